"""Prompt-to-Prompt with attention maps that are built, edited and multiplied, as published code does it.

Written from the formulas of Hertz et al. 2023, section 3.2, on the same host and the same models, to compare
with: the pictures must be the same, time and memory are not.
"""

from __future__ import annotations

import math
from typing import Any

from einops import rearrange
from torch import Tensor


def materialised(model: Any, edit: Any, tau: Any) -> tuple[Any, list]:
    """A clone of the model that samples the edit, and the positive conditioning that goes with it.

    edit: with prompts of the same number of tokens as the conditioning. tau: for every target.
    """
    from p2p.sampling.conditioning import paired_conditioning
    from p2p.sampling.network import layers_of, of_kind

    patched = model.clone()
    layers = layers_of(model.get_model_object("diffusion_model"))
    for name, number, depth in (layer.block for layer in of_kind(layers, "cross")):
        maps = _Maps(edit, tau)
        patched.set_model_attn2_replace(maps.cross, name, number, depth)
        patched.set_model_attn1_replace(maps.self_, name, number, depth)
    return patched, paired_conditioning(edit, "materialised")


class _Maps:
    """Attention of one layer through its maps, (rows, heads, pixels, tokens)."""

    def __init__(self, edit: Any, tau: Any):
        self.edit, self.tau = edit, tau

    def cross(self, q: Tensor, k: Tensor, v: Tensor, options: dict) -> Tensor:
        """A*_j = w c (m (A_s M)_j + (1 - m) A_t,j) + (1 - w) A_t,j in the targets' rows."""
        from p2p.attention.plan import cross_weights

        progress = _progress(options)
        maps = _maps(q, k, options["n_heads"])
        for source in _sources(options, q.shape[0], self.edit.branches):
            for n, target in enumerate(self.edit.targets, start=1):
                w = cross_weights(target, self.tau, progress).to(maps)
                c, m, mapping = (x.to(maps) for x in (target.gain, target.inherits, target.mapping))
                own = maps[source + n]
                edited = c * (m * (maps[source] @ mapping) + (1 - m) * own)
                maps[source + n] = w * edited + (1 - w) * own
        return _applied(maps, v, options["n_heads"])

    def self_(self, q: Tensor, k: Tensor, v: Tensor, options: dict) -> Tensor:
        """A*_t = w A_s + (1 - w) A_t, in layers whose grid is small enough."""
        progress = _progress(options)
        w = self.tau.self_weight(progress)
        maps = _maps(q, k, options["n_heads"])
        height, width = options["original_shape"][-2:]
        factor = round(math.sqrt(height * width / q.shape[1]))
        if 1 / factor <= self.tau.self_resolution and w > 0:
            for source in _sources(options, q.shape[0], self.edit.branches):
                for target in range(source + 1, source + self.edit.branches):
                    maps[target] = w * maps[source] + (1 - w) * maps[target]
        return _applied(maps, v, options["n_heads"])


def _maps(q: Tensor, k: Tensor, heads: int) -> Tensor:
    q, k = (rearrange(x, "b n (h d) -> b h n d", h=heads) for x in (q, k))
    return (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)


def _applied(maps: Tensor, v: Tensor, heads: int) -> Tensor:
    return rearrange(maps @ rearrange(v, "b t (h d) -> b h t d", h=heads), "b h n d -> b n (h d)")


def _progress(options: dict) -> float:
    """The place of this call's sigma among the run's, as a fraction of its steps."""
    sigmas = options["sample_sigmas"]
    return int((sigmas[:-1] >= options["sigmas"][0] * (1 - 1e-4)).sum() - 1) / (len(sigmas) - 1)


def _sources(options: dict, rows: int, branches: int) -> list[int]:
    """Rows of the sources in the positive chunks; a chunk tiles (source, target 1 .. N)."""
    chunks = options["cond_or_uncond"]
    size = rows // len(chunks)
    positive = [n * size for n, kind in enumerate(chunks) if kind == 0]
    return [row for first in positive for row in range(first, first + size, branches)]
