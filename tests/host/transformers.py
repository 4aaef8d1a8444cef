"""Transformers of every family that the running host has: tiny, random weights, random conditionings.

Blocks, token order and conditioning are the host's own. There are at least two blocks of each kind: in the
first one a pair's image tokens are equal anyway.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import comfy.model_patcher
import comfy.sample
import comfy.supported_models
import torch
from comfy.ldm.chroma.model import ChromaParams
from comfy.ldm.chroma_radiance.model import ChromaRadianceParams
from comfy.ldm.flux.model import FluxParams
from comfy.ldm.hunyuan_video.model import HunyuanVideoParams
from torch import Tensor

More = Callable[[torch.Generator, int], dict[str, Any]]
"""generator and number of tokens -> what a conditioning has beside its features."""


@dataclass(frozen=True)
class Tiny:
    """How to make a network and what it is fed.

    config: class in `comfy.supported_models`. layout: of the network; `forced`, what the class overwrites.
    latent: channels, (frames,) rows, columns. width: of the text's features. tokens: of a prompt; fixed, if
    all have as many. more: further entries of a conditioning. gain: of random matrices.
    """

    config: str
    layout: dict[str, Any]
    latent: tuple[int, ...]
    width: int
    tokens: int = 5
    fixed: bool = False
    more: More = lambda generator, tokens: {}
    forced: dict[str, Any] = field(default_factory=dict)
    gain: float = 1.0


def pooled(width: int) -> More:
    return lambda generator, tokens: {"pooled_output": torch.randn(1, width, generator=generator)}


def llama(layers: int, width: int) -> More:
    def more(generator: torch.Generator, tokens: int) -> dict[str, Any]:
        features = torch.randn(1, layers, tokens + 1, width, generator=generator)
        return {**pooled(64)(generator, tokens), "conditioning_llama3": features}

    return more


def mt5(generator: torch.Generator, tokens: int) -> dict[str, Any]:
    return {
        "conditioning_mt5xl": torch.randn(1, 20, 64, generator=generator),
        "attention_mask": torch.ones(1, tokens),
        "attention_mask_mt5xl": torch.ones(1, 20),
    }


def byt5(generator: torch.Generator, tokens: int) -> dict[str, Any]:
    return {"conditioning_byt5small": torch.randn(1, 3, 1472, generator=generator)}


def t5_tokens(generator: torch.Generator, tokens: int) -> dict[str, Any]:
    """The T5 tokens that Anima's adapter writes the features to."""
    return {
        "t5xxl_ids": torch.randint(3, 32000, (tokens + 2,), generator=generator),
        "t5xxl_weights": torch.ones(tokens + 2),
    }


def masked(generator: torch.Generator, tokens: int) -> dict[str, Any]:
    """A mask of the tokens that hides none."""
    return {"attention_mask": torch.ones(1, tokens, dtype=torch.int64)}


def where_known(params: type, **values: Any) -> dict[str, Any]:
    """What a later host's parameters have beyond the older host's."""
    return {name: value for name, value in values.items() if name in params.__dataclass_fields__}


