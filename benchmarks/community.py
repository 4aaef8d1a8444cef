"""What does an edit cost beside the community's Prompt-to-Prompt pipeline of diffusers?

pip install diffusers
python benchmarks/community.py --pipeline pipeline_prompt2prompt.py

The file is examples/community/pipeline_prompt2prompt.py of https://github.com/huggingface/diffusers.
Both sides sample the same prompts at SD1.5's real width with random weights of the same type, and take turns
in one process. Time per step with guidance, of steps in which everything is injected, and memory are measured
as in edits.py. Text encoding and decoding are left out.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from edits import SOURCE, SWAP, Bench, Plan, Result, Variant, compare, schedule
from measure import machine, write_section
from models import Model, dtype_of, random_model
from pack import load_pack
from speed import PAGE

OURS, COMMUNITY = "this pack", "diffusers, community pipeline"
HOST, DIFFUSERS = "ComfyUI, plain batch", "diffusers, plain batch"
SIDE = 16  # px of the largest grid whose self-attention the community pipeline injects


@dataclass(frozen=True)
class Pipelined(Variant):
    """model: a pipeline of diffusers. positive: its prompts' embedding. control: of the edit, if any."""

    control: dict[str, Any] | None = None


class Both(Bench):
    """ComfyUI's U-Net and diffusers', of the same parameters."""

    def __init__(self, model: Model, clip: Any, unet: Any):
        super().__init__(model, clip)
        self.unet, self.processors = unet, unet.attn_processors
        ours = model.patcher.model.diffusion_model
        self.nbytes = sum(parameter.nbytes for parameter in unet.parameters())
        if self.nbytes != sum(parameter.nbytes for parameter in ours.parameters()):
            raise ValueError("The U-Nets of ComfyUI and diffusers differ in size.")

    def pipelines(self, published: type) -> tuple[Any, Any]:
        """Plain Stable Diffusion, and the published class, both without what encodes and decodes."""
        import comfy.sd1_clip
        from diffusers import DDIMScheduler, StableDiffusionPipeline
        from transformers import CLIPTokenizer

        class Cast(published):
            """Multiplies maps and mapping in one dtype: as published it fails in all but float32."""

            def register_attention_control(self, controller: Any) -> None:
                for name in ("mapper", "cross_replace_alpha"):
                    setattr(controller, name, getattr(controller, name).to(self.unet.dtype))
                super().register_attention_control(controller)

        parts = {
            "unet": self.unet,
            "scheduler": DDIMScheduler(
                beta_start=0.00085,
                beta_end=0.012,
                beta_schedule="scaled_linear",
                clip_sample=False,
                set_alpha_to_one=False,
                steps_offset=1,
            ),
            "tokenizer": CLIPTokenizer.from_pretrained(
                str(Path(comfy.sd1_clip.__file__).with_name("sd1_tokenizer"))
            ),
            **dict.fromkeys(("vae", "text_encoder", "safety_checker", "feature_extractor")),
        }
        plain, edits = (
            kind(**parts, requires_safety_checker=False) for kind in (StableDiffusionPipeline, Cast)
        )
        for pipeline in (plain, edits):
            pipeline.set_progress_bar_config(disable=True)
        return plain, edits

    def compared(self, published: type, size: int) -> dict[str, Variant]:
        """The swap of both sides, also with self-attention, and each side's plain batch."""
        import torch

        plain, edits = self.pipelines(published)
        edit, cross = self.edit(SOURCE, SWAP), schedule(1.0, 0.0)
        both = replace(schedule(1.0, 1.0), self_resolution=min(1.0, SIDE * 8 / size))
        embedding = [torch.randn(2, 77, self.model.width)]

        def community(self_: float) -> Variant:
            control = {"edit_type": "replace", "n_cross_replace": 1.0, "n_self_replace": self_}
            return Pipelined(edits, embedding, 2, control)

        return {
            HOST: self.plain(edit),
            f"{OURS}, swap": self.ours(edit, cross),
            f"{OURS}, swap, self-attention": self.ours(edit, both),
            DIFFUSERS: Pipelined(plain, embedding, 2),
            f"{COMMUNITY}, swap": community(0.0),
            f"{COMMUNITY}, swap, self-attention": community(1.0),
        }

    def run(
        self, variant: Variant, size: int, steps: int, finished: Callable[[], None] = lambda: None
    ) -> None:
        if not isinstance(variant, Pipelined):
            super().run(variant, size, steps, finished)
            return
        import torch

        def stepped(*_: Any) -> dict[str, Any]:
            finished()
            return {}

        self.unet.set_attn_processor(dict(self.processors))  # of which the other pipeline leaves its own
        arguments: dict[str, Any] = {"callback_on_step_end": stepped}
        if variant.control:
            arguments = {
                "prompt": [SOURCE, SWAP],
                "cross_attention_kwargs": variant.control,
                "callback": stepped,
            }
        (embedding,) = variant.positive
        variant.model(
            prompt_embeds=embedding,
            negative_prompt_embeds=torch.zeros_like(embedding),
            height=size,
            width=size,
            num_inference_steps=steps,
            guidance_scale=7.0,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
            **arguments,
        )
        variant.model.controller = None  # and with it the maps that it keeps

    def memory(self, variant: Variant, size: int) -> float:
        """As Bench's; on a GPU without the other side's weights, which lie there too."""
        import torch

        return super().memory(variant, size) - self.nbytes * torch.cuda.is_available()


