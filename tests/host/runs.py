"""Sampling runs for the laws: plain runs of the host, and paired runs through every way that a graph has.

Sizes are small, so that a run takes a fraction of a second: 8 x 8 latents, four steps.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import comfy.samplers
import comfy.utils
import pytest
import torch
from comfy_extras import nodes_custom_sampler as custom
from p2p.attention.edit import Edit
from p2p.attention.schedule import TauSchedule, Window
from p2p.nodes import AttentionController, PairedLatent, PairedSampler
from p2p.sampling.encode import add_target, start_edit
from torch import Tensor

import nodes as host_nodes

comfy.utils.set_progress_bar_enabled(False)

SAMPLERS = comfy.samplers.KSampler.SAMPLERS
SCHEDULERS = comfy.samplers.KSampler.SCHEDULERS

SOURCE = "a cat riding a bicycle"
TARGET = "a dog riding a red car"

EULER = {"sampler_name": "euler", "scheduler": "normal"}

EMPTY = TauSchedule(Window(0, 0), Window(0, 0))
FULL = TauSchedule(Window(0, 1), Window(0, 1), self_resolution=1.0)
PART = TauSchedule(Window(0, 0.8), Window(0, 0.5), fade=0.3, self_resolution=1.0)

TOLERANCE = 2e-3
EDITED = 1e-2
"""What differs by more was edited, as a fraction of the largest value."""

HOST_WARNINGS = [
    pytest.mark.filterwarnings("ignore:Should have t:UserWarning"),  # torchsde, on float noise
    pytest.mark.filterwarnings("ignore:To copy construct:UserWarning"),  # the host's dpm_fast
]


def difference(found: Tensor, expected: Tensor) -> float:
    """Largest difference as a fraction of the largest value."""
    assert found.shape == expected.shape and torch.isfinite(found).all() and torch.isfinite(expected).all()
    return float((found - expected).abs().max() / expected.abs().max())


def assert_close(found: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> None:
    assert difference(found, expected) <= tolerance


def empty(rows: int = 1, height: int = 8, width: int = 8) -> dict:
    return {"samples": torch.zeros(rows, 4, height, width)}


def picture(rows: int = 1, height: int = 8, width: int = 8) -> dict:
    """A latent with something in it, for img2img."""
    return {"samples": torch.randn(rows, 4, height, width, generator=torch.Generator().manual_seed(9))}


@dataclass(frozen=True)
class Settings:
    """What the sampler node is told."""

    seed: int = 5
    steps: int = 4
    cfg: float = 4.0
    sampler: str = "euler"
    scheduler: str = "normal"
    denoise: float = 1.0
    advanced: dict = field(default_factory=dict)


def ksampler(model: Any, positive: list, negative: list, latent: dict, s: Settings) -> Tensor:
    return host_nodes.common_ksampler(
        model,
        s.seed,
        s.steps,
        s.cfg,
        s.sampler,
        s.scheduler,
        positive,
        negative,
        latent,
        s.denoise,
        **s.advanced,
    )[0]["samples"]


def sigmas_of(model: Any, s: Settings) -> Tensor:
    return comfy.samplers.KSampler(
        model,
        steps=s.steps,
        device=model.load_device,
        sampler=s.sampler,
        scheduler=s.scheduler,
        denoise=s.denoise,
    ).sigmas


def sampler_custom(
    model: Any, positive: list, negative: list, latent: dict, s: Settings, sampler: Any = None
) -> Tensor:
    sampler = sampler or comfy.samplers.sampler_object(s.sampler)
    output = custom.SamplerCustom.execute(
        model, True, s.seed, s.cfg, positive, negative, sampler, sigmas_of(model, s), latent
    )
    return output.args[0]["samples"]


def sampler_custom_advanced(
    model: Any, positive: list, negative: list, latent: dict, s: Settings, guider: Any = None
) -> Tensor:
    guider = guider or custom.CFGGuider.execute(model, positive, negative, s.cfg).args[0]
    output = custom.SamplerCustomAdvanced.execute(
        custom.RandomNoise.execute(s.seed).args[0],
        guider,
        comfy.samplers.sampler_object(s.sampler),
        sigmas_of(model, s),
        latent,
    )
    return output.args[0]["samples"]


def in_graph(node: Any, unique_id: str, *others: str) -> Any:
    """A node class as the host executes it within a graph of nodes with these ids."""
    prompt = {name: {"inputs": {}} for name in (unique_id, *others)}
    hidden = SimpleNamespace(unique_id=unique_id, prompt=prompt)
    return type(node.__name__, (node,), {"hidden": hidden})


def paired_sampler(
    model: Any,
    edit: Edit,
    tau: TauSchedule,
    negative: list,
    latent: dict,
    s: Settings,
    node: Any = PairedSampler,
    **optional: Any,
) -> tuple:
    """The outputs of a Paired Sampler. optional: its optional inputs."""
    return node.execute(
        model,
        edit,
        tau,
        negative,
        latent,
        s.seed,
        s.steps,
        s.cfg,
        s.sampler,
        s.scheduler,
        s.denoise,
        **optional,
    ).args


STOCK = {
    "KSampler": ksampler,
    "SamplerCustom": sampler_custom,
    "SamplerCustomAdvanced": sampler_custom_advanced,
}
WAYS = [*STOCK, "P2PSampler"]


class Studio:
    """The bundled model with its helpers; plain runs are remembered."""

    def __init__(self, model: Any, clip: Any):
        self.model, self.clip = model, clip
        self.negative = self.encode("")
        self._plain: dict = {}

    def empty(self, rows: int = 1, height: int = 8, width: int = 8) -> dict:
        return empty(rows, height, width)

    def encode(self, text: str) -> list:
        return self.clip.encode_from_tokens_scheduled(self.clip.tokenize(text))

    def edit(self, source: str = SOURCE, *targets: str, mode: Any = "auto") -> Edit:
        first, *others = targets or (TARGET,)
        edit = start_edit(self.clip, source, first, mode)
        for target in others:
            edit = add_target(self.clip, edit, target, mode)
        return edit

    def plain(
        self, text: str, settings: Settings = Settings(), latent: dict | None = None, model: Any = None
    ) -> Tensor:
        """An ordinary run of the host with one prompt."""
        if latent is not None or model is not None:
            return ksampler(
                model or self.model, self.encode(text), self.negative, latent or self.empty(), settings
            )
        key = (text, *vars(replace(settings, advanced={})).values())[:-1]
        if key not in self._plain:
            self._plain[key] = ksampler(
                self.model, self.encode(text), self.negative, self.empty(), settings
            )
        return self._plain[key]

    def plain_batch(self, texts: list[str], settings: Settings, latent: dict, model: Any = None) -> Tensor:
        """An ordinary run of the host with one prompt per row and one noise for all rows."""
        positive = [[torch.cat([self.encode(text)[0][0] for text in texts]), {}]]
        rows = {
            **latent,
            "samples": latent["samples"].repeat(len(texts), 1, 1, 1),
            "batch_index": [0] * len(texts),
        }
        return ksampler(model or self.model, positive, self.negative, rows, settings)

    def paired(
        self,
        edit: Edit,
        tau: TauSchedule,
        settings: Settings = Settings(),
        latent: dict | None = None,
        way: str = "KSampler",
        model: Any = None,
        negative: list | None = None,
    ) -> tuple[Tensor, Tensor]:
        """A paired run: (sources, targets), through stock nodes or the Paired Sampler."""
        model, latent = model or self.model, latent or self.empty()
        negative = negative or self.negative
        if way == "P2PSampler":
            source, targets, *_ = paired_sampler(model, edit, tau, negative, latent, settings)
            return source["samples"], targets["samples"]
        controlled, positive = AttentionController.execute(model, edit, tau).args[:2]
        rows = STOCK[way](controlled, positive, negative, self.rows(edit, latent), settings)
        return self.split(edit, rows)

    def rows(self, edit: Edit, latent: dict) -> dict:
        return PairedLatent.execute(latent, edit).args[0]

    @staticmethod
    def split(edit: Edit, rows: Tensor) -> tuple[Tensor, Tensor]:
        branch = torch.arange(rows.shape[0]) % edit.branches
        return rows[branch == 0], rows[branch > 0]