SD3 = {
    "in_channels": 16,
    "depth": 2,
    "patch_size": 2,
    "input_size": None,
    "adm_in_channels": 64,
    "pos_embed_scaling_factor": None,
    "pos_embed_max_size": 16,
    "num_patches": 256,
    "qk_norm": "rms",
    "context_embedder_config": {
        "target": "torch.nn.Linear",
        "params": {"in_features": 64, "out_features": 128},
    },
}
FLUX = {
    "image_model": "flux",
    "in_channels": 16,
    "out_channels": 16,
    "patch_size": 2,
    "vec_in_dim": 64,
    "context_in_dim": 64,
    "hidden_size": 64,
    "mlp_ratio": 2.0,
    "num_heads": 2,
    "depth": 2,
    "depth_single_blocks": 2,
    "axes_dim": [8, 12, 12],
    "theta": 10000,
    "qkv_bias": True,
    "guidance_embed": True,
    **where_known(FluxParams, txt_ids_dims=[]),
}
FLUX2 = FLUX | {
    "image_model": "flux2",
    "in_channels": 128,
    "out_channels": 128,
    "patch_size": 1,
    "vec_in_dim": None,
    "axes_dim": [8, 8, 8, 8],
    "theta": 2000,
    "global_modulation": True,
    "mlp_silu_act": True,
    "qkv_bias": False,
    "ops_bias": False,
    "default_ref_method": "index",
    "ref_index_scale": 10.0,
    **where_known(FluxParams, txt_ids_dims=[3]),
}
CHROMA = {
    name: FLUX[name]
    for name in ("context_in_dim", "hidden_size", "mlp_ratio", "num_heads", "axes_dim", "theta", "qkv_bias")
} | {
    "image_model": "chroma",
    "in_channels": 64,
    "out_channels": 64,
    "patch_size": 2,
    "depth": 2,
    "depth_single_blocks": 2,
    "in_dim": 64,
    "out_dim": 64,
    "hidden_dim": 64,
    "n_layers": 2,
    **where_known(ChromaParams, txt_ids_dims=[], vec_in_dim=None),
}
RADIANCE = CHROMA | {
    "image_model": "chroma_radiance",
    "in_channels": 3,
    "out_channels": 3,
    "patch_size": 16,
    "nerf_hidden_size": 16,
    "nerf_mlp_ratio": 2,
    "nerf_depth": 2,
    "nerf_max_freqs": 4,
    "nerf_tile_size": 0,
    "nerf_final_head_type": "conv",
    "nerf_embedder_dtype": torch.float32,
    **where_known(ChromaRadianceParams, use_x0=False, use_sequential_txt_ids=False),
}
QWEN = {
    "image_model": "qwen_image",
    "in_channels": 64,
    "num_layers": 2,
    "attention_head_dim": 32,
    "num_attention_heads": 2,
    "joint_attention_dim": 64,
    "axes_dims_rope": (8, 12, 12),
}
LUMINA = {
    "image_model": "lumina2",
    "patch_size": 2,
    "in_channels": 16,
    "dim": 64,
    "cap_feat_dim": 64,
    "n_layers": 2,
    "n_refiner_layers": 2,
    "qk_norm": True,
    "n_heads": 2,
    "n_kv_heads": 1,
    "axes_dims": [8, 12, 12],
    "axes_lens": [300, 512, 512],
    "rope_theta": 10000.0,
    "ffn_dim_multiplier": 1.0,
}
Z_IMAGE = LUMINA | {
    "dim": 256,
    "n_heads": 2,
    "n_kv_heads": 2,
    "axes_dims": [32, 48, 48],
    "axes_lens": [1536, 512, 512],
    "rope_theta": 256.0,
    "z_image_modulation": True,
    "time_scale": 1000.0,
    "pad_tokens_multiple": 32,
}
HIDREAM = {
    "image_model": "hidream",
    "attention_head_dim": 32,
    "axes_dims_rope": [16, 8, 8],
    "caption_channels": [64, 64],
    "max_resolution": [32, 32],
    "in_channels": 16,
    "out_channels": 16,
    "llama_layers": [0, 1, 2, 2],
    "num_attention_heads": 2,
    "num_routed_experts": 2,
    "num_activated_experts": 1,
    "num_layers": 2,
    "num_single_layers": 2,
    "patch_size": 2,
    "text_emb_dim": 64,
}
OMNIGEN2 = {
    "image_model": "omnigen2",
    "axes_dim_rope": [8, 12, 12],
    "axes_lens": [1024, 1664, 1664],
    "hidden_size": 64,
    "in_channels": 16,
    "multiple_of": 32,
    "num_attention_heads": 2,
    "num_kv_heads": 1,
    "num_layers": 2,
    "num_refiner_layers": 2,
    "out_channels": None,
    "patch_size": 2,
    "text_feat_dim": 64,
    "timestep_scale": 1000.0,
}
HUNYUAN_IMAGE = {
    "image_model": "hunyuan_video",
    "in_channels": 64,
    "out_channels": 64,
    "patch_size": [1, 1],
    "vec_in_dim": None,
    "axes_dim": [16, 16],
    "meanflow": False,
    "context_in_dim": 64,
    "hidden_size": 64,
    "mlp_ratio": 2.0,
    "num_heads": 2,
    "depth": 2,
    "depth_single_blocks": 2,
    "theta": 256,
    "qkv_bias": True,
    "byt5": False,
    "guidance_embed": False,
    "use_cond_type_embedding": False,
    "vision_in_dim": None,
    **where_known(HunyuanVideoParams, meanflow_sum=False),
}
PIXART = {
    "in_channels": 4,
    "hidden_size": 96,
    "depth": 2,
    "num_heads": 2,
    "mlp_ratio": 2.0,
    "caption_channels": 64,
    "model_max_length": 300,
    "input_size": None,
}
HUNYUAN_DIT = {
    "image_model": "hydit",
    "depth": 4,
    "hidden_size": 64,
    "num_heads": 2,
    "mlp_ratio": 2.0,
    "text_states_dim": 64,
    "text_states_dim_t5": 64,
    "text_len": 7,
    "text_len_t5": 20,
}
COSMOS = {
    "image_model": "cosmos_predict2",
    "max_img_h": 240,
    "max_img_w": 240,
    "max_frames": 128,
    "in_channels": 16,
    "out_channels": 16,
    "patch_spatial": 2,
    "patch_temporal": 1,
    "model_channels": 64,
    "num_blocks": 2,
    "num_heads": 2,
    "concat_padding_mask": True,
    "crossattn_emb_channels": 64,
    "pos_emb_cls": "rope3d",
    "pos_emb_learnable": True,
    "use_adaln_lora": True,
    "adaln_lora_dim": 16,
    "rope_h_extrapolation_ratio": 4.0,
    "rope_w_extrapolation_ratio": 4.0,
    "rope_enable_fps_modulation": False,
}
WAN = {
    "image_model": "wan2.1",
    "model_type": "t2v",
    "dim": 64,
    "ffn_dim": 64,
    "text_dim": 64,
    "num_heads": 2,
    "num_layers": 2,
    "patch_size": (1, 2, 2),
    "in_dim": 16,
    "out_dim": 16,
}
LTXV = {
    "image_model": "ltxv",
    "in_channels": 128,
    "cross_attention_dim": 64,
    "attention_head_dim": 32,
    "num_attention_heads": 2,
    "caption_channels": 64,
    "num_layers": 2,
}
AURA = {
    "cond_seq_dim": 64,
    "global_conddim": 64,
    "n_layers": 4,
    "n_double_layers": 2,
    "dim": 64,
    "n_heads": 2,
    "max_seq": 64,
}