def random_unet() -> Any:
    """diffusers' U-Net with the configuration of SD1.5, weights as those of `random_model`."""
    import comfy.model_management
    import torch
    from diffusers import UNet2DConditionModel

    device = comfy.model_management.get_torch_device()
    unet = UNet2DConditionModel(
        sample_size=64,
        block_out_channels=(320, 640, 1280, 1280),
        layers_per_block=2,
        cross_attention_dim=768,
        attention_head_dim=8,
    )
    unet = unet.to(device, dtype_of(device)).eval()
    for parameter in unet.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    return unet


def published_pipeline(path: Path) -> type:
    """The class in diffusers' file."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Prompt2PromptPipeline


def table(results: dict[str, Result], memory: dict[str, float]) -> str:
    """Each against its own framework's plain batch and against this pack's edit of the same kind."""

    def against(name: str, base: str) -> str:
        ratios = [a / b for a, b in zip(results[name].ratios, results[base].ratios, strict=True)]
        return f"{statistics.median(ratios):.3f} | {min(ratios):.2f} to {max(ratios):.2f}"

    lines = [
        "| | s per step | time, own plain batch = 1 | range | time, this pack's edit = 1 | range "
        "| memory, GB | own plain batch = 1 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, one in results.items():
        plain = DIFFUSERS if name.startswith("diffusers") else HOST
        same = name.replace(COMMUNITY, OURS)
        ratio = against(name, same) if OURS in same else " | "
        lines.append(
            f"| {name} | {one.seconds:.3f} | {against(name, plain)} | {ratio} "
            f"| {memory[name] / 1e9:.2f} | {memory[name] / memory[plain]:.3f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pipeline", type=Path, required=True, help="diffusers' pipeline_prompt2prompt.py")
    parser.add_argument("--page", action="store_true", help="write docs/benchmarks.md")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=1, help="timed at a time")
    parser.add_argument("--size", type=int, default=512, help="px")
    options = parser.parse_args()
    if not options.pipeline.is_file():
        parser.error(f"There is no file {options.pipeline}; see above where it is published.")
    load_pack()
    import diffusers
    import torch
    from p2p.demo.loader import load_demo_model

    torch.set_grad_enabled(False)
    unet = random_unet()
    bench = Both(random_model("SD1.5"), load_demo_model()[1], unet)
    variants = bench.compared(published_pipeline(options.pipeline), options.size)
    results = compare(bench, variants, options.size, Plan(options.rounds, options.steps))
    memory = {name: bench.memory(variant, options.size) for name, variant in variants.items()}
    dtype = str(unet.dtype).removeprefix("torch.")
    rounds = f"{options.rounds} rounds of {options.steps} timed steps"
    text = (
        f"{machine()}, {dtype}, diffusers {diffusers.__version__}.\n\n"
        f"**SD1.5's U-Net, {options.size} px, one target, {rounds}**\n\n{table(results, memory)}"
    )
    print(text)
    if options.page:
        write_section(PAGE, "speed community", text)


if __name__ == "__main__":
    main()
