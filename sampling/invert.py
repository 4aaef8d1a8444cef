"""From a picture back to the noise that it would be sampled from: DDIM inversion."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import comfy.sample
import comfy.samplers
import comfy.utils
import latent_preview
import torch
from comfy.patcher_extension import WrappersMP
from torch import Tensor
from tqdm.auto import trange

from .families import family_of
from .host import KEY
from .network import layers_of
from .trajectory import ModelIdentity, Trajectory


def invert(
    model: Any,
    positive: list,
    latent: dict,
    steps: int,
    scheduler: str,
    cfg: float = 1.0,
    refinement: int = 0,
    negative: list | None = None,
    reconstruction: str = "direct",
) -> tuple[Trajectory, dict]:
    """Find the noise that sampling turns into the picture, by running Euler's (DDIM's) steps backwards.

    With d(x, sigma) = (x - denoised(x, sigma)) / sigma, sampling goes x' = x + (sigma' - sigma) d(x, sigma)
    from each sigma to the next lower sigma'. Its inverse is the x that solves

        x = x' + (sigma - sigma') d(x, sigma)

    DDIM inversion (Song et al. 2021, as the authors of Prompt-to-Prompt run it) takes x' itself for the x on
    the right, brought to sigma's scale. Each round of refinement puts the result in there once more: a
    fixed-point iteration (Pan et al. 2023), after which sampling returns closer to the picture.

    steps, scheduler: of the sampling to come. cfg: guidance, 1 for none as published. refinement: rounds; a
    step costs 1 + refinement model calls. negative: for a cfg other than 1. A batch gives one path per item.

    Returns the trajectory and its first entry as a LATENT, from which a sampler without added noise starts.
    Raises ValueError for an unsupported model and for what does not fit together.
    """
    _check(model, positive, latent, cfg, negative)
    picture = latent["samples"]
    sampling = model.get_model_object("model_sampling")
    sigmas = comfy.samplers.calculate_sigmas(sampling, scheduler, steps)
    path: list[Tensor] = []

    def keep(x: Tensor) -> None:
        path.append(x.to("cpu", picture.dtype))

    def backwards(
        model: Any, x: Tensor, sigmas: Tensor, extra_args: dict, callback: Callable, disable: bool
    ) -> Tensor:
        keep(x)
        ones = x.new_ones([x.shape[0]])
        for n in trange(len(sigmas) - 1, disable=disable):
            sigma, lower = sigmas[-2 - n], sigmas[-1 - n]
            noisier = x * (_input_scale(sampling, lower) / _input_scale(sampling, sigma)).to(x)
            for _ in range(1 + refinement):
                denoised = model(noisier, sigma * ones, **extra_args)
                noisier = x + (sigma - lower) * (noisier - denoised) / sigma
            x = noisier
            keep(x)
            callback({"i": n, "denoised": denoised, "x": x})
        return x

    noise = comfy.sample.sample_custom(
        model,
        torch.zeros_like(picture, dtype=torch.float32),
        cfg,
        comfy.samplers.KSAMPLER(backwards),
        sigmas,
        positive,
        [] if negative is None else negative,
        picture,
        callback=latent_preview.prepare_callback(model, steps),
        disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
        seed=0,
    )
    trajectory = Trajectory(
        tuple(reversed(path)), tuple(sigmas.tolist()), ModelIdentity.of(model), reconstruction, scheduler
    )
    return trajectory, {**latent, "samples": noise}


def _input_scale(sampling: Any, sigma: Tensor) -> Tensor:
    """What the network's input is multiplied with: 1 / sqrt(sigma^2 + 1) for Stable Diffusion."""
    return sampling.calculate_input(sigma, torch.ones_like(sigma))


def _check(model: Any, positive: list, latent: dict, cfg: float, negative: list | None) -> None:
    family = family_of(model.model)
    if family is not None:
        raise ValueError(
            f"Invert Image does not work on transformers yet, and this model is {family.name}; use an SD1.x, "
            "SD2.x or SDXL model."
        )
    layers_of(model.get_model_object("diffusion_model"))
    if model.get_wrappers(WrappersMP.OUTER_SAMPLE, KEY):
        raise ValueError(
            "Invert Image inverts one picture, and its model comes from an Attention Controller; "
            "connect the model from before it."
        )
    if any(KEY in options for _, options in positive):
        raise ValueError(
            "Invert Image needs the source prompt's own conditioning, and this one belongs to an Attention "
            "Controller; connect a CLIP Text Encode with the source prompt."
        )
    if cfg != 1.0 and negative is None:
        raise ValueError(
            f"cfg is {cfg:g}, and guidance needs a negative prompt: connect the sampler's negative, "
            "or set cfg to 1."
        )
    picture = latent["samples"]
    channels = model.get_model_object("latent_format").latent_channels
    if picture.ndim != 4 or picture.shape[1] != channels:
        raise ValueError(
            f"The latent has shape {tuple(picture.shape)}; this model needs (batch, {channels}, height, "
            "width). Encode the picture with the VAE of the same checkpoint."
        )
    if not torch.count_nonzero(picture):
        raise ValueError("The latent is empty; connect a picture that was encoded with VAE Encode.")
    if "noise_mask" in latent:
        raise ValueError(
            "The latent has a noise mask, but inversion is of the whole picture; "
            "remove Set Latent Noise Mask."
        )
    sampling = model.get_model_object("model_sampling")
    one = torch.ones(1, 1, 1, 1)
    if not torch.equal(sampling.noise_scaling(torch.tensor(2.0), torch.zeros_like(one), one, False), one):
        raise ValueError(
            f"The model's noise schedule {type(sampling).__name__} cannot start from a given latent, so an "
            "inverted one would not come back; use a Stable Diffusion model."
        )
