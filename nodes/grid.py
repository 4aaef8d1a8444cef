"""Images side by side, with what they are written above them."""

from __future__ import annotations

from comfy_api.latest import io
from torch import Tensor

from ..drawing.grid import comparison_grid
from .types import CATEGORY


class ComparisonGrid(io.ComfyNode):
    """A batch of images as one labelled grid."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="P2PComparisonGrid",
            display_name="Comparison Grid",
            category=CATEGORY,
            description="Lays a batch of images out in columns, each under its label.",
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
            ],
            outputs=[io.Image.Output("image", display_name="image")],
        )

    @classmethod
    def execute(cls, images: Tensor, columns: int, labels: str = "") -> io.NodeOutput:
        return io.NodeOutput(comparison_grid(images, labels.splitlines(), columns))
