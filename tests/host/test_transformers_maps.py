"""Words' maps of transformers, and the local blend that they make: equal to those of materialised maps."""

from __future__ import annotations

import functools
import importlib
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from comfy.model_management import OOM_EXCEPTION
from comfy.patcher_extension import WrappersMP
from einops import rearrange
from p2p.attention.blend import read_blend, region_mask, regions
from p2p.attention.edit import Edit, Source
from p2p.attention.plan import cross_weights
from p2p.attention.prompt import Word
from p2p.attention.schedule import TauSchedule, Window, parse_word_windows
from p2p.attention.taken import Layer
from p2p.nodes.maps import AttentionMaps
from p2p.sampling.controller import control
from p2p.sampling.families import FAMILIES, family_of, layers_of
from p2p.sampling.maps import MapsHandle
from p2p.sampling.overrides import OVERRIDE, standing_in
from p2p.sampling.reuse import Keep, SourceCache
from p2p.tests import naive
from p2p.tests.host.runs import EDITED, assert_close, difference
from p2p.tests.host.test_transformers_laws import (
    CLOSELY,
    EMPTY,
    FULL,
    IMAGE,
    MUTUAL,
    PART,
    SCHEDULES,
    STEPS,
    pair_of,
    sampled,
    seen_rows,
)
from p2p.tests.host.transformers import TINY, build, latent

every_family = pytest.mark.parametrize("name", TINY)
WINDOWS = TauSchedule(Window(0, 0.5), Window(0, 0.3), words=parse_word_windows("x1: 0.3-1"))


@pytest.fixture(scope="module")
def model_of():
    """Each family's MODEL, made once for this module."""
    made = functools.cache(build)
    yield made
    made.cache_clear()


