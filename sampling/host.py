"""What the pack leans on in ComfyUI beyond its public interface, by name.

`ATTRIBUTES` lists what is read from the host's objects; a test checks that each is there. Whatever differs
between supported versions is asked for here, by feature and never by version.
"""

from __future__ import annotations

import logging
import sys
from typing import Any

import comfy.model_management
import torch
from comfy.cli_args import args
from comfy.k_diffusion.sampling import BrownianTreeNoiseSampler, default_noise_sampler
from comfy.ldm.modules.attention import SpatialTransformer, SpatialVideoTransformer, optimized_attention
from comfy.ldm.modules.diffusionmodules.openaimodel import Downsample, ResBlock, UNetModel, Upsample
from comfy.patcher_extension import WrappersMP, get_all_wrappers
from comfy_execution.utils import get_executing_context
from torch import Tensor

__all__ = [
    "BrownianTreeNoiseSampler",
    "Downsample",
    "ResBlock",
    "SpatialTransformer",
    "SpatialVideoTransformer",
    "UNetModel",
    "Upsample",
    "default_noise_sampler",
    "optimized_attention",
]

KEY = "prompt_to_prompt"
"""Under this key the wrappers are installed, and a paired conditioning carries its controller's mark."""

ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "comfy.samplers.CFGGuider": ("outer_sample", "predict_noise", "set_conds"),
    "comfy.samplers.KSAMPLER": ("sample",),
    "comfy.samplers.KSamplerX0Inpaint": ("__call__",),
    "comfy.model_patcher.ModelPatcher": ("clone", "get_model_object", "get_wrappers", "add_wrapper_with_key"),
    "comfy.model_base.BaseModel": ("apply_model", "memory_required"),
    "comfy.controlnet.ControlNet": ("copy",),
    "comfy.sd1_clip.SDTokenizer": ("_try_get_embedding", "tokenize_with_weights", "untokenize"),
    "comfy.conds.CONDRegular": ("process_cond", "concat"),
    "comfy.model_management": ("get_free_memory", "soft_empty_cache"),
    "latent_preview": ("prepare_callback",),
}
"""Class or module -> attributes, of the class itself."""

INSTANCE_ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "guider": ("conds", "model_options", "model_patcher"),
    "sampler": ("sampler_function", "extra_options", "inpaint_options"),
    "model patcher": (
        "attachments",
        "additional_models",
        "injections",
        "model",
        "model_options",
        "object_patches",
        "patches_uuid",
    ),
    "model": ("current_patcher", "diffusion_model", "model_config", "model_sampling"),
    "control": ("cond_hint_original", "extra_concat_orig", "previous_controlnet"),
}
"""What objects have once they are made, by what they are; `guider` in mid-run."""

ENTRIES: dict[str, tuple[str, ...]] = {
    "entry": ("cross_attn", "model_conds", "uuid"),
    "model_conds": ("c_crossattn",),
    "transformer_options": ("cond_or_uncond", "sample_sigmas", "sigmas", "uuids"),
}
"""What the host's dictionaries hold in mid-run: an entry of conditioning, a forward's options."""


def is_out_of_memory(error: Exception) -> bool:
    """As the host tells it; later versions know more than one such exception."""
    host = comfy.model_management
    return host.is_oom(error) if hasattr(host, "is_oom") else isinstance(error, host.OOM_EXCEPTION)


def free_memory(model: Any, device: torch.device) -> int:
    """Bytes that a forward of the host's BaseModel may take on the device."""
    host = comfy.model_management
    return getattr(model.current_patcher, "get_free_memory", host.get_free_memory)(device)


def wraps_network(options: dict) -> bool:
    """Whether another node wraps the network, by transformer_options, and may leave it out (EasyCache)."""
    return bool(get_all_wrappers(WrappersMP.DIFFUSION_MODEL, options))


def pins_memory() -> bool:
    return not getattr(args, "disable_pinned_memory", False)


def inpainting_noise(x: Tensor, seed: int) -> Tensor:
    """The noise that samplers with noise of their own put outside of an inpainting mask, on the CPU."""
    return torch.randn(x.shape, generator=torch.manual_seed(seed + 1), device="cpu")


def tell(text: str) -> None:
    """Say something about the node that runs: in the log, and on the node in the page if there is one."""
    logging.warning("[prompt-to-prompt] %s", text)
    context = get_executing_context()
    server = getattr(sys.modules.get("server"), "PromptServer", None)  # never imported: scripts have none
    instance = getattr(server, "instance", None)
    if context is not None and instance is not None:
        instance.send_progress_text(text, context.node_id)


def is_multigpu(model_options: dict) -> bool:
    return bool(model_options.get("multigpu_clones"))
