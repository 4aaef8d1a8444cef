"""The paired sampler: source and targets in one batch, through the host's own sampling."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import comfy.sample
import comfy.utils
import latent_preview
import torch
from einops import repeat
from torch import Tensor

from ..attention.blend import LocalBlend
from ..attention.edit import Edit
from ..attention.schedule import TauSchedule
from .controller import control
from .maps import MapsHandle
from .pairing import PAIRED, paired_latent, repeated_latent, seeing_images_of, source_latent, split_rows
from .trajectory import Trajectory


def sample_pairs(
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
    maps: MapsHandle | None = None,
    reuse: float = 0.0,
) -> tuple[dict, dict, dict]:
    """Sample every item of a LATENT as a pair; with a trajectory, from its noise and not a seed's.

    latent: an ordinary one, which all branches start from, or a paired one (`pairing.PAIRED`), whose branches
    start from their own rows: for second passes.
    Returns the sources' LATENT, item by item, the targets', all targets of an item in a row, and all of them
    as a paired one.
    """
    patched, positive = control(model, edit, tau, blend, trajectory, maps, reuse)
    positive = seeing_images_of(negative, positive)
    latent = {**latent, "samples": comfy.sample.fix_empty_latent_channels(patched, latent["samples"])}
    items = source_latent(latent, edit.branches)
    noise = comfy.sample.prepare_noise(items["samples"], seed, items.get("batch_index"))
    paired = latent if PAIRED in latent else paired_latent(items, edit.branches)
    samples = comfy.sample.sample(
        patched,
        repeat(noise, "b ... -> (b n) ...", n=edit.branches),
        steps,
        cfg,
        sampler_name,
        scheduler,
        positive,
        negative,
        paired["samples"],
        denoise=denoise,
        noise_mask=paired.get("noise_mask"),
        callback=preview_callback(patched, steps, edit.branches),
        disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
        seed=seed,
    )
    sources, targets = split_rows(samples, edit.branches)
    return (
        {**items, "samples": sources},
        {**repeated_latent(items, len(edit.targets)), "samples": targets},
        {**paired, "samples": samples},
    )


def preview_callback(model: Any, steps: int, branches: int) -> Callable:
    """The host's preview and progress callback, showing the first pair's branches side by side."""
    show = latent_preview.prepare_callback(model, steps)

    def callback(step: int, x0: Tensor, x: Tensor, total_steps: int) -> None:
        show(step, torch.cat([*x0[:branches]], dim=-1)[None], x, total_steps)

    return callback
