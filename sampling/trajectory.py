"""A picture's path from noise, and runs whose source follows it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from comfy.samplers import KSampler, calculate_sigmas
from einops import repeat
from torch import Tensor

from .run import Guest, Run, Start

RECONSTRUCTIONS = ("direct", "negative prompt")


@dataclass(frozen=True, eq=False)
class ModelIdentity:
    """Which model a trajectory was made with, without keeping the model in memory.

    Clones of one loaded model, with whatever patches, are the same model. After that model was freed, any of
    its class and network configuration counts as it was loaded again.
    """

    name: str
    network: str
    loaded: Callable[[], Any]

    @classmethod
    def of(cls, model: Any) -> ModelIdentity:
        base = model.model
        config = getattr(base.model_config, "unet_config", {})
        network = repr(sorted((name, str(value)) for name, value in config.items()))
        return cls(type(base).__name__, network, weakref.ref(base))

    def is_of(self, model: Any) -> bool:
        if self.loaded() is not None:
            return self.loaded() is model.model
        other = ModelIdentity.of(model)
        return (self.name, self.network) == (other.name, other.network)


@dataclass(frozen=True, eq=False)
class Trajectory:
    """The path of a picture from noise (entry 0) to the picture (last entry), one entry for each sigma.

    latents: each (items, channels, height, width), on the CPU in the picture's dtype, in the sampler's space.
    sigmas: descending, the last one 0. model: what it was made with.
    reconstruction: how a run's source is kept on it. "direct": its latent is put back on the path at every
        step (Ju et al. 2024). "negative prompt": the run starts where the path does, and the source prompt is
        the source's own negative prompt, so that guidance does not move it (Miyake et al. 2023).
    scheduler: the host's name for the spacing of the sigmas.
    """

    latents: tuple[Tensor, ...]
    sigmas: tuple[float, ...]
    model: ModelIdentity
    reconstruction: str = "direct"
    scheduler: str | None = None

    @property
    def steps(self) -> int:
        return len(self.sigmas) - 1

    def check_model(self, model: Any) -> None:
        """Raise ValueError, naming both, if the model of a run is another one."""
        if not self.model.is_of(model):
            other = type(model.model).__name__
            what = f"of class {other}" if other != self.model.name else f"another {other}"
            raise ValueError(
                f"The trajectory was inverted with a model of class {self.model.name}, but the run's model "
                f"is {what}. Connect Invert Image to the model that samples."
            )

    def offset_in(self, sigmas: Sequence[float], sampling: Any) -> int:
        """Where in the path a run with these sigmas begins: 0, or later for denoise below 1.

        sampling: the model's, which knows the schedulers' sigmas.
        Raises ValueError, which says both sides, unless they are a part of the path's.
        """
        wanted, own = torch.tensor(sigmas), torch.tensor(self.sigmas)
        for offset in range(len(own) - len(wanted) + 1):
            if torch.allclose(own[offset : offset + len(wanted)], wanted, rtol=1e-4, atol=1e-6):
                return offset
        raise ValueError(
            f"The trajectory has {_steps_of(self.sigmas, self.scheduler)}, but the run has "
            f"{_steps_of(sigmas, _scheduler_of(sigmas, sampling))}. "
            "Use the same steps and scheduler in Invert Image and in the sampler (with denoise below 1, "
            "Invert Image needs steps / denoise)."
        )


def _steps_of(sigmas: Sequence[float], scheduler: str | None) -> str:
    return (
        f"{len(sigmas) - 1} steps"
        + (f" of scheduler {scheduler}" if scheduler else "")
        + f" from sigma {sigmas[0]:.4g} to {sigmas[-1]:.4g}"
        + (f" (the next is {sigmas[1]:.4g})" if len(sigmas) > 1 else "")
    )


def _scheduler_of(sigmas: Sequence[float], sampling: Any) -> str | None:
    """The host's scheduler that gives these sigmas in as many steps, if one does."""
    for name in KSampler.SCHEDULERS if len(sigmas) > 1 else ():
        given = calculate_sigmas(sampling, name, len(sigmas) - 1).tolist()
        if len(given) == len(sigmas) and torch.allclose(
            torch.tensor(given), torch.tensor(sigmas), rtol=1e-4, atol=1e-6
        ):
            return name
    return None


