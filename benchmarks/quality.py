"""Does the edit happen, and does the rest of the picture stay?  Writes the section of docs/benchmarks.md.

python benchmarks/quality.py [--pairs 100] [--seeds 2]
python benchmarks/quality.py --halves        self-attention alone, in one and in both halves of guidance

Prompt pairs come from the demo's scene grammar, in order, none picked (`cases.py`); each is sampled on the
bundled model with every method (`runs.py`) from the same noise. What is measured:

- edit success: the demo's classifier finds the target's object, colour, place or style; weather and
  re-weightings: the strength of snow or crowd that `surveyor.py` reads crosses the threshold of presence, or
  moves the way that was asked by more than the surveyor's mean error on drawn scenes.
- background: mean squared error, PSNR and SSIM between target and source picture outside of what was edited.
  Which pixels these are is told by the surveyor on the source picture, which is the same for all methods, and
  not by attention maps, which would favour the methods that use them. Edits of an object or its colour: all
  pixels further than a latent cell from the object. Edits of the surroundings: the objects' inner pixels.
- layout: overlap (IoU) of all objects' masks in source and target picture, for edits of style too.

Runs and figures that are done are kept in output/quality and not repeated.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from cases import KINDS, Case, cases
from measure import machine, psnr, ssim, write_section
from pack import ROOT, load_pack
from runs import BLEND, CFG, DEFAULT, HALVES, METHODS, SAMPLER, SCHEDULER, STEPS, Runner

OUT, PAGE = ROOT / "output" / "quality", ROOT / "docs" / "benchmarks.md"
CELL = 8
"""px of a latent cell."""
SAME_EDITS = f"{DEFAULT}, the edits that can be blended"
REFERENCE = 10
"""Edits of each kind that are compared with materialised maps."""
LINES = {
    "cross-attention until ..., self until 0.4": [
        f"cross {end}, self 0.4" for end in ("0.4", "0.6", "0.8", "1.0")
    ],
    "self-attention in all layers until ..., cross until 0.8": [
        "cross 0.8, self 0.0",
        *(f"cross 0.8, self {end} in all layers" for end in ("0.4", "0.8")),
    ],
    "cross-attention until ..., self until 0.8 in all layers": [
        f"cross {end}, self 0.8 in all layers" for end in ("0.4", "0.6", "0.8")
    ],
    "self-attention only, until ...": ["no control", "self only, 0.4", "self only, 0.8"],
}


class Judge:
    """Reads pictures: the demo's classifier, and the surveyor."""

    def __init__(self) -> None:
        import torch
        from p2p.demo import evaluate
        from p2p.demo.train import HERE
        from surveyor import accuracy, trained

        with torch.enable_grad():
            self.classifier = evaluate.train_classifier(HERE / ".work" / "classifier.pt")
            self.surveyor = trained(OUT / "surveyor.pt")
        kept = OUT / "surveyor.json"
        if not kept.exists():
            kept.write_text(json.dumps(accuracy(self.surveyor)))
        self.accuracy = json.loads(kept.read_text())

    def figures(self, case: Case, pictures: dict[str, Any]) -> dict[str, dict[str, Any]]:
        """What is measured of each method's picture; pictures["source"] is what they are compared with."""
        import torch
        from surveyor import OBJECTS, survey

        batch = torch.stack(list(pictures.values()))
        masks, strengths = survey(self.surveyor, batch)
        outputs = self.classifier(batch.permute(0, 3, 1, 2) * 2 - 1)
        found = dict(zip(pictures, zip(masks, strengths, strict=True), strict=True))
        source, (source_masks, source_strengths) = pictures["source"], found["source"]
        outside = background(case, source_masks, OBJECTS)
        figures = {}
        for n, name in enumerate(pictures):
            if name == "source":
                continue
            logits = [output[n] for output in outputs]
            figure: dict[str, Any] = {
                "success": self._success(case, logits, found[name][1], source_strengths),
                "layout": overlap(source_masks.any(0), found[name][0].any(0)),
            }
            if outside is not None:
                figure["error"] = float(((pictures[name] - source) ** 2)[outside].mean())
                figure["psnr"] = psnr(pictures[name], source, outside)
                figure["ssim"] = ssim(pictures[name], source, outside)
            figures[name] = figure
        return figures

    def _success(self, case: Case, logits: list[Any], strengths: Any, before: Any) -> bool:
        from p2p.demo import evaluate
        from surveyor import PRESENT, STRENGTHS

        objects, places, colors, styles = logits
        if case.strength is not None:
            n = STRENGTHS.index(case.strength)
            if case.kind == "refine":
                return bool(strengths[n] > PRESENT)
            moved = (strengths[n] - before[n]) * (1 if case.scale > 1 else -1)
            return bool(moved > self.accuracy[f"{case.strength}_error"])
        if case.change == "object":
            named = 1 + (case.target.partner is not None)
            return evaluate.OBJECTS.index(case.word) in objects.topk(named).indices.tolist()
        heads = {
            "color": (colors, evaluate.COLORS, case.target.subject_color),
            "place": (places, evaluate.PLACES, case.target.place),
            "style": (styles, evaluate.STYLES, case.target.style),
        }
        values, names, wanted = heads[case.change]
        return names[int(values.argmax())] == wanted


