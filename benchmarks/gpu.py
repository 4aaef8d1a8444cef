"""What does an edit cost on a GPU?  Ratios of time and memory to the host sampling as many rows.

python benchmarks/gpu.py                                SD1.5's and SDXL's U-Nets, random weights: tables
python benchmarks/gpu.py --page                         the same, into docs/benchmarks.md
python benchmarks/gpu.py --device cpu --model bundled   the way through this program, without a GPU

Variants take turns. A step is timed between two events of the GPU, each waited for. A wait is what PyTorch
tells of (torch.cuda.set_sync_debug_mode); a read is a wait that brings values to the program.
"""

from __future__ import annotations

import argparse
import gc
import statistics
from collections.abc import Iterator
from typing import Any

import torch
from edits import MATERIALISED, Bench, Plan, compare
from measure import machine, write_section
from models import bundled_model, random_model
from pack import load_pack
from speed import PAGE, reuse_table

SIZES = (512, 1024)
DTYPES = ("float16", "bfloat16")
MODELS = ("SD1.5", "SDXL")
BUNDLED = "bundled"


def edits_table(bench: Bench, title: str, size: int, plan: Plan) -> str:
    """Every kind of edit but the materialised one, whose maps would not fit on most cards."""
    variants = {name: one for name, one in bench.variants().items() if name != MATERIALISED}
    lines = [
        f"**{title}, {size} px, one target, {plan.rounds} rounds of {plan.steps} timed steps**",
        "",
        "| | ms per step | time | range | memory | waits per step | reads among them |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, one in compare(bench, variants, size, plan, details=True).items():
        counted = 4
        waits = len(bench.waits(variants[name], size, counted)) / (counted - 1)
        reads = statistics.mean(bench.reads(variants[name], size, counted))
        assert one.memory is not None
        lines.append(
            f"| {name} | {one.seconds * 1000:.2f} | {one.ratio:.3f} | {one.spread} | {one.memory:.3f} "
            f"| {waits:g} | {reads:g} |"
        )
    return "\n".join(lines)


def tables(name: str, clip: Any, sizes: list[int], dtypes: list[str], plan: Plan) -> Iterator[str]:
    """Of one model, in each dtype and size; in the first dtype also with kept sources."""
    for dtype in dtypes:
        number = getattr(torch, dtype)
        model = bundled_model(number)[0] if name == BUNDLED else random_model(name, number)
        bench, title = Bench(model, clip), f"{name}, {dtype}"
        for size in sizes:
            yield edits_table(bench, title, size, plan)
        if dtype == dtypes[0]:
            yield reuse_table(bench, title, sizes[0], plan)
        del model, bench
        free()


def free() -> None:
    import comfy.model_management

    comfy.model_management.unload_all_models()
    gc.collect()
    comfy.model_management.soft_empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--page", action="store_true", help="write docs/benchmarks.md")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--model", choices=(*MODELS, BUNDLED), action="append", help="both real ones")
    parser.add_argument("--dtype", choices=(*DTYPES, "float32"), action="append", help="both half ones")
    parser.add_argument("--size", type=int, action="append", help="px (512 and 1024)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10, help="timed at a time")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        print("no GPU found: nothing to measure")
        return
    load_pack(options.device)
    torch.set_grad_enabled(False)
    _, clip = bundled_model()
    plan, found = Plan(options.rounds, options.steps), [f"{machine()}."]
    print(found[0])
    for name in options.model or MODELS:
        for text in tables(name, clip, options.size or list(SIZES), options.dtype or list(DTYPES), plan):
            print(text, flush=True)
            found.append(text)
    if options.page:
        write_section(PAGE, "speed gpu", "\n\n".join(found))


if __name__ == "__main__":
    main()