@dataclass(frozen=True, eq=False)
class Following:
    """Keeps the sources of a run on a trajectory: an `Entry`.

    sampling: of the run's model, which knows the schedulers' sigmas.
    """

    trajectory: Trajectory
    sampling: Any

    def begin(self, run: Run, start: Start) -> Guest:
        """Raises ValueError for a run that cannot follow this trajectory."""
        check_first_order(start.sampler)
        items, *size = self.trajectory.latents[0].shape
        if list(run.shape[1:]) != size:
            raise ValueError(
                f"The trajectory has latents of {_size(size)}, but the run's are of {_size(run.shape[1:])}. "
                "Connect the latent that was inverted."
            )
        pairs = run.shape[0] // run.branches
        if pairs != items:
            raise ValueError(
                f"The trajectory has a batch of {items}, but the run has {pairs} pairs. "
                "Connect the latent that was inverted."
            )
        if start.denoise_mask is not None:
            raise ValueError(
                "A trajectory and a noise mask exclude each other: both say what the source is outside the "
                "mask. Remove Set Latent Noise Mask; Local Blend with a mask keeps the rest of the picture."
            )
        offset = self.trajectory.offset_in(run.sigmas, self.sampling)
        return _Follower(run, self.trajectory, offset, bool(torch.count_nonzero(start.noise)))


class _Follower(Guest):
    """Every branch starts from the path; the sources stay on it.

    With direct inversion (Ju et al. 2024) the source's latent is put back on the path before every step and
    at the end, so the source is the image whatever the guidance. A run that adds no noise goes on from the
    latent that it was given, as in any sampler; only its sources are put back.

    offset: where in the path the run begins. fresh: whether the run adds noise.
    """

    acts_on_state = True

    def __init__(self, run: Run, trajectory: Trajectory, offset: int, fresh: bool):
        self.run, self.trajectory, self.offset, self.fresh = run, trajectory, offset, fresh

    def step(self, x: Tensor, n: int) -> None:
        branches = self.run.branches
        if n == 0 and self.fresh:
            latents = self.trajectory.latents[self.offset].to(x, non_blocking=True)
            x.copy_(repeat(latents, "p ... -> (p n) ...", n=branches))
        elif self.trajectory.reconstruction == "direct":
            x[::branches] = self.trajectory.latents[self.offset + n].to(x, non_blocking=True)


def follow(model: Any, trajectory: Trajectory | None) -> Following | None:
    """What keeps the sources of a run of `model` on the trajectory. Raises ValueError for another model."""
    if trajectory is None:
        return None
    trajectory.check_model(model)
    return Following(trajectory, model.get_model_object("model_sampling"))


def _size(shape: Sequence[int]) -> str:
    channels, height, width = shape
    return f"{width} x {height} with {channels} channels"


FIRST_ORDER = {
    "sample_euler": "s_churn",
    "sample_euler_cfg_pp": None,
    "sample_euler_ancestral": "eta",
    "sample_euler_ancestral_cfg_pp": "eta",
}
"""Sampler functions whose every step depends on the state alone; and the option that must be 0 for that."""


def check_first_order(sampler: Any) -> None:
    """Raise ValueError unless a SAMPLER is deterministic and steps by the latest state alone."""
    function = getattr(sampler, "sampler_function", None)
    name = getattr(function, "__name__", type(sampler).__name__)
    option = FIRST_ORDER.get(name, "")
    if function is not None and name in FIRST_ORDER:
        if option is None:
            return
        default = signature(function).parameters[option].default
        if getattr(sampler, "extra_options", {}).get(option, default) == 0:
            return
    raise ValueError(
        f"The sampler {name.removeprefix('sample_')} cannot follow a trajectory"
        + (f" unless its {option} is 0" if option else "")
        + ": it must be deterministic and of first order. Use euler, ddim or euler_cfg_pp."
    )
