"""Nodes that change the MODEL: its weights, its guidance, its attention and features."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import comfy.ldm.modules.attention as host_attention
import torch
from comfy import context_windows
from p2p.tests.host.beside import AVERAGES, add, files, model_node, stock, stock_outputs
from p2p.tests.host.runs import PART, Settings, Studio
from torch import Tensor


def caching(name: str) -> Callable[[Studio, Any], Any]:
    """EasyCache or LazyCache, so that it skips steps of these short runs."""
    return model_node(
        "comfy_extras.nodes_easycache",
        f"{name}Node",
        reuse_threshold=3.0,
        start_percent=0.0,
        end_percent=1.0,
        verbose=False,
    )


# Weights


def lora(studio: Studio, model: Any) -> Any:
    return stock_outputs(
        "nodes",
        "LoraLoader",
        model=model,
        clip=studio.clip,
        lora_name=files.lora(studio),
        strength_model=0.8,
        strength_clip=0.0,
    )[0]


def lora_model_only(studio: Studio, model: Any) -> Any:
    return stock(
        "nodes", "LoraLoaderModelOnly", model=model, lora_name=files.lora(studio), strength_model=0.8
    )


def merged(studio: Studio, model: Any) -> Any:
    return stock(
        "comfy_extras.nodes_model_merging",
        "ModelMergeSimple",
        model1=model,
        model2=lora_model_only(studio, studio.model),
        ratio=0.4,
    )


add("Weights", "LoraLoader", model=lora)
add("Weights", "LoraLoaderModelOnly", model=lora_model_only)
add("Weights", "ModelMergeSimple and other merges", model=merged)
add(
    "Weights",
    "UNetSelfAttentionMultiply",
    model=model_node(
        "comfy_extras.nodes_attention_multiply", "UNetSelfAttentionMultiply", q=1.2, k=1.1, v=0.9, out=1.0
    ),
)
add(
    "Weights",
    "UNetCrossAttentionMultiply",
    model=model_node(
        "comfy_extras.nodes_attention_multiply", "UNetCrossAttentionMultiply", q=1.2, k=1.1, v=0.9, out=1.0
    ),
)
add(
    "Weights",
    "HypernetworkLoader",
    model=lambda studio, model: stock(
        "comfy_extras.nodes_hypernetwork",
        "HypernetworkLoader",
        model=model,
        hypernetwork_name=files.hypernetwork(),
        strength=1.0,
    ),
)
add(
    "Weights",
    "ModelComputeDtype",
    model=model_node("comfy_extras.nodes_model_advanced", "ModelComputeDtype", dtype="bf16"),
    tolerance=3e-2,
    note="Tested with bfloat16.",
)

# Guidance

advanced = "comfy_extras.nodes_model_advanced"
add(
    "Guidance",
    "ModelSamplingDiscrete",
    model=model_node(advanced, "ModelSamplingDiscrete", sampling="eps", zsnr=True),
)
add(
    "Guidance",
    "ModelSamplingContinuousEDM",
    model=model_node(
        advanced, "ModelSamplingContinuousEDM", sampling="v_prediction", sigma_max=80.0, sigma_min=0.01
    ),
)
add("Guidance", "RescaleCFG", model=model_node(advanced, "RescaleCFG", multiplier=0.7))
add("Guidance", "CFGZeroStar", model=model_node("comfy_extras.nodes_cfg", "CFGZeroStar"))
add("Guidance", "CFGNorm", model=model_node("comfy_extras.nodes_cfg", "CFGNorm", strength=1.0))
add("Guidance", "TCFG", model=model_node("comfy_extras.nodes_tcfg", "TCFG"))
add(
    "Guidance",
    "APG",
    model=model_node("comfy_extras.nodes_apg", "APG", eta=0.8, norm_threshold=5.0, momentum=-0.5),
)
add(
    "Guidance",
    "FreSca",
    model=model_node("comfy_extras.nodes_fresca", "FreSca", scale_low=1.0, scale_high=1.5, freq_cutoff=2),
)
add(
    "Guidance",
    "Epsilon Scaling",
    model=model_node("comfy_extras.nodes_eps", "EpsilonScaling", scaling_factor=1.02),
)
add(
    "Guidance",
    "Mahiro",
    model=model_node("comfy_extras.nodes_mahiro", "Mahiro"),
    fails=AVERAGES,
)
add(
    "Guidance",
    "PerturbedAttentionGuidance",
    model=model_node("comfy_extras.nodes_pag", "PerturbedAttentionGuidance", scale=3.0),
)
add(
    "Guidance",
    "SelfAttentionGuidance",
    model=model_node("comfy_extras.nodes_sag", "SelfAttentionGuidance", scale=0.5, blur_sigma=2.0),
)
add(
    "Guidance",
    "PerpNeg",
    model=lambda studio, model: stock(
        "comfy_extras.nodes_perpneg",
        "PerpNeg",
        model=model,
        empty_conditioning=studio.encode("blurry"),
        neg_scale=1.0,
    ),
    fails=AVERAGES,
)
add(
    "Guidance",
    "SkipLayerGuidanceDiTSimple",
    model=model_node(
        "comfy_extras.nodes_slg",
        "SkipLayerGuidanceDiTSimple",
        double_layers="1",
        single_layers="1",
        start_percent=0.0,
        end_percent=1.0,
    ),
    acts=False,
    note="Skips layers of DiTs; it does nothing on U-Nets.",
)

add(
    "Guidance",
    "SkipLayerGuidanceDiT",
    model=model_node(
        "comfy_extras.nodes_slg",
        "SkipLayerGuidanceDiT",
        double_layers="1",
        single_layers="1",
        scale=0.5,
        start_percent=0.0,
        end_percent=1.0,
    ),
    acts=False,
    note="Skips layers of DiTs and does nothing on U-Nets; its extra pass, which is not edited, strengthens "
    "the edit.",
)
add(
    "Guidance",
    "VideoLinearCFGGuidance, VideoTriangleCFGGuidance",
    model=model_node("comfy_extras.nodes_video_model", "VideoLinearCFGGuidance", min_cfg=1.0),
    fails={
        "same prompt": "They give each row of a batch another guidance scale, as frames of a video,",
        "tau empty": "so source and target are guided differently: not for pairs.",
    },
)
for name in ("EasyCache", "LazyCache"):
    add(
        "Guidance",
        name,
        model=caching(name),
        settings=Settings(steps=5),
        fails={
            "tau empty": "It decides for the whole batch which steps to skip, with this pack or without: a "
            "row differs from a run of its own,",
            "source": "and an edit of the target may move the source.",
        },
    )

# Attention and features


def with_patches(change: Any) -> Any:
    """A node that clones the model and changes the clone."""

    def node(_studio: Studio, model: Any) -> Any:
        model = model.clone()
        change(model)
        return model

    return node


class ImagePrompt:
    """An attn2 replacer as IP-Adapter Plus': the text's attention, plus attention to an image's tokens.

    As there, image tokens are repeated for the rows of a chunk and picked by `cond_or_uncond`; the text's own
    attention is called without transformer_options. batches: (rows, chunks) of each call.
    """

    BLOCKS = [("input", 1), ("input", 3), ("middle", 0), ("output", 0), ("output", 2)]
    """Not all blocks, so that patched and unpatched ones meet."""

    def __init__(self, scale: float = 0.7):
        self.scale, self.batches = scale, []

    def __deepcopy__(self, memo: dict) -> ImagePrompt:
        return self  # some hosts copy what is attached to a model

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, extra_options: dict) -> Tensor:
        chunks, heads = extra_options["cond_or_uncond"], extra_options["n_heads"]
        self.batches.append((q.shape[0], len(chunks)))
        text = host_attention.optimized_attention(q, k, v, heads)
        generator = torch.Generator().manual_seed(q.shape[-1])
        image = torch.randn(2, 4, q.shape[-1], generator=generator).to(q)
        picked = torch.cat(
            [image[[0]] * (index == 0) for index in chunks for _ in range(q.shape[0] // len(chunks))]
        )
        out = host_attention.optimized_attention(q, picked, picked, heads)
        return text + self.scale * out

    def on(self, model: Any, with_depth: bool = False) -> None:
        for name, number in self.BLOCKS:
            model.set_model_attn2_replace(self, name, number, 0 if with_depth else None)


def additive(model: Any) -> None:
    def patch(q: Tensor, k: Tensor, v: Tensor, extra_options: dict) -> tuple:
        return q, k * 1.1, v + 0.05

    model.set_model_attn1_patch(patch)
    model.set_model_attn2_patch(patch)


def appended(model: Any) -> None:
    def patch(q: Tensor, k: Tensor, v: Tensor, extra_options: dict) -> tuple:
        generator = torch.Generator().manual_seed(3)
        extra = torch.randn(1, 4, k.shape[-1], generator=generator).to(k).expand(k.shape[0], -1, -1)
        return q, torch.cat([k, extra], 1), torch.cat([v, extra], 1)

    model.set_model_attn2_patch(patch)


def output_patches(model: Any) -> None:
    model.set_model_attn1_output_patch(lambda n, extra_options: n * 1.1)
    model.set_model_attn2_output_patch(lambda n, extra_options: n * 0.9)
    model.set_model_input_block_patch(lambda h, options: h * 1.02)


def fewer_keys(model: Any) -> None:
    """Keys and values of self-attention at every other pixel."""

    def patch(q: Tensor, k: Tensor, v: Tensor, extra_options: dict) -> tuple:
        return (q, k, v) if k.shape[1] < 64 else (q, k[:, ::2], v[:, ::2])

    model.set_model_attn1_patch(patch)


def sharper(model: Any) -> None:
    """A kernel of another pack: gets q, k, v, heads, and calls what it replaces or something else."""

    def override(
        function: Any, q: Tensor, k: Tensor, v: Tensor, heads: int, *args: Any, **kwargs: Any
    ) -> Tensor:
        return function(q * 1.3, k, v, heads, *args, **kwargs)

    model.model_options["transformer_options"]["optimized_attention_override"] = override


def tiles(model: Any) -> None:
    """The picture in two halves, one model call each; the canvas is put together again."""

    def wrapper(apply: Any, given: dict) -> Tensor:
        left, right = (apply(x, given["timestep"], **given["c"]) for x in given["input"].chunk(2, dim=-1))
        return torch.cat([left, right], dim=-1)

    model.set_model_unet_function_wrapper(wrapper)


features = "Attention and features"
add(
    features,
    "IP-Adapter",
    origin="stand-in for IPAdapter_plus",
    model=with_patches(lambda m: ImagePrompt().on(m)),
)
add(
    features,
    "IP-Adapter, one depth of a block",
    origin="stand-in for IPAdapter_plus",
    model=with_patches(lambda m: ImagePrompt().on(m, with_depth=True)),
    note="A patch for one transformer layer of a block, as InstantID and style transfer use.",
)
add(
    features,
    "Attention override",
    origin="stand-in for KJNodes' Patch Sage Attention",
    model=with_patches(sharper),
    note="Every call goes through it, the rewritten ones too.",
)
add(
    features,
    "Patches of keys and values",
    origin="stand-in",
    model=with_patches(additive),
    note="As attention couple and style packs use.",
)
add(features, "Tokens appended inside cross-attention", origin="stand-in", model=with_patches(appended))
add(features, "Patches of outputs and features", origin="stand-in", model=with_patches(output_patches))
add(
    features,
    "Self-attention with fewer keys",
    origin="stand-in for ToDo (token down-sampling)",
    model=with_patches(fewer_keys),
)
for name, numbers in (("FreeU", (1.1, 1.2, 0.9, 0.2)), ("FreeU_V2", (1.3, 1.4, 0.9, 0.2))):
    scales = dict(zip(("b1", "b2", "s1", "s2"), numbers, strict=True))
    add(features, name, model=model_node("comfy_extras.nodes_freelunch", name, **scales))
add(
    features,
    "HyperTile",
    model=model_node(
        "comfy_extras.nodes_hypertile",
        "HyperTile",
        tile_size=32,
        swap_size=1,
        max_depth=0,
        scale_depth=False,
    ),
    size=(1, 16, 16),
    seeded=True,
)
add(
    features,
    "TomePatchModel",
    model=model_node("comfy_extras.nodes_tomesd", "TomePatchModel", ratio=0.6),
    size=(1, 16, 16),
    seeded=True,
    tau=replace(PART, self_resolution=0.5),
    note="With `self_resolution` above 0.5 it is an error: the finest layers' pixels are merged differently "
    "for source and target.",
)
add(
    features,
    "PatchModelAddDownscale (Kohya Deep Shrink)",
    model=model_node(
        "comfy_extras.nodes_model_downscale",
        "PatchModelAddDownscale",
        block_number=1,
        downscale_factor=2.0,
        start_percent=0.0,
        end_percent=0.6,
        downscale_after_skip=True,
        downscale_method="bicubic",
        upscale_method="bicubic",
    ),
    size=(1, 16, 16),
    note="A layer counts for `self_resolution` with the grid that it really has.",
)
add(
    features,
    "Tiles, one per model call",
    origin="stand-in for TiledDiffusion with a tile batch of 1",
    model=with_patches(tiles),
    size=(1, 8, 16),
)


def with_context_windows(dim: int) -> Callable[[Any], None]:
    """As ContextWindowsManual does; its inputs are others in every version of ComfyUI. dim: of the frames."""

    def windows(model: Any) -> None:
        model.model_options["context_handler"] = context_windows.IndexListContextHandler(
            context_schedule=context_windows.get_matching_context_schedule("standard_static"),
            fuse_method=context_windows.get_matching_fuse_method("pyramid"),
            context_length=4,
            context_overlap=1,
            dim=dim,
        )

    return windows
