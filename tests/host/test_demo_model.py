"""What the bundled model promises: ordinary ComfyUI objects, a small file, scores that are its own."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import comfy.sample
import numpy as np
import pytest
import torch
from comfy.sd1_clip import SDTokenizer
from p2p.demo import loader, scenes, train
from p2p.demo.networks import END, AutoEncoder

Demo = tuple[Any, Any, Any]


def drawn(count: int) -> torch.Tensor:
    """Scenes that no training saw, `(count, 128, 128, 3)` in 0..1."""
    try:
        pictures = [scenes.draw(scenes.sample(train.HELD_OUT + i))[0] for i in range(count)]
    except FileNotFoundError as missing:
        pytest.skip(str(missing))
    return torch.from_numpy(np.stack(pictures)) / 255.0


def encode(demo: Demo, text: str) -> list:
    return demo[1].encode_from_tokens_scheduled(demo[1].tokenize(text))


def paint(demo: Demo, model: Any, text: str, steps: int = 4, side: int = 16) -> torch.Tensor:
    latent = torch.zeros(1, 4, side, side)
    noise = comfy.sample.prepare_noise(latent, 3)
    with torch.inference_mode():
        return comfy.sample.sample(
            model, noise, steps, 4.0, "euler", "normal", encode(demo, text), encode(demo, ""), latent,
            disable_pbar=True, seed=3,
        )  # fmt: skip


def test_the_file_is_small() -> None:
    assert loader.WEIGHTS.stat().st_size <= 15_000_000


def test_the_published_scores_are_those_of_the_file() -> None:
    scores = json.loads((loader.WEIGHTS.parent / "scores.json").read_text())
    assert scores["weights_sha256"] == hashlib.sha256(loader.WEIGHTS.read_bytes()).hexdigest()


def test_every_word_of_a_caption_is_one_token() -> None:
    tokenizer = SDTokenizer(embedding_directory=None)
    for word in scenes.vocabulary():
        tokens = [t[0] for t in tokenizer.tokenize_with_weights(word)[0]]
        assert tokens.index(END) == 2, word


@pytest.mark.parametrize("side", [16, 24])
def test_the_host_samples_and_decodes(demo_model: Demo, side: int) -> None:
    latent = paint(demo_model, demo_model[0], "a castle on a mountain", side=side)
    with torch.inference_mode():
        pictures = demo_model[2].decode(latent)
    assert pictures.shape == (1, 8 * side, 8 * side, 3)
    assert pictures.isfinite().all() and 0 <= pictures.min() < pictures.max() <= 1


def test_the_vae_keeps_the_picture(demo_model: Demo) -> None:
    pictures = drawn(24)
    vae = demo_model[2]
    with torch.inference_mode():
        latents = vae.encode(pictures)
        whole, tiled = vae.decode(latents), vae.decode_tiled(latents, 16, 16, 4)
    assert latents.shape == (24, 4, 16, 16)
    assert 0.8 < latents.std() < 1.2
    assert train.psnr(whole * 2 - 1, pictures * 2 - 1) > 26
    assert train.psnr(tiled * 2 - 1, pictures * 2 - 1) > 20


def test_a_weight_patch_reaches_a_clone_only(demo_model: Demo) -> None:
    model = demo_model[0]
    before = paint(demo_model, model, "a castle")
    clone = model.clone()
    key = "diffusion_model.input_blocks.1.0.in_layers.2.weight"
    shape = model.model.state_dict()[key].shape
    clone.add_patches({key: (torch.randn(shape, generator=torch.Generator().manual_seed(0)),)}, 0.1)
    assert not torch.equal(paint(demo_model, clone, "a castle"), before)
    assert torch.equal(paint(demo_model, model, "a castle"), before)


def test_words_it_never_learnt_are_all_alike(demo_model: Demo) -> None:
    one, other = (encode(demo_model, f"a {word} castle")[0][0] for word in ("gorgeous", "tiny"))
    assert torch.equal(one, other)


def test_a_long_prompt_is_finite(demo_model: Demo) -> None:
    context = encode(demo_model, "a castle on a mountain " * 40)[0][0]
    assert context.shape[1] > 77 and context.isfinite().all()


@pytest.mark.parametrize("kind", ["vae", "unet"])
@torch.inference_mode(False)
def test_training_resumes_exactly(tmp_path: Path, kind: str) -> None:
    pictures = (drawn(8).numpy() * 255).round().astype(np.uint8)
    results = []
    for name, stops in (("straight", [None]), ("resumed", [2, None])):
        work = tmp_path / name
        work.mkdir()
        np.save(work / "scenes.npy", pictures)
        np.save(work / "held_out.npy", pictures)
        torch.manual_seed(0)
        vae = AutoEncoder()
        if kind == "unet":
            train.encode_pool(work, vae.requires_grad_(False), 8)
        for stop in stops:
            if kind == "vae":
                model: torch.nn.Module = train.train_vae(work, 4, batch=2, stop=stop)
            else:
                model = train.train_unet(work, 4, vae, batch=2, compiled=False, stop=stop)[0]
        results.append(model.state_dict())
    assert all(torch.equal(results[0][key], results[1][key]) for key in results[0])
