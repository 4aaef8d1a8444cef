"""The bundled tiny model, so that every workflow runs without a download."""

from __future__ import annotations

from comfy_api.latest import io

from ..demo.loader import load_demo_model
from ..demo.picture import load_picture
from .types import CATEGORY


class DemoModel(io.ComfyNode):
    """The bundled text-to-image model, 128 px, for trying the pack."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="P2PDemoModel",
            display_name="Load Demo Model",
            category=CATEGORY,
            description="Loads the tiny model that comes with this pack: 128 x 128 px, simple scenes, fast "
            "on a CPU. Exchange it for Load Checkpoint to use a model of your own.",
            outputs=[
                io.Model.Output("model", display_name="model"),
                io.Clip.Output("clip", display_name="clip"),
                io.Vae.Output("vae", display_name="vae"),
                io.Image.Output("picture", display_name="picture"),
            ],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        return io.NodeOutput(*load_demo_model(), load_picture())
