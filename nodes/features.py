"""Plug-and-Play: a model whose targets take features and attention from their source."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..attention.edit import Edit
from ..sampling.controller import plug_and_play
from ..sampling.maps import MapsHandle
from ..sampling.trajectory import Trajectory
from .types import (
    CATEGORY,
    MAPS_OUTPUT,
    EditIO,
    MapsIO,
    also_called,
    check_wiring,
    is_wired,
    model_input,
    trajectory_input,
)


class FeatureInjection(io.ComfyNode):
    """Plug-and-Play instead of Prompt-to-Prompt: the prompts need not resemble each other."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="P2PFeatureInjection",
            display_name="Plug-and-Play Features",
            category=CATEGORY,
            **also_called("pnp", "plug and play"),
            description="Patches a model like Attention Controller, but the targets take the source's "
            "features and self-attention: structure stays, and the target prompt may be quite another one. "
            "Feed KSampler this model, this positive and a latent from Paired Latent.",
            inputs=[
                model_input("SD1.x, SD2.x or SDXL"),
                EditIO.Input(
                    "edit", tooltip="Source and target prompts; the alignment of words is not used."
                ),
                io.Float.Input(
                    "feature_end",
                    default=0.8,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="The part of the run in which the source's features are injected; lower lets "
                    "shapes change. From 0 to 1.",
                ),
                io.Float.Input(
                    "attention_end",
                    default=0.5,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="The part of the run in which the source's self-attention is injected, "
                    "from 0 to 1.",
                ),
                trajectory_input(),
                io.Conditioning.Input(
                    "source_conditioning",
                    optional=True,
                    tooltip="With a trajectory: what the source is denoised under, without guidance, instead "
                    "of its prompt. The paper takes the empty prompt, there and in Invert Image.",
                ),
            ],
            outputs=[
                io.Model.Output("controlled", display_name="model"),
                io.Conditioning.Output("positive", display_name="positive"),
                MapsIO.Output("maps", display_name="maps"),
            ],
            hidden=[io.Hidden.prompt, io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        edit: Edit,
        feature_end: float,
        attention_end: float,
        trajectory: Trajectory | None = None,
        source_conditioning: list | None = None,
    ) -> io.NodeOutput:
        check_wiring(cls.hidden)
        maps = MapsHandle(wanted=is_wired(cls.hidden, MAPS_OUTPUT))
        controlled, positive = plug_and_play(
            model,
            edit,
            feature_end,
            attention_end,
            trajectory=trajectory,
            source_conditioning=source_conditioning,
            maps=maps,
        )
        return io.NodeOutput(controlled, positive, maps)
