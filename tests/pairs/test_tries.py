"""Ids, seeds and draws follow from a row and the settings, and from nothing else."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
from p2p.attention.schedule import Window
from p2p.pairs.command import Recipe, chosen_settings
from p2p.pairs.table import Row
from p2p.pairs.tries import INSTRUCTPIX2PIX, Settings, expand, published_end, row_id
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


@pytest.mark.parametrize("steps", [1, 2, 3, 10, 20, 37, 50, 100, 101])
def test_the_published_window_has_the_steps_of_the_published_rule(steps: int) -> None:
    for p in range(0, 10_001, 7 if steps > 20 else 1):  # in ten-thousandths
        window = Window(0.0, published_end(p / 10_000, steps))
        inside = [i for i in range(steps) if window.weight(i / steps)]
        assert inside == [i for i in range(steps) if 10_000 * i < p * (steps - 1)]


def test_a_try_of_the_recipe_has_a_window_of_its_own_drawn_p() -> None:
    recipe = chosen_settings(False, Recipe.instructpix2pix)
    plain = replace(recipe, published_window=False)
    for unit, drawn in zip(expand(ROW, recipe, 30), expand(ROW, plain, 30), strict=True):
        assert 0.1 <= drawn["self_end"] <= 0.9 and 7.5 <= unit["cfg"] <= 15 and unit["cross_end"] == 0
        assert unit["self_end"] == published_end(drawn["self_end"], 100)


def test_what_is_given_changes_the_recipe_and_the_recipe_the_bundled_models_settings() -> None:
    given = {"cfg": "3:4", "steps": 12, "self_end": None, "self_mode": "map"}
    found = chosen_settings(True, Recipe.instructpix2pix, **given)
    expected = {**INSTRUCTPIX2PIX, "cfg": (3.0, 4.0), "steps": 12, "self_mode": "map"}
    assert {name: getattr(found, name) for name in expected} == expected
    assert (found.width, found.height) == (128, 128)
    assert chosen_settings(False, None) == Settings()
    assert chosen_settings(True, Recipe.instructpix2pix).steps == 100
