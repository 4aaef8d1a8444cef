"""What the scene generator promises: words decide what is there, the layout's seed decides where."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from p2p.demo import scenes
from p2p.demo.scenes import Scene, draw, sample

try:
    scenes.font_path()
except FileNotFoundError as missing:
    pytest.skip(str(missing), allow_module_level=True)

SINGLE = [
    Scene(word, place=place, layout=3)
    for word, place in zip(scenes.OBJECTS, [None, *scenes.PLACES] * 2, strict=False)
]
PAIRS = [
    Scene("cat", relation="riding", partner="bicycle", place="street", layout=5),
    Scene("duck", relation="riding", partner="boat", place="beach", crowd=0.7, layout=6),
    Scene("castle", "red", "next to", "tree", place="mountain", snow=0.5, layout=7),
]


def grown(mask: np.ndarray) -> np.ndarray:
    """The mask and its eight neighbours: where an outline's soft edge lies."""
    padded = np.pad(mask, 1)
    size = scenes.SIZE
    return np.any([padded[y : y + size, x : x + size] for y in range(3) for x in range(3)], axis=0)


@pytest.mark.parametrize("seed", range(5))
def test_a_seed_decides_scene_caption_and_picture(seed: int) -> None:
    scene = sample(seed)
    assert scene == sample(seed)
    assert np.array_equal(draw(scene)[0], draw(sample(seed))[0])


def test_captions_use_the_vocabulary_only() -> None:
    words = set(scenes.vocabulary())
    used = {word for seed in range(3000) for word in sample(seed).caption().split()}
    assert used == words


@pytest.mark.parametrize(
    "scene, caption",
    [
        (Scene("cat", relation="riding", partner="bicycle"), "a cat riding a bicycle"),
        (Scene("castle", style="drawing", article=False), "children drawing of a castle"),
        (
            Scene("elephant", "blue", place="mountain", snow=0.4, night=True),
            "a blue elephant on a snowy mountain at night",
        ),
        (Scene(place="boulevard", crowd=1.0), "a crowded boulevard"),
    ],
)
def test_captions_read_as_a_person_would_write_them(scene: Scene, caption: str) -> None:
    assert scene.caption() == caption


@pytest.mark.parametrize("scene", [*SINGLE, *PAIRS], ids=Scene.caption)
def test_masks_cover_what_an_object_changes_and_nothing_else(scene: Scene) -> None:
    picture, masks = draw(scene)
    empty = replace(scene, subject=None, subject_color=None, relation=None, partner=None, partner_color=None)
    changed = np.abs(picture.astype(int) - draw(empty)[0]).max(-1)
    covered = np.any(list(masks.values()), axis=0)
    assert set(masks) == {word for word in (scene.subject, scene.partner) if word}
    assert changed[~grown(grown(covered))].max() < 48  # an emoji has a faint halo
    assert (changed[covered] > 0).mean() > 0.9


@pytest.mark.parametrize("scene", PAIRS, ids=Scene.caption)
def test_a_pixel_belongs_to_one_object(scene: Scene) -> None:
    masks = list(draw(scene)[1].values())
    assert not (masks[0] & masks[1]).any()
    assert all(mask.mean() > 0.02 for mask in masks)


@pytest.mark.parametrize("scene", SINGLE, ids=Scene.caption)
def test_an_object_alone_fills_two_thirds_of_the_frame(scene: Scene) -> None:
    rows, columns = np.nonzero(next(iter(draw(scene)[1].values())))
    assert 0.6 < max(np.ptp(rows), np.ptp(columns)) / scenes.SIZE < 0.9


@pytest.mark.parametrize("strength", ["snow", "crowd"])
def test_a_strength_changes_the_picture_gradually(strength: str) -> None:
    scene = Scene(place="boulevard", layout=9)
    plain = draw(scene)[0].astype(float)
    distances = [np.abs(draw(replace(scene, **{strength: k}))[0] - plain).mean() for k in (0.2, 0.6, 1.0)]
    assert distances == sorted(distances) and distances[0] > 0
