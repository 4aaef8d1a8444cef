"""What the report counts."""

from __future__ import annotations

from p2p.pairs.report import BEATEN, Tally
from p2p.pairs.select import Filter


def test_every_try_is_kept_or_has_its_reasons() -> None:
    limits = {"clip_sim_0": 0.5, "clip_sim_dir": 0.2}
    scores = [(0.9, 0.8), (0.9, 0.7), (0.9, 0.3), (0.1, 0.9), (0.1, 0.1)]
    row = {"original_prompt": "a cat", "edited_prompt": "a dog"}
    tries = [
        {**row, "id": str(n), "clip_sim_0": text, "clip_sim_dir": direction}
        for n, (text, direction) in enumerate(scores)
    ]
    tally = Tally(Filter(2, limits))
    tally.add(0, {"tries": [*tries, {**row, "id": "x", "error": "no such word"}]})
    assert (tally.tries, tally.kept) == (6, 2)
    assert tally.reasons == {BEATEN: 1, "clip_sim_0": 2, "clip_sim_dir": 1, "error": 1}
    assert tally.errors == {"no such word": 1}
    assert sum(tally.bins["clip_sim_dir"][True].values()) == 2
