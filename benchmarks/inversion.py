"""How well are pictures edited that the model did not draw?  Writes figures into docs/inversion.*

python benchmarks/inversion.py [--scenes 20] [--again]     docs/inversion.json, .png, .jpg, .md's tables

Pictures come from the demo's scene generator, with seeds that no training saw, in order, none picked: plain
scenes with one place and one object or rider. Every other edit swaps an object, the others change a colour.
Each is inverted in four ways and edited by three methods, and measured against the picture as the VAE gives
it back:

- reconstruction: PSNR of the source prompt's own run, without guidance and with it.
- background: PSNR and SSIM outside of the edited object's mask, widened by one latent cell.
- edit success: the demo's classifier (`demo/evaluate.py`; trained on first use) finds what the target prompt
  asks for.

Plug-and-Play is as published where the source follows the inverted path: the picture is inverted and denoised
under the empty prompt. Without a path there is only the source prompt.

Runs that are done are kept in output/inversion and not repeated.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from measure import psnr, ssim, write_section
from pack import ROOT, load_pack

OUT, DOCS = ROOT / "output" / "inversion", ROOT / "docs"
SEED = 5_000_000
STEPS, CFG, SAMPLER, SCHEDULER = 20, 4.0, "euler", "normal"
REFINEMENT = 5
INVERSIONS = {
    "DDIM": "plain DDIM",
    "fixed point": f"fixed point, {REFINEMENT} rounds",
    "negative prompt": "negative prompt",
    "direct": "direct",
}
METHODS = {"P2P": "Prompt-to-Prompt", "PnP": "Plug-and-Play", "MasaCtrl": "mutual self-attention"}
CELL = 8  # px of a latent cell


@dataclass(frozen=True)
class Case:
    """A picture and its edit. edited: the word whose object is swapped or coloured."""

    source: Any
    target: Any
    edited: str


def cases(count: int) -> Iterator[Case]:
    """The first `count` scenes that fit, each with the next object of its kind or the next colour."""
    from p2p.demo import scenes

    kinds = [list(kind) for kind in (scenes.ANIMALS, scenes.VEHICLES, scenes.THINGS)]
    colors = list(scenes.COLORS)
    seed, found = SEED, 0
    while found < count:
        scene = scenes.sample(seed)
        seed += 1
        if scene.subject is None or scene.place is None or scene.style or scene.relation == "next to":
            continue
        role = "partner" if scene.partner else "subject"
        word = getattr(scene, role)
        if found % 2 == 0 or scene.partner:
            (kind,) = [kind for kind in kinds if word in kind]
            change: dict[str, Any] = {role: kind[(kind.index(word) + 1) % len(kind)]}
        else:
            color = scene.subject_color
            change = {"subject_color": colors[(colors.index(color) + 1) % 5 if color else seed % 5]}
        yield Case(scene, replace(scene, **change), word)
        found += 1


class Bench:
    """The bundled model, and what a run of each kind gives."""

    def __init__(self) -> None:
        from p2p.demo.loader import load_demo_model

        self.model, self.clip, self.vae = load_demo_model()
        self.negative = self.encode("")

    def encode(self, text: str) -> list:
        return self.clip.encode_from_tokens_scheduled(self.clip.tokenize(text))

    def latent(self, scene: Any) -> Any:
        import torch
        from p2p.demo import scenes

        return self.vae.encode(torch.from_numpy(scenes.draw(scene)[0])[None] / 255.0)

    def invert(self, prompt: str, latent: Any, inversion: str) -> tuple[Any, Any]:
        from p2p.sampling.invert import invert

        return invert(
            self.model,
            self.encode(prompt),
            {"samples": latent},
            STEPS,
            SCHEDULER,
            refinement=REFINEMENT if inversion == "fixed point" else 0,
            reconstruction="negative prompt" if inversion == "negative prompt" else "direct",
        )

    def sample(self, model: Any, positive: list, rows: Any, cfg: float = CFG) -> Any:
        """A stock sampler's run from an inverted latent, without added noise."""
        import nodes as host

        return host.common_ksampler(
            model,
            0,
            STEPS,
            cfg,
            SAMPLER,
            SCHEDULER,
            positive,
            self.negative,
            {"samples": rows},
            disable_noise=True,
        )[0]["samples"]

    def edit(self, case: Case, method: str, noise: Any, trajectory: Any) -> Any:
        """Latents of source and target, (2, 4, 16, 16)."""
        from p2p.attention.schedule import TauSchedule, Window
        from p2p.sampling.controller import control, plug_and_play
        from p2p.sampling.encode import start_edit

        edit = start_edit(self.clip, case.source.caption(), case.target.caption(), "auto")
        if method == "PnP":
            unprompted = self.negative if trajectory else None
            model, positive = plug_and_play(
                self.model, edit, 0.8, 0.5, trajectory=trajectory, source_conditioning=unprompted
            )
        else:
            mutual = TauSchedule(Window(0.0, 0.0), Window(0.1, 1.0), self_mode="mutual")
            tau = mutual if method == "MasaCtrl" else TauSchedule()
            model, positive = control(self.model, edit, tau, trajectory=trajectory)
        return self.sample(model, positive, noise["samples"].repeat(2, 1, 1, 1))


