"""Which genes an imported network reads and gives: by the folder's own names, or by lists that the user gives."""

from __future__ import annotations

from collections.abc import Sequence

from pertcast.errors import CheckpointError, Problem
from pertcast.models.arc.convert import ArcNames, ArcNetwork
from pertcast.models.arc.folder import ArcFolder
from pertcast.models.arc.options import GENE_KEYS

__all__ = ["network_names"]


def network_names(
    folder: ArcFolder, network: ArcNetwork, *, genes: Sequence[str] = (), hvgs: Sequence[str] = ()
) -> ArcNames:
    """Return the names of a network's inputs and outputs.

    Parameters
    ----------
    folder, network
        The folder, and its network.
    genes, hvgs
        All genes, and the highly variable ones, as the user lists them; empty where not given.

    Raises
    ------
    CheckpointError
        If the folder does not name the genes and no list of the right length does.
    """
    embed_key, arc_space = folder.options.get("embed_key"), folder.options.get("output_space", "gene")
    spec, problems = network.spec, []
    own = folder.gene_names
    # var_dims.pkl names the genes of the output space: the highly variable ones, or all
    named_hvgs, named_genes = (own, ()) if arc_space == "gene" else ((), own)

    def choose(what: str, option: str, num: int, *lists: Sequence[str]) -> tuple[str, ...]:
        for names in lists:
            if len(names) == num and len(set(names)) == num:
                return tuple(names)
        found = ", ".join(f"{len(names):,}" for names in lists if names) or "no list"
        message = f"expected {num:,} different names of the genes {what}, got {found}"
        problems.append(Problem(str(folder.path), message, f"list them, one a line in their order, with {option} FILE"))
        return ()

    outputs: tuple[str, ...] = ()
    inputs: tuple[str, ...] = ()
    if spec.output_space == "gene":
        if embed_key is None:
            outputs = choose("that it reads and gives", "--genes", spec.output_dim, genes, named_genes, named_hvgs)
        else:
            outputs = choose("that it reads and gives", "--hvgs", spec.output_dim, hvgs, named_hvgs, named_genes)
        inputs = outputs
    elif spec.output_space == "latent":
        wide = arc_space == "all"
        lists = (genes, named_genes) if wide else (hvgs, named_hvgs)
        outputs = choose("that it gives", "--genes" if wide else "--hvgs", spec.num_genes, *lists)
        if embed_key in GENE_KEYS:
            inputs = choose("that it reads", "--hvgs", spec.input_dim, hvgs, named_hvgs)
    lost = sorted(set(inputs) - set(outputs))
    if lost and not problems:
        problems.append(Problem(str(folder.path), f"genes that it reads are not among those it gives: {lost[:5]}"))
    if problems:
        raise CheckpointError(problems=problems)
    return ArcNames(inputs, outputs, None if embed_key in GENE_KEYS else str(embed_key))
