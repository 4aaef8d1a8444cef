"""Thresholds and the best of a row."""

from __future__ import annotations

import math

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from p2p.pairs.select import PUBLISHED, Filter

SCORES = st.one_of(st.none(), st.just(math.nan), st.floats(-1, 1))
TRIES = st.lists(st.fixed_dictionaries({name: SCORES for name in PUBLISHED}), max_size=12).map(
    lambda found: [{**values, "id": f"{n:03}"} for n, values in enumerate(found)]
)


def passes(values: dict) -> bool:
    """The published rule, written out."""
    return all(
        values[name] is not None and not math.isnan(values[name]) and values[name] >= limit
        for name, limit in PUBLISHED.items()
    )


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(TRIES, st.integers(1, 5))
def test_the_best_are_those_of_the_published_rule(tries: list[dict], keep: int) -> None:
    kept = Filter(keep).best(tries)
    expected = sorted((v for v in tries if passes(v)), key=lambda v: v["clip_sim_dir"], reverse=True)[:keep]
    assert [v["clip_sim_dir"] for v in kept] == [v["clip_sim_dir"] for v in expected]
    assert Filter(keep).best(tries[::-1]) == kept


def test_a_try_without_images_never_passes() -> None:
    assert Filter(least={}).best([{"id": "a", "error": "no such word"}]) == []


def test_a_limit_from_above_leaves_out_what_is_over_it_or_unknown() -> None:
    chosen = Filter(least={}, most={"distance_outside": 0.1})
    tries = [{"id": str(n), "distance_outside": value} for n, value in enumerate([0.05, 0.1, 0.2, None])]
    assert [values["id"] for values in chosen.best(tries)] == ["0", "1"]