def background(case: Case) -> Any:
    """Pixels that are not of the edited object, in source or target, nor within a latent cell of it."""
    import torch
    import torch.nn.functional as F
    from p2p.demo import scenes

    masks = [scenes.draw(scene)[1] for scene in (case.source, case.target)]
    (new,) = {case.target.partner if case.source.partner else case.target.subject}
    edited = torch.from_numpy(masks[0][case.edited]).float() + torch.from_numpy(masks[1][new]).float()
    return F.max_pool2d(edited.clamp(max=1)[None], 2 * CELL + 1, 1, CELL)[0] == 0


def succeeded(classifier: Any, case: Case, picture: Any) -> bool:
    """Whether the classifier finds what the target prompt asks for."""
    import torch
    from p2p.demo import evaluate

    outputs = classifier(picture.permute(2, 0, 1)[None] * 2 - 1)
    score = evaluate.count_agreement(outputs, torch.tensor([evaluate._labels(case.target)]))
    kind = "colors" if case.target.subject_color != case.source.subject_color else "objects"
    right, asked = score[kind]
    return right == asked


def measure(bench: Bench, classifier: Any, number: int, case: Case) -> dict[str, Any]:
    """All figures of one picture; its pictures are kept beside them."""
    from p2p.drawing.grid import comparison_grid
    from PIL import Image

    latent = bench.latent(case.source)
    picture = bench.vae.decode(latent)[0]
    everywhere, outside = picture[..., 0] >= -1, background(case)
    figures: dict[str, Any] = {"source": case.source.caption(), "target": case.target.caption()}
    pictures = [picture]
    for inversion in INVERSIONS:
        follows = inversion in ("direct", "negative prompt")
        prompts = (case.source.caption(), "") if follows else (case.source.caption(),)
        inverted = {prompt: bench.invert(prompt, latent, inversion) for prompt in prompts}
        positive, (_, noise) = bench.encode(case.source.caption()), inverted[case.source.caption()]
        plain = bench.vae.decode(bench.sample(bench.model, positive, noise["samples"], cfg=1.0))[0]
        figures[inversion] = {"reconstruction": {"unguided": psnr(plain, picture, everywhere)}}
        for method in METHODS:
            prompt = "" if method == "PnP" and follows else case.source.caption()
            trajectory, noise = inverted[prompt]
            edited = bench.edit(case, method, noise, trajectory if follows else None)
            source, target = bench.vae.decode(edited)
            if prompt:
                figures[inversion]["reconstruction"]["guided"] = psnr(source, picture, everywhere)
            figures[inversion][method] = {
                "psnr": psnr(target, picture, outside),
                "ssim": ssim(target, picture, outside),
                "success": succeeded(classifier, case, target),
            }
            pictures.append(target)
    import torch

    labels = ["picture", *(f"{method}, {inversion}" for inversion in INVERSIONS for method in METHODS)]
    sheet = comparison_grid(torch.stack(pictures), labels, columns=len(pictures))[0]
    Image.fromarray((sheet * 255).round().byte().numpy()).save(OUT / f"{number:02d}.png")
    return figures


