"""Choose the precision of a training if the device decides, and keep it for the run.

In bf16 the network's products are of bfloat16 with float32 sums. Weights, gradients, optimiser, residual stream,
normalisation and losses stay float32.
"""

from __future__ import annotations

from pathlib import Path

import torch
from lightning_fabric import Fabric

from pertcast.config import Experiment
from pertcast.errors import ConfigError
from pertcast.files.artefacts import read_json
from pertcast.train.checkpoints import IDENTITY


def resolve_precision(experiment: Experiment, out: Path) -> tuple[Experiment, tuple[str, ...]]:
    """Replace "auto" by a precision, and return a sentence on the choice."""
    if experiment.train.precision != "auto":
        return experiment, ()
    begun = _begun(out)
    precision = begun or native_precision(experiment.train.accelerator)
    why = "as the run was begun" if begun else "bf16 where the device multiplies it natively, else fp32"
    train = experiment.train.model_copy(update={"precision": precision})
    return experiment.model_copy(update={"train": train}), (f'train.precision = "auto": {precision} ({why})',)


def native_precision(accelerator: str) -> str:
    """Return "bf16" if the chosen device multiplies bfloat16 natively, else "fp32"."""
    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    if accelerator == "cpu" or (accelerator == "auto" and not torch.backends.mps.is_available()):
        return "bf16" if _cpu_multiplies_bf16() else "fp32"
    return "fp32"


def require_one_precision(fabric: Fabric, precision: str) -> None:
    """Require that all processes compute in the same precision."""
    first = fabric.broadcast(precision)
    if first != precision:
        raise ConfigError(
            f'[train] precision = "auto": the first process computes in {first}, the device of process '
            f'{fabric.global_rank} would in {precision}; set train.precision = "{first}" or "fp32"'
        )


def _begun(out: Path) -> str | None:
    """Return the precision that a folder's run started with, if any."""
    if not (out / IDENTITY).is_file():
        return None
    train = read_json(out / IDENTITY).get("train")
    precision = train.get("precision") if isinstance(train, dict) else None
    return precision if isinstance(precision, str) else None


def _cpu_multiplies_bf16() -> bool:
    """Return whether oneDNN and the processor support bfloat16 products (AVX-512 BF16 or AMX)."""
    return (
        bool(torch.backends.mkldnn.enabled)
        and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
        and bool(torch.cpu._is_avx512_bf16_supported())
    )