class Witness:
    """Builds the maps of a run's words from the queries and keys of its attention calls, in float64.

    It stands between the network and the pack's override, and goes by the table of families.
    """

    def __init__(self, pair, tau, edit, pairs=1):
        self.pair, self.tau, self.edit, self.pairs = pair, tau, edit, pairs
        self.family, self.network = family_of(pair.model.model), pair.model.model.diffusion_model
        self.lengths = [prompt.length for prompt in pair.prompts]
        self.sigmas: list[float] = []
        self.maps: dict[tuple, list] = {}

    def on(self, model):
        model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "witness", self.apply_model)

    def apply_model(self, executor, x, t, concat, context, control, options, **more):
        own = [n for n, index in enumerate(options["cond_or_uncond"]) if index == 0]
        sigma = float(options["sigmas"][0])
        self.sigmas += [sigma] if sigma not in self.sigmas else []
        layers = iter(layers_of(self.family, self.network))
        read = self.family.map_layers(layers_of(self.family, self.network))
        inner = options[OVERRIDE]
        texts = self.family.text_lengths({**more, "c_crossattn": context})
        _, height, width = self.family.grid(x)

        def override(function, q, k, v, heads, *args, **kwargs):
            layer = next(layers)
            if own and layer in read:
                rows = self.pairs * self.edit.branches
                chunk = slice(own[0] * rows, (own[0] + 1) * rows)
                self.see(layer, texts, (height, width), q[chunk], k[chunk], heads)
            return inner(function, q, k, v, heads, *args, **kwargs)

        options = {**options, OVERRIDE: override}
        module = self.family.module
        around = standing_in(importlib.import_module(module), options) if module else nullcontext()
        with around:
            return executor(x, t, concat, context, control, options, **more)

    def see(self, layer, texts, grid, q, k, heads):
        size, length = q.shape[-1] // (1 if q.ndim == 4 else heads), k.shape[-2]
        q, k = (x if x.ndim == 4 else rearrange(x, "b n (h d) -> b h n d", d=size) for x in (q, k))
        q, k = q.double(), k.double().repeat_interleave(heads // k.shape[1], dim=1)
        multiple = getattr(self.network, self.family.multiple) if self.family.multiple else 1
        if layer.kind == "joint":
            tokens = self.family.tokens(texts, grid[0] * grid[1], length, multiple)
            image = tokens.image
            text = [n for span in tokens.text for n in range(span.start, span.stop)]
        else:
            image, text = slice(0, 0), list(range(sum(texts)))
        for row in range(len(q)):
            pair, branch = divmod(row, self.edit.branches)
            found = []
            for head in range(heads):
                rows = (Row(self, layer, text, image, n, q, k, head) for n in (row - branch, row))
                found.append(self.columns(branch, *rows))
            maps = (sum(found) / heads).T.unflatten(-1, grid)
            self.maps.setdefault((len(self.sigmas) - 1, pair, branch), []).append(maps)

    def columns(self, branch, source, own):
        """The columns of a branch's prompt in its edited map, (n, t)."""
        plain = own.map(own.q, own.text, own.image)
        if branch == 0:
            return plain
        target, tau = self.edit.targets[branch - 1], self.edit.targets[branch - 1].tau or self.tau
        progress = (len(self.sigmas) - 1) / STEPS
        share = cross_weights(target, tau, progress) * target.inherits.double()
        joint = own.joint
        image, mutual = (
            max(tau.self_weight(progress, mode) for mode in modes) if joint else 0.0
            for modes in (("map", "map in both halves"), ("mutual",))
        )
        if mutual:
            return mutual * own.map(own.q, own.text, source.image) + (1 - mutual) * plain
        if share.any() or tau.cross.weight(progress, tau.fade):
            taken = own.map(source.q, source.text, source.image, source)
            return (taken @ target.mapping.double()) * share + (1 - share) * plain
        return image * own.map(source.q, own.text, source.image) + (1 - image) * plain

    def word(self, step, pair, branch, tokens):
        """The map of a word at one step, over all layers: (h, w)."""
        layers = self.maps[step, pair, branch]
        return sum(maps[list(tokens)].sum(0) for maps in layers) / len(layers)


class Row:
    """A row and head of a call: queries of the image, and keys of text, image and all else that is kept."""

    def __init__(self, witness, layer, text, image, row, q, k, head):
        lengths, front = witness.lengths, witness.family.padding == "front" or witness.family.front
        branch = row % len(lengths)
        self.joint = layer.kind == "joint"
        prompt = text[-lengths[branch] :] if front else text[: lengths[branch]]
        padded = len(set(lengths)) > 1 and not witness.family.pad_token
        kept = prompt if padded else text
        self.prompt = [kept.index(n) for n in prompt]
        self.q = q[row, head, image if self.joint else slice(None)]
        self.text, self.image = k[row, head, kept], k[row, head, image]
        among = {*text, *range(image.start, image.stop)}
        self.other = k[row, head, [n for n in range(k.shape[2]) if n not in among]]

    def map(self, q, text, image, words=None):
        """The columns of the prompt, of this row's or of another's, where these keys are seen."""
        return naive.joint_map(q, text, image, self.other)[:, (words or self).prompt]


def run(pair, tau, edit=None, cfg=1.0, pairs=1, witness=None, **more):
    """A run whose maps are read: its samples, and its maps."""
    handle = MapsHandle(wanted=True)
    controlled, positive = control(pair.model, edit or pair.edit, tau, maps=handle, **more)
    if witness is not None:
        witness.on(controlled)
    noise = torch.cat([latent(pair.name, (edit or pair.edit).branches, seed) for seed in range(pairs)])
    negative = pair.prompts[1].conditioning  # as long as the pair's own, which meets it in one call
    rows = sampled(controlled, noise, positive, negative, cfg)
    return rows, handle.maps_of(rows)


def assert_as_materialised(maps, witness):
    """Maps of some words of three branches, step by step."""
    (scale,) = maps.by_scale
    assert maps.progress == tuple(step / STEPS for step in range(STEPS))
    for branch, words in enumerate(["w0, w1 w2", "x1", "y2, w0 w1"]):
        _, phrases = maps.phrases(branch, words)
        for step, progress in enumerate(maps.progress):
            found = maps.of(branch, phrases, scale, progress, progress + 1e-6)
            for pair, words in enumerate(found):
                for word, tokens in zip(words, phrases, strict=True):
                    expected = witness.word(step, pair, branch, tokens)
                    torch.testing.assert_close(word.double(), expected, rtol=1e-4, atol=1e-6)


def assert_equal_maps(found, expected):
    """Maps of two runs, step by step."""
    for scale, steps in expected.by_scale.items():
        for one, other in zip(found.by_scale[scale], steps, strict=True):
            assert_close(one, other, 1e-4)


@pytest.mark.parametrize(
    ("name", "schedule"),
    [(name, schedule) for name in TINY for schedule in (SCHEDULES if name in CLOSELY else ("faded",))],
)
@pytest.mark.parametrize("cfg", [1.0, 4.0])
def test_maps_of_a_run_are_the_materialised_edited_ones(name, schedule, cfg, model_of):
    pair, tau, pairs = pair_of(name, model_of(name)), SCHEDULES[schedule], 2 if cfg > 1 else 1
    edit = pair.edit.reweighted("w0", 1.5)
    witness = Witness(pair, tau, edit, pairs)
    _, maps = run(pair, tau, edit, cfg, pairs, witness)
    assert_as_materialised(maps, witness)


@pytest.mark.parametrize("name", ["Flux", "SD3", "PixArt Sigma"])
def test_words_and_targets_with_windows_of_their_own_are_read_by_these(name, model_of):
    """Targets whose images are made in different ways meet in one forward."""
    pair = pair_of(name, model_of(name))
    source, first, second = pair.edit.prompts
    for schedules in ((PART, WINDOWS), (EMPTY, FULL), (MUTUAL, IMAGE)):
        targets = zip(pair.edit.targets, schedules, strict=True)
        edit = replace(pair.edit, targets=tuple(replace(target, tau=tau) for target, tau in targets))
        witness = Witness(pair, FULL, edit)
        _, maps = run(pair, FULL, edit, witness=witness)
        assert_as_materialised(maps, witness)


@every_family
def test_maps_change_nothing_of_the_run(name, model_of):
    pair = pair_of(name, model_of(name))
    negative = pair.prompts[1].conditioning
    assert torch.equal(run(pair, PART, cfg=4.0)[0], pair.run(PART, 4.0, negative=negative))


@pytest.mark.parametrize("name", ["Flux", "Lumina 2", "HiDream", "Wan 2.1"])
def test_a_group_of_the_targets_at_a_time_gives_the_same_maps(name, model_of, monkeypatch):
    pair = pair_of(name, model_of(name))
    _, together = run(pair, PART, cfg=4.0)
    rows = seen_rows(pair.model, monkeypatch)
    monkeypatch.setattr(pair.model.model, "memory_required", lambda *args, **kwargs: 1e30)
    _, apart = run(pair, PART, cfg=4.0)
    assert set(rows) == {2}
    assert_equal_maps(apart, together)


@pytest.mark.parametrize("name", ["Flux", "PixArt Sigma"])
def test_memory_that_runs_out_in_mid_run_leaves_the_same_maps(name, model_of):
    pair, calls, failing = pair_of(name, model_of(name)), [], []

    def override(function, *args, **kwargs):
        calls.append(function)
        if len(calls) in failing:
            raise OOM_EXCEPTION("out of memory")
        return function(*args, **kwargs)

    model = pair.model.clone()
    model.model_options["transformer_options"] = {OVERRIDE: override}
    blend = read_blend("x1, y2", "", "", 0.7, 0.2)
    expected, maps = run(replace(pair, model=model), PART, blend=blend)
    count = len(calls)
    for n in range(1, 4):
        calls.clear()
        failing[:] = [n * count // 4]
        rows, found = run(replace(pair, model=model), PART, blend=blend)
        assert len(calls) > count  # begun again, in parts
        assert_close(rows, expected, 1e-4)
        assert_equal_maps(found, maps)


@pytest.mark.parametrize("name", ["Flux", "PixArt Sigma"])
def test_maps_are_read_whole_beside_a_kept_source(name, model_of, monkeypatch):
    monkeypatch.setattr("p2p.sampling.reuse.CACHE", SourceCache())
    pair = pair_of(name, model_of(name))
    expected = run(pair, PART)
    pair.run(PART, keep=Keep(1.0))
    found = run(pair, PART, keep=Keep(1.0))
    assert torch.equal(found[0], expected[0])
    assert_equal_maps(found[1], expected[1])


@pytest.mark.parametrize("name", ["Flux", "PixArt Sigma"])
def test_another_nodes_override_reads_the_maps_and_builds_none(name, model_of):
    """Values as wide as a head, in each of its calls, are what kernels want that build no map."""
    pair, calls = pair_of(name, model_of(name)), []

    def override(function, q, k, v, heads, *args, **kwargs):
        calls.append((v.shape[-2:], k.shape[-2:]))
        return function(q, k, v, heads, *args, **kwargs)

    def count(wanted):
        calls.clear()
        handle = MapsHandle(wanted=wanted)
        pair.run(PART, model=model, maps=handle)
        return len(calls)

    model = pair.model.clone()
    model.model_options["transformer_options"] = {OVERRIDE: override}
    without, reading = count(False), count(True)
    assert reading > without
    assert all(v == k for v, k in calls)


def test_a_word_that_several_text_encoders_read_has_the_sum_of_its_tokens_maps(model_of):
    pair = pair_of("HiDream", model_of("HiDream"))
    part, several = pair.prompts[0].length // 3, []
    for prompt in pair.prompts:
        words = [
            Word(word.text, tuple(token + part * n for n in range(3) for token in word.tokens))
            for word in prompt.words[: part - 2]
        ]
        several.append(replace(prompt, words=tuple(words)))
    edit = Edit(Source(several[0])).with_target(several[1], "auto")
    witness = Witness(pair, EMPTY, edit)
    _, maps = run(pair, EMPTY, edit, witness=witness)
    _, (tokens,) = maps.phrases(1, "x1")
    assert tokens == (2, 2 + part, 2 + 2 * part)
    found = maps.of(1, [tokens], 0, 0.0, 0.1)[0, 0]
    torch.testing.assert_close(found.double(), witness.word(0, 0, 1, tokens), rtol=1e-4, atol=1e-6)


SMALL = ("Flux", "SD3.5 Medium", "Qwen-Image", "Z-Image", "Chroma Radiance")


@pytest.mark.parametrize(("name", "threshold"), [*((name, 0.97) for name in SMALL), ("PixArt Sigma", 0.7)])
@pytest.mark.parametrize("cfg", [1.0, 4.0])
@pytest.mark.parametrize("masked", [False, True])
def test_the_blend_keeps_the_source_outside_of_the_words_regions(
    name, threshold, cfg, masked, model_of
):
    pair = pair_of(name, model_of(name))
    size = TINY[name].latent[-2:]
    mask = torch.ones(1, *size)
    mask[..., ::2] = 0.0 if masked else 1.0
    blend = read_blend("x1, y2", "", "", threshold, 0.2, 0.0, mask if masked else None)
    plain = run(pair, PART, cfg=cfg)[0]
    rows, maps = run(pair, PART, cfg=cfg, blend=blend)
    assert torch.equal(rows[0], plain[0])
    (steps,) = maps.by_scale.values()
    for n, found in enumerate(regions(blend, pair.edit), 1):
        expected = region_mask(found, sum(steps), pair.edit.tokens, size, threshold, 0.0)[:, 0] * mask
        region = maps.blend_of(n)
        assert torch.equal(region, expected) and 0.0 < region.mean() < 1.0
        outside, inside = region[0] == 0.0, region[0] == 1.0
        assert torch.equal(rows[n][..., outside], rows[0][..., outside])
        assert difference(rows[n][..., inside], rows[0][..., inside]) > EDITED


@pytest.mark.parametrize("name", ["Flux", "Flux.2", "Chroma Radiance", "Qwen-Image"])
def test_the_node_draws_the_maps_in_the_size_of_the_image_from_the_one_scale_that_there_is(name, model_of):
    pair, handle = pair_of(name, model_of(name)), MapsHandle(wanted=True)
    samples = {"samples": pair.run(PART, maps=handle)}
    pictures, mask = AttentionMaps.execute(handle, samples, "w0, x1", 1).args
    assert pictures.shape[0] == 2 and pictures.shape[2] == 64
    assert mask.shape == (1, 64, 64) and mask.max() == 1.0
    assert torch.equal(pictures, AttentionMaps.execute(handle, samples, "w0, x1", 1, layers="all").args[0])
    with pytest.raises(ValueError, match="no attention layers at 1/8 of the latent's sides; it has 1/"):
        AttentionMaps.execute(handle, samples, "w0, x1", 1, layers="eighth")


def test_latents_of_several_frames_are_an_error_before_the_first_step(model_of):
    pair = pair_of("Wan 2.1", model_of("Wan 2.1"))
    for more in ({"maps": MapsHandle(wanted=True)}, {"blend": read_blend("x1", "w0", "", 0.3, 0.2)}):
        controlled, positive = control(pair.model, pair.edit, PART, **more)
        noise = torch.cat([latent("Wan 2.1", pair.branches)] * 2, dim=2)
        with pytest.raises(ValueError, match="the latent has 2 frames. Use a latent of one frame"):
            sampled(controlled, noise, positive, pair.negative, 1.0)


def layers(*counts):
    """Joint attention in stages of so many blocks."""
    return tuple(Layer("joint", (n, block), 2) for n, count in enumerate(counts) for block in range(count))


@pytest.mark.parametrize(
    ("family", "counts", "blocks"),
    [
        ("Flux", (19, 38), {(0, n) for n in (11, 12, 14, 17, 18)}),
        ("SD3", (24,), {(0, n) for n in (4, 5, 7, 8, 9)}),
        ("SD3", (38,), {(0, n) for n in (16, 18, 20, 21, 24)}),
        ("Qwen-Image", (60,), {(0, n) for n in range(20, 40)}),
        ("Flux.2", (8, 48), {(1, n) for n in range(10, 30)}),
    ],
)
def test_maps_are_read_in_the_published_blocks_or_in_the_middle_third(family, counts, blocks):
    family = next(f for f in FAMILIES if f.name == family)
    assert {layer.block for layer in family.map_layers(layers(*counts))} == blocks
