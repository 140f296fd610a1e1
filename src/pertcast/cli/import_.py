"""``pertcast import``."""

from __future__ import annotations

from pathlib import Path

from cyclopts import App

__all__ = ["command", "import_run"]


command = App(name="import")


@command.default
def import_run(
    folder: Path,
    /,
    *,
    out: Path,
    checkpoint: Path | None = None,
    genes: Path | None = None,
    hvgs: Path | None = None,
    target_sum: float | None = None,
) -> None:
    """Make a run of a folder that `state tx train` wrote; no code in its files runs.

    `pertcast generate RUN --store STORE` then predicts with it, from the control cells of a store that `pertcast
    prepare` made of your cells. What of its options is not covered is an error that names the option.

    Example: `pertcast import state_run --out run`

    Parameters
    ----------
    folder
        The folder: config.yaml, var_dims.pkl, pert_onehot_map.pt, checkpoints/ and the rest.
    out
        The folder of the run.
    checkpoint
        Which checkpoint; default: checkpoints/final.ckpt in the folder.
    genes
        Names of all genes, one a line, in the order of training; asked for where the folder does not name them.
    hvgs
        The same of the highly variable genes.
    target_sum
        The total that its training cells were normalised to before log1p, such as 10000. `pertcast generate` then
        normalises the control cells to it.
    """
    from pertcast.cli.console import Console
    from pertcast.train.arc import import_run as convert

    print(
        convert(folder, out, checkpoint=checkpoint, genes=genes, hvgs=hvgs, target_sum=target_sum, progress=Console())
    )
