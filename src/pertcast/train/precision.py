"""Which precision a training computes in, where it is left to the device, and that a run keeps it.

In bf16 the network's products are of bfloat16 with float32 sums; weights, their gradients and the optimiser, the
residual stream, normalisation and losses stay float32.
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
    """Return the experiment with a precision of its own in place of "auto", and a sentence on where it is from."""
    if experiment.train.precision != "auto":
        return experiment, ()
    begun = _begun(out)
    precision = begun or native_precision(experiment.train.accelerator)
    why = "as the run was begun" if begun else "bf16 where the device multiplies it natively, else fp32"
    train = experiment.train.model_copy(update={"precision": precision})
    return experiment.model_copy(update={"train": train}), (f'train.precision = "auto": {precision} ({why})',)


def native_precision(accelerator: str) -> str:
    """Return "bf16" where the device that Fabric would take multiplies bfloat16 natively, else "fp32"."""
    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    if accelerator == "cpu" or (accelerator == "auto" and not torch.backends.mps.is_available()):
        return "bf16" if _cpu_multiplies_bf16() else "fp32"
    return "fp32"


def require_one_precision(fabric: Fabric, precision: str) -> None:
    """Require that all processes compute in the first one's precision."""
    first = fabric.broadcast(precision)
    if first != precision:
        raise ConfigError(
            f'[train] precision = "auto": the first process computes in {first}, the device of process '
            f'{fabric.global_rank} would in {precision}; set train.precision = "{first}" or "fp32"'
        )


def _begun(out: Path) -> str | None:
    """Return the precision that a folder's run was begun with, if there is one that says so."""
    if not (out / IDENTITY).is_file():
        return None
    train = read_json(out / IDENTITY).get("train")
    precision = train.get("precision") if isinstance(train, dict) else None
    return precision if isinstance(precision, str) else None


def _cpu_multiplies_bf16() -> bool:
    """Return whether oneDNN is at hand, and the processor has products of bfloat16 (AVX-512 BF16; all with AMX do)."""
    return (
        bool(torch.backends.mkldnn.enabled)
        and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
        and bool(torch.cpu._is_avx512_bf16_supported())
    )
