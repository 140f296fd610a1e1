"""Runs within a Python that has arc-state: makes its run folders, and what its networks give of fixed inputs.

``python arc_oracle.py make FOLDER`` trains one small run for each option; ``python arc_oracle.py forward RUN...``
writes ``out.npz`` into runs that are there. Weights are moved far from where
training left them, so that all of them matter. It runs with 0.9.1 and later; an option that a version does not know yet
changes nothing there.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import torch
from scipy import sparse

GENES = tuple(f"G{number}" for number in range(30))
HVGS = tuple(GENES[place] for place in (1, 3, 4, 8, 9, 15, 20, 21, 22, 29))
SET_SIZE = 8
# versions differ in which options their files list
_NETWORK = "++model.kwargs."
_BACKBONE = f"{_NETWORK}transformer_backbone_kwargs."
_HVG = ("data.kwargs.embed_key=X_hvg", "data.kwargs.output_space=gene")
_EMBEDDING = "data.kwargs.embed_key=X_emb"
_BATCHED = ("data.kwargs.basal_mapping_strategy=batch", f"{_NETWORK}use_batch_token=true")
OPTIONS = {
    "hvg": _HVG,
    "genes": ("data.kwargs.embed_key=null", "data.kwargs.output_space=gene"),
    "batch_encoder": (*_HVG, f"{_NETWORK}batch_encoder=true"),
    "no_residual": (*_HVG, f"{_NETWORK}predict_residual=false"),
    "all_of_genes": ("data.kwargs.embed_key=null", "data.kwargs.output_space=all"),
    "all_of_hvg": ("data.kwargs.embed_key=X_hvg", "data.kwargs.output_space=all"),
    "all_decoded": ("data.kwargs.embed_key=X_hvg", "data.kwargs.output_space=all", f"{_NETWORK}gene_decoder_bool=true"),
    "embedding_to_hvg": (_EMBEDDING, "data.kwargs.output_space=gene", f"{_NETWORK}gene_decoder_bool=true"),
    "embedding_to_all": (_EMBEDDING, "data.kwargs.output_space=all", f"{_NETWORK}gene_decoder_bool=true"),
    "embedding": (_EMBEDDING, "data.kwargs.output_space=embedding"),
    "unused_decoder": (*_HVG, f"{_NETWORK}gene_decoder_bool=true"),
    "basal_projection": (*_HVG, f"{_NETWORK}use_basal_projection=true"),
    "one_layer": (
        *_HVG,
        f"{_NETWORK}use_basal_projection=true",
        f"{_NETWORK}n_encoder_layers=1",
        f"{_NETWORK}n_decoder_layers=1",
    ),
    "batch_token": (*_HVG, *_BATCHED),
    "confidence_token": (*_HVG, f"{_NETWORK}confidence_token=true"),
    "both_tokens": (*_HVG, *_BATCHED, f"{_NETWORK}confidence_token=true"),
    "lora": (*_HVG, f"{_NETWORK}lora.enable=true"),
    "lora_mlp": (*_HVG, f"{_NETWORK}lora.enable=true", f"{_NETWORK}lora.adapt_mlp=true", f"{_NETWORK}lora.r=4"),
    # arc-state's GPT-2 does not start with transformers 5
    "gpt2": (*_HVG, f"{_NETWORK}transformer_backbone_key=GPT2"),
    "gpt2_lora": (*_HVG, f"{_NETWORK}transformer_backbone_key=GPT2", f"{_NETWORK}lora.enable=true"),
}


def write_data(folder: Path) -> Path:
    """Write cells as `state tx train` wants them, and the file that names them; return the latter."""
    rng = np.random.default_rng(0)
    rows = [
        (context, pert, batch)
        for context in ("H1", "K562")
        for pert in ("non-targeting", "G1", "G2", "G3")
        for batch in ("b1", "b2")
        for _cell in range(12)
    ]
    obs = pd.DataFrame(rows, columns=["cell_type", "target_gene", "batch_var"]).astype("category")
    obs.index = [f"cell{place}" for place in range(len(rows))]
    counts = rng.poisson(np.tile(rng.gamma(2.0, 10.0, size=len(GENES)), (len(rows), 1)))
    log1p = np.log1p(counts * (1e4 / counts.sum(1, keepdims=True))).astype(np.float32)
    cells = ad.AnnData(sparse.csr_matrix(log1p), obs=obs, var=pd.DataFrame(index=list(GENES)))
    cells.var["highly_variable"] = [gene in HVGS for gene in GENES]
    cells.obsm["X_hvg"] = log1p[:, [GENES.index(gene) for gene in HVGS]]
    cells.obsm["X_emb"] = rng.normal(size=(len(rows), 16)).astype(np.float32)
    (folder / "data").mkdir(parents=True, exist_ok=True)
    cells.write_h5ad(folder / "data" / "cells.h5ad")
    experiment = folder / "experiment.toml"
    experiment.write_text(
        f'[datasets]\ncells = "{folder / "data"}"\n[training]\ncells = "train"\n[zeroshot]\n[fewshot]\n'
        '[fewshot."cells.K562"]\nval = ["G1"]\ntest = ["G2"]\n'
    )
    return experiment


def train(experiment: Path, folder: Path, name: str) -> None:
    from state.__main__ import load_hydra_config  # type: ignore[import-not-found, unused-ignore]
    from state._cli._tx import run_tx_train  # type: ignore[import-not-found, unused-ignore]

    overrides = [
        f"data.kwargs.toml_config_path={experiment}",
        "data.kwargs.num_workers=0",
        "data.kwargs.pin_memory=false",
        "data.kwargs.batch_col=batch_var",
        "data.kwargs.pert_col=target_gene",
        "data.kwargs.cell_type_key=cell_type",
        "data.kwargs.control_pert=non-targeting",
        "training.batch_size=2",
        "training.max_steps=2",
        "training.val_freq=2",
        "training.ckpt_every_n_steps=1",
        "use_wandb=false",
        f"output_dir={folder}",
        f"name={name}",
        *model_settings(),
        f"{_NETWORK}cell_set_len={SET_SIZE}",
        f"{_NETWORK}hidden_dim=16",
        f"{_BACKBONE}intermediate_size=24",
        f"{_BACKBONE}num_hidden_layers=2",
        f"{_BACKBONE}num_attention_heads=2",
        f"{_BACKBONE}num_key_value_heads=2",
        f"{_BACKBONE}head_dim=8",
        *OPTIONS[name],
        *missing_settings(folder),
    ]
    run_tx_train(load_hydra_config("tx", overrides))


def configs() -> Path:
    import state  # type: ignore[import-not-found, unused-ignore]

    return Path(state.__file__).parent / "configs"


def model_settings() -> list[str]:
    """Return which model to train; the first versions have no state_sm, but what it is made of."""
    if (configs() / "model" / "state_sm.yaml").is_file():
        return ["model=state_sm"]
    return ["model=pertsets", f"{_NETWORK}transformer_backbone_key=llama"]


def missing_settings(folder: Path) -> list[str]:
    """Write the settings that most packages before 0.11 lack, without which they do not start; return where."""
    if (configs() / "wandb").is_dir():
        return []
    (folder / "configs" / "wandb").mkdir(parents=True, exist_ok=True)
    (folder / "configs" / "wandb" / "default.yaml").write_text("project: none\nentity: none\nlocal_wandb_dir: none\n")
    return [f"hydra.searchpath=[file://{folder / 'configs'}]"]


def shake(checkpoint: Path) -> None:
    saved = torch.load(checkpoint, map_location="cpu", weights_only=False)
    generator = torch.Generator().manual_seed(1)
    for name, value in saved["state_dict"].items():
        if not any(part in name for part in ("embed_tokens", ".wte.", ".wpe.")):
            value.add_(torch.randn(value.shape, generator=generator), alpha=0.2)
    torch.save(saved, checkpoint)


def network_class() -> Any:
    """Return the class of the network, by the name that it has in this version."""
    from state.tx import models  # type: ignore[import-not-found, unused-ignore]

    # since 0.9.14, and before
    names = ("StateTransitionPerturbationModel", "PertSetsPerturbationModel")
    return next(getattr(models, name) for name in names if hasattr(models, name))


def forward(run: Path) -> None:
    checkpoint = run / "checkpoints" / "final.ckpt"
    model: Any = network_class().load_from_checkpoint(checkpoint, map_location="cpu", weights_only=False).eval()
    generator = torch.Generator().manual_seed(0)
    num_sets, size = 3, model.cell_sentence_len
    control = torch.rand(num_sets, size, model.input_dim, generator=generator) * 3
    pert = torch.randn(num_sets, model.pert_dim, generator=generator)
    batch = torch.randint(0, 2, (num_sets, size), generator=generator)
    with torch.inference_mode():
        given = {
            "ctrl_cell_emb": control.flatten(0, 1),
            "pert_emb": pert[:, None].expand(-1, size, -1).flatten(0, 1),
            "batch": batch.flatten(),
        }
        found = model(given)
        latent, confidence = found if isinstance(found, tuple) else (found, None)
        out = {"control": control, "pert": pert, "batch": batch, "latent": latent.unflatten(0, (num_sets, size))}
        if confidence is not None:
            out["confidence"] = confidence.flatten()
        if model.gene_decoder is not None:
            out["genes"] = model.gene_decoder(out["latent"])
    np.savez(run / "out.npz", allow_pickle=False, **{name: value.numpy() for name, value in out.items()})


def main(command: str, *arguments: str) -> None:
    os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = "1"
    if command == "make":
        folder = Path(arguments[0])
        experiment = write_data(folder)
        for name in arguments[1:] or OPTIONS:
            try:
                train(experiment, folder, name)
            except AttributeError as error:
                if "gpt2" not in name:
                    raise
                sys.stderr.write(f"arc-state's GPT-2 does not start here: {error}\n")
                continue
            shake(folder / name / "checkpoints" / "final.ckpt")
            forward(folder / name)
    else:
        for run in arguments:
            forward(Path(run))


if __name__ == "__main__":
    main(*sys.argv[1:])
