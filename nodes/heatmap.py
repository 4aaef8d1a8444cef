"""Drawing heat maps, each with its word written above it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import repeat
from torch import Tensor

from .grid import comparison_grid

PIXELS = 8  # of a picture for each pixel of its latent, where no picture says how many
OPACITY = 0.6  # of the colours over a picture

COLOURS = torch.tensor(
    [(0.05, 0.03, 0.22), (0.42, 0.11, 0.49), (0.80, 0.28, 0.36), (0.97, 0.60, 0.19), (0.99, 0.95, 0.65)]
)
"""From none to most, evenly spaced, each lighter than the one before."""


def heatmaps(
    maps: Tensor,
    labels: list[str],
    size: tuple[int, int],
    image: Tensor | None,
    blend: Tensor | None,
    branch: int,
    branches: int,
) -> tuple[Tensor, Tensor]:
    """Pictures of words' maps, (pairs x words, height, width, 3), and a mask, (pairs, height, width).

    The maps of a pair share one colour scale, from 0 to their common maximum.

    maps (pairs, words, h, w). size: height and width of the latent. image: pictures to lay them over, one for
    all pairs, one for each pair, or a batch of all (or all targets') branches. blend: (pairs, height, width),
    the mask, or None for the maps' own: at each pixel the largest map, as a fraction of its maximum.

    Raises ValueError for any other number of pictures.
    """
    pairs = maps.shape[0]
    height, width = (side * PIXELS for side in size) if image is None else image.shape[1:3]
    large = F.interpolate(maps, (height, width), mode="bilinear", align_corners=False)
    colours = colour(large / large.amax((1, 2, 3), keepdim=True).clamp_min(1e-12))
    if image is not None:
        under = _pictures(image, pairs, branch, branches)[..., :3].to("cpu", torch.float32)
        colours = torch.lerp(under[:, None], colours, OPACITY)
    cells = [
        comparison_grid(cell[None], [label], 1)
        for pair in colours
        for cell, label in zip(pair, labels, strict=True)
    ]
    if blend is None:
        mask = (large / large.amax((2, 3), keepdim=True).clamp_min(1e-12)).amax(1)
    else:
        mask = F.interpolate(blend[:, None], (height, width), mode="nearest")[:, 0]
    tallest = max(cell.shape[1] for cell in cells)
    cells = [F.pad(cell, (0, 0, 0, 0, tallest - cell.shape[1], 0), value=1.0) for cell in cells]
    return torch.cat(cells), mask


def colour(values: Tensor) -> Tensor:
    """Values from 0 to 1 as colours: (...) -> (..., 3)."""
    place = values.clamp(0.0, 1.0) * (len(COLOURS) - 1)
    below = place.floor().long().clamp_max(len(COLOURS) - 2)
    return torch.lerp(COLOURS[below], COLOURS[below + 1], (place - below)[..., None])


def _pictures(image: Tensor, pairs: int, branch: int, branches: int) -> Tensor:
    """The branch's pictures, (pairs, height, width, channels)."""
    rows = image.shape[0]
    if rows == pairs:
        return image
    if rows == 1:
        return repeat(image, "1 ... -> p ...", p=pairs)
    if rows == pairs * branches:
        return image[branch::branches]
    if rows == pairs * (branches - 1) and branch > 0:
        return image[branch - 1 :: branches - 1]
    raise ValueError(
        f"There are {rows} pictures for {pairs} pair{'s' if pairs > 1 else ''} of {branches} branches; "
        f"expected 1, {pairs} (this branch's), {pairs * branches} (all branches)"
        + (f" or {pairs * (branches - 1)} (all targets)." if branch else ".")
    )
