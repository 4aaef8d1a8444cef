"""Pictures side by side, with what they are written above them."""

from __future__ import annotations

import textwrap

import numpy as np
import torch
import torch.nn.functional as F
from comfy_api.latest import io
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.utils import make_grid

from .types import CATEGORY

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

GAP = 4  # px between the pictures
FURTHER = {
    "images_2": "More pictures, after those of images; other sizes are scaled to that of the first.",
    "images_3": "More pictures, after those of images_2.",
    "images_4": "More pictures, after those of images_3.",
}


class ComparisonGrid(io.ComfyNode):
    """A batch of images as one labelled grid."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="P2PComparisonGrid",
            display_name="Comparison Grid",
            category=CATEGORY,
            description="Lays one or more batches of images out in columns, each image under its label.",
            inputs=[
                io.Image.Input("images", tooltip="The pictures, in reading order."),
                io.String.Input(
                    "labels",
                    multiline=True,
                    default="",
                    optional=True,
                    tooltip="One label per line: one for each image, or one for each column. Empty for none.",
                ),
                io.Int.Input("columns", default=2, min=1, max=64, tooltip="Images per row, from 1 to 64."),
                *(io.Image.Input(name, optional=True, tooltip=tip) for name, tip in FURTHER.items()),
            ],
            outputs=[io.Image.Output("image", display_name="image")],
        )

    @classmethod
    def execute(
        cls,
        images: Tensor,
        columns: int,
        labels: str = "",
        images_2: Tensor | None = None,
        images_3: Tensor | None = None,
        images_4: Tensor | None = None,
    ) -> io.NodeOutput:
        batches = [batch for batch in (images, images_2, images_3, images_4) if batch is not None]
        return io.NodeOutput(comparison_grid(joined(batches), labels.splitlines(), columns))


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


def comparison_grid(images: Tensor, labels: list[str], columns: int) -> Tensor:
    """Lay images (b, height, width, 3) out in a grid (1, height, width, 3), values 0 to 1.

    labels: none, one per image, or one per column (then written over the first row).
    Raises ValueError for any other number of labels.
    """
    count = images.shape[0]
    columns = min(columns, count)
    if len(labels) not in (0, columns, count):
        raise ValueError(
            f"There are {len(labels)} labels for {count} images in {columns} columns; "
            f"expected one line for each image ({count}), one for each column ({columns}), or none."
        )
    if 0 < len(labels) < count:
        labels = labels + [""] * (count - len(labels))
    captions = _captions(labels or [""] * count, images.shape[2])
    missing = -count % columns
    cells = torch.cat([images[..., :3].to("cpu", torch.float32), torch.ones(missing, *images.shape[1:3], 3)])
    captions += [None] * missing
    rows = [slice(first, first + columns) for first in range(0, len(captions), columns)]
    return torch.cat([_row(cells[row], captions[row]) for row in rows], dim=1)


def _row(images: Tensor, captions: list[Image.Image | None]) -> Tensor:
    """One row of the grid; its captions take the height of the tallest, and none where all are empty."""
    height = max((caption.height for caption in captions if caption), default=0)
    cells = []
    for image, caption in zip(images, captions, strict=True):
        head = torch.ones(height, image.shape[1], 3)
        if caption:
            head[-caption.height :] = torch.from_numpy(np.asarray(caption, np.float32) / 255.0)
        cells.append(torch.cat([head, image]))
    grid = make_grid(rearrange(torch.stack(cells), "b h w c -> b c h w"), len(cells), GAP, pad_value=1.0)
    return rearrange(grid, "c h w -> 1 h w c")


def _captions(labels: list[str], width: int) -> list[Image.Image | None]:
    """Each label as a picture of the given width, wrapped to it; None for an empty one."""
    size = max(11, width // 16)
    font = ImageFont.load_default(size)
    letters = max(4, int(width / font.getlength("n")))
    return [
        _caption(textwrap.fill(label, letters), font, width) if label.strip() else None for label in labels
    ]


def _caption(text: str, font: Font, width: int) -> Image.Image:
    canvas = Image.new("RGB", (width, 1), "white")
    bottom = ImageDraw.Draw(canvas).multiline_textbbox((2, 2), text, font=font)[3]
    canvas = canvas.resize((width, int(bottom) + 4))
    ImageDraw.Draw(canvas).multiline_text((2, 2), text, font=font, fill="black")
    return canvas