OVIS = FLUX | {
    "vec_in_dim": None,
    "guidance_embed": False,
    "yak_mlp": True,
    "txt_norm": True,
    "txt_ids_dims": [1, 2],
}
LONGCAT = FLUX | {"vec_in_dim": None, "guidance_embed": False, "txt_ids_dims": [1, 2]}
BOOGU = {
    "image_model": "boogu",
    "axes_dim_rope": [8, 12, 12],
    "hidden_size": 64,
    "num_layers": 2,
    "num_double_stream_layers": 2,
    "num_refiner_layers": 2,
    "num_attention_heads": 2,
    "num_kv_heads": 1,
    "multiple_of": 32,
    "in_channels": 16,
    "instruction_feat_dim": 64,
}
KANDINSKY = {
    "image_model": "kandinsky5",
    "in_visual_dim": 16,
    "out_visual_dim": 16,
    "in_text_dim": 64,
    "in_text_dim2": 64,
    "time_dim": 32,
    "model_dim": 64,
    "ff_dim": 64,
    "visual_embed_dim": 64,
    "num_text_blocks": 2,
    "num_visual_blocks": 2,
    "axes_dims": (8, 12, 12),
    "rope_scale_factor": (1.0, 1.0, 1.0),
}
IDEOGRAM4 = {"image_model": "ideogram4", "in_channels": 128, "num_layers": 2}
IDEOGRAM4_SIZES = {
    "num_attention_heads": 2,
    "attention_head_dim": 32,
    "intermediate_size": 64,
    "adaln_dim": 32,
    "llm_features_dim": 64,
    "mrope_section": [6, 5, 5],
}
KREA2 = {
    "image_model": "krea2",
    "features": 64,
    "tdim": 32,
    "txtdim": 32,
    "heads": 2,
    "kvheads": 1,
    "multiplier": 2,
    "layers": 2,
    "patch": 2,
    "channels": 16,
    "txtlayers": 2,
    "txtheads": 2,
    "txtkvheads": 2,
    "default_ref_method": "index",
}
LENS = {
    "image_model": "lens",
    "in_channels": 128,
    "out_channels": 32,
    "num_layers": 2,
    "attention_head_dim": 32,
    "num_attention_heads": 2,
    "enc_hidden_dim": 16,
    "axes_dims_rope": (8, 12, 12),
}
JOYIMAGE = {
    "image_model": "joyimage",
    "in_channels": 16,
    "hidden_size": 64,
    "patch_size": [1, 2, 2],
    "num_layers": 2,
    "num_attention_heads": 2,
    "text_dim": 64,
}
MAGE_FLOW = {
    "image_model": "mage_flow",
    "in_channels": 128,
    "out_channels": 128,
    "num_layers": 2,
    "attention_head_dim": 32,
    "num_attention_heads": 2,
    "joint_attention_dim": 64,
    "axes_dims_rope": (8, 12, 12),
}
PIXELDIT = {
    "image_model": "pixeldit_t2i",
    "num_groups": 2,
    "hidden_size": 64,
    "pixel_hidden_size": 8,
    "pixel_attn_hidden_size": 64,
    "pixel_num_groups": 2,
    "patch_depth": 2,
    "pixel_depth": 2,
    "txt_embed_dim": 64,
    "txt_max_length": 20,
}
ERNIE = {
    "image_model": "ernie",
    "hidden_size": 64,
    "num_attention_heads": 2,
    "num_layers": 2,
    "ffn_hidden_size": 64,
    "text_in_dim": 32,
    "rope_axes_dim": (8, 12, 12),
}

