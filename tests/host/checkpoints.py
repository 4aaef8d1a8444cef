"""Checkpoint files of the model families, for ComfyUI to detect and load as it does a user's.

What detection reads is real: keys, number and depth of blocks, width of the first layer (320, the refiner's
384) and of the text conditioning. The rest is small: all levels have the first one's width, the text encoders
three layers. Weights are random.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import comfy.sd
import comfy.supported_models
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from torch import Tensor

UNET = "model.diffusion_model."
TEXT = {
    f"clip_{name}_model_config": {"num_hidden_layers": 3, "intermediate_size": 64} for name in ("l", "g", "h")
}
"""The text encoders' sizes, in the host's option for them."""

COMMON = {
    "image_size": 32,
    "out_channels": 4,
    "use_spatial_transformer": True,
    "legacy": False,
    "use_temporal_attention": False,
    "use_temporal_resblock": False,
}
SD = {
    "model_channels": 320,
    "num_res_blocks": [2] * 4,
    "channel_mult": [1] * 4,
    "transformer_depth": [1] * 6 + [0] * 2,
    "transformer_depth_output": [1] * 9 + [0] * 3,
    "transformer_depth_middle": 1,
    "adm_in_channels": None,
}
SD1 = SD | {"context_dim": 768, "use_linear_in_transformer": False, "num_heads": 8}
SD2 = SD | {"context_dim": 1024, "use_linear_in_transformer": True, "num_head_channels": 64}
XL = {
    "model_channels": 320,
    "num_res_blocks": [2] * 3,
    "channel_mult": [1] * 3,
    "context_dim": 2048,
    "adm_in_channels": 2816,
    "num_classes": "sequential",
    "use_linear_in_transformer": True,
    "num_head_channels": 64,
}
SDXL = XL | {
    "transformer_depth": [0, 0, 2, 2, 10, 10],
    "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
    "transformer_depth_middle": 10,
}
SDXL_VARIANT = SDXL | {"transformer_depth_output": [0, 0, 0, 1, 1, 1, 1, 1, 1], "transformer_depth_middle": 1}
"""What tells SDXL's variants apart is not in the second half of the network, which is short here."""
REFINER = XL | {
    "model_channels": 384,
    "num_res_blocks": [2] * 4,
    "channel_mult": [1] * 4,
    "transformer_depth": [0, 0, 4, 4, 4, 4, 0, 0],
    "transformer_depth_output": [0, 0, 0, 4, 4, 4, 4, 4, 4, 0, 0, 0],
    "transformer_depth_middle": 4,
    "context_dim": 1280,
    "adm_in_channels": 2560,
}
SSD1B = XL | {
    "transformer_depth": [0, 0, 2, 2, 4, 4],
    "transformer_depth_output": [0, 0, 0, 1, 1, 2, 10, 4, 4],
    "transformer_depth_middle": -1,
}
VEGA = XL | {
    "transformer_depth": [0, 0, 1, 1, 2, 2],
    "transformer_depth_output": [0, 0, 0, 1, 1, 1, 2, 2, 2],
    "transformer_depth_middle": -1,
}
KOALA = XL | {
    "num_res_blocks": [1] * 3,
    "transformer_depth": [0, 2, 5],
    "transformer_depth_output": [0, 0, 2, 2, 5, 5],
    "transformer_depth_middle": -2,
}


@dataclass(frozen=True)
class Family:
    """A kind of checkpoint, and what the host should take it for.

    config: class in `comfy.supported_models`. unet: its layout. model: class in `comfy.model_base`.
    prediction: name in `comfy.model_base.ModelType`. channels: of the first layer's input, 4 of them the
    latent's. keys: more entries of the file, which mark a variant. v_marked: whether it has SD2's mark of
    v-prediction, a wide bias.
    """

    config: str
    unet: dict[str, Any]
    model: str = "BaseModel"
    prediction: str = "EPS"
    channels: int = 4
    keys: dict[str, list[float]] = field(default_factory=dict)
    v_marked: bool = False


