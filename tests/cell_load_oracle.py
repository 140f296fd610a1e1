"""Runs within a Python that has cell-load: prints which cells of which file it puts into which split, as JSON.

``python cell_load_oracle.py EXPERIMENT.toml...`` prints one object: path → split → sorted ``file/cell`` names.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import anndata as ad


def splits_of(path: Path) -> dict[str, list[str]]:
    """Return the cells of each split; those of a pattern are found from the file's own folder."""
    from cell_load.data_modules import PerturbationDataModule  # type: ignore[import-not-found]

    os.chdir(path.parent)
    module = PerturbationDataModule(
        toml_config_path=str(path),
        batch_size=2,
        num_workers=0,
        embed_key=None,
        output_space="all",
        basal_mapping_strategy="random",
        cell_sentence_len=4,
        should_yield_control_cells=True,
        pert_col="target_gene",
        batch_col="batch",
        cell_type_key="cell_type",
        control_pert="non-targeting",
    )
    module.setup()
    found = {}
    for split in ("train", "val", "test"):
        cells = set()
        for subset in getattr(module, f"{split}_datasets"):
            file = Path(subset.dataset.h5_path)
            names = ad.read_h5ad(file, backed="r").obs_names
            cells |= {f"{file.name}/{names[int(row)]}" for row in subset.indices}
        found[split] = sorted(cells)
    return found


if __name__ == "__main__":
    sys.stdout.write(json.dumps({name: splits_of(Path(name)) for name in sys.argv[1:]}))
