"""The factor of one gene: what is expected at it, and the search among draws, against slow and obvious twins."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats

from pertcast.generate.cells.gene_counts import ALWAYS_ZERO, Gene, Law, drawn
from pertcast.generate.cells.mean_solver import (
    SMALL_COUNTS,
    Tally,
    expected_sum,
    find_factor,
    new_search,
    solve,
    typical_cell,
)

NUM_CELLS = 240
TARGET_SUM = 2000.0
Float = NDArray[np.float64]


def draw_gene(mean: float, law: Law, *, seed: int, spread: float = 0.3) -> Gene:
    random = np.random.default_rng(seed)
    sizes = TARGET_SUM * np.exp(spread * random.normal(size=NUM_CELLS))
    rate = mean * sizes / sizes.mean()
    count = random.poisson(rate * random.gamma(law.shape, 1 / law.shape, size=NUM_CELLS)).astype(np.int64)
    u = random.random(NUM_CELLS)
    u[random.random(NUM_CELLS) < law.inflation] = ALWAYS_ZERO
    return Gene(np.flatnonzero(count).astype(np.int32), count, u, rate, TARGET_SUM / sizes)


def counts_at(law: Law, gene: Gene, factor: float) -> NDArray[np.int64]:
    cells = zip(gene.u.tolist(), gene.count.tolist(), gene.mean.tolist(), strict=True)
    return np.array([drawn(law, factor, *cell) for cell in cells])


def sum_at(law: Law, gene: Gene, factor: float) -> tuple[float, float]:
    values = np.log1p(counts_at(law, gene, factor) * gene.norm)
    return float(values.sum()), float(values.std() * np.sqrt(NUM_CELLS))


def tally_of(law: Law, gene: Gene) -> Tally:
    """Count a gene of one batch."""
    small = gene.count[gene.count < SMALL_COUNTS] if law.real else np.zeros(NUM_CELLS, dtype=np.int64)
    cells = np.bincount(small, minlength=SMALL_COUNTS)[None].astype(np.int64)
    mean = float(gene.mean.mean())
    return Tally(cells, np.array([mean]), gene.count[gene.count >= SMALL_COUNTS], mean)


def slow_expected(law: Law, count: int, mean: float, factor: float, norm: float) -> float:
    """Return the mean of log1p(normalised) of one cell by its whole distribution."""
    numbers = np.arange(20_000)
    values = np.log1p(norm * numbers)
    if not law.real:
        mean *= factor / (1 - law.inflation)
        mass = stats.nbinom.pmf(numbers, law.shape, law.shape / (law.shape + mean)) * (1 - law.inflation)
    elif factor <= 1:
        mass = stats.binom.pmf(numbers, count, factor)
    else:
        shape = law.shape + count
        more = (factor - 1) * shape * mean / (law.shape + mean)
        mass = stats.nbinom.pmf(numbers - count, shape, shape / (shape + more))
    return float(mass @ values)


@pytest.mark.parametrize("law", [Law(6.0, 0.0, real=True), Law(3.0, 0.0, real=False), Law(3.0, 0.2, real=False)])
@pytest.mark.parametrize("mean", [0.05, 1.0, 12.0, 90.0])
@pytest.mark.parametrize("factor", [0.04, 0.5, 1.0, 1.3, 9.0])
def test_what_is_expected_is_the_mean_over_the_distribution(law: Law, mean: float, factor: float) -> None:
    gene = draw_gene(mean, law, seed=0, spread=0.0)
    typical = typical_cell(np.full(NUM_CELLS, TARGET_SUM), TARGET_SUM, real=law.real)
    assert (typical.norm, typical.size) == pytest.approx((1.0, TARGET_SUM))
    found = expected_sum(law, tally_of(law, gene), typical, factor)
    slow = sum(slow_expected(law, int(count), mean, factor, 1.0) for count in gene.count)
    assert found == pytest.approx(slow, rel=0.005, abs=0.01)


@pytest.mark.parametrize("real", [True, False])
@pytest.mark.parametrize("mean", [0.03, 0.4, 4.0, 40.0])
@pytest.mark.parametrize("share", [0.3, 0.8, 1.2, 3.0])
def test_the_factor_that_is_found_is_where_the_search_ends(real: bool, mean: float, share: float) -> None:
    law, factors, expected = Law(6.0, 0.0, real), [], []
    for seed in range(12):
        gene = draw_gene(mean, law, seed=seed)
        sizes = TARGET_SUM / gene.norm
        typical = typical_cell(sizes, TARGET_SUM, real=real)
        unit, now = float(np.log1p(gene.norm).mean()), float(np.log1p(gene.count * gene.norm).sum())
        wanted = share * NUM_CELLS * float(np.log1p(mean * np.ones(1)).mean()) * (1 if mean > 1 else np.log(2))
        tally = tally_of(law, gene)._replace(rate=np.array([mean * typical.size / sizes.mean()]))
        guess, slope = find_factor(law, tally, typical, now, wanted, unit)
        found, is_drawn = solve(law, gene, new_search(NUM_CELLS), now, wanted, unit, (guess, slope), 0.02)
        assert is_drawn or abs(sum_at(law, gene, found)[0] - wanted) < 2 * unit + 0.1 * wanted
        factors.append(found)
        expected.append(guess)
    # of one gene the draws differ from what is expected; of many they do not
    off = np.log(np.array(factors) / np.array(expected))
    assert abs(off.mean()) < 3 * off.std() / np.sqrt(12) + 0.03


@settings(max_examples=150, deadline=None)
@given(
    real=st.booleans(),
    inflation=st.sampled_from([0.0, 0.3]),
    mean=st.floats(0.01, 80.0),
    shape=st.floats(0.3, 50.0),
    times=st.floats(0.02, 30.0),
    guess=st.floats(0.02, 50.0),
    slope=st.floats(0.0, 300.0),
    seed=st.integers(0, 1000),
)
def test_the_search_meets_the_sum_and_keeps_the_counts_that_are_drawn_at_its_factor(
    *, real: bool, inflation: float, mean: float, shape: float, times: float, guess: float, slope: float, seed: int
) -> None:
    law = Law(shape, 0.0 if real else inflation, real)
    gene = draw_gene(mean, law, seed=seed)
    unit, now = float(np.log1p(gene.norm).mean()), float(np.log1p(gene.count * gene.norm).sum())
    wanted = sum_at(law, gene, times)[0]
    search = new_search(NUM_CELLS)
    factor, is_drawn = solve(law, gene, search, now, wanted, unit, (guess, slope), 0.05)
    found, error = sum_at(law, gene, factor)
    # no sum may lie within half a count of one cell where a cell has many
    assert abs(found - wanted) <= max(0.5 * unit, 0.05 * error) * (1 + 1e-9) + (0 if is_drawn else 1.5 * unit)
    if is_drawn:
        cells = gene.rows if real and factor <= 1 else np.arange(NUM_CELLS)
        assert (search.now[cells] == counts_at(law, gene, factor)[cells]).all()


def test_nothing_is_searched_for_where_donors_meet_the_sum_or_nothing_is_wanted() -> None:
    law = Law(6.0, 0.0, real=True)
    gene = draw_gene(1.0, law, seed=3)
    now = float(np.log1p(gene.count * gene.norm).sum())
    for wanted, factor in ((now, 1.0), (now + 0.3, 1.0), (0.0, 0.0)):
        assert solve(law, gene, new_search(NUM_CELLS), now, wanted, 0.7, (3.0, 1.0), 0.05) == (factor, False)


def test_a_sum_beyond_reach_ends_with_the_nearest() -> None:
    law = Law(6.0, 0.0, real=True)
    gene = draw_gene(0.02, law, seed=4)
    factor, _ = solve(law, gene, new_search(NUM_CELLS), 1.0, 1e5, 0.7, (2.0, 1.0), 0.05)
    assert factor == pytest.approx(1e9)
