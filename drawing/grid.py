"""Images side by side, each under its label."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

GAP = 4
"""Pixels of paper between the images of a grid, and around it."""
PAPER = 1.0
"""Grey value of the paper."""


def comparison_grid(images: Tensor, labels: Sequence[str], columns: int) -> Tensor:
    """Lay images (b, height, width, channels) out in a grid (1, height', width', 3), values 0 to 1.

    A grid of r rows and c columns is c (width + GAP) + GAP wide and r (height + GAP) + GAP high, captions
    aside.

    labels: none, one per image, or one per column, which then stands once, above the first row.
    Raises ValueError for any other number of labels.
    """
    count = images.shape[0]
    columns = min(columns, count)
    if len(labels) not in (0, columns, count):
        raise ValueError(
            f"There are {len(labels)} labels for {count} images in {columns} columns; "
            f"expected one line for each image ({count}), one for each column ({columns}), or none."
        )
    images = images[..., :3].to("cpu", torch.float32)
    heads = captions(labels, images.shape[2]) if any(map(str.strip, labels)) else None
    if heads is None:
        rows = _rows(images, columns)
    elif len(labels) == count:
        rows = _rows(torch.cat([heads, images], 1), columns)
    else:
        rows = torch.cat([_rows(heads, columns), _rows(images, columns)])
    return F.pad(rows, (0, 0, 0, GAP, 0, GAP), value=PAPER)[None]


def joined(batches: list[Tensor]) -> Tensor:
    """Batches of images (b, height, width, channels) as one of RGB images, all of the first batch's size."""
    height, width = batches[0].shape[1:3]
    return torch.cat([_scaled(images[..., :3].to("cpu", torch.float32), height, width) for images in batches])


def _scaled(images: Tensor, height: int, width: int) -> Tensor:
    if images.shape[1:3] == (height, width):
        return images
    channels_first = rearrange(images, "b h w c -> b c h w")
    scaled = F.interpolate(channels_first, (height, width), mode="bilinear", antialias=True)
    return rearrange(scaled, "b c h w -> b h w c")


def _rows(cells: Tensor, columns: int) -> Tensor:
    """Cells in rows, each with a gap above it and to its left: (b, h, w, 3) -> (height, width, 3)."""
    missing = -len(cells) % columns
    framed = F.pad(cells, (0, 0, GAP, 0, GAP, 0, 0, missing), value=PAPER)
    return rearrange(framed, "(row column) h w c -> (row h) (column w) c", column=columns)


def contact_sheet(images: Sequence[Image.Image], labels: Sequence[str], columns: int) -> Image.Image:
    """A grid of PIL images of any sizes, each fitted to the largest width and height."""
    size = max(image.width for image in images), max(image.height for image in images)
    cells = [ImageOps.pad(image.convert("RGB"), size, color="white") for image in images]
    pixels = torch.from_numpy(np.stack([np.asarray(cell, np.float32) / 255.0 for cell in cells]))
    return Image.fromarray((comparison_grid(pixels, labels, columns)[0] * 255).round().byte().numpy())


def captions(labels: Sequence[str], width: int) -> Tensor:
    """Labels as images (b, height, width, 3) of one height, wrapped to the width; blank for an empty one."""
    size = max(11, width // 16)
    font = ImageFont.load_default(size)
    letters = max(4, int(width / font.getlength("n")))
    drawn = [_caption(textwrap.fill(label, letters), font, width) for label in labels]
    height = max(len(image) for image in drawn)
    return torch.stack([F.pad(image, (0, 0, 0, 0, height - len(image), 0), value=PAPER) for image in drawn])


def _caption(text: str, font: Font, width: int) -> Tensor:
    canvas = Image.new("RGB", (width, 1), "white")
    bottom = ImageDraw.Draw(canvas).multiline_textbbox((2, 2), text, font=font)[3]
    canvas = canvas.resize((width, int(bottom) + 4))
    ImageDraw.Draw(canvas).multiline_text((2, 2), text, font=font, fill="black")
    return torch.from_numpy(np.asarray(canvas, np.float32) / 255.0)