ALL = {
    "SD3": Tiny("SD3", SD3, (16, 8, 8), 64, more=pooled(64)),
    "SD3.5 Medium": Tiny(
        "SD3",
        SD3 | {"x_block_self_attn_layers": [0, 1], "depth": 2},
        (16, 8, 8),
        64,
        more=pooled(64),
    ),
    "AuraFlow": Tiny("AuraFlow", AURA, (4, 8, 8), 64, gain=1.2),
    "Flux": Tiny("Flux", FLUX, (16, 8, 8), 64, more=pooled(64)),
    "Flux schnell": Tiny("FluxSchnell", FLUX | {"guidance_embed": False}, (16, 8, 8), 64, more=pooled(64)),
    "Flux.2": Tiny("Flux2", FLUX2, (128, 4, 4), 64, tokens=200, fixed=True, more=pooled(64), gain=2.0),
    "Chroma": Tiny("Chroma", CHROMA, (16, 8, 8), 64, more=pooled(64)),
    "Chroma Radiance": Tiny("ChromaRadiance", RADIANCE, (3, 64, 64), 64, more=pooled(64)),
    "Qwen-Image": Tiny("QwenImage", QWEN, (16, 1, 8, 8), 64, gain=1.5),
    "Lumina 2": Tiny("Lumina2", LUMINA, (16, 8, 8), 64, more=masked),
    "Z-Image": Tiny("ZImage", Z_IMAGE, (16, 10, 14), 64, gain=1.5),
    "HiDream": Tiny("HiDream", HIDREAM, (16, 8, 8), 64, more=llama(4, 64)),
    "OmniGen2": Tiny("Omnigen2", OMNIGEN2, (16, 8, 8), 64, more=masked),
    "Hunyuan Image 2.1": Tiny("HunyuanImage21", HUNYUAN_IMAGE, (64, 4, 4), 64),
    "Hunyuan Image 2.1, quoted text": Tiny(
        "HunyuanImage21", HUNYUAN_IMAGE | {"byt5": True}, (64, 4, 4), 64, more=byt5
    ),
    "PixArt alpha": Tiny(
        "PixArtAlpha", PIXART | {"image_model": "pixart_alpha", "micro_condition": True}, (4, 64, 64), 64
    ),
    "PixArt Sigma": Tiny(
        "PixArtSigma", PIXART | {"image_model": "pixart_sigma", "micro_condition": False}, (4, 64, 64), 64
    ),
    "HunyuanDiT": Tiny("HunyuanDiT", HUNYUAN_DIT, (4, 8, 8), 64, tokens=7, fixed=True, more=mt5),
    "Cosmos Predict2": Tiny("CosmosT2IPredict2", COSMOS, (16, 1, 8, 8), 64),
    "Wan 2.1": Tiny("WAN21_T2V", WAN, (16, 1, 8, 8), 64),
    "LTXV": Tiny("LTXV", LTXV, (128, 1, 4, 4), 64, more=masked),
    "LongCat-Image": Tiny("LongCatImage", LONGCAT, (16, 8, 8), 64),
    "Ovis-Image": Tiny("Flux", OVIS, (16, 8, 8), 64, more=pooled(64)),
    "Boogu": Tiny("Boogu", BOOGU, (16, 8, 8), 64, more=masked),
    "Kandinsky 5 Image": Tiny("Kandinsky5Image", KANDINSKY, (16, 8, 8), 64, more=pooled(64)),
    "Anima": Tiny("Anima", COSMOS | {"image_model": "anima"}, (16, 1, 8, 8), 64, fixed=True, more=t5_tokens),
    "Ideogram 4": Tiny("Ideogram4", IDEOGRAM4, (128, 4, 4), 64, forced=IDEOGRAM4_SIZES),
    "Krea 2": Tiny("Krea2", KREA2, (16, 1, 8, 8), 64),
    "Lens": Tiny("Lens", LENS, (128, 4, 4), 64, more=masked),
    "JoyImage": Tiny("JoyImage", JOYIMAGE, (16, 1, 8, 8), 64, forced={"rope_dim_list": [8, 12, 12]}),
    "Mage-Flow": Tiny("MageFlow", MAGE_FLOW, (128, 4, 4), 64),
    "PixelDiT": Tiny("PixelDiTT2I", PIXELDIT, (3, 64, 64), 64, tokens=20, fixed=True),
    "Ernie Image": Tiny("ErnieImage", ERNIE, (128, 4, 4), 32),
}
TINY = {
    name: tiny
    for name, tiny in ALL.items()
    if hasattr(comfy.supported_models, tiny.config)
    and ("yak_mlp" not in tiny.layout or "yak_mlp" in FluxParams.__dataclass_fields__)
}
"""Those that the running host has."""
KNOWN = TINY | {
    "Flux Fill": replace(ALL["Flux"], config="FluxInpaint", layout=FLUX | {"in_channels": 96}),
}
"""And those of the same families that take something beside."""


