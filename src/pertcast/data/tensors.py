"""Arrays as tensors: in equally aligned memory always, copied only where they do not lie so already."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pertcast.data.store import ALIGNMENT_BYTES

__all__ = ["as_tensor"]


def as_tensor(values: NDArray[np.generic]) -> Tensor:
    """Return the values as a tensor of the same shape; it may share their memory.

    Products of matrices may round by the alignment of their operands, so that it must not be left to chance.

    Examples
    --------
    >>> as_tensor(np.arange(3)).tolist()
    [0, 1, 2]
    """
    tensor = torch.from_numpy(values)
    return tensor if tensor.is_contiguous() and tensor.data_ptr() % ALIGNMENT_BYTES == 0 else tensor.clone()
