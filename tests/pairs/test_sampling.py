"""What the sampling actor writes is what the nodes make of the same settings."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from p2p.pairs.samplers import DEMO, ComfySampler, load_checkpoint
from p2p.pairs.scores import Scorer
from p2p.pairs.store import Store, image_names
from p2p.pairs.table import Row
from p2p.pairs.tries import INSTRUCTPIX2PIX, Settings, expand
from PIL import Image

SETTINGS = Settings(steps=3, width=64, height=64, cfg=(4.0, 4.0), sampler="euler_ancestral")
ROW = Row(1, "a cat riding a bicycle", "", "a dog riding a bicycle")


@pytest.fixture(scope="module")
def sampler(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfySampler]:
    address = str(tmp_path_factory.mktemp("set"))
    Store(address).prepare()
    threads = torch.get_num_threads()
    yield ComfySampler(address, DEMO, 1)
    torch.set_num_threads(threads)


def images(store: Store, name: str) -> tuple[np.ndarray, np.ndarray]:
    source, target = (np.asarray(Image.open(io.BytesIO(store.read(file)))) for file in image_names(name)[:2])
    return source, target


def by_the_nodes(sampler: ComfySampler, unit: dict[str, Any]) -> list[np.ndarray]:
    from p2p.attention.schedule import TauSchedule, Window
    from p2p.nodes import PairedSampler
    from p2p.sampling.encode import start_edit

    with torch.inference_mode():
        found = PairedSampler.execute(
            sampler.model,
            start_edit(sampler.clip, unit["original_prompt"], unit["edited_prompt"], "auto"),
            TauSchedule(
                Window(0, unit["cross_end"]),
                Window(0, unit["self_end"]),
                self_resolution=unit["self_resolution"],
                self_mode=unit["self_mode"],
            ),
            sampler.clip.encode_from_tokens_scheduled(sampler.clip.tokenize("")),
            {"samples": torch.zeros(unit["batch"], 4, 8, 8)},
            unit["seed"],
            unit["steps"],
            unit["cfg"],
            unit["sampler"],
            unit["scheduler"],
            1.0,
        ).args
        decoded = [sampler.vae.decode(latent["samples"]).numpy() for latent in found[:2]]
    return [(np.clip(pixels, 0, 1) * 255).astype(np.uint8) for pixels in decoded]


@pytest.mark.parametrize(
    "settings",
    [SETTINGS, replace(SETTINGS, batch=2), replace(SETTINGS, **{**INSTRUCTPIX2PIX, "steps": 4})],
    ids=["one", "batch", "recipe"],
)
def test_the_images_are_those_of_the_nodes(sampler: ComfySampler, settings: Settings) -> None:
    for unit in expand(ROW, settings, 2):
        sampler.make(unit)
        sources, targets = by_the_nodes(sampler, unit)
        for n, name in enumerate(unit["ids"]):
            source, target = images(sampler.store, name)
            np.testing.assert_array_equal(source, sources[n])
            np.testing.assert_array_equal(target, targets[n])


def test_a_unit_that_lost_a_file_is_made_again_bit_for_bit(sampler: ComfySampler) -> None:
    (unit,) = expand(ROW, replace(SETTINGS, batch=2, seed=9), 2)
    sampler.make(unit)
    files = [file for name in unit["ids"] for file in image_names(name)[:2]]
    before = [sampler.store.read(file) for file in files]
    sampler.store.remove(files[3])
    sampler.make(unit)
    assert [sampler.store.read(file) for file in files] == before


def test_a_blend_keeps_what_is_outside_of_its_mask(sampler: ComfySampler) -> None:
    row = replace(ROW, options={"blend_words": "dog", "blend_source_words": "cat"})
    (unit,) = expand(row, replace(SETTINGS, width=128, height=128, steps=6), 1)
    sampler.make(unit)
    scores = Scorer(sampler.store.address, None).score(unit["ids"][0], "", "")
    assert Path(sampler.store.path(image_names(unit["ids"][0])[2])).exists()
    assert scores["distance_outside"] < scores["distance_inside"]


def test_a_row_that_cannot_be_sampled_is_its_own_fault(sampler: ComfySampler) -> None:
    (unit,) = expand(replace(ROW, options={"blend_words": "fox"}), SETTINGS, 1)
    with pytest.raises(ValueError, match="fox"):
        sampler.make(unit)


def test_a_file_that_is_no_checkpoint_is_named(sampler: ComfySampler, tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(b"no checkpoint")
    with pytest.raises(ValueError, match=r"x\.safetensors is no checkpoint that ComfyUI can load"):
        load_checkpoint(str(tmp_path / "x.safetensors"))


def test_an_unknown_sampler_is_everyones(sampler: ComfySampler) -> None:
    (unit,) = expand(ROW, replace(SETTINGS, sampler="oiler"), 1)
    with pytest.raises(RuntimeError, match="sampler is 'oiler'; this ComfyUI has euler"):
        sampler.make(unit)
