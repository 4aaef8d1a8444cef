"""Nodes on conditionings, latents and samplers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from comfy.controlnet import T2IAdapter
from p2p.tests.host.beside import AVERAGES, add, files, stock, stock_outputs
from p2p.tests.host.runs import (
    Settings,
    Studio,
    ksampler,
    picture,
    sampler_custom_advanced,
)
from torch import Tensor

# Conditioning: applied to the controller's positive, or to a plain one


def half(rows: int = 1, height: int = 64, width: int = 64) -> Tensor:
    mask = torch.zeros(rows, height, width)
    for row in range(rows):
        mask[row, :, : width // 2 + row * width // 8] = 1.0
    return mask


def other(studio: Studio) -> list:
    return studio.encode("a castle on a mountain")


def area(conditioning: list, width: int, height: int, x: int, y: int) -> list:
    return stock(
        "nodes",
        "ConditioningSetArea",
        conditioning=conditioning,
        width=width,
        height=height,
        x=x,
        y=y,
        strength=1.0,
    )


def masked(conditioning: list, mask: Tensor, set_cond_area: str = "default") -> list:
    return stock(
        "nodes",
        "ConditioningSetMask",
        conditioning=conditioning,
        mask=mask,
        set_cond_area=set_cond_area,
        strength=1.0,
    )


def combine(one: list, two: list) -> list:
    return stock("nodes", "ConditioningCombine", conditioning_1=one, conditioning_2=two)


def timed(conditioning: list, start: float, end: float) -> list:
    return stock("nodes", "ConditioningSetTimestepRange", conditioning=conditioning, start=start, end=end)


def boxes(studio: Studio, positive: list) -> list:
    gligen = stock("nodes", "GLIGENLoader", gligen_name=files.gligen(studio))
    return stock(
        "nodes",
        "GLIGENTextBoxApply",
        conditioning_to=positive,
        clip=studio.clip,
        gligen_textbox_model=gligen,
        text="a boat",
        width=32,
        height=32,
        x=16,
        y=16,
    )


def lora_hooks(studio: Studio, strength_clip: float = 0.0) -> Any:
    """A LoRA that is weaker from half of the run on."""
    hooks = stock(
        "comfy_extras.nodes_hooks",
        "CreateHookLora",
        lora_name=files.lora(studio),
        strength_model=0.8,
        strength_clip=strength_clip,
    )
    keyframe = stock("comfy_extras.nodes_hooks", "CreateHookKeyframe", strength_mult=0.3, start_percent=0.5)
    return stock("comfy_extras.nodes_hooks", "SetHookKeyframes", hooks=hooks, hook_kf=keyframe)


def hooked(studio: Studio, conditioning: list) -> list:
    return stock(
        "comfy_extras.nodes_hooks",
        "ConditioningSetProperties",
        cond_NEW=conditioning,
        strength=1.0,
        set_cond_area="default",
        hooks=lora_hooks(studio),
    )


def with_default(studio: Studio, positive: list) -> list:
    """The pair under a mask, another prompt wherever no mask is."""
    return stock(
        "comfy_extras.nodes_hooks",
        "ConditioningSetDefaultAndCombine",
        cond=masked(positive, half()),
        cond_DEFAULT=other(studio),
    )


def rows_of(studio: Studio, *texts: str) -> list:
    """A conditioning of several rows, as prompt travel nodes make them: one for each item of the batch."""
    return [[torch.cat([studio.encode(text)[0][0] for text in texts]), {}]]


kind = "Conditioning"
add(kind, "ConditioningCombine", positive=lambda s, c: combine(c, other(s)))
add(kind, "ConditioningSetArea", positive=lambda s, c: area(c, 32, 64, 0, 0), note="An area for the pair.")
add(
    kind,
    "ConditioningSetArea for another prompt",
    positive=lambda s, c: combine(c, area(other(s), 32, 32, 32, 0)),
)
add(kind, "ConditioningSetMask", positive=lambda s, c: combine(masked(c, half()), other(s)))
add(
    kind,
    "ConditioningSetMask with mask bounds",
    positive=lambda s, c: combine(masked(c, half(), "mask bounds"), other(s)),
)
add(
    kind,
    "ConditioningSetMask with a mask per item of the batch",
    positive=lambda s, c: combine(masked(c, half(2)), other(s)),
    size=(2, 8, 8),
)
add(
    kind,
    "Three prompts on areas",
    positive=lambda s, c: combine(
        combine(area(c, 64, 32, 0, 0), area(other(s), 32, 32, 0, 32)),
        area(s.encode("a tree"), 32, 32, 32, 32),
    ),
)
add(
    kind,
    "ConditioningSetTimestepRange",
    positive=lambda s, c: combine(timed(c, 0.0, 0.6), timed(other(s), 0.6, 1.0)),
)
add(
    kind,
    "ConditioningSetAreaStrength",
    positive=lambda s, c: combine(
        c, stock("nodes", "ConditioningSetAreaStrength", conditioning=other(s), strength=0.4)
    ),
)
add(kind, "ConditioningSetDefaultAndCombine", positive=with_default)
add(
    kind,
    "LoRA hooks with keyframes, on the pair",
    positive=hooked,
    note="*Create Hook LoRA*, *Set Hook Keyframes*, *Cond Set Props* on the controller's positive.",
)
add(kind, "LoRA hooks on the negative", negative=hooked)
add(
    kind,
    "ConditioningAverage",
    positive=lambda s, c: stock(
        "nodes",
        "ConditioningAverage",
        conditioning_to=c,
        conditioning_from=other(s),
        conditioning_to_strength=0.7,
    ),
    note="The controller's positive goes into `conditioning_to`.",
)
add(
    kind,
    "ConditioningAverage on the negative",
    negative=lambda s, c: stock(
        "nodes",
        "ConditioningAverage",
        conditioning_to=s.encode("blurry"),
        conditioning_from=other(s),
        conditioning_to_strength=0.5,
    ),
)
add(
    kind,
    "ConditioningConcat on the negative",
    negative=lambda s, c: stock("nodes", "ConditioningConcat", conditioning_to=c, conditioning_from=other(s)),
)
add(kind, "Several negatives", negative=lambda s, c: combine(s.encode("blurry"), other(s)))
add(
    kind,
    "A negative per item of the batch",
    negative=lambda s, c: rows_of(s, "blurry", "a castle on a mountain"),
    size=(2, 8, 8),
)
add(
    kind,
    "ConditioningZeroOut as negative",
    negative=lambda s, c: stock("nodes", "ConditioningZeroOut", conditioning=c),
)
add(kind, "GLIGENTextBoxApply", positive=boxes, shared=boxes)

# Guiders


def guided(make: Any) -> Any:
    """A sampler node with a guider: make(studio, model, positive, negative) -> GUIDER."""

    def sample(
        studio: Studio, model: Any, positive: list, negative: list, latent: dict, settings: Settings
    ) -> Tensor:
        guider = make(studio, model, positive, negative)
        return sampler_custom_advanced(model, positive, negative, latent, settings, guider)

    return sample


custom = "comfy_extras.nodes_custom_sampler"
for style in ("regular", "nested"):
    for first in (True, False):
        add(
            "Guidance",
            f"DualCFGGuider, {style}, the pair as cond{1 if first else 2}",
            line="DualCFGGuider",
            note="The pair may be cond1 or cond2, the style regular or nested.",
            sample=guided(
                lambda s, model, positive, negative, style=style, first=first: stock(
                    custom,
                    "DualCFGGuider",
                    model=model,
                    cond1=positive if first else other(s),
                    cond2=other(s) if first else positive,
                    negative=negative,
                    cfg_conds=3.0,
                    cfg_cond2_negative=2.0,
                    style=style,
                )
            ),
        )
add(
    "Guidance",
    "PerpNegGuider",
    sample=guided(
        lambda s, model, positive, negative: stock(
            "comfy_extras.nodes_perpneg",
            "PerpNegGuider",
            model=model,
            positive=positive,
            negative=s.encode("blurry"),
            empty_conditioning=negative,
            cfg=4.0,
            neg_scale=1.0,
        )
    ),
    fails=AVERAGES,
)
add(
    "Guidance",
    "BasicGuider",
    sample=guided(
        lambda s, model, positive, _: stock(custom, "BasicGuider", model=model, conditioning=positive)
    ),
)

# Control


def hints(count: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.rand(count, 64, 64, 3, generator=generator)


def controlled(
    studio: Studio, positive: list, negative: list, image: Tensor, start: float, end: float
) -> tuple:
    net = stock("nodes", "ControlNetLoader", control_net_name=files.control_net(studio))
    return stock_outputs(
        "nodes",
        "ControlNetApplyAdvanced",
        positive=positive,
        negative=negative,
        control_net=net,
        image=image,
        strength=1.0,
        start_percent=start,
        end_percent=end,
    )


def with_control(*images: Tensor, start: float = 0.0, end: float = 1.0) -> dict[str, Any]:
    """One Apply ControlNet per image batch, on positive and negative; for Paired Sampler on its negative."""

    def sample(
        studio: Studio, model: Any, positive: list, negative: list, latent: dict, settings: Settings
    ) -> Tensor:
        for image in images:
            positive, negative = controlled(studio, positive, negative, image, start, end)
        return ksampler(model, positive, negative, latent, settings)

    def shared(studio: Studio, negative: list) -> list:
        for image in images:
            _, negative = controlled(studio, other(studio), negative, image, start, end)
        return negative

    return {"sample": sample, "shared": shared}


class Adapter(torch.nn.Module):
    """A network in the place of a T2I-Adapter's, for the bundled model's sizes."""

    unshuffle_amount = 8

    def forward(self, image: Tensor) -> dict:
        small = torch.nn.functional.adaptive_avg_pool2d(image, (image.shape[-2] // 8, image.shape[-1] // 8))
        return {"input": [None, small.mean(1, keepdim=True).repeat(1, 64, 1, 1)]}


def adapted(studio: Studio, positive: list) -> list:
    adapter = T2IAdapter(Adapter(), 3, 8, "nearest-exact")
    return stock(
        "nodes",
        "ControlNetApply",
        conditioning=positive,
        control_net=adapter,
        image=hints(2),
        strength=0.7,
    )


kind = "Control"
add(kind, "ControlNetApplyAdvanced", **with_control(hints()))
add(kind, "ControlNetApplyAdvanced from 0.2 to 0.6", **with_control(hints(), start=0.2, end=0.6))
add(kind, "Two ControlNets in a row", **with_control(hints(), 1.0 - hints()))
add(
    kind,
    "A ControlNet image per item of the batch",
    **with_control(hints(3)),
    size=(3, 8, 8),
    note="Each pair gets its item's image, on all of its branches.",
)
add(
    kind,
    "More ControlNet images than items",
    **with_control(hints(3)),
    size=(2, 8, 8),
    note="As in a plain run, the rest is not used.",
)
add(
    kind,
    "T2I-Adapter with an image per item",
    origin="ComfyUI, with a small network of its own",
    positive=adapted,
    shared=adapted,
    size=(2, 8, 8),
    note="By *Apply ControlNet (OLD)*, on one conditioning only.",
)

# Latents


def noise_masked(rows: int = 1) -> Any:
    return lambda s, latent: stock(
        "nodes", "SetLatentNoiseMask", samples=picture(latent["samples"].shape[0]), mask=half(rows)
    )


class Encoder:
    """In the place of a VAE: four channels of a picture an eighth of the size."""

    def encode(self, pixels: Tensor) -> Tensor:
        small = torch.nn.functional.avg_pool2d(pixels.movedim(-1, 1), 8)
        return 8.0 * torch.cat([small, small[:, :1]], dim=1) - 4.0


def inpainting(conditioning: list) -> tuple:
    return stock_outputs(
        "nodes",
        "InpaintModelConditioning",
        positive=conditioning,
        negative=conditioning,
        pixels=hints(),
        vae=Encoder(),
        mask=half(),
    )


def soft_mask(height: int = 64, width: int = 64) -> Tensor:
    return torch.linspace(0, 1, width).expand(1, height, width)


def again(stage: Any) -> Any:
    """Two samplers: what `stage` makes of the first's latent goes on at denoise 0.5."""

    def sample(
        studio: Studio, model: Any, positive: list, negative: list, latent: dict, settings: Settings
    ) -> Tensor:
        first = {**latent, "samples": ksampler(model, positive, negative, latent, settings)}
        second = replace(settings, denoise=0.5, seed=settings.seed + 1)
        return ksampler(model, positive, negative, stage(first), second)

    return sample


