"""Reads random cell sets with cell-load, as arc-state trains on them; for the interpreter that has cell-load.

python benchmarks/cell_load_child.py split.toml WORKERS BATCHES [warm]
"""

import json
import os
import sys
import time
from pathlib import Path


def forget(paths: list[Path]) -> None:
    """Drop the files from the page cache."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def main() -> None:
    """Set up, read batches of eight sets of 128 (from the disk, unless warm), print the cells and the seconds."""
    import tomllib

    from cell_load.data_modules import PerturbationDataModule  # type: ignore[import-not-found]

    split, workers, batches = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    module = PerturbationDataModule(
        toml_config_path=str(split),
        batch_size=8,
        num_workers=workers,
        embed_key=None,
        output_space="all",
        basal_mapping_strategy="random",
        n_basal_samples=1,
        cell_sentence_len=128,
        should_yield_control_cells=True,
        pert_col="target_gene",
        batch_col="batch",
        cell_type_key="cell_type",
        control_pert="non-targeting",
        pin_memory=False,
    )
    module.setup()
    loader = module.train_dataloader()
    folders = tomllib.loads(split.read_text())["datasets"].values()
    paths = [path for folder in folders for path in Path(folder).glob("*.h5ad")]
    stream = iter(loader)
    if not workers:
        # memory is there from then on; workers read ahead, and would be let in before the clock starts
        for _ in range(2):
            next(stream)
    if sys.argv[4:] != ["warm"]:
        forget(paths)
    start, cells = time.perf_counter(), 0
    for _ in range(batches):
        batch = next(stream)
        both = (batch["pert_cell_emb"], batch["ctrl_cell_emb"])
        if any(part.is_sparse or str(part.dtype) != "torch.float32" for part in both):
            raise TypeError("expected dense float32")
        cells += sum(part.numel() // part.shape[-1] for part in both)
    print(json.dumps({"cells": cells, "seconds": time.perf_counter() - start}))


if __name__ == "__main__":
    main()
