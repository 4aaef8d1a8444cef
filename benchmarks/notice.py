"""How far targets are from their sources, by tau: where the notice "came out nearly as the source" comes.

python benchmarks/notice.py [--pairs 12]

Prompt pairs come from the demo's scene grammar, in order, none picked (`cases.py`). Prints a table for
docs/benchmarks.md: the change of `sampling/notice.py` without control, at the default tau, and with all of
the source's maps injected in every layer and step, where next to nothing of an edit is left.
"""

from __future__ import annotations

import argparse
import logging
import statistics

from cases import KINDS, cases
from pack import ROOT, load_pack
from runs import SETTINGS, SIZE, Runner

TAUS = {
    "no control": (0.0, 0.0, 0.5),
    "default": (0.8, 0.4, 0.5),
    "cross 0.8, self 0.8 in all layers": (0.8, 0.8, 1.0),
    "all maps, every step": (1.0, 1.0, 1.0),
}
"""Ends of the windows of cross- and self-attention, and self_resolution."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=12, help="of each kind")
    pairs = parser.parse_args().pairs
    load_pack()
    import comfy.utils
    import torch
    from p2p.attention.schedule import TauSchedule, Window
    from p2p.sampling.notice import changes, least_change
    from p2p.sampling.sampler import sample_pairs

    torch.set_grad_enabled(False)
    logging.disable(logging.WARNING)  # the notices themselves
    comfy.utils.set_progress_bar_enabled(False)
    runner = Runner(ROOT / "output" / "quality")
    schedules = [
        TauSchedule(Window(0.0, cross), Window(0.0, self_), self_resolution=resolution)
        for cross, self_, resolution in TAUS.values()
    ]
    print(f"| {pairs} pairs of each kind | smallest change | median | largest | told |")
    print("|---|---|---|---|---|")
    for kind in KINDS:
        found: dict[str, list[float]] = {name: [] for name in TAUS}
        told = dict.fromkeys(TAUS, 0)
        for case in cases(kind, pairs):
            edit = runner.edits(case, dict(zip(TAUS, schedules, strict=True)))
            latent = {"samples": torch.zeros(1, 4, SIZE // 8, SIZE // 8)}
            with runner.precision():
                *_, paired = sample_pairs(
                    runner.model,
                    edit,
                    schedules[0],
                    negative=runner.negative,
                    latent=latent,
                    seed=case.number,
                    **SETTINGS,
                )
            each = zip(TAUS, edit.targets, changes(paired["samples"], edit.branches), strict=True)
            for name, target, change in each:
                found[name].append(change)
                told[name] += change < least_change(edit.source, target)
        for name, values in found.items():
            print(
                f"| {kind}, {name} | {min(values):.2f} | {statistics.median(values):.2f} "
                f"| {max(values):.2f} | {told[name]} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
