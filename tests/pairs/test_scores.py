"""Scores against their definitions, written out."""

from __future__ import annotations

import math

import numpy as np
import pytest
from p2p.pairs.scores import changes, similarities, ssim_map


def naive_ssim(a: np.ndarray, b: np.ndarray, y: int, x: int) -> float:
    """Equation 13 of Wang et al. 2004 at one pixel away from the edge, one channel."""
    weights = {(i, j): math.exp(-(i * i + j * j) / (2 * 1.5**2)) for i in range(-5, 6) for j in range(-5, 6)}
    total = sum(weights.values())

    def mean(of) -> float:
        return sum(w * of(y + i, x + j) for (i, j), w in weights.items()) / total

    ma, mb = mean(lambda i, j: a[i, j]), mean(lambda i, j: b[i, j])
    va, vb = mean(lambda i, j: a[i, j] ** 2) - ma**2, mean(lambda i, j: b[i, j] ** 2) - mb**2
    both = mean(lambda i, j: a[i, j] * b[i, j]) - ma * mb
    c1, c2 = 0.01**2, 0.03**2
    return (2 * ma * mb + c1) * (2 * both + c2) / ((ma**2 + mb**2 + c1) * (va + vb + c2))


def test_ssim_is_its_formula() -> None:
    r = np.random.default_rng(0)
    a, b = r.random((16, 18, 3)), r.random((16, 18, 3))
    found = ssim_map(a, b)
    for y, x in ((5, 5), (8, 11), (10, 12)):
        expected = sum(naive_ssim(a[..., c], b[..., c], y, x) for c in range(3)) / 3
        assert found[y, x] == pytest.approx(expected, abs=1e-6)


def test_sides_of_a_mask_are_measured_apart() -> None:
    source = np.random.default_rng(1).random((24, 24, 3))
    mask = np.zeros((24, 24), bool)
    mask[:, 12:] = True
    target = source.copy()
    target[mask] = 1 - target[mask]
    found = changes(source, target, mask)
    assert found["distance_outside"] == 0 < found["distance_inside"]
    assert found["distance_inside"] == pytest.approx(np.abs(source - target)[mask].mean(), abs=1e-4)
    assert found["ssim_inside"] < found["ssim"] < found["ssim_outside"] <= 1
    assert changes(source, source, None) == {"ssim": 1.0}
    assert changes(source, source, np.ones((24, 24), bool))["ssim_outside"] is None


def test_similarities_are_the_published_cosines() -> None:
    r = np.random.default_rng(2)
    images, texts = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in r.normal(size=(2, 2, 8)))

    def naive(a: np.ndarray, b: np.ndarray) -> float:
        return float(a @ b / math.sqrt((a @ a) * (b @ b)))

    expected = {
        "clip_sim_0": naive(images[0], texts[0]),
        "clip_sim_1": naive(images[1], texts[1]),
        "clip_sim_image": naive(images[0], images[1]),
        "clip_sim_dir": naive(images[1] - images[0], texts[1] - texts[0]),
    }
    found = similarities(images, texts)
    assert found == pytest.approx(expected, abs=1e-4)
    assert similarities(images, texts[[0, 0]])["clip_sim_dir"] == 0
