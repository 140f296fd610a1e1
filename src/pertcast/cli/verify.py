"""``pertcast verify``."""

from __future__ import annotations

from pathlib import Path

from cyclopts import App

__all__ = ["command", "verify"]


command = App(name="verify")


@command.default
def verify(artefact: Path, /) -> None:
    """Tell whether an artefact (store, run, parts, prediction, archive) is whole and what its manifest says.

    Example: `pertcast verify run`

    Parameters
    ----------
    artefact
        A folder or file that pertcast wrote.
    """
    from pertcast.errors import CheckpointError
    from pertcast.files.artefacts import read_manifest, verify_artefact

    problems = verify_artefact(artefact)
    if problems:
        raise CheckpointError(f"{artefact}: not what its manifest says", problems=problems)
    manifest = read_manifest(artefact)
    print(f"{artefact}: a {manifest.kind}, whole ({len(manifest.files)} file(s))")
