"""Nodes that transformers are used with, on tiny networks with random weights."""

from __future__ import annotations

import functools
import zlib
from typing import Any

import comfy.cldm.mmdit
import comfy.controlnet
import comfy.latent_formats
import comfy.ldm.flux.controlnet
import comfy.ldm.modules.attention as host_attention
import comfy.ldm.qwen_image.controlnet
import comfy.ops
import torch
from p2p.attention.edit import Edit, Source
from p2p.attention.prompt import END, START, WORD_END, read_prompt
from p2p.sampling.encode import EncodedPrompt
from p2p.tests.host.beside import TRANSFORMERS, files, model_node, stock, stock_outputs
from p2p.tests.host.beside import add as add_neighbour
from p2p.tests.host.beside.graphs import (
    again,
    custom,
    guided,
    half,
    hints,
    in_two_parts,
    other,
    soft_mask,
    split_sigmas,
    upscaled,
)
from p2p.tests.host.beside.models import caching, with_patches
from p2p.tests.host.runs import SOURCE, STOCK, Settings, Studio, ksampler
from p2p.tests.host.transformers import KNOWN, build, conditioning, randomize
from torch import Tensor

SIMPLE = Settings(steps=3, scheduler="simple")
AS_LONG = "a dog riding a car"
"""A target of as many tokens as the source."""


class Tiny(Studio):
    """A tiny transformer in the place of the bundled model; a prompt's features are random."""

    def __init__(self, name: str):
        self.name = name
        super().__init__(build(name), None)
        self.negative = self.encode("a blurry picture")

    def empty(self, rows: int = 1, height: int = 8, width: int = 8) -> dict:
        return {"samples": torch.zeros(rows, *KNOWN[self.name].latent[:-2], height, width)}

    def encode(self, text: str) -> list:
        """Features of a start, each word and an end, the same for the same text."""
        tokens = len(text.split()) + 2
        return conditioning(self.name, zlib.crc32(text.encode()), tokens - KNOWN[self.name].tokens)

    def edit(self, source: str = SOURCE, *targets: str, mode: Any = "auto") -> Edit:
        edit = Edit(Source(self._prompt(source)))
        for target in targets:
            edit = edit.with_target(self._prompt(target), mode)
        return edit

    def _prompt(self, text: str) -> EncodedPrompt:
        read = read_prompt(text, [[START, *(word + WORD_END for word in text.split()), END]])
        return EncodedPrompt(text, read.words, read.chunks, conditioning=self.encode(text))


def add(name: str, *families: str, **fields: Any) -> None:
    """List a neighbour of these families."""
    add_neighbour(TRANSFORMERS, name, families=families, **({"settings": SIMPLE} | fields))


# Noise schedules and guidance

advanced, cfg = "comfy_extras.nodes_model_advanced", "comfy_extras.nodes_cfg"
add(
    "ModelSamplingFlux",
    "Flux",
    model=model_node(advanced, "ModelSamplingFlux", max_shift=1.15, base_shift=0.5, width=2048, height=2048),
)
add("ModelSamplingSD3", "SD3", "Wan 2.1", model=model_node(advanced, "ModelSamplingSD3", shift=6.0))
add(
    "ModelSamplingAuraFlow",
    "AuraFlow",
    "Qwen-Image",
    "Z-Image",
    model=lambda s, model: stock(advanced, "ModelSamplingAuraFlow", model=model, shift=5.5),
)


def distilled(studio: Studio, positive: list) -> list:
    return stock("comfy_extras.nodes_flux", "FluxGuidance", conditioning=positive, guidance=9.0)


