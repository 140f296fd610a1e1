"""Reads random cell sets from a store, as training does: the twin of cell_load_child.py.

python -m benchmarks.loader_child experiment.toml STORE BATCHES
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.cell_load_child import forget

SETS = 8


def main() -> None:
    """Set up, forget the files, read batches of eight sets of 128, print the cells and the seconds."""
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # as the command line does
    import torch

    from pertcast.config import load_experiment
    from pertcast.data.features import load_features
    from pertcast.data.store import Store
    from pertcast.train.batches import Codes, SetReader, SetStream, StreamState

    experiment_path, folder, batches = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    experiment = load_experiment(experiment_path, ["model.input=genes", "model.output=genes"])
    store = Store.open(folder)
    reader = SetReader(store, experiment, load_features(experiment.features, store, targets=()))
    stream = SetStream(reader.training, StreamState(0, 0))

    def pieces() -> Iterator[tuple[Codes, StreamState]]:
        for _ in range(batches):
            yield stream.take(SETS)

    # memory is there from then on
    for _ in range(2):
        codes, _ = stream.take(SETS)
        reader.batch(codes.device, reader.fetch(codes))
    forget(list(folder.glob("*.npy")))
    start, cells = time.perf_counter(), 0
    for codes, found, _ in reader.batches(pieces()):
        batch = reader.batch(codes.device, found)
        for part in (batch.control_BSI, batch.real_BSO):
            if part.is_sparse or part.dtype != torch.float32:
                raise TypeError("expected dense float32")
            cells += part.numel() // part.shape[-1]
    print(json.dumps({"cells": cells, "seconds": time.perf_counter() - start}))


if __name__ == "__main__":
    main()