def summary(figures: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over the pictures."""

    def mean(values: Iterator[float]) -> float:
        return round(sum(collected := list(values)) / len(collected), 3)

    return {
        inversion: {
            "reconstruction": {
                kind: mean(one[inversion]["reconstruction"][kind] for one in figures)
                for kind in ("unguided", "guided")
            },
            **{
                method: {
                    name: mean(float(one[inversion][method][name]) for one in figures)
                    for name in ("psnr", "ssim", "success")
                }
                for method in METHODS
            },
        }
        for inversion in INVERSIONS
    }


def table(means: dict[str, Any], count: int) -> str:
    lines = [
        "| inversion | method | background PSNR | background SSIM | edit success |",
        "|---|---|---|---|---|",
    ]
    for method in METHODS:
        for inversion, title in INVERSIONS.items():
            one = means[inversion][method]
            lines.append(
                f"| {title} | {METHODS[method]} | {one['psnr']:.1f} dB | {one['ssim']:.3f} "
                f"| {round(one['success'] * count)} of {count} |"
            )
    lines += ["", "| inversion | reconstruction, guidance 1 | with guidance " + f"{CFG:g} |", "|---|---|---|"]
    for inversion, title in INVERSIONS.items():
        one = means[inversion]["reconstruction"]
        guided = "exact" if one["guided"] > 90 else f"{one['guided']:.1f} dB"
        lines.append(f"| {title} | {one['unguided']:.1f} dB | {guided} |")
    return "\n".join(lines)


def examples(figures: list[dict[str, Any]], path: Path, rows: int = 6) -> None:
    """The first pictures and some of their edits, from the sheets that `measure` kept."""
    import numpy as np
    import torch
    from p2p.drawing.grid import GAP, comparison_grid
    from PIL import Image

    order = [(inversion, method) for inversion in INVERSIONS for method in METHODS]
    shown = [("DDIM", "P2P"), *(("direct", method) for method in METHODS)]
    tiles, labels = [], []
    for number, one in enumerate(figures[:rows]):
        sheet = np.asarray(Image.open(OUT / f"{number:02d}.png").convert("RGB"), np.float32) / 255.0
        width = (sheet.shape[1] - GAP) // (1 + len(order))
        for place in (0, *(1 + order.index(pair) for pair in shown)):
            left, side = GAP + place * width, width - GAP
            tiles.append(torch.from_numpy(sheet[-GAP - side : -GAP, left : left + side]))
        edits = [f"{method}, {INVERSIONS[inversion]}" for inversion, method in shown]
        labels += [one["source"], one["target"] + ": " + edits[0], *edits[1:]]
    grid = comparison_grid(torch.stack(tiles), labels, columns=1 + len(shown))[0]
    Image.fromarray((grid * 255).round().byte().numpy()).save(path, quality=90)


def plot(means: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.4, 4.2), layout="constrained")
    for method, marker in zip(METHODS, "os^", strict=True):
        points = [(means[i][method]["psnr"], means[i][method]["success"] * 100) for i in INVERSIONS]
        axes.plot(*zip(*points, strict=True), color="lightgray", zorder=0)
        for n, (x, y) in enumerate(points):
            axes.scatter(x, y, color=f"C{n}", marker=marker, s=60)
    for n, title in enumerate(INVERSIONS.values()):
        axes.scatter([], [], color=f"C{n}", label=title)
    for method, marker in zip(METHODS.values(), "os^", strict=True):
        axes.scatter([], [], color="gray", marker=marker, label=method)
    axes.set(xlabel="background PSNR, dB", ylabel="edit success, %", ylim=(50, 102))
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scenes", type=int, default=20)
    parser.add_argument("--again", action="store_true", help="repeat runs that are done")
    parser.add_argument("--out", type=Path, default=DOCS)
    options = parser.parse_args()
    load_pack()
    import comfy.utils
    import torch
    from p2p.demo.evaluate import train_classifier
    from p2p.demo.train import HERE

    torch.set_grad_enabled(False)
    comfy.utils.set_progress_bar_enabled(False)
    OUT.mkdir(parents=True, exist_ok=True)
    with torch.enable_grad():
        classifier = train_classifier(HERE / ".work" / "classifier.pt")
    bench, figures = Bench(), []
    for number, case in enumerate(cases(options.scenes)):
        kept = OUT / f"{number:02d}.json"
        if options.again or not kept.exists():
            kept.write_text(json.dumps(measure(bench, classifier, number, case), indent=1) + "\n")
        figures.append(json.loads(kept.read_text()))
        print(
            f"{number + 1} of {options.scenes}: {case.source.caption()} -> {case.target.caption()}",
            flush=True,
        )
    means = summary(figures)
    settings = {"steps": STEPS, "cfg": CFG, "sampler": SAMPLER, "scheduler": SCHEDULER}
    (options.out / "inversion.json").write_text(
        json.dumps({"settings": settings, "means": means, "pictures": figures}, indent=1) + "\n"
    )
    plot(means, options.out / "inversion.png")
    examples(figures, options.out / "inversion.jpg")
    text = table(means, options.scenes)
    write_section(options.out / "inversion.md", "figures", text)
    print(text)


if __name__ == "__main__":
    main()
