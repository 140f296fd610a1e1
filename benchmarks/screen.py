"""A simulated screen with the structure of real ones: what cells are drawn around, and the cells.

A cell i of target p in context c and batch b has counts y, negative binomial around ::

    mean y_ig = size_i * share_cg * exp(batch_bg + effect_pcg) / (sum over g)     sizes and shares are log-normal
    effect_pc = clip(strength_p * (sqrt(shared) * m + sqrt(1 - shared) * u_pc))   own gene: log(own_gene_left)
    u_pc      = (sqrt(1 - context_share) * a_p + sqrt(context_share) * a_pc) @ L  low rank: `rank` programs
    a_p       = sqrt(linked) * z_p @ B + sqrt(1 - linked) * noise_p               what features tell, and what not
    L_kg      = the tenth of genes with the largest |z_g @ C_k + noise|           a program's genes share features
    strength  = log-normal over targets, `tail` its sigma                         few strong targets, many weak ones

with z the leading `num_features` features (GO or ESM2; of genes without one: draws), B and C random maps, m one more
program that all targets share (what the mean-effect baseline can know), and a_pc as a_p with a map of its own for each
context. m and u have a mean square of 1 over genes, so `strength` is the root mean square of a median target's log
fold changes. Every draw is keyed by the seed and its purpose: with the same genes, a target's effect does not depend
on the other targets.

benchmarks/write_screen.py puts one on disk, with an experiment that holds targets out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import anndata as ad
import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import sparse, stats

from pertcast.seasons import CONTROL_LABEL, PERT_COLUMN
from pertcast.stats.draws import generator

__all__ = ["BATCH_COLUMN", "CONTEXT_COLUMN", "Screen", "ScreenConfig", "draw_cells", "draw_screen", "made_up_features"]

CONTEXT_COLUMN, BATCH_COLUMN = "cell_type", "batch"
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class ScreenConfig:
    """What a screen is like; the defaults are those of a screen with clear effects.

    Attributes
    ----------
    contexts
        Names of the cell types; each has all targets.
    num_targets, num_genes
        Targets are among the genes.
    cells_per_target, num_controls, num_batches
        Of each context; every label has cells of each batch.
    umi
        Median UMIs of a cell over the simulated genes.
    num_features, rank
        Leading features that matter, and programs.
    strength, tail
        Median root mean square of a target's log fold changes, and the sigma of its logarithm over targets.
    linked, shared, context_share
        Shares of the variance: of activities that features explain, of effects that all targets have in common, and of
        the rest that is a context's own.
    context_spread, batch_spread, size_spread, gene_spread
        Sigmas of log-normal factors: a context's genes, a batch's genes, cells, genes.
    own_gene_left, limit
        What is left of the target's own gene, and the largest other |log fold change|.
    dispersion
        Of the negative binomial: variance = mean + dispersion * mean ** 2.
    noise
        ``nb``; ``poisson`` (no dispersion); or ``none``: log1p of the expected values, without sizes and batches.
    seed
        Key of every draw.
    """

    contexts: tuple[str, ...] = ("sim",)
    num_targets: int = 120
    num_genes: int = 2000
    cells_per_target: int = 100
    num_controls: int = 1000
    num_batches: int = 4
    umi: float = 6000.0
    num_features: int = 16
    rank: int = 8
    strength: float = 0.1
    tail: float = 0.9
    linked: float = 0.8
    shared: float = 0.2
    context_share: float = 0.3
    context_spread: float = 0.5
    batch_spread: float = 0.1
    size_spread: float = 0.3
    gene_spread: float = 2.0
    own_gene_left: float = 0.15
    limit: float = 2.5
    dispersion: float = 0.12
    noise: Literal["nb", "poisson", "none"] = "nb"
    seed: int = 0


@dataclass(frozen=True)
class Screen:
    """What cells are drawn around.

    Attributes
    ----------
    genes, targets
        Names.
    share_CG
        (contexts, G) share of each gene in the UMIs of a control cell.
    batch_CBG
        (contexts, batches, G) log factors.
    effects_CPG
        (contexts, targets, G) log fold changes: the truth.
    features
        Name → vector of the targets: what a model may know.
    """

    genes: tuple[str, ...]
    targets: tuple[str, ...]
    share_CG: Floats
    batch_CBG: Floats
    effects_CPG: Floats
    features: dict[str, NDArray[np.float32]]


def made_up_features(names: Sequence[str], *, width: int = 16, seed: int = 0) -> dict[str, NDArray[np.float32]]:
    """Return normal draws as features, for where no real ones are at hand."""
    return {name: generator(seed, "screen", "feature", name).normal(size=width).astype("f4") for name in names}


def draw_screen(genes: Sequence[str], features: Mapping[str, NDArray[np.floating]], config: ScreenConfig) -> Screen:
    """Draw what is common to all cells.

    Parameters
    ----------
    genes
        At least as many names as wanted; which of them are in the screen is drawn.
    features
        Name → vector; targets are drawn among the genes that have one.
    config
        What the screen is like.
    """
    seed = config.seed
    order = generator(seed, "screen", "genes").permutation(len(genes))
    targets = [genes[place] for place in order if genes[place] in features][: config.num_targets]
    others = [genes[place] for place in order if genes[place] not in set(targets)]
    chosen = set(targets) | set(others[: config.num_genes - len(targets)])
    kept = tuple(gene for gene in genes if gene in chosen)
    if len(targets) < config.num_targets or len(kept) < config.num_genes:
        raise ValueError(f"{len(targets)} targets with a feature and {len(kept)} genes: too few")
    scaled = _scaled(features)
    z_GF = np.stack([_leading(scaled, gene, config) for gene in kept])
    z_PF = np.stack([_leading(scaled, target, config) for target in targets])
    programs_KG = np.stack([_program(z_GF, program, config) for program in range(config.rank)])
    common_G = _unit(_program(z_GF, config.rank, config))
    effects_CPG = np.stack(
        [
            [
                _effect(target, z_F, context, programs_KG, common_G, config)
                for target, z_F in zip(targets, z_PF, strict=True)
            ]
            for context in config.contexts
        ]
    )
    position = {gene: place for place, gene in enumerate(kept)}
    for row, target in enumerate(targets):
        effects_CPG[:, row, position[target]] = np.log(config.own_gene_left)
    return Screen(
        genes=kept,
        targets=tuple(targets),
        share_CG=np.stack([_shares(kept, context, config) for context in config.contexts]),
        batch_CBG=config.batch_spread
        * np.stack(
            [
                [
                    generator(seed, "screen", "batch", context, batch).normal(size=len(kept))
                    for batch in range(config.num_batches)
                ]
                for context in config.contexts
            ]
        ),
        effects_CPG=effects_CPG,
        features={target: scaled[target] for target in targets},
    )


def _scaled(features: Mapping[str, NDArray[np.floating]]) -> dict[str, NDArray[np.float32]]:
    """Return features centred and with a mean square of 1 over all of them, so that a network can read them."""
    matrix = np.stack([np.asarray(vector, dtype=np.float64) for vector in features.values()])
    matrix -= matrix.mean(axis=0)
    matrix /= np.sqrt(np.square(matrix).mean())
    return dict(zip(features, matrix.astype(np.float32), strict=True))


def _leading(scaled: Mapping[str, NDArray[np.float32]], name: str, config: ScreenConfig) -> Floats:
    """Return a gene's leading features with a root mean square of 1, or draws where it has none."""
    if name not in scaled:
        return generator(config.seed, "screen", "no feature", name).normal(size=config.num_features)
    return _unit(scaled[name][: config.num_features].astype(np.float64))


