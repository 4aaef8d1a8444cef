"""Ids, seeds and draws follow from a row and the settings, and from nothing else."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
from p2p.pairs.table import Row
from p2p.pairs.tries import Settings, expand, row_id
from p2p.tests.pairs.conftest import ROOT

ROW = Row(1, "a cat", "a dog!", "a dog", {}, {})
DRAWN = Settings(cross_end=(0.2, 0.9), cfg=(4.0, 9.0))


def ids(row: Row, settings: Settings, tries: int = 4) -> list[str]:
    return [name for unit in expand(row, settings, tries) for name in unit["ids"]]


def test_another_process_makes_the_same_tries() -> None:
    code = (
        "import runpy; runpy.run_path('pairs/__main__.py')['load_pack']()\n"
        "from p2p.tests.pairs.test_tries import *; print(*ids(ROW, DRAWN))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ids(ROW, DRAWN)


def test_place_and_further_columns_change_no_try() -> None:
    assert ids(replace(ROW, line=7, more={"note": "x"}), DRAWN) == ids(ROW, DRAWN)


def test_more_tries_begin_with_the_same_ones() -> None:
    assert ids(ROW, DRAWN, 9)[:4] == ids(ROW, DRAWN, 4)
    assert row_id(ROW, DRAWN) == expand(ROW, DRAWN, 9)[0]["row"]


@pytest.mark.parametrize(
    "other",
    [
        (replace(ROW, edited_prompt="a fox"), DRAWN),
        (replace(ROW, edit_prompt="fox"), DRAWN),
        (ROW, replace(DRAWN, steps=7)),
        (ROW, replace(DRAWN, seed=1)),
        (ROW, replace(DRAWN, model_sha256="0")),
        (replace(ROW, options={"cfg": (5.0, 5.0)}), DRAWN),
    ],
)
def test_whatever_changes_the_images_changes_every_id(other: tuple[Row, Settings]) -> None:
    assert not set(ids(*other)) & set(ids(ROW, DRAWN))
    assert row_id(*other) != row_id(ROW, DRAWN)


def test_every_try_has_a_seed_and_draws_of_its_own_inside_the_ranges() -> None:
    units = expand(ROW, DRAWN, 50)
    assert len({unit["seed"] for unit in units}) == len({unit["cfg"] for unit in units}) == 50
    assert all(0.2 <= unit["cross_end"] <= 0.9 and 4.0 <= unit["cfg"] <= 9.0 for unit in units)


def test_a_rows_own_seed_is_its_first_trys_and_counts_on() -> None:
    assert [unit["seed"] for unit in expand(replace(ROW, options={"seed": 5}), DRAWN, 3)] == [5, 6, 7]


def test_a_batch_shares_its_draws_and_names_each_try() -> None:
    units = expand(ROW, replace(DRAWN, batch=3), 5)
    assert [len(unit["ids"]) for unit in units] == [3, 3]
    assert len({name for unit in units for name in unit["ids"]}) == 6
