"""The bundled CLIP: what transformers reads from its folder, and how well it knows scenes it never saw."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from p2p.demo import scenes
from p2p.demo.train_clip import HELD_OUT, SIDE, meaning, scene_of
from p2p.pairs.scores import BUNDLED_CLIP, DEMO, Clip, cosine
from p2p.pairs.select import BUNDLED
from PIL import Image

HELD_OUT_SCENES = 400
"""In pairs of a scene and the same with one thing changed; from the same list as those of scores.json."""


@pytest.fixture(scope="module")
def clip() -> Iterator[Clip]:
    threads = torch.get_num_threads()
    yield Clip(DEMO)
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def captions() -> list[str]:
    return [scene_of(number, HELD_OUT).caption() for number in range(HELD_OUT_SCENES)]


@pytest.fixture(scope="module")
def embedded(clip: Clip, captions: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Images and texts of the held-out scenes, drawn anew."""
    pictures = [Image.fromarray(scenes.draw(scene_of(n, HELD_OUT))[0]) for n in range(HELD_OUT_SCENES)]
    return clip.images(pictures), np.stack([clip.text(caption) for caption in captions])


@pytest.fixture(scope="module")
def documented() -> dict[str, Any]:
    return json.loads((BUNDLED_CLIP / "scores.json").read_text())


def test_the_folder_is_a_clip_of_transformers_and_small(clip: Clip) -> None:
    from transformers import CLIPModel

    model = CLIPModel.from_pretrained(BUNDLED_CLIP, dtype=torch.float32).eval()
    assert isinstance(clip.model, CLIPModel)
    tokens = clip.tokenizer(["a cat riding a bicycle"], return_tensors="pt")
    pixels = torch.zeros(1, 3, SIDE, SIDE)
    found = model(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"], pixel_values=pixels)
    embedded = found.text_embeds[0].detach().numpy()
    np.testing.assert_allclose(clip.text("a cat riding a bicycle"), embedded, atol=1e-5)
    assert sum(path.stat().st_size for path in BUNDLED_CLIP.iterdir()) < 3e6


def test_it_knows_every_word_of_the_scenes_captions(clip: Clip, captions: list[str]) -> None:
    unknown = clip.tokenizer.unk_token_id
    assert not [text for text in captions if unknown in clip.tokenizer(text)["input_ids"]]
    assert unknown in clip.tokenizer("a zeppelin")["input_ids"]


def test_it_finds_held_out_scenes_as_often_as_documented(
    embedded: tuple[np.ndarray, np.ndarray], captions: list[str], documented: dict[str, Any]
) -> None:
    """Each picture's caption among 100 of different meaning, and the reverse."""
    images, texts = embedded
    meanings = [meaning(caption) for caption in captions]
    by_text, by_image = [], []
    for start in range(0, HELD_OUT_SCENES, 200):
        block = meanings[start : start + 200]
        different = list(dict.fromkeys(block))[: documented["captions_to_choose_from"]]
        rows = [start + block.index(text) for text in different]
        cosines = images[rows] @ texts[rows].T
        by_text += list(cosines.argmax(1) == np.arange(len(rows)))
        by_image += list(cosines.argmax(0) == np.arange(len(rows)))
    assert np.mean(by_text) == pytest.approx(documented["caption_of_picture"], abs=0.05)
    assert np.mean(by_image) == pytest.approx(documented["picture_of_caption"], abs=0.05)


def test_the_direction_of_a_right_edit_is_higher_than_of_wrong_ones(
    embedded: tuple[np.ndarray, np.ndarray], captions: list[str]
) -> None:
    """The change from a scene to its changed scene, against the changes of other pairs' prompts."""
    images, texts = embedded
    moved = images[1::2] - images[::2]
    asked = texts[1::2] - texts[::2]
    direction = np.array([[cosine(image, text) for text in asked] for image in moved])
    right = direction.diagonal()
    wrong = direction[~np.eye(len(direction), dtype=bool)].reshape(len(direction), -1)
    assert np.mean(right[:, None] > wrong) > 0.9
    limit = BUNDLED["clip_sim_dir"]
    assert np.mean(right >= limit) > 0.9 and np.mean(wrong >= limit) < 0.05


def test_its_limit_tells_a_scenes_caption_from_others(embedded: tuple[np.ndarray, np.ndarray]) -> None:
    images, texts = embedded
    cosines, own = images @ texts.T, np.eye(HELD_OUT_SCENES, dtype=bool)
    limit = BUNDLED["clip_sim_0"]
    assert np.mean(cosines[own] >= limit) > 0.99 and np.mean(cosines[~own] >= limit) < 0.01
