"""Which attention layers a network has: the one place that knows families of models."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..attention.taken import Kind, Layer
from . import families
from .families import FAMILIES, Family
from .host import Downsample, SpatialTransformer, SpatialVideoTransformer, UNetModel, Upsample

SUPPORTED = (
    "SD1.x, SD2.x, SDXL and other models of ComfyUI's UNetModel class with cross-attention to text, and on "
    "these transformers: " + ", ".join(dict.fromkeys(family.name for family in FAMILIES))
)

Layers = tuple[Layer, ...]
"""A network's attention layers in the order in which a forward calls them."""


def of_kind(layers: Layers, *kinds: Kind) -> Layers:
    return tuple(layer for layer in layers if layer.kind in kinds)


def layers_of(network: torch.nn.Module, family: Family | None = None) -> Layers:
    """The attention layers of a diffusion model. family: of a transformer (`families.family_of`).

    Raises ValueError that names the class of a model without any that the pack can reach.
    """
    if family is not None:
        return families.layers_of(family, network)
    found = unet_layers(network) if isinstance(network, UNetModel) else ()
    if not found:
        raise ValueError(
            f"The model's class {type(network).__name__} is not supported; "
            f"Prompt-to-Prompt works on {SUPPORTED}."
        )
    return found


def unet_layers(network: UNetModel) -> Layers:
    """Self- and cross-attention of every transformer block of a U-Net."""
    layers: list[Layer] = []
    scale = 1
    middle = [network.middle_block] if network.middle_block is not None else []
    stages: Sequence[tuple[str, Sequence]] = (
        ("input", network.input_blocks),
        ("middle", middle),
        ("output", network.output_blocks),
    )
    for name, modules in stages:
        for number, module in enumerate(modules):
            for part in module:
                if isinstance(part, SpatialTransformer) and not isinstance(part, SpatialVideoTransformer):
                    for depth in range(len(part.transformer_blocks)):
                        block = (name, number, depth)
                        layers += [Layer("self", block, scale), Layer("cross", block, scale)]
                changes = getattr(part, "h_upd", part)  # residual blocks may do it themselves
                if isinstance(changes, Downsample):
                    scale *= 2
                elif isinstance(changes, Upsample):
                    scale //= 2
    return tuple(layers)
