"""When to inject (tau), and the controller that puts an edit on a model."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io
from torch import Tensor

from ..attention.blend import LocalBlend, read_blend
from ..attention.edit import Edit
from ..attention.schedule import MEASURES, SELF_MODES, TauSchedule, Window, parse_word_windows
from ..sampling.controller import control
from ..sampling.maps import MapsHandle
from ..sampling.trajectory import Trajectory
from .types import (
    CATEGORY,
    MAPS_OUTPUT,
    BlendIO,
    MapsIO,
    TauIO,
    also_called,
    blend_input,
    check_wiring,
    check_words,
    edit_input,
    is_wired,
    keep_sources,
    model_input,
    reuse_input,
    tau_input,
    trajectory_input,
)


def _fraction(name: str, default: float, tooltip: str) -> io.Float.Input:
    return io.Float.Input(
        name, default=default, min=0.0, max=1.0, step=0.01, tooltip=f"{tooltip} From 0 to 1."
    )


def _window(name: str, start: float, end: float) -> Window:
    """A window of these edges. Raises ValueError that names the inputs."""
    if end < start:
        raise ValueError(f"{name}_end is {end:g}, before {name}_start at {start:g}.")
    try:
        return Window(start, end)
    except ValueError as error:
        raise ValueError(f"{name}_start, {name}_end: {error}") from None


class TauScheduler(io.ComfyNode):
    """The windows of the run in which the source's attention is injected."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="P2PTauScheduler",
            display_name="\N{GREEK SMALL LETTER TAU} Scheduler",
            category=CATEGORY,
            **also_called("masactrl", "mutual self-attention"),
            description="When the source's attention is injected: longer is more faithful, shorter is freer.",
            inputs=[
                _fraction(
                    "cross_start",
                    0.0,
                    "Where cross-attention injection begins, as a fraction of the run's steps.",
                ),
                _fraction(
                    "cross_end",
                    0.8,
                    "Where it ends: 1 keeps the source's layout throughout, 0 injects nothing.",
                ),
                _fraction(
                    "self_start",
                    0.0,
                    "Where self-attention injection begins, as a fraction of the run's steps.",
                ),
                _fraction(
                    "self_end", 0.4, "Where it ends: higher keeps shapes and outlines closer to the source."
                ),
                _fraction(
                    "fade", 0.0, "Width of the windows' soft edges as a fraction of the run; 0 switches hard."
                ),
                _fraction(
                    "self_resolution",
                    0.5,
                    "Self-attention is injected in layers of at most this fraction of the latent's sides: "
                    "0.5 leaves the finest layers free.",
                ),
                io.String.Input(
                    "words",
                    default="",
                    multiline=True,
                    tooltip="Cross-attention windows for words or phrases of the target, one per line: "
                    "'hat: 0.3' or 'red hair: 0.1-0.6'.",
                ),
                io.Combo.Input(
                    "self_mode",
                    options=list(SELF_MODES),
                    default=SELF_MODES[0],
                    optional=True,
                    tooltip="map: self-attention takes the source's map, which keeps shapes. mutual: it "
                    "looks at the source image (MasaCtrl), which keeps looks while poses and shapes change; "
                    "try self_start 0.1, self_end 1 and cross_end 0. map in both halves: the map, under the "
                    "negative prompt too, as InstructPix2Pix made its data.",
                ),
                io.Float.Input(
                    "mutual_layer",
                    default=0.63,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    optional=True,
                    tooltip="Mutual mode, in place of self_resolution: the first layer, as a fraction of all "
                    "layers, from 0 to 1. 0.63 is layer 10 of 16 in SD1.5.",
                ),
                io.Combo.Input(
                    "measure",
                    options=list(MEASURES),
                    default=MEASURES[0],
                    optional=True,
                    tooltip="What the fractions are of. One sampler: steps. A run in parts (base and "
                    "refiner, two experts, split sigmas): percent, of the model's noise schedule.",
                ),
            ],
            outputs=[TauIO.Output("tau", display_name="tau")],
        )

    @classmethod
    def validate_inputs(cls, words: str | None = None) -> bool | str:
        try:
            parse_word_windows(words or "")
        except ValueError as error:
            return str(error)
        return True

    @classmethod
    def execute(
        cls,
        cross_start: float,
        cross_end: float,
        self_start: float,
        self_end: float,
        fade: float,
        self_resolution: float,
        words: str,
        self_mode: str = SELF_MODES[0],
        mutual_layer: float = 0.63,
        measure: str = MEASURES[0],
    ) -> io.NodeOutput:
        return io.NodeOutput(
            TauSchedule(
                _window("cross", cross_start, cross_end),
                _window("self", self_start, self_end),
                fade,
                self_resolution,
                parse_word_windows(words),
                self_mode,
                mutual_layer,
                measure,
            )
        )


class LocalBlendNode(io.ComfyNode):
    """Where the targets may differ from their source."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="P2PLocalBlend",
            display_name="Local Blend",
            category=CATEGORY,
            description="Keeps the targets equal to the source outside of the regions that words look at, "
            "outside of a mask, or of both.",
            inputs=[
                io.String.Input(
                    "words",
                    default="",
                    tooltip="Words or phrases of the target whose regions may change, separated by commas.",
                ),
                io.String.Input(
                    "source_words",
                    default="",
                    tooltip="Words or phrases of the source whose regions may change: what is taken away.",
                ),
                io.String.Input(
                    "exclude",
                    default="",
                    tooltip="Words or phrases of either prompt whose regions must not change.",
                ),
                _fraction(
                    "threshold",
                    0.3,
                    "How strongly a word must look at a pixel, as a fraction of its maximum: lower takes in "
                    "more, higher keeps more of the source.",
                ),
                _fraction(
                    "start",
                    0.2,
                    "The part of the run that goes by before the blend begins: later lets shapes settle.",
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="White where the targets may change; with words, both must allow it.",
                ),
                io.Float.Input(
                    "softness",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    optional=True,
                    tooltip="Width of the regions' soft edge around the threshold, from 0 (hard) to 1.",
                ),
            ],
            outputs=[BlendIO.Output("blend", display_name="blend")],
        )

    @classmethod
    def execute(
        cls,
        words: str,
        source_words: str,
        exclude: str,
        threshold: float,
        start: float,
        mask: Tensor | None = None,
        softness: float = 0.0,
    ) -> io.NodeOutput:
        return io.NodeOutput(read_blend(words, source_words, exclude, threshold, start, softness, mask))


class AttentionController(io.ComfyNode):
    """A model that samples source and targets side by side, for stock samplers."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="P2PAttentionController",
            display_name="Attention Controller",
            category=CATEGORY,
            **also_called("cross attention control", "masactrl"),
            description="Patches a model so that KSampler, SamplerCustom and SamplerCustomAdvanced sample "
            "the pair: feed them this model, this positive and a latent from Paired Latent.",
            inputs=[
                model_input(),
                edit_input(),
                tau_input(),
                blend_input(),
                trajectory_input(),
                reuse_input(),
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
        tau: TauSchedule,
        blend: LocalBlend | None = None,
        trajectory: Trajectory | None = None,
        reuse_gb: float = 0.0,
    ) -> io.NodeOutput:
        check_wiring(cls.hidden)
        check_words(edit, tau, blend)
        maps = MapsHandle(wanted=is_wired(cls.hidden, MAPS_OUTPUT))
        keep = keep_sources(cls.hidden, reuse_gb)
        controlled, positive = control(
            model, edit, tau, blend=blend, trajectory=trajectory, maps=maps, keep=keep
        )
        return io.NodeOutput(controlled, positive, maps)
