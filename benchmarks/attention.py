"""Cost of edited sampling: ratios to the host sampling the same two prompts as one plain batch.

    python benchmarks/attention.py [--model sd15] [--size 512] [--steps 4] [--repeats 5]

Runs of all variants alternate in one process; the table gives the median of time over plain time, the
spread of those ratios, and on a GPU the ratio of peak memory. `materialised` is the same word swap with
attention maps built, edited and multiplied, as published implementations do it.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

from pack import load_pack


def sd15_model() -> Any:
    """Stable Diffusion 1.5's U-Net at its real width with random weights, as a ComfyUI MODEL."""
    import comfy.model_management
    import comfy.model_patcher
    import comfy.supported_models
    import torch

    config = comfy.supported_models.SD15(
        {
            "image_size": 32,
            "in_channels": 4,
            "out_channels": 4,
            "model_channels": 320,
            "num_res_blocks": [2, 2, 2, 2],
            "channel_mult": [1, 2, 4, 4],
            "num_heads": 8,
            "num_head_channels": -1,
            "use_spatial_transformer": True,
            "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
            "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
            "transformer_depth_middle": 1,
            "context_dim": 768,
            "use_linear_in_transformer": False,
            "adm_in_channels": None,
            "legacy": False,
            "use_temporal_attention": False,
        }
    )
    device = comfy.model_management.get_torch_device()
    config.set_inference_dtype(torch.float32 if device.type == "cpu" else torch.float16, None)
    model = config.get_model({}, "", device=device)
    for parameter in model.diffusion_model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    return comfy.model_patcher.ModelPatcher(model, device, comfy.model_management.unet_offload_device())


def variants(model: Any, clip: Any, width: int) -> dict[str, tuple[Any, list]]:
    """Name -> (model, positive conditioning of both prompts), all from the same pair of prompts."""
    import torch
    from p2p.attention.schedule import TauSchedule, Window, parse_word_windows
    from p2p.sampling.controller import control
    from p2p.sampling.encode import start_edit

    def widen(edit: Any) -> Any:
        from dataclasses import replace

        def entries(conditioning: list) -> list:
            return [
                [torch.randn(cond.shape[0], cond.shape[1], width), options] for cond, options in conditioning
            ]

        source = replace(edit.source, conditioning=entries(edit.source.conditioning))
        targets = tuple(replace(target, conditioning=entries(target.conditioning)) for target in edit.targets)
        return replace(edit, source=source, targets=targets)

    swap = widen(start_edit(clip, "a cat riding a bicycle", "a cat riding a car", "auto"))
    refine = widen(start_edit(clip, "a cat on a beach", "a watercolor of a cat on a crowded beach", "auto"))
    whole = TauSchedule(Window(0.0, 1.0), Window(0.0, 1.0))
    cross = TauSchedule(Window(0.0, 1.0), Window(0.0, 0.0))
    per_word = TauSchedule(Window(0.0, 1.0), Window(0.0, 0.0), words=parse_word_windows("beach: 0"))
    nothing = TauSchedule(Window(0.0, 0.0), Window(0.0, 0.0))
    table = {
        "plain batch": control(model, swap, nothing),
        "swap": control(model, swap, cross),
        "swap + self-attention": control(model, swap, whole),
        "refine": control(model, refine, cross),
        "refine, tau per word": control(model, refine, per_word),
        "re-weight": control(model, swap.reweighted("cat", 2.0), cross),
    }
    plain_model, conditioning = model, [[cond, {"pooled_output": None}] for cond, _ in table["swap"][1]]
    return {
        **table,
        "plain batch": (plain_model, conditioning),
        "materialised swap": (materialised(model, swap.targets[0].mapping), conditioning),
    }


def materialised(model: Any, mapping: Any) -> Any:
    """The word swap with maps: softmax(Q K^T), the target's replaced by the source's M, then times V."""
    import torch
    from einops import rearrange

    def replace(q: Any, k: Any, v: Any, options: dict) -> Any:
        q, k, v = (rearrange(x, "b n (h d) -> b h n d", h=options["n_heads"]) for x in (q, k, v))
        maps = (torch.einsum("b h n d, b h t d -> b h n t", q, k) * q.shape[-1] ** -0.5).softmax(-1)
        for chunk, kind in enumerate(options["cond_or_uncond"]):
            if kind == 0:
                source = chunk * q.shape[0] // len(options["cond_or_uncond"])
                maps[source + 1] = maps[source] @ mapping.to(maps)
        return rearrange(torch.einsum("b h n t, b h t d -> b h n d", maps, v), "b h n d -> b n (h d)")

    from p2p.sampling.controller import cross_attention_blocks

    patched = model.clone()
    for name, number, depth in cross_attention_blocks(model.get_model_object("diffusion_model")):
        patched.set_model_attn2_replace(replace, name, number, depth)
    return patched


def sampler(size: int, steps: int, width: int) -> Callable[[Any, list], float]:
    """A function that samples one pair with guidance and returns seconds per step."""
    import comfy.sample
    import torch

    latent = torch.zeros(2, 4, size // 8, size // 8)
    negative = [[torch.zeros(1, 77, width), {"pooled_output": None}]]

    def run(model: Any, positive: list) -> float:
        noise = comfy.sample.prepare_noise(latent, 0, [0, 0])
        started = time.perf_counter()
        comfy.sample.sample(
            model, noise, steps, 7.0, "euler", "normal", positive, negative, latent, disable_pbar=True
        )
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return (time.perf_counter() - started) / steps

    return run


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=["demo", "sd15"], default="demo")
    parser.add_argument("--size", type=int, default=None, help="px; default 128 for demo, 512 for sd15")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    load_pack()
    import torch
    from p2p.demo.loader import load_demo_model

    torch.set_grad_enabled(False)
    demo, clip, _ = load_demo_model()
    model, width, size = (demo, 128, 128) if options.model == "demo" else (sd15_model(), 768, 512)
    size = options.size or size
    run = sampler(size, options.steps, width)
    table = variants(model, clip, width)
    seconds: dict[str, list[float]] = {name: [] for name in table}
    peaks: dict[str, int] = {}
    for repeat in range(options.repeats + 1):
        for name, (patched, positive) in table.items():
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
            elapsed = run(patched, positive)
            if repeat:  # the first round warms up
                seconds[name].append(elapsed)
            if torch.cuda.is_available():
                peaks[name] = torch.cuda.max_memory_allocated()
    plain = seconds["plain batch"]
    device = "CUDA" if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    print(
        f"{options.model}, {size} px, 1 pair with guidance, {options.steps} steps, {options.repeats} repeats"
    )
    print(f"{device}, torch {torch.__version__}")
    print(f"{'':24}{'s/step':>9}{'ratio':>8}{'spread':>16}{'memory':>9}")
    for name, times in seconds.items():
        ratios = sorted(a / b for a, b in zip(times, plain, strict=True))
        memory = f"{peaks[name] / peaks['plain batch']:9.3f}" if peaks else f"{'-':>9}"
        spread = f"{ratios[0]:.3f} - {ratios[-1]:.3f}"
        print(f"{name:24}{statistics.median(times):9.4f}{statistics.median(ratios):8.3f}{spread:>16}{memory}")


if __name__ == "__main__":
    main()