def upscaled(latent: dict) -> dict:
    return stock(
        "nodes",
        "LatentUpscaleBy",
        samples=latent,
        upscale_method="bislerp",
        scale_by=1.5,
    )


def in_two_parts(
    studio: Studio, model: Any, positive: list, negative: list, latent: dict, settings: Settings
) -> Tensor:
    """Two KSamplerAdvanced: to step 2 with leftover noise, then on from there."""
    first = replace(settings, advanced={"last_step": 2, "force_full_denoise": False})
    rest = replace(settings, advanced={"start_step": 2, "disable_noise": True, "force_full_denoise": True})
    halfway = {**latent, "samples": ksampler(model, positive, negative, latent, first)}
    return ksampler(model, positive, negative, halfway, rest)


def split_sigmas(
    studio: Studio, model: Any, positive: list, negative: list, latent: dict, settings: Settings
) -> Tensor:
    """SamplerCustom on the high sigmas, then without new noise on the low ones."""
    from p2p.tests.host.runs import sigmas_of

    high, low = stock_outputs(custom, "SplitSigmas", sigmas=sigmas_of(model, settings), step=2)
    sampler = stock(custom, "KSamplerSelect", sampler_name=settings.sampler)
    for noise, sigmas in ((True, high), (False, low)):
        latent = stock(
            custom,
            "SamplerCustom",
            model=model,
            add_noise=noise,
            noise_seed=settings.seed,
            cfg=settings.cfg,
            positive=positive,
            negative=negative,
            sampler=sampler,
            sigmas=sigmas,
            latent_image=latent,
        )
    return latent["samples"]


