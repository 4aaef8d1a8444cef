"""A picture to edit: back to the noise that it would be sampled from."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..sampling.choices import schedulers
from ..sampling.invert import invert
from ..sampling.trajectory import RECONSTRUCTIONS
from .types import CATEGORY, TrajectoryIO, also_called, check_options


class InvertImage(io.ComfyNode):
    """The trajectory that leads from noise to a given picture."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="P2PInvert",
            display_name="Invert Image",
            category=CATEGORY,
            **also_called("ddim inversion", "null text"),
            description="Runs a picture backwards to noise (DDIM inversion), so that it can be edited like a "
            "generated one: connect trajectory to Paired Sampler or Attention Controller.",
            inputs=[
                io.Model.Input(
                    "model", tooltip="The model that will sample, from before any Attention Controller."
                ),
                io.Conditioning.Input("positive", tooltip="The source prompt: what the picture shows."),
                io.Latent.Input("latent", tooltip="The picture, from VAE Encode. A batch shares the prompt."),
                io.Int.Input(
                    "steps",
                    default=20,
                    min=1,
                    max=10000,
                    tooltip="As in the sampler, from 1; for a denoise below 1 there, its steps / denoise.",
                ),
                io.Combo.Input(
                    "scheduler",
                    options=schedulers(),
                    tooltip="As in the sampler.",
                ),
                io.Float.Input(
                    "cfg",
                    default=1.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    round=0.01,
                    optional=True,
                    tooltip="Guidance of the inversion, from 0 to 100; 1 is none, as published. Other "
                    "values need negative.",
                ),
                io.Int.Input(
                    "refinement",
                    default=0,
                    min=0,
                    max=50,
                    optional=True,
                    tooltip="Rounds of fixed-point iteration per step, from 0 to 50: the noise gives the "
                    "picture back more closely, at one more model call per round. 0 is plain DDIM inversion.",
                ),
                io.Combo.Input(
                    "reconstruction",
                    options=list(RECONSTRUCTIONS),
                    default=RECONSTRUCTIONS[0],
                    optional=True,
                    tooltip="How the source stays the picture. direct: its latent is put back on the "
                    "trajectory at every step, which is exact. negative prompt: the source prompt serves as "
                    "the source's negative prompt, which is approximate.",
                ),
                io.Conditioning.Input(
                    "negative", optional=True, tooltip="Negative prompt, needed for a cfg other than 1."
                ),
            ],
            outputs=[
                TrajectoryIO.Output("trajectory", display_name="trajectory"),
                io.Latent.Output("noise", display_name="noise"),
            ],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        positive: list,
        latent: dict,
        steps: int,
        scheduler: str,
        cfg: float = 1.0,
        refinement: int = 0,
        reconstruction: str = RECONSTRUCTIONS[0],
        negative: list | None = None,
    ) -> io.NodeOutput:
        check_options(
            scheduler=(scheduler, schedulers()),
            reconstruction=(reconstruction, RECONSTRUCTIONS),
        )
        return io.NodeOutput(
            *invert(model, positive, latent, steps, scheduler, cfg, refinement, negative, reconstruction)
        )
