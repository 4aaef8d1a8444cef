"""Plug-and-Play as a method: what the targets' decoder takes from their source's, features and attention."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from ..attention.inject import Rows
from ..attention.schedule import Window
from ..attention.taken import SelfTaken, Taken
from .host import ResBlock
from .network import Layer, Layers, of_kind
from .run import Call

SCALE = 4
"""How much smaller than the latent the first injected layers are: 16 x 16 of 64 x 64, as published."""


class PlugAndPlay:
    """Tumanyan et al. 2023: features and self-attention of the source, in every conditioning of the targets.

    features, attention: windows of the run. layers: of the network.
    """

    def __init__(self, features: Window, attention: Window, layers: Layers):
        self.features, self.attention = features, attention
        self.number, self.layers = feature_layers(layers)

    def taken(self, call: Call) -> Taken:
        targets = call.run.branches - 1
        self_ = SelfTaken("map", (1.0,) * targets, self.layers, (math.inf,) * targets, everywhere=True)
        return Taken(
            self_=(self_,) if self.attention.weight(call.progress()) else (),
            features=self.number if self.features.weight(call.progress()) else None,
        )


@contextmanager
def copied_features(network: Any, number: int, rows: Rows) -> Iterator[None]:
    """While this is open, an output block's residual features are the source's for the targets: f_t = f_s.

    The features are what the residual block adds to its skip connection (Tumanyan et al. 2023, section 4).
    The host has no hook at this place, so one of PyTorch's sits on the residual block's last layer for the
    time of one forward.

    Raises ValueError if the forward went by without it, as that of a compiled model does.
    """
    (block,) = [layer for layer in network.output_blocks[number] if isinstance(layer, ResBlock)]
    fired = []

    def copy(module: Any, given: Any, features: Tensor) -> Tensor:
        fired.append(True)
        return features.index_select(0, rows.origin)

    handle = block.out_layers[-1].register_forward_hook(copy)
    try:
        yield
    finally:
        handle.remove()
    if not fired:
        raise ValueError(
            "Plug-and-Play cannot reach the features inside a compiled model; take out the node that "
            "compiles it (Torch Compile Model), or set feature_end to 0."
        )


def feature_layers(layers: Layers) -> tuple[int, tuple[Layer, ...]]:
    """Where Plug-and-Play acts: the output block of the features, and self-attention from there on.

    The second output block at a quarter of the latent's sides, or of the coarsest where none is that coarse:
    block 4 of SD1.x and SD2.x, as published; block 1 of SDXL, whose decoder begins at that level.
    """
    decoder = [layer for layer in of_kind(layers, "self") if layer.block[0] == "output"]
    scale = min(SCALE, max(layer.scale for layer in decoder))
    numbers = sorted({int(layer.block[1]) for layer in decoder if layer.scale == scale})
    number = numbers[min(1, len(numbers) - 1)]
    return number, tuple(layer for layer in decoder if int(layer.block[1]) >= number)