kind = "Latents"
add(
    kind,
    "Latent of a picture, denoise 0.5 (img2img)",
    latent=lambda s, latent: picture(),
    settings=Settings(denoise=0.5),
    acts=False,
)
add(kind, "SetLatentNoiseMask", latent=noise_masked())
add(
    kind,
    "InpaintModelConditioning",
    positive=lambda s, c: inpainting(c)[0],
    negative=lambda s, c: inpainting(c)[0],
    shared=lambda s, c: inpainting(c)[0],
    latent=lambda s, latent: inpainting([])[2],
    note="Its latent goes through *Paired Latent*, or into *Paired Sampler*.",
)
add(kind, "SetLatentNoiseMask with a mask per item", latent=noise_masked(2), size=(2, 8, 8))
add(
    kind,
    "DifferentialDiffusion",
    model=lambda s, model: stock(
        "comfy_extras.nodes_differential_diffusion", "DifferentialDiffusion", model=model
    ),
    latent=lambda s, latent: {**picture(), "noise_mask": soft_mask()},
)
add(
    kind,
    "LatentUpscaleBy and a second pass (hires fix)",
    sample=again(upscaled),
    acts=False,
    note="Model, positive and the paired result go on into the second sampler.",
)
add(
    kind,
    "KSamplerAdvanced in two parts, with leftover noise",
    sample=in_two_parts,
    acts=False,
    note="With `measure` percent on *tau Scheduler*, the second part goes on with the edit.",
)
add(
    kind,
    "SplitSigmas and two SamplerCustom",
    sample=split_sigmas,
    acts=False,
    note="With `measure` percent on *tau Scheduler*, the second part goes on with the edit.",
)
add(
    kind,
    "KSamplerAdvanced from step 1 to 3",
    settings=Settings(advanced={"start_step": 1, "last_step": 3}),
    acts=False,
)
add(
    kind,
    "RepeatLatentBatch before Paired Latent",
    latent=lambda s, latent: stock("nodes", "RepeatLatentBatch", samples=latent, amount=3),
    acts=False,
)
add(
    kind,
    "LatentFromBatch before Paired Latent",
    latent=lambda s, latent: stock("nodes", "LatentFromBatch", samples=latent, batch_index=1, length=2),
    size=(4, 8, 8),
    acts=False,
    note="An item keeps the noise that it has in the whole batch.",
)
for name, size in (
    ("A batch of seeds", (3, 8, 8)),
    ("Wide and tall latents", (1, 6, 24)),
    ("Latents with odd sides", (1, 11, 7)),
):
    add(kind, name, size=size, acts=False)
