"""Effects beside their slow twins."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from pertcast.stats.metrics import compare_effects, knockdown

VECTORS = arrays(np.float64, 6, elements=st.floats(-10, 10, allow_subnormal=False).map(lambda value: round(value, 3)))


@given(VECTORS, VECTORS)
def test_comparison_equals_its_slow_twin(predicted: np.ndarray, measured: np.ndarray) -> None:
    agreement = compare_effects(predicted, measured)
    assert agreement.predicted_size == pytest.approx(sum(value**2 for value in predicted) ** 0.5)
    if predicted.std() > 1e-3 and measured.std() > 1e-3:
        assert agreement.correlation == pytest.approx(np.corrcoef(predicted, measured)[0, 1], abs=1e-6)


def test_a_constant_effect_has_no_correlation() -> None:
    assert np.isnan(compare_effects(np.ones(4), np.arange(4.0)).correlation)


def test_knockdown_is_the_ratio_on_the_linear_scale() -> None:
    assert knockdown(np.log1p(3.0), np.log1p(12.0)) == pytest.approx(0.25)
    assert np.isnan(knockdown(1.0, 0.0))