def background(case: Case, masks: Any, objects: list[str]) -> Any:
    """Pixels (height, width) that an edit should leave alone; None where it is of the whole picture.

    masks: of each object in the source picture.
    """
    import torch.nn.functional as F

    def grown(mask: Any, by: int) -> Any:
        return F.max_pool2d(mask.float()[None], 2 * by + 1, 1, by)[0] > 0

    if case.change in ("object", "color"):
        return ~grown(masks[objects.index(case.old or case.word)], CELL)
    if case.change == "style":
        return None
    there = masks.any(0)
    inner = ~grown(~there, CELL // 2)
    return inner if inner.any() else there if there.any() else ~there


def overlap(a: Any, b: Any) -> float:
    """Intersection over union of two masks; 1 for two empty ones."""
    return float((a & b).sum() / (a | b).sum()) if (a | b).any() else 1.0


def measured(runner: Runner, judge: Judge, case: Case, seed: int) -> dict[str, Any]:
    """All figures of one case; they and its pictures are kept."""
    kept = runner.folder / f"{case.kind}-{case.number:03d}-{seed}.json"
    figures = json.loads(kept.read_text()) if kept.exists() else {}
    names = runner.methods(case)
    if set(names) - set(figures):
        latents = runner.latents(case, seed)
        pictures = runner.decode([latents["source"], *(latents[name] for name in names)])
        figures = judge.figures(case, dict(zip(["source", *names], pictures, strict=True)))
        kept.write_text(json.dumps(figures) + "\n")
    return {"kind": case.kind, "change": case.change, "figures": figures}


def reference(runner: Runner, count: int) -> dict[str, float]:
    """Kind -> largest difference of a picture's values (0..1) from the one with materialised maps."""
    kept = OUT / "reference.json"
    if not kept.exists():
        result = {}
        for kind in KINDS:
            differences = []
            for case in cases(kind, count):
                built, ours = runner.materialised(case, 0)
                apart = runner.vae.decode(built) - runner.vae.decode(ours)
                differences.append(float(apart.abs().max()))
            result[kind] = max(differences)
        kept.write_text(json.dumps(result))
    return json.loads(kept.read_text())


def mean(values: Iterable[float]) -> float:
    return statistics.fmean(values)


def summary(records: list[dict[str, Any]], methods: Iterable[str] = METHODS) -> dict[str, Any]:
    """Kind -> method -> means, with the number of cases that each is of."""
    found: dict[str, Any] = {}
    for kind in dict.fromkeys(record["kind"] for record in records):
        rows = [record for record in records if record["kind"] == kind]
        found[kind] = {method: _means([r["figures"].get(method) for r in rows]) for method in methods}
        blended = [r["figures"] for r in rows if BLEND in r["figures"]]
        if blended:
            found[kind][SAME_EDITS] = _means([figures[DEFAULT] for figures in blended])
    return found


def _means(figures: list[dict[str, Any] | None]) -> dict[str, float]:
    there = [figure for figure in figures if figure is not None]
    local = [figure for figure in there if "error" in figure]
    return {
        "cases": len(there),
        "success": mean(figure["success"] for figure in there),
        "layout": mean(figure["layout"] for figure in there),
        "error": mean(figure["error"] for figure in local),
        "psnr": mean(figure["psnr"] for figure in local),
        "ssim": mean(figure["ssim"] for figure in local),
    }


def conditions(settings: dict[str, Any]) -> str:
    return (
        f"{settings['pairs']} prompt pairs of each kind, {settings['seeds']} "
        f"seed{'s' if settings['seeds'] > 1 else ''} each: {STEPS} steps, guidance {CFG:g}, {SAMPLER}, "
        f"{SCHEDULER}. {settings['machine']}, {settings['precision']}."
    )


def table(kind: str, means: dict[str, Any]) -> list[str]:
    """Lines of the page: a row for each method."""
    lines = [
        "",
        f"**{kind}**",
        "",
        "| tau | edit success | background error | PSNR | SSIM | layout |",
        "|---|---|---|---|---|---|",
    ]
    plain = means["no control"]
    for method, one in means.items():
        if method == SAME_EDITS and one["cases"] == plain["cases"]:
            continue
        name = f"**{method}** (default)" if method == DEFAULT else method
        if one["cases"] < plain["cases"]:
            name += f" ({one['cases']} of {plain['cases']})"
        lines.append(
            f"| {name} | {one['success']:.0%} | {one['error'] / plain['error']:.2f} "
            f"| {one['psnr']:.1f} dB | {one['ssim']:.3f} | {one['layout']:.2f} |"
        )
    return lines


def page_text(means: dict[str, Any], settings: dict[str, Any], accuracy: dict[str, float]) -> str:
    lines = [conditions(settings), "", "![Preservation against success](benchmarks/quality.png)"]
    for kind in KINDS:
        lines += table(kind, means[kind])
    lines += ["", "Goals at the default tau:", ""]
    for kind in KINDS:
        plain, ours = means[kind]["no control"], means[kind][DEFAULT]
        success, error = ours["success"] / plain["success"], ours["error"] / plain["error"]
        lines.append(
            f"- {kind}: {success:.0%} of the edit success without control (goal: 85 % or more, "
            f"{'met' if success >= 0.85 else 'not met'}), {error:.0%} of its background error (goal: 50 % or "
            f"less, {'met' if error <= 0.5 else 'not met'})."
        )
    apart = settings["reference"]
    lines += [
        "",
        f"Through materialised maps, these edits (the first {REFERENCE} of each kind, in float32) "
        "give the same pictures: values from 0 to 1 differ by at most "
        + ", ".join(f"{value:.1g} ({kind})" for kind, value in apart.items())
        + ".",
        "",
        f"The surveyor on drawn scenes that no training saw: masks overlap by {accuracy['objects_iou']:.2f}"
        + "".join(
            f", {name} is told in {accuracy[f'{name}_told']:.1%} and its strength read with an error of "
            f"{accuracy[f'{name}_error']:.2f}"
            for name in ("snow", "crowd")
        )
        + ". The classifier's accuracy is in [scores.json](../demo/scores.json).",
    ]
    return "\n".join(lines)


def plot(means: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(11, 4.1), layout="constrained", sharey=True)
    for axis, kind in zip(axes, KINDS, strict=True):
        for n, (title, methods) in enumerate(LINES.items()):
            points = [(means[kind][m]["success"] * 100, means[kind][m]["psnr"]) for m in methods]
            axis.plot(*zip(*points, strict=True), color=f"C{n}", marker="o", ms=4, label=title)
            for method, point in zip(methods, points, strict=True):
                end = method.split()[(1, 3, 1, 2)[n]].rstrip(",") if method != "no control" else method
                if method != DEFAULT:
                    axis.annotate(end, point, (3, 4), textcoords="offset points", fontsize=7)
        for name, title, marker in ((DEFAULT, "default", "D"), (BLEND, "default + local blend", "*")):
            one = means[kind][name]
            axis.scatter(
                one["success"] * 100, one["psnr"], color="black", marker=marker, s=50, label=title, zorder=3
            )
        axis.set(title=kind, xlabel="edit success, %")
    axes[0].set_ylabel("background PSNR, dB")
    figure.legend(*axes[0].get_legend_handles_labels(), fontsize=8, loc="outside lower center", ncols=3)
    figure.savefig(path, dpi=80)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=100, help="of each kind")
    parser.add_argument("--seeds", type=int, default=2, help="noise seeds for each pair")
    parser.add_argument("--halves", action="store_true", help="self-attention alone, in one or both halves")
    options = parser.parse_args()
    load_pack()
    import comfy.utils
    import torch

    torch.set_grad_enabled(False)
    comfy.utils.set_progress_bar_enabled(False)
    runner = Runner(OUT / "halves", HALVES, blend=False) if options.halves else Runner(OUT)
    judge = Judge()
    kinds = KINDS[:2] if options.halves else KINDS  # a re-weighting has a map to scale, or is another prompt
    columns = {kind: list(cases(kind, options.pairs)) for kind in kinds}
    records = []
    for seed in range(options.seeds):
        for number in range(options.pairs):
            records += [measured(runner, judge, columns[kind][number], seed) for kind in columns]
            print(f"seed {seed}: {number + 1} of {options.pairs} pairs of each kind", flush=True)
    means = summary(records, HALVES if options.halves else METHODS)
    settings = {
        "pairs": options.pairs,
        "seeds": options.seeds,
        "machine": machine(),
        "precision": "bfloat16" if runner.half else "float32",
    }
    if options.halves:
        lines = [conditions(settings), *(line for kind in kinds for line in table(kind, means[kind]))]
        text = "\n".join(lines)
        write_section(PAGE, "halves", text)
        print(text)
        return
    settings["reference"] = reference(runner, REFERENCE)
    folder = PAGE.parent / "benchmarks"
    folder.mkdir(exist_ok=True)
    (folder / "quality.json").write_text(
        json.dumps({"settings": settings, "surveyor": judge.accuracy, "means": means}, indent=1) + "\n"
    )
    plot(means, folder / "quality.png")
    text = page_text(means, settings, judge.accuracy)
    write_section(PAGE, "quality", text)
    print(text)


if __name__ == "__main__":
    main()
