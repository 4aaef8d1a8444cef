"""Heat maps of words: their colours, and what they cover."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from einops import rearrange, repeat
from torch import Tensor

from .grid import captions

OPACITY = 0.6
"""Of the colours over an image."""

COLOURS = torch.tensor(
    [(0.05, 0.03, 0.22), (0.42, 0.11, 0.49), (0.80, 0.28, 0.36), (0.97, 0.60, 0.19), (0.99, 0.95, 0.65)]
)
"""From none to most, evenly spaced, each lighter than the one before."""


def heatmaps(maps: Tensor, labels: Sequence[str], under: Tensor | None = None) -> Tensor:
    """Words' maps (pairs, words, height, width) as images (pairs x words, height', width, 3) under labels.

    The maps of a pair share one colour scale, from 0 to their common maximum.

    labels: one per word. under: an image for each pair (pairs, height, width, channels) to lay the maps over.
    """
    colours = colour(maps / maps.amax((1, 2, 3), keepdim=True).clamp_min(1e-12))
    if under is not None:
        colours = torch.lerp(under[:, None, ..., :3].to("cpu", torch.float32), colours, OPACITY)
    heads = repeat(captions(labels, maps.shape[3]), "w ... -> (p w) ...", p=len(maps))
    return torch.cat([heads, rearrange(colours, "p w ... -> (p w) ...")], 1)


def coverage(maps: Tensor) -> Tensor:
    """What the words cover: at each pixel the largest map, as a fraction of that map's maximum.

    maps (pairs, words, height, width) -> (pairs, height, width), values 0 to 1.
    """
    return (maps / maps.amax((2, 3), keepdim=True).clamp_min(1e-12)).amax(1)


def colour(values: Tensor) -> Tensor:
    """Values from 0 to 1 as colours: (...) -> (..., 3)."""
    place = values.clamp(0.0, 1.0) * (len(COLOURS) - 1)
    below = place.floor().long().clamp_max(len(COLOURS) - 2)
    return torch.lerp(COLOURS[below], COLOURS[below + 1], (place - below)[..., None])
