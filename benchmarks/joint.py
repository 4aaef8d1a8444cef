"""Transformers with joint attention at their real widths: some blocks, random weights, and their edits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from edits import MATERIALISED, PLAIN, REFINED, SOURCE, SWAP, Bench, Variant, schedule
from models import Model, dtype_of, fill


@dataclass(frozen=True)
class Layout:
    """A family's network.

    config: class in `comfy.supported_models`. network: its layout, of all sizes but depth. blocks: how many
    of each kind; all of a kind are alike. tokens: of the text, as its tokenizer gives them. width, pooled: of
    the text's features. frames: whether latents have that axis. cfg: 1 for the prompts without a negative.
    """

    config: str
    network: dict[str, Any]
    blocks: dict[str, int]
    tokens: int
    width: int
    pooled: int = 0
    frames: bool = False
    cfg: float = 1.0


LAYOUTS = {
    "Flux": Layout(
        "Flux",
        {
            "image_model": "flux",
            "in_channels": 16,
            "out_channels": 16,
            "patch_size": 2,
            "vec_in_dim": 768,
            "context_in_dim": 4096,
            "hidden_size": 3072,
            "mlp_ratio": 4.0,
            "num_heads": 24,
            "axes_dim": [16, 56, 56],
            "theta": 10000,
            "qkv_bias": True,
            "guidance_embed": True,
        },
        {"depth": 1, "depth_single_blocks": 1},
        tokens=256,
        width=4096,
        pooled=768,
    ),
    "SD3.5-Large": Layout(
        "SD3",
        {
            "in_channels": 16,
            "patch_size": 2,
            "input_size": None,
            "adm_in_channels": 2048,
            "pos_embed_scaling_factor": None,
            "pos_embed_max_size": 192,
            "num_patches": 36864,
            "qk_norm": "rms",
            "context_embedder_config": {
                "target": "torch.nn.Linear",
                "params": {"in_features": 4096, "out_features": 2432},
            },
        },
        {"depth": 38, "num_blocks": 2},  # the width is made of 38
        tokens=154,
        width=4096,
        pooled=2048,
        cfg=4.5,
    ),
    "Qwen-Image": Layout(
        "QwenImage",
        {
            "image_model": "qwen_image",
            "in_channels": 64,
            "attention_head_dim": 128,
            "num_attention_heads": 24,
            "joint_attention_dim": 3584,
        },
        {"num_layers": 1},
        tokens=77,
        width=3584,
        frames=True,
        cfg=4.0,
    ),
}


class JointBench(Bench):
    """A transformer, and the prompts' edits for it."""

    def __init__(self, name: str, clip: Any):
        self.layout = LAYOUTS[name]
        super().__init__(_random_model(self.layout), clip)
        self.cfg = self.layout.cfg

    def rows(self, edit: Any) -> list:
        """A CONDITIONING with a row for each branch."""
        import torch

        prompts = [prompt.conditioning[0] for prompt in edit.prompts]
        pooled = [options["pooled_output"] for _, options in prompts]
        options = {} if pooled[0] is None else {"pooled_output": torch.cat(pooled)}
        return [[torch.cat([cond for cond, _ in prompts]), options]]

    def plain(self, edit: Any) -> Variant:
        return Variant(self.model.patcher, self.rows(edit), edit.branches)

    def built(self, edit: Any, tau: Any = None) -> Variant:
        """The swap with materialised maps, in every step."""
        model = materialised(self.model.patcher, edit, self.layout.tokens)
        return Variant(model, self.rows(edit), edit.branches)

    def variants(self) -> dict[str, Variant]:
        """Every kind of edit with one target, injected in all steps."""
        swap, refine = self.edit(SOURCE, SWAP), self.edit(SOURCE, REFINED)
        image, words = schedule(0.0, 1.0), schedule(1.0, 0.0)
        fading = replace(schedule(0.99, 0.0), fade=1.0)
        return {
            PLAIN: self.plain(swap),
            "image": self.ours(swap, image),
            "words, swap": self.ours(swap, words),
            "words, refine": self.ours(refine, words),
            "words, faded": self.ours(swap, fading),
            "words, re-weight": self.ours(swap.reweighted("cat", 2.0), words),
            "mutual": self.ours(swap, replace(image, self_mode="mutual", mutual_layer=0.0)),
            MATERIALISED: self.built(swap),
        }

    def latent(self, rows: int, size: int) -> Any:
        import torch

        frames = (1,) if self.layout.frames else ()
        return torch.zeros(rows, 16, *frames, size // 8, size // 8)

    @property
    def negative(self) -> list:
        import torch

        pooled = {"pooled_output": torch.zeros(1, self.model.pooled)} if self.model.pooled else {}
        return [[torch.zeros(1, self.layout.tokens, self.model.width), pooled]]


def _random_model(layout: Layout) -> Model:
    """The network, with random weights."""
    import comfy.model_management
    import comfy.model_patcher
    import comfy.supported_models

    config = getattr(comfy.supported_models, layout.config)({**layout.network, **layout.blocks})
    device = comfy.model_management.get_torch_device()
    config.set_inference_dtype(dtype_of(device), None)
    model = config.get_model({}, "", device=device)
    for name, tensor in model.diffusion_model.state_dict().items():
        fill(name, tensor)
    patcher = comfy.model_patcher.ModelPatcher(model, device, comfy.model_management.unet_offload_device())
    return Model(patcher, layout.width, layout.pooled, layout.tokens)


def materialised(model: Any, edit: Any, tokens: int) -> Any:
    """A clone of the model in which a target's image queries take the source's map, built and re-ordered.

        [A_s,T M ; A_s,I] v_t

    Where the text stands first in joint attention, of `tokens` tokens, of which the prompt's come first.
    """
    import torch
    from comfy.patcher_extension import WrappersMP
    from einops import rearrange

    mapping = edit.targets[0].mapping.float()
    mapping = torch.block_diag(mapping, torch.eye(tokens - mapping.shape[0]))

    def attention(_: Callable, q: Any, k: Any, v: Any, heads: int, *args: Any, **kwargs: Any) -> Any:
        if q.ndim == 3:
            q, k = (rearrange(x, "b l (h d) -> b h l d", h=heads) for x in (q, k))
        if v.ndim == 3:
            v = rearrange(v, "b l (h d) -> b h l d", h=heads)
        elif v.shape[1] != heads:
            v = v.transpose(1, 2)
        maps = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)
        if maps.shape[-1] > tokens:
            first = positive * edit.branches
            source, target = maps[first, :, tokens:], maps[first + 1, :, tokens:]
            target[..., :tokens] = source[..., :tokens] @ mapping.to(maps)
            target[..., tokens:] = source[..., tokens:]
        return rearrange(maps @ v, "b h l d -> b l (h d)")

    positive = 0

    def apply_model(executor: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal positive
        *given, options = args
        positive = options["cond_or_uncond"].index(0)
        return executor(*given, {**options, "optimized_attention_override": attention}, **kwargs)

    patched = model.clone()
    patched.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "materialised", apply_model)
    return patched
