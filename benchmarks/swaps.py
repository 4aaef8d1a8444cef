"""Draws docs/swaps.jpg: ten word swaps on the bundled model, seeds 0 to 9 in order, none picked or left out.

python benchmarks/swaps.py [--out docs/swaps.jpg]
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from pack import ROOT, load_pack

SWAPS = [
    ("a dog riding a bicycle", "a dog riding a boat"),
    ("a penguin on a beach", "a duck on a beach"),
    ("a castle in a field", "a house in a field"),
    ("a tree in a desert", "a cake in a desert"),
    ("a car on a street", "a boat on a street"),
    ("an elephant riding a car", "a penguin riding a car"),
    ("a house on a mountain", "a castle on a mountain"),
    ("a red car in a forest", "a blue car in a forest"),
    ("a duck in a field", "a duck in a desert"),
    ("a cake on a beach", "a tree on a beach"),
]
STEPS, SIZE = 20, 128
SETTINGS: dict[str, Any] = {"steps": STEPS, "cfg": 4.0, "sampler_name": "euler", "scheduler": "normal"}


def draw(model: Any, clip: Any, vae: Any, source: str, target: str, seed: int) -> Any:
    """Three images (3, height, width, 3): the source, the target without control, the target edited."""
    import torch
    from p2p.attention.schedule import TauSchedule, Window
    from p2p.sampling.encode import start_edit
    from p2p.sampling.sampler import sample_pairs

    edit = start_edit(clip, source, target, "auto")
    negative = clip.encode_from_tokens_scheduled(clip.tokenize(""))
    latent = {"samples": torch.zeros(1, 4, SIZE // 8, SIZE // 8)}
    rows = []
    for tau in (TauSchedule(Window(0.0, 0.0), Window(0.0, 0.0)), TauSchedule()):
        rows.append(
            sample_pairs(
                model, edit, tau, negative=negative, latent=latent, seed=seed, **SETTINGS
            )
        )
    (sources, alone, _), (_, edited, _) = rows
    return vae.decode(torch.cat([sources["samples"], alone["samples"], edited["samples"]]))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "swaps.jpg")
    options = parser.parse_args()
    load_pack()
    import torch
    from p2p.demo.loader import load_demo_model
    from p2p.drawing.grid import comparison_grid
    from PIL import Image

    torch.set_grad_enabled(False)
    model, clip, vae = load_demo_model()
    images, labels = [], []
    for seed, (source, target) in enumerate(SWAPS):
        images.append(draw(model, clip, vae, source, target, seed))
        labels += [source, f"{target}, no control", f"{target}, Prompt-to-Prompt"]
    grid = comparison_grid(torch.cat(images), labels, columns=6)[0]
    Image.fromarray((grid * 255).round().byte().numpy()).save(options.out, quality=90)
    print(options.out)


if __name__ == "__main__":
    main()