def _unit(values: Floats) -> Floats:
    return np.asarray(values / max(np.sqrt(np.square(values).mean()), 1e-12))


def _program(z_GF: Floats, program: int, config: ScreenConfig) -> Floats:
    """Return the loadings of a program: of a tenth of the genes, more alike in their features than others."""
    random = generator(config.seed, "screen", "program", program)
    scores_G = z_GF @ random.normal(size=z_GF.shape[1]) / np.sqrt(z_GF.shape[1]) + random.normal(size=len(z_GF))
    threshold = np.quantile(np.abs(scores_G), 0.9)
    return np.asarray(np.sign(scores_G) * np.maximum(np.abs(scores_G) - threshold, 0) * random.choice([-1, 1]))


def _activities(target: str, z_F: Floats, where: str, config: ScreenConfig) -> Floats:
    """Return (K,) activities of the programs; `where` names the map: all contexts', or one context's own."""
    random = generator(config.seed, "screen", "map", where)
    map_FK = random.normal(size=(len(z_F), config.rank)) / np.sqrt(len(z_F))
    noise_K = generator(config.seed, "screen", "activity", where, target).normal(size=config.rank)
    return np.asarray(np.sqrt(config.linked) * (z_F @ map_FK) + np.sqrt(1 - config.linked) * noise_K)


