"""Images side by side, with what they are written above them."""

from __future__ import annotations

from comfy_api.latest import io
from torch import Tensor

from ..drawing.grid import comparison_grid, joined
from .types import CATEGORY

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
