"""Model files as people download them, made for the bundled model."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

import comfy.cldm.cldm
import comfy.gligen
import comfy.ops
import folder_paths
import safetensors.torch
import torch
from p2p.tests.host.runs import Studio
from torch import Tensor

_FOLDER = tempfile.TemporaryDirectory(prefix="p2p-models-")


def _path(kind: str, name: str) -> Path:
    """Where the host looks for a model file of this kind."""
    folder = Path(_FOLDER.name) / kind
    folder.mkdir(exist_ok=True)
    folder_paths.add_model_folder_path(kind, str(folder))
    return folder / name


def _noise(shape: Any, scale: float, seed: int) -> Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@functools.cache
def lora(studio: Studio) -> str:
    """A LoRA on attention of the network and of a text encoder if there is one; its name for LoraLoader."""
    weights = {}
    parts = [("", studio.model.model)]
    if studio.clip is not None:
        parts.append(("text_encoders.", studio.clip.cond_stage_model))
    for prefix, module in parts:
        for seed, (name, value) in enumerate(module.state_dict().items()):
            if name.endswith(("to_q.weight", "to_v.weight", "v_proj.weight", "qkv.weight")):
                key = prefix + name.removesuffix(".weight")
                weights[f"{key}.lora_up.weight"] = _noise((value.shape[0], 2), 0.3, seed)
                weights[f"{key}.lora_down.weight"] = _noise((2, value.shape[1]), 0.3, seed + 1)
    file = f"style-{id(studio)}.safetensors"
    safetensors.torch.save_file(weights, _path("loras", file))
    return file


@functools.cache
def hypernetwork() -> str:
    sizes = {}
    for size in (64, 128):
        pair = []
        for seed in (size, size + 1):
            pair.append(
                {"linear.0.weight": _noise((size, size), 0.03, seed), "linear.0.bias": torch.zeros(size)}
            )
        sizes[size] = tuple(pair)
    torch.save({**sizes, "activation_func": "linear"}, _path("hypernetworks", "style.pt"))
    return "style.pt"


@functools.cache
def control_net(studio: Studio) -> str:
    """A ControlNet of the model's own layout."""
    config = dict(studio.model.model.model_config.unet_config)
    config.pop("out_channels")
    operations = comfy.ops.disable_weight_init
    network = comfy.cldm.cldm.ControlNet(**{**config, "hint_channels": 3, "operations": operations})
    weights = {
        name: torch.ones(value.shape)
        if name.endswith("norm.weight") or (value.ndim == 1 and name.endswith("weight"))
        else _noise(value.shape, (3.0 if "hint" in name else 0.3) / max(1, value[0].numel()) ** 0.5, seed)
        for seed, (name, value) in enumerate(network.state_dict().items())
    }
    safetensors.torch.save_file(weights, _path("controlnet", "edges.safetensors"))
    return "edges.safetensors"


@functools.cache
def gligen(studio: Studio) -> str:
    """GLIGEN's gated attention for each of the model's transformer blocks, in their order."""
    weights: dict[str, Tensor] = {}
    blocks = [
        name.removesuffix(".attn1.to_q.weight").replace("diffusion_model.", "")
        for name in studio.model.model.state_dict()
        if name.endswith("attn1.to_q.weight")
    ]
    context = studio.negative[0][0].shape[-1]
    for block in blocks:
        query = studio.model.model.state_dict()[f"diffusion_model.{block}.attn1.to_q.weight"].shape[0]
        module = comfy.gligen.GatedSelfAttentionDense(query, context, query // 64, 64)
        for seed, (name, value) in enumerate(module.state_dict().items()):
            weights[f"{block}.fuser.{name}"] = (
                torch.ones(value.shape)
                if value.ndim == 0 or (value.ndim == 1 and name.endswith("weight"))
                else _noise(value.shape, 0.3 / value[0].numel() ** 0.5, seed)
            )
    net = comfy.gligen.PositionNet(context, context)
    for seed, (name, value) in enumerate(net.state_dict().items()):
        weights[f"position_net.{name}"] = _noise(value.shape, 0.3 / max(1, value[0].numel()) ** 0.5, seed)
    safetensors.torch.save_file(weights, _path("gligen", "boxes.safetensors"))
    return "boxes.safetensors"
