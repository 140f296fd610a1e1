"""Write a run as a folder that ``state tx infer`` reads."""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml  # type: ignore[import-untyped]
from torch import Tensor

from pertcast.arc.convert import TRANSPOSED
from pertcast.errors import CheckpointError, Problem
from pertcast.files.artefacts import atomic_dir
from pertcast.models.heads import COUNTS_HEAD_PREFIX, DE_HEAD_PREFIX
from pertcast.models.run_folder import WEIGHTS, Run, load_tensors
from pertcast.models.spec import StateSpec

_OBSM = "obsm:"
# which genes, in which order, the cells must hold in obsm["X_hvg"]
HVG_LIST = "X_hvg_genes.csv"
_BATCHES = "batch_encoder.weight"


def write_arc_folder(run: Run, vectors: Mapping[str, Tensor], out: Path) -> tuple[str, ...]:
    """Write a run's network, names and perturbation vectors as ``state tx train`` would; return what is left out."""
    _require_known(run)
    tensors, notes = _needed(run, load_tensors(run.path / WEIGHTS))
    options = _options(run)
    weights = _weights(run, tensors)
    outputs = [run.genes[place] for place in run.output_genes]
    dims = {
        name: options[name]
        for name in ("input_dim", "output_dim", "pert_dim", "gene_dim", "hvg_dim", "batch_dim", "gene_names")
    }
    kwargs = {name: value for name, value in options.items() if name not in dims}
    data = {
        "embed_key": options["embed_key"],
        "output_space": options["output_space"],
        "control_pert": run.control,
        "batch_col": "batch",
        "pert_col": "target_gene",
        "cell_type_key": "cell_type",
        "pert_rep": "onehot",
        "basal_rep": "sample",
    }
    config = {
        "data": {"name": "PerturbationDataModule", "kwargs": data},
        "model": {"name": "state", "kwargs": kwargs},
        "training": {},
        "name": out.name,
        "output_dir": str(out.parent.absolute()),
    }
    saved = {
        "state_dict": weights,
        "hyper_parameters": {**options, "gene_names": outputs},
        "global_step": run.step,
        "epoch": 0,
        "pytorch-lightning_version": "2.5.0",
        "loops": {},
        "callbacks": {},
        "optimizer_states": [],
        "lr_schedulers": [],
    }
    with atomic_dir(out) as folder:
        (folder / "checkpoints").mkdir()
        (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
        (folder / "var_dims.pkl").write_bytes(pickle.dumps({**dims, "pert_names": list(vectors)}, protocol=4))
        torch.save(dict(vectors), folder / "pert_onehot_map.pt")
        torch.save(_one_hot(run.batches or ("batch",)), folder / "batch_onehot_map.torch")
        torch.save(_one_hot(run.contexts or ("context",)), folder / "cell_type_onehot_map.torch")
        torch.save(saved, folder / "checkpoints" / "final.ckpt")
        if options["embed_key"] == "X_hvg":
            genes = "".join(f"{run.genes[place]}\n" for place in run.hvg)
            (folder / HVG_LIST).write_text(genes, encoding="utf-8")
    return (*notes, *_how_to_infer(run, out, options["embed_key"]))


def _how_to_infer(run: Run, out: Path, embed_key: str | None) -> list[str]:
    total = "an unknown total" if run.target_sum is None else f"a total of {run.target_sum:,.6g}"
    notes = [f"the network reads log1p of cells that were normalised to {total}; bring your cells to the same"]
    if embed_key == "X_hvg":
        notes.append(f'obsm["X_hvg"] of your cells must hold the {len(run.hvg):,} genes of {out / HVG_LIST}, in order')
    reads = f"--embed-key {embed_key} " if embed_key else ""
    notes.append(
        f"predict with: state tx infer --model-dir {out} --adata CELLS.h5ad {reads}--pert-col target_gene "
        "--celltype-col cell_type --batch-col batch --output PREDICTED.h5ad"
    )
    return notes


_LEFT_OUT = {
    DE_HEAD_PREFIX: "the DE head is left out: it serves training alone, and predictions are the same without it",
    COUNTS_HEAD_PREFIX: "the counts head is left out: arc-state has none; predictions in log1p are the same without it",
}


def _needed(run: Run, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Return the weights that arc-state's network also has, and a sentence on each that is left out."""
    kept, notes = dict(tensors), []
    for prefix, sentence in _LEFT_OUT.items():
        head = [name for name in kept if name.startswith(prefix)]
        if head:
            notes.append(sentence)
        for name in head:
            del kept[name]
    if run.network.unknown_batch:
        kept[_BATCHES] = kept[_BATCHES][:-1]
        notes.append("the row of the unknown batch is left out: arc-state knows no cell without a batch")
    return kept, tuple(notes)


def _num_batches(run: Run) -> int:
    """Return the number of rows of arc-state's batch embedding, 0 if there is none."""
    spec = run.network
    return spec.num_batches - int(spec.unknown_batch and spec.num_batches > 0)


def _one_hot(names: Sequence[str]) -> dict[str, Tensor]:
    return dict(zip(names, torch.eye(len(names)), strict=True))


def _require_known(run: Run) -> None:
    spec, problems = run.network, []
    if spec.num_contexts:
        problems.append(Problem("model.context_embedding", "arc-state's networks have no context embedding"))
    if getattr(spec, "shift", False):
        problems.append(Problem("model.residual", "arc-state's networks do not add to the control cell itself"))
    if run.baseline() is not None:
        problems.append(Problem("model.base", "arc-state's networks have no baseline"))
    if spec.output_space == "latent" and not spec.decoder_widths:
        problems.append(Problem("model.input", "arc-state's gene decoder has other layers than ours of an embedding"))
    if spec.basal_layers not in (1, spec.encoder_layers):
        problems.append(Problem("basal_layers", f"expected 1 or {spec.encoder_layers}, got {spec.basal_layers}"))
    if problems:
        raise CheckpointError(f"{run.path}: arc-state has no such network", problems=problems)


def _options(run: Run) -> dict[str, Any]:
    """Return arc-state's options of the network."""
    spec, source = run.network, str(run.experiment["model"]["input"])
    embed_key = source.removeprefix(_OBSM) if source.startswith(_OBSM) else "X_hvg" if source == "hvg" else None
    outputs = [run.genes[place] for place in run.output_genes]
    space = "embedding" if spec.output_space == "embedding" else "gene"
    if spec.bottleneck or spec.latent_relu:
        space = "all"
    has_decoder = spec.output_space == "latent"
    decoder = {
        "latent_dim": spec.output_dim,
        "gene_dim": spec.num_genes,
        "hidden_dims": list(spec.decoder_widths),
        "dropout": spec.dropout,
        "residual_decoder": False,
    }
    return {
        "input_dim": spec.input_dim,
        "hidden_dim": spec.hidden,
        "output_dim": spec.output_dim,
        "pert_dim": spec.pert_dim,
        "batch_dim": _num_batches(run) or max(1, len(run.batches)),
        "gene_dim": spec.num_genes or spec.output_dim,
        "hvg_dim": spec.num_genes or spec.output_dim,
        "gene_names": outputs,
        "dropout": spec.dropout,
        "control_pert": run.control,
        "embed_key": embed_key,
        "output_space": space,
        "decoder_cfg": decoder if has_decoder else None,
        "gene_decoder_bool": has_decoder,
        "cell_set_len": spec.set_size,
        "extra_tokens": int(spec.batch_token) + int(spec.confidence_token),
        "blur": 0.05,
        "loss": "energy",
        "n_encoder_layers": spec.encoder_layers,
        "n_decoder_layers": spec.decoder_layers,
        "predict_residual": spec.residual,
        "use_basal_projection": (spec.basal_layers > 1),
        "batch_encoder": bool(spec.num_batches),
        "use_batch_token": spec.batch_token,
        "basal_mapping_strategy": "batch" if spec.batch_token else "random",
        "confidence_token": spec.confidence_token,
        "distributional_loss": "energy",
        "transformer_backbone_key": "GPT2" if spec.backbone == "gpt2" else "llama",
        "transformer_backbone_kwargs": _backbone(spec),
        "lora": {"enable": False},
    }


def _backbone(spec: StateSpec) -> dict[str, Any]:
    length = spec.set_size + int(spec.batch_token) + int(spec.confidence_token)
    if spec.backbone == "gpt2":
        return {
            "n_embd": spec.hidden,
            "n_layer": spec.layers,
            "n_head": spec.heads,
            "n_inner": spec.feedforward,
            "n_positions": length,
            "vocab_size": 1,
            "bos_token_id": 0,
            "eos_token_id": 0,
            "use_cache": False,
        }
    return {
        "bidirectional_attention": True,
        "max_position_embeddings": length,
        "hidden_size": spec.hidden,
        "intermediate_size": spec.feedforward,
        "num_hidden_layers": spec.layers,
        "num_attention_heads": spec.heads,
        "num_key_value_heads": spec.heads,
        "head_dim": spec.head_dim,
        "vocab_size": 1,
        "pad_token_id": 0,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "use_cache": False,
        "tie_word_embeddings": False,
    }


def _weights(run: Run, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights under arc-state's names, with the vocabularies that it requires."""
    spec, weights = run.network, {}
    for ours, value in tensors.items():
        name = ours.replace("gene_decoder.", "gene_decoder.decoder.")
        weights[name] = value.T.contiguous() if TRANSPOSED.fullmatch(name) else value
    vocabulary = torch.zeros(1, spec.hidden)
    if spec.backbone == "gpt2":
        length = spec.set_size + int(spec.batch_token) + int(spec.confidence_token)
        weights["transformer_backbone.wte.weight"] = vocabulary
        weights["transformer_backbone.wpe.weight"] = torch.zeros(length, spec.hidden)
    else:
        weights["transformer_backbone.embed_tokens.weight"] = vocabulary
    if spec.batch_token:
        # which only its training reads
        num_batches = _num_batches(run) or max(1, len(run.batches))
        weights["batch_classifier.0.weight"] = torch.zeros(num_batches, spec.hidden)
        weights["batch_classifier.0.bias"] = torch.zeros(num_batches)
    return weights
