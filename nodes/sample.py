"""Sampling pairs: the paired latent, the paired sampler, and taking branches apart again."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io
from torch import Tensor

from ..attention.blend import LocalBlend
from ..attention.edit import Edit
from ..attention.schedule import TauSchedule
from ..sampling.choices import samplers, schedulers
from ..sampling.latents import check_rows, paired_latent, split_rows
from ..sampling.maps import MapsHandle
from ..sampling.sampler import sample_pairs
from ..sampling.trajectory import Trajectory
from .types import (
    CATEGORY,
    MAPS_OUTPUT,
    MapsIO,
    also_called,
    blend_input,
    check_options,
    check_words,
    edit_input,
    is_wired,
    keep_sources,
    model_input,
    reuse_input,
    tau_input,
    trajectory_input,
)


class PairedLatent(io.ComfyNode):
    """One latent per branch, for stock samplers."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="P2PPairedLatent",
            display_name="Paired Latent",
            category=CATEGORY,
            description="Repeats each latent for source and targets, which then start from the same noise.",
            inputs=[
                io.Latent.Input("latent", tooltip="An ordinary latent or a batch: one pair for each item."),
                edit_input(),
            ],
            outputs=[io.Latent.Output("paired", display_name="latent")],
        )

    @classmethod
    def execute(cls, latent: dict, edit: Edit) -> io.NodeOutput:
        return io.NodeOutput(paired_latent(latent, edit.branches))


class PairedSampler(io.ComfyNode):
    """Controller, paired latent, sampler and split in one node."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="P2PSampler",
            display_name="Paired Sampler",
            category=CATEGORY,
            **also_called("paired sampler"),
            description="Denoises source and targets side by side from the same noise, injecting the "
            "source's attention into the targets. A batch of latents gives one pair per item.",
            inputs=[
                model_input(),
                edit_input(),
                tau_input(),
                io.Conditioning.Input(
                    "negative", tooltip="The negative prompt, for source and targets alike."
                ),
                io.Latent.Input(
                    "latent",
                    tooltip="An ordinary latent, or, for a second pass, the paired one of another sampler.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=True,
                    tooltip="Any whole number; the same one gives the same source as a KSampler with the "
                    "source prompt.",
                ),
                io.Int.Input("steps", default=20, min=1, max=10000, tooltip="Denoising steps, from 1."),
                io.Float.Input(
                    "cfg",
                    default=7.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    round=0.01,
                    tooltip="Guidance, from 0 to 100: 1 is none, higher follows the prompts more.",
                ),
                io.Combo.Input(
                    "sampler_name",
                    options=samplers(),
                    tooltip="Any of ComfyUI's samplers.",
                ),
                io.Combo.Input(
                    "scheduler",
                    options=schedulers(),
                    tooltip="Spacing of the noise levels.",
                ),
                io.Float.Input(
                    "denoise",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="From 0 to 1: 1 starts from pure noise, less from the latent, as in KSampler.",
                ),
                blend_input(),
                trajectory_input(),
                reuse_input(),
            ],
            outputs=[
                io.Latent.Output("source", display_name="source"),
                io.Latent.Output("targets", display_name="targets"),
                MapsIO.Output("maps", display_name="maps"),
                io.Latent.Output(
                    "paired",
                    display_name="paired",
                    tooltip="Source and targets of each pair side by side: upscale it and connect it to "
                    "another Paired Sampler for a second pass.",
                ),
            ],
            hidden=[io.Hidden.prompt, io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        edit: Edit,
        tau: TauSchedule,
        negative: list,
        latent: dict,
        seed: int,
        steps: int,
        cfg: float,
        sampler_name: str,
        scheduler: str,
        denoise: float,
        blend: LocalBlend | None = None,
        trajectory: Trajectory | None = None,
        reuse_gb: float = 0.0,
    ) -> io.NodeOutput:
        check_options(
            sampler_name=(sampler_name, samplers()),
            scheduler=(scheduler, schedulers()),
        )
        check_words(edit, tau, blend)
        maps = MapsHandle(wanted=is_wired(cls.hidden, MAPS_OUTPUT))
        source, targets, paired = sample_pairs(
            model,
            edit,
            tau,
            negative=negative,
            latent=latent,
            seed=seed,
            steps=steps,
            cfg=cfg,
            sampler_name=sampler_name,
            scheduler=scheduler,
            denoise=denoise,
            blend=blend,
            trajectory=trajectory,
            maps=maps,
            keep=keep_sources(cls.hidden, reuse_gb),
        )
        return io.NodeOutput(source, targets, maps, paired)


class SplitBranches(io.ComfyNode):
    """Images of a paired batch, sources and targets apart."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="P2PSplitBranches",
            display_name="Split Branches",
            category=CATEGORY,
            description="Takes the images of a paired batch apart: the sources, and the targets.",
            inputs=[
                io.Image.Input("images", tooltip="Images decoded from a paired latent."),
                edit_input(),
            ],
            outputs=[
                io.Image.Output("source", display_name="source"),
                io.Image.Output("targets", display_name="targets"),
            ],
        )

    @classmethod
    def execute(cls, images: Tensor, edit: Edit) -> io.NodeOutput:
        check_rows(images.shape[0], edit.branches, "The image batch")
        return io.NodeOutput(*split_rows(images, edit.branches))