def build(name: str, seed: int = 0, **layout: Any) -> comfy.model_patcher.ModelPatcher:
    """The network of a family, with random weights, as a MODEL. layout: what differs from `KNOWN`'s."""
    tiny = KNOWN[name]
    made = getattr(comfy.supported_models, tiny.config)(tiny.layout | layout)
    made.unet_config |= tiny.forced
    made.set_inference_dtype(torch.float32, None)
    cpu = torch.device("cpu")
    with torch.inference_mode(False), torch.random.fork_rng():
        torch.manual_seed(seed)
        if tiny.config == "Anima":
            shrink_adapter()
        model = made.get_model({}, "", device=cpu)
        randomize(model.diffusion_model, torch.Generator().manual_seed(seed), tiny.gain)
    return comfy.model_patcher.ModelPatcher(model, cpu, cpu)


def shrink_adapter() -> None:
    """Anima's adapter has no sizes in its layout: other defaults for this process."""
    from comfy.ldm.anima.model import LLMAdapter

    sizes = {"source_dim": 64, "target_dim": 64, "model_dim": 64, "num_layers": 1, "num_heads": 2}
    names = inspect.getfullargspec(LLMAdapter.__init__).args[1:]
    defaults = zip(names, LLMAdapter.__init__.__defaults__ or (), strict=True)
    LLMAdapter.__init__.__defaults__ = tuple(sizes.get(name, default) for name, default in defaults)


def randomize(network: torch.nn.Module, generator: torch.Generator, gain: float) -> None:
    """Random weights, in the order of their names: norms near 1, matrices that keep sizes times the gain."""
    tensors = dict(network.named_parameters()) | {
        name: buffer for name, buffer in network.named_buffers() if name.endswith("pos_embed")
    }
    for name in sorted(tensors):
        tensor = tensors[name].data
        numbers = torch.randn(tensor.shape, generator=generator).to(tensor.dtype)
        if name.endswith(("pos_embed", "table", "modulation", "token", "padding", "tokens")):
            tensor.copy_(0.5 * numbers)
        elif tensor.ndim > 1:
            tensor.copy_(gain * numbers / math.sqrt(tensor[0].numel()))
        else:
            tensor.copy_(0.1 * numbers + (0.0 if name.endswith("bias") else 1.0))


def conditioning(name: str, seed: int, longer: int = 0) -> list:
    """A prompt's CONDITIONING of random features. longer: more tokens, where prompts can differ in it."""
    tiny = KNOWN[name]
    generator = torch.Generator().manual_seed(seed)
    tokens = tiny.tokens + (0 if tiny.fixed else longer)
    features = torch.randn(1, tokens, tiny.width, generator=generator)
    return [[features, tiny.more(generator, tokens)]]


def latent(name: str, batch: int = 1, seed: int = 0) -> Tensor:
    """Noise in the shape of the family's latents, the same in each row."""
    noise = torch.randn(1, *KNOWN[name].latent, generator=torch.Generator().manual_seed(seed))
    return noise.repeat(batch, *[1] * (noise.ndim - 1))


def sample(model: Any, noise: Tensor, positive: list, negative: list, cfg: float, steps: int = 2) -> Tensor:
    """What KSampler does, from noise."""
    return comfy.sample.sample(
        model,
        noise,
        steps,
        cfg,
        "euler",
        "simple",
        positive,
        negative,
        torch.zeros_like(noise),
        denoise=1.0,
        disable_pbar=True,
    )