add("FluxGuidance", "Flux", positive=distilled, negative=distilled)
add("RescaleCFG", "SD3", "Qwen-Image", model=model_node(advanced, "RescaleCFG", multiplier=0.7))
add("CFGNorm", "SD3", "Qwen-Image", model=model_node(cfg, "CFGNorm", strength=0.5))
add("CFGZeroStar", "SD3", "Chroma", model=model_node(cfg, "CFGZeroStar"))
skipped = {"scale": 0.5, "start_percent": 0.0, "end_percent": 1.0}
add(
    "SkipLayerGuidanceSD3",
    "SD3.5 Medium",
    model=model_node("comfy_extras.nodes_sd3", "SkipLayerGuidanceSD3", layers="1", **skipped),
    note="Its extra pass, which is not edited, strengthens the edit.",
)
add(
    "SkipLayerGuidanceDiT",
    "Flux",
    "Qwen-Image",
    model=model_node(
        "comfy_extras.nodes_slg", "SkipLayerGuidanceDiT", double_layers="1", single_layers="1", **skipped
    ),
    note="Its extra pass, which is not edited, strengthens the edit.",
)
add(
    "SkipLayerGuidanceDiTSimple",
    "Flux",
    model=model_node(
        "comfy_extras.nodes_slg",
        "SkipLayerGuidanceDiTSimple",
        double_layers="1",
        single_layers="",
        start_percent=0.0,
        end_percent=1.0,
    ),
)
add(
    "NAGuidance",
    "Flux",
    target=AS_LONG,
    negative=lambda s, c: s.encode("blurry words on a wall"),
    model=model_node(
        "comfy_extras.nodes_nag", "NAGuidance", nag_scale=3.0, nag_alpha=0.5, nag_tau=2.5
    ),
    note="Tested on ComfyUI 0.33; the oldest supported has no such node.",
)
for name in ("EasyCache", "LazyCache"):
    add(
        name,
        "Flux",
        "Qwen-Image",
        model=caching(name),
        settings=Settings(steps=5, scheduler="simple"),
        fails={
            "tau empty": "It decides for the whole batch which steps to skip, with this pack or without: a "
            "row differs from a run of its own,",
            "source": "and an edit of the target may move the source.",
        },
    )

# Weights and attention

add(
    "LoraLoaderModelOnly",
    "Flux",
    "SD3",
    "Qwen-Image",
    model=lambda studio, model: stock(
        "nodes", "LoraLoaderModelOnly", model=model, lora_name=files.lora(studio), strength_model=0.8
    ),
)