def _effect(
    target: str, z_F: Floats, context: str, programs_KG: Floats, common_G: Floats, config: ScreenConfig
) -> Floats:
    own_G = np.sqrt(1 - config.context_share) * _activities(target, z_F, "all", config) @ programs_KG
    own_G = own_G + np.sqrt(config.context_share) * _activities(target, z_F, context, config) @ programs_KG
    size = config.strength * np.exp(config.tail * generator(config.seed, "screen", "strength", target).normal())
    mixed_G = np.sqrt(config.shared) * common_G + np.sqrt(1 - config.shared) * _unit(own_G)
    return np.asarray(np.clip(size * mixed_G, -config.limit, config.limit))


def _shares(genes: Sequence[str], context: str, config: ScreenConfig) -> Floats:
    """Return shares whose quantiles are log-normal exactly, so that the depth of a screen does not hang on a draw."""
    quantiles = stats.norm.ppf((np.arange(len(genes)) + 0.5) / len(genes))
    logs = config.gene_spread * generator(config.seed, "screen", "gene means").permutation(quantiles)
    logs += config.context_spread * generator(config.seed, "screen", "context", context).normal(size=len(genes))
    shares = np.exp(logs)
    return np.asarray(shares / shares.sum())


def draw_cells(screen: Screen, config: ScreenConfig) -> ad.AnnData:
    """Draw all cells: float32 CSR with obs `target_gene`, `cell_type`, `batch`, in the order context, label, cell."""
    blocks, rows = [], []
    labels = [*screen.targets, CONTROL_LABEL]
    for place, context in enumerate(config.contexts):
        for row, label in enumerate(labels):
            number = config.num_controls if label == CONTROL_LABEL else config.cells_per_target
            batches = np.arange(number) % config.num_batches
            effect_G = screen.effects_CPG[place, row] if row < len(screen.targets) else np.zeros(len(screen.genes))
            random = generator(config.seed, "screen", "cells", context, label)
            blocks.append(
                _block(screen.share_CG[place] * np.exp(effect_G), screen.batch_CBG[place][batches], config, random)
            )
            rows += [(label, context, f"{context}_batch_{batch}") for batch in batches]
    obs = pd.DataFrame(rows, columns=[PERT_COLUMN, CONTEXT_COLUMN, BATCH_COLUMN]).astype("category")
    obs.index = pd.Index([f"cell_{number}" for number in range(len(obs))])
    return ad.AnnData(sparse.vstack(blocks, format="csr"), obs=obs, var=pd.DataFrame(index=list(screen.genes)))


def _block(share_G: Floats, batch_SG: Floats, config: ScreenConfig, random: np.random.Generator) -> sparse.csr_matrix:
    if config.noise == "none":
        expected_G = np.log1p(share_G / share_G.sum() * config.umi).astype(np.float32)
        return sparse.csr_matrix(np.tile(expected_G, (len(batch_SG), 1)))
    mean_SG = share_G * np.exp(batch_SG)
    mean_SG *= (
        config.umi * np.exp(config.size_spread * random.normal(size=(len(batch_SG), 1))) / mean_SG.sum(1, keepdims=True)
    )
    if config.noise == "nb":
        mean_SG *= random.standard_gamma(1 / config.dispersion, size=mean_SG.shape) * config.dispersion
    return sparse.csr_matrix(random.poisson(mean_SG).astype(np.float32))