FAMILIES = {
    "SD1.5": Family("SD15", SD1),
    "SD1.5 inpainting": Family("SD15", SD1, channels=9),
    "InstructPix2Pix": Family("SD15_instructpix2pix", SD1, "SD15_instructpix2pix", channels=8),
    "SD2.0": Family("SD20", SD2),
    "SD2.1 v": Family("SD20", SD2, prediction="V_PREDICTION", v_marked=True),
    "SD2 inpainting": Family("SD20", SD2, channels=9),
    "SDXL": Family("SDXL", SDXL, "SDXL"),
    "SDXL v": Family("SDXL", SDXL_VARIANT, "SDXL", "V_PREDICTION", keys={"v_pred": [], "ztsnr": []}),
    "Playground 2.5": Family(
        "SDXL", SDXL_VARIANT, "SDXL", "EDM", keys={"edm_mean": [0.0] * 4, "edm_std": [1.0] * 4}
    ),
    "SDXL inpainting": Family("SDXL", SDXL_VARIANT, "SDXL", channels=9),
    "SDXL InstructPix2Pix": Family("SDXL_instructpix2pix", SDXL_VARIANT, "SDXL_instructpix2pix", channels=8),
    "SDXL refiner": Family("SDXLRefiner", REFINER, "SDXLRefiner"),
    "SSD-1B": Family("SSD1B", SSD1B, "SDXL"),
    "Segmind Vega": Family("Segmind_Vega", VEGA, "SDXL"),
    "KOALA 700M": Family("KOALA_700M", KOALA, "SDXL"),
}


class RandomWeights:
    """Random tensors of any shape, which share a few numbers: a file of them is small and quickly written."""

    def __init__(self, seed: int = 0, size: int = 1_000_000):
        self.numbers = torch.randn(size, generator=torch.Generator().manual_seed(seed))
        self.scaled: dict[float, Tensor] = {}
        self.begin = 0

    def like(self, name: str, meta: Tensor) -> Tensor:
        """A weight; norms are 1 and 0, biases small, and matrices keep the size of what they multiply."""
        if meta.ndim < 2:
            one = meta.ndim == 0 or name.endswith("weight")
            return torch.ones(meta.shape) if one else torch.zeros(meta.shape)
        scale = 1.0 if "embedding" in name else 0.6 * meta[0].numel() ** -0.5
        numbers = self.scaled.setdefault(scale, self.numbers * scale)
        row = min(meta[0].numel(), (numbers.numel() - meta[0].numel()) // meta.shape[0])  # rows may overlap
        strides = [row, *torch.empty(meta.shape[1:], device="meta").stride()]
        room = numbers.numel() - row * (meta.shape[0] - 1) - meta[0].numel()
        self.begin = (self.begin + 7919) % max(room, 1)
        return numbers.as_strided(meta.shape, strides, self.begin)


def network_of(name: str) -> UNetModel:
    """The U-Net of a family by its name, without weights: its blocks and their places are real."""
    return _network(_layout(FAMILIES[name]))


def _layout(family: Family) -> dict[str, Any]:
    return COMMON | family.unet | {"in_channels": family.channels}


def _network(layout: dict[str, Any]) -> UNetModel:
    return UNetModel(**{"num_heads": -1, **layout}, device="meta", dtype=torch.float32)


def state_dict(family: Family) -> dict[str, Tensor]:
    """What a checkpoint file of the family holds: the U-Net and the text encoders, without a VAE."""
    weights = RandomWeights()
    layout = _layout(family)
    unet = _network(layout).state_dict()
    tensors = {UNET + name: weights.like(name, meta) for name, meta in unet.items()}
    config = getattr(comfy.supported_models, family.config)(layout)
    target = config.clip_target()
    text = target.clip(device="meta", dtype=torch.float32, model_options=TEXT).state_dict()
    encoders = {name: weights.like(name, meta) for name, meta in text.items()}
    tensors |= config.process_clip_state_dict_for_saving(encoders)
    tensors |= {name: torch.tensor(values) for name, values in family.keys.items()}
    if family.v_marked:
        name = f"{UNET}output_blocks.11.1.transformer_blocks.0.norm1.bias"
        tensors[name] = torch.linspace(-0.3, 0.3, tensors[name].numel())
    return tensors


def load(path: Path, family: Family) -> tuple[Any, Any]:
    """Write a checkpoint of the family to `path` and have the host load it: (MODEL, CLIP)."""
    torch.save({"state_dict": state_dict(family)}, path)
    model, clip, *_ = comfy.sd.load_checkpoint_guess_config(
        str(path), output_vae=False, output_clip=True, te_model_options=TEXT
    )
    path.unlink()
    return model, clip