def sharper(model: Any) -> None:
    """As KJNodes' Patch Sage Attention: another kernel in every call, whatever stood there before."""

    def override(function: Any, q: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return host_attention.attention_pytorch.__wrapped__(1.2 * q, *args, **kwargs)

    model.model_options["transformer_options"]["optimized_attention_override"] = override


add(
    "Attention override",
    "Flux",
    "SD3",
    "Z-Image",
    origin="stand-in for KJNodes' Patch Sage Attention",
    model=with_patches(sharper),
    note="Every call goes through it, the rewritten ones too.",
)

# Images that the model sees


class Encoder:
    """In the place of a VAE: sixteen channels of a picture an eighth of the size. frames: with that axis."""

    def __init__(self, frames: bool):
        self.frames = frames

    def spacial_compression_encode(self) -> int:
        return 8

    def encode(self, pixels: Tensor) -> Tensor:
        channels = torch.nn.functional.pixel_unshuffle(pixels[..., :3].movedim(-1, 1), 8)[:, :16]
        return (4.0 * channels - 2.0)[:, :, None] if self.frames else 4.0 * channels - 2.0


def encoder(studio: Any) -> Encoder:
    return Encoder(len(KNOWN[studio.name].latent) == 4)


@functools.cache
def control_net(studio: Any, sees: str = "latents") -> Any:
    """A ControlNet of the family, as the host's loader makes it. sees: latents or the picture itself."""
    tiny, formats = KNOWN[studio.name], comfy.latent_formats
    made = {"operations": comfy.ops.disable_weight_init, "dtype": torch.float32, **tiny.layout}
    options: dict[str, Any] = {"compression_ratio": 1}
    if studio.name == "SD3":
        network = comfy.cldm.mmdit.ControlNet(num_blocks=1, control_latent_channels=16, **made)
        options |= {"latent_format": formats.SD3()}
    elif studio.name == "Qwen-Image":
        network = comfy.ldm.qwen_image.controlnet.QwenImageControlNetModel(**made)
        options |= {"latent_format": formats.Wan21(), "extra_conds": []}
    else:
        kind, options["extra_conds"] = comfy.ldm.flux.controlnet.ControlNetFlux, ["y", "guidance"]
        if sees == "latents":
            network = kind(latent_input=True, num_union_modes=10, control_latent_channels=16, **made)
            options |= {"latent_format": formats.Flux()}
        else:
            network, options["compression_ratio"] = kind(**made), 8
    randomize(network, torch.Generator().manual_seed(4), 1.0)
    return comfy.controlnet.ControlNet(network, load_device=torch.device("cpu"), **options)


def controlled(net: Any, count: int = 1, vae: Any = encoder) -> dict[str, Any]:
    """Apply ControlNet on positive and negative; for Paired Sampler on its negative."""

    def apply(studio: Any, positive: list, negative: list) -> tuple:
        return stock_outputs(
            "nodes",
            "ControlNetApplyAdvanced",
            positive=positive,
            negative=negative,
            control_net=net(studio),
            image=hints(count),
            strength=1.0,
            start_percent=0.0,
            end_percent=0.7,
            vae=vae and vae(studio),
        )

    return {
        "sample": lambda s, model, positive, negative, latent, settings: ksampler(
            model, *apply(s, positive, negative), latent, settings
        ),
        "shared": lambda s, negative: apply(s, other(s), negative)[1],
    }


def union(studio: Any) -> Any:
    return stock(
        "comfy_extras.nodes_controlnet",
        "SetUnionControlNetType",
        control_net=control_net(studio),
        type="canny/lineart/anime_lineart/mlsd",
    )


add("ControlNet", "Flux", "SD3", "Qwen-Image", **controlled(control_net))
add("ControlNet of the picture itself", "Flux", **controlled(lambda s: control_net(s, "pixels"), vae=None))
add("ControlNet with SetUnionControlNetType", "Flux", **controlled(union))
add(
    "ControlNet with an image per item of the batch",
    "Flux",
    "Qwen-Image",
    target=AS_LONG,
    size=(2, 8, 8),
    **controlled(control_net, count=2),
)


class Redux:
    """In the place of a style model: tokens of an image. width: of the text's features."""

    def __init__(self, width: int):
        self.width = width

    def get_cond(self, _: Any) -> Tensor:
        return torch.randn(1, 4, self.width, generator=torch.Generator().manual_seed(6))


def styled(strength: float, kind: str) -> Any:
    return lambda studio, positive: stock(
        "nodes",
        "StyleModelApply",
        conditioning=positive,
        style_model=Redux(KNOWN[studio.name].width),
        clip_vision_output=None,
        strength=strength,
        strength_type=kind,
    )


add("StyleModelApply (Redux)", "Flux", positive=styled(0.8, "multiply"))
add(
    "StyleModelApply (Redux), attn_bias",
    "Flux",
    target=AS_LONG,
    positive=styled(0.3, "attn_bias"),
    note="Its mask goes with the rows that it belongs to. Source and targets need as many tokens; Flux fills "
    "prompts up to 256.",
)


def referenced(studio: Any, positive: list) -> list:
    """Kontext, Qwen-Image-Edit: one reference image larger than the latent, and another."""
    for seed, side in ((2, 12), (3, 8)):
        latent = studio.empty(1, side, 8)["samples"]
        generator = torch.Generator().manual_seed(seed)
        latent = {"samples": torch.randn(latent.shape, generator=generator)}
        positive = stock(
            "comfy_extras.nodes_edit_model", "ReferenceLatent", conditioning=positive, latent=latent
        )
    return positive


add("ReferenceLatent", "Flux", "Qwen-Image", positive=referenced, negative=referenced)
add(
    "ReferenceLatent, prompts of one length",
    "OmniGen2",
    positive=referenced,
    negative=referenced,
    target=AS_LONG,
    note="OmniGen2 needs prompts of as many tokens.",
)
add(
    "FluxKontextMultiReferenceLatentMethod",
    "Flux",
    positive=lambda s, c: stock(
        "comfy_extras.nodes_flux",
        "FluxKontextMultiReferenceLatentMethod",
        conditioning=referenced(s, c),
        reference_latents_method="index",
    ),
)


def inpainting(studio: Any, positive: list) -> tuple:
    return stock_outputs(
        "nodes",
        "InpaintModelConditioning",
        positive=positive,
        negative=positive,
        pixels=hints(),
        vae=encoder(studio),
        mask=half(),
    )


add(
    "InpaintModelConditioning",
    "Flux Fill",
    positive=lambda s, c: inpainting(s, c)[0],
    negative=lambda s, c: inpainting(s, c)[0],
    latent=lambda s, latent: inpainting(s, [])[2],
)


def drawn(studio: Any, mask: Tensor) -> dict:
    generator = torch.Generator().manual_seed(9)
    return {"samples": torch.randn(studio.empty()["samples"].shape, generator=generator), "noise_mask": mask}


add("SetLatentNoiseMask", "Flux", "Qwen-Image", latent=lambda s, latent: drawn(s, half()))
add(
    "DifferentialDiffusion",
    "Flux",
    "Qwen-Image",
    model=model_node("comfy_extras.nodes_differential_diffusion", "DifferentialDiffusion"),
    latent=lambda s, latent: drawn(s, soft_mask()),
)

# Samplers and passes

for name in ("SamplerCustom", "SamplerCustomAdvanced"):
    add(
        name if name == "SamplerCustom" else f"{name} with CFGGuider",
        "Flux",
        "SD3",
        sample=lambda s, *given, sample=STOCK[name]: sample(*given),
        acts=False,
    )
add(
    "SamplerCustomAdvanced with BasicGuider",
    "Flux",
    "SD3",
    sample=guided(
        lambda s, model, positive, _: stock(custom, "BasicGuider", model=model, conditioning=positive)
    ),
)
add(
    "SamplerCustomAdvanced with DualCFGGuider",
    "Flux",
    "SD3",
    sample=guided(
        lambda s, model, positive, negative: stock(
            custom,
            "DualCFGGuider",
            model=model,
            cond1=other(s),
            cond2=positive,
            negative=negative,
            cfg_conds=3.0,
            cfg_cond2_negative=2.0,
            style="regular",
        )
    ),
)
add(
    "LatentUpscaleBy and a second pass (hires fix)",
    "Flux",
    "SD3",
    sample=again(upscaled),
    acts=False,
    note="Model, positive and the paired result go on into the second sampler.",
)
for name, sampler in (
    ("KSamplerAdvanced in two parts, with leftover noise", in_two_parts),
    ("SplitSigmas and two SamplerCustom", split_sigmas),
):
    note = "tau counts the steps of each part by itself."
    add(name, "Flux", "Qwen-Image", sample=sampler, acts=False, note=note)
for name, size in (("A batch of seeds", (3, 8, 8)), ("Wide and tall latents", (1, 6, 24))):
    add(name, "Flux", "SD3", "Qwen-Image", size=size, acts=False)
add("Latents with odd sides", "Flux", "Qwen-Image", size=(1, 11, 7), acts=False)
add(
    "Latent of a picture, denoise 0.5 (img2img)",
    "Flux",
    "Qwen-Image",
    latent=lambda s, latent: {"samples": drawn(s, half())["samples"]},
    settings=Settings(steps=4, scheduler="simple", denoise=0.5),
    acts=False,
)
