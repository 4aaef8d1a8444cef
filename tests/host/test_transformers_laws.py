"""The laws of paired sampling on transformers: tiny networks of every family, edits made by hand.

A prompt's tokens are a start, words "w0 w1 ..." and an end; what the model is given for it is random
features, one for each token.
"""

from __future__ import annotations

import functools
import importlib
from dataclasses import dataclass

import comfy.sample
import pytest
import torch
from comfy.patcher_extension import WrappersMP
from einops import rearrange
from p2p.attention.blend import LocalBlend
from p2p.attention.edit import Edit, Source
from p2p.attention.prompt import END, START, WORD_END, read_prompt
from p2p.attention.schedule import TauSchedule, Window
from p2p.sampling.controller import control, plug_and_play
from p2p.sampling.encode import EncodedPrompt
from p2p.sampling.families import family_of
from p2p.sampling.host import KEY
from p2p.sampling.invert import invert
from p2p.sampling.overrides import OVERRIDE, standing_in
from p2p.sampling.reuse import Keep, SourceCache
from p2p.sampling.sampler import sample_pairs
from p2p.tests import naive
from p2p.tests.host.runs import EDITED, assert_close, difference
from p2p.tests.host.test_transformers import Forward, padded
from p2p.tests.host.transformers import TINY, build, conditioning, latent

STEPS = 3
EMPTY = TauSchedule(Window(0, 0), Window(0, 0))
FULL = TauSchedule(Window(0, 1), Window(0, 1))
PART = TauSchedule(Window(0, 0.5), Window(0, 0.8), fade=0.4)
IMAGE = TauSchedule(Window(0, 0), Window(0, 1))
MUTUAL = TauSchedule(Window(0, 0.5), Window(0, 1), self_mode="mutual", mutual_layer=0.0)
HALVES = TauSchedule(Window(0, 0.4), Window(0, 1), self_mode="map in both halves")
SCHEDULES = {
    "words": FULL,
    "faded": PART,
    "image": IMAGE,
    "mutual": MUTUAL,
    "map in both halves": HALVES,
}

every_family = pytest.mark.parametrize("name", TINY)
CLOSELY = ("Flux", "SD3.5 Medium", "Z-Image", "Lumina 2", "HiDream", "Cosmos Predict2")
"""A family of each kind, tested with every schedule; the others are with one."""
both_guidances = pytest.mark.parametrize("cfg", [1.0, 4.0])


@pytest.fixture(scope="module")
def model_of():
    """Each family's MODEL, made once for this module."""
    made = functools.cache(build)
    yield made
    made.cache_clear()


def text_tokens(name, model, features, options):
    """Tokens of a prompt, all parts of the text together."""
    (x, more), family = (features, options), family_of(model.model)
    count = x.shape[1]
    if len(family.texts) > 1:
        parts = {"encoder_hidden_states_llama3": "conditioning_llama3", "txt_byt5": "conditioning_byt5small"}
        parts["encoder_hidden_states_t5"] = "conditioning_mt5xl"
        for part in family.texts[1:]:
            value = more.get(parts[part.key])
            count += 0 if value is None else value.shape[part.axis]
    return count


def prompt(name, model, seed, longer=0, words=""):
    """A prompt of random features. words: instead of "w0 w1 ...", where they are not as many."""
    entry = conditioning(name, seed, longer)
    count = text_tokens(name, model, *entry[0])
    named = words.split()
    text = " ".join([*named, *(f"w{n}" for n in range(len(named), count - 2))])
    read = read_prompt(text, [[START, *(word + WORD_END for word in text.split()), END]])
    return EncodedPrompt(text, read.words, read.chunks, conditioning=entry)


@dataclass(frozen=True)
class Pair:
    """An edit of one source and two targets: one swaps a word, one adds words where lengths may differ."""

    name: str
    model: object
    prompts: tuple[EncodedPrompt, ...]

    @property
    def edit(self) -> Edit:
        edit = Edit(Source(self.prompts[0]))
        for target in self.prompts[1:]:
            edit = edit.with_target(target, "auto")
        return edit

    @property
    def branches(self):
        return len(self.prompts)

    def run(self, tau, cfg=1.0, edit=None, pairs=1, model=None, negative=None, **more):
        """A paired run: the rows of all pairs, source first."""
        edit = self.edit if edit is None else edit
        controlled, positive = control(model or self.model, edit, tau, **more)
        noise = torch.cat([latent(self.name, self.branches, seed) for seed in range(pairs)])
        return sampled(controlled, noise, positive, negative or self.negative, cfg)

    def plain(self, branch, cfg=1.0, seed=0):
        """An ordinary run of one prompt."""
        positive = self.prompts[branch].conditioning
        return sampled(self.model, latent(self.name, 1, seed), positive, self.negative, cfg)

    @property
    def negative(self):
        return conditioning(self.name, 99, longer=3)


def sampled(model, noise, positive, negative, cfg):
    return comfy.sample.sample(
        model,
        noise,
        STEPS,
        cfg,
        "euler",
        "simple",
        positive,
        negative,
        torch.zeros_like(noise),
        denoise=1.0,
        disable_pbar=True,
    )


def can_be_unequal(name, model):
    family = family_of(model.model)
    return not TINY[name].fixed and family.padding is not None and len(family.texts) == 1


def pair_of(name, model, unequal=True, same=False):
    longer = (0, 2, 1) if unequal and can_be_unequal(name, model) else (0, 0, 0)
    seeds = (1, 1, 1) if same else (1, 2, 3)
    words = ("", "w0 x1", "w0 w1 y2")
    return Pair(
        name,
        model,
        tuple(
            prompt(name, model, seed, 0 if same else more, "" if same else word)
            for seed, more, word in zip(seeds, longer, words, strict=True)
        ),
    )


@every_family
@both_guidances
def test_law_1_equal_prompts_give_equal_images(name, cfg, model_of):
    rows = pair_of(name, model_of(name), same=True).run(PART, cfg)
    for target in rows[1:]:
        assert_close(target, rows[0], 1e-5)


@every_family
@both_guidances
def test_law_2_tau_empty_gives_plain_runs(name, cfg, model_of):
    pair = pair_of(name, model_of(name))
    rows = pair.run(EMPTY, cfg, pair.edit.reweighted("w0", 2.0))
    for branch in range(pair.branches):
        assert_close(rows[branch : branch + 1], pair.plain(branch, cfg), 1e-4)


@pytest.mark.parametrize(
    ("name", "schedule"),
    [(name, schedule) for name in TINY for schedule in (SCHEDULES if name in CLOSELY else ("faded",))],
)
def test_law_3_the_source_never_changes_and_targets_do(name, schedule, model_of):
    tau = SCHEDULES[schedule]
    pair = pair_of(name, model_of(name))
    plain = pair.run(EMPTY)
    edited = pair.run(tau, edit=pair.edit.reweighted("w0", -1.0))
    assert torch.equal(edited[0], plain[0])
    for branch in range(1, pair.branches):
        assert difference(edited[branch], plain[branch]) > 1e-3


class Materialised(Forward):
    """The paper's way on a batch of source and targets: maps built, edited column by column, in float64."""

    def __init__(self, pair, tau, edit):
        super().__init__(pair.name, pair.model, self.attention)
        self.pair, self.tau, self.targets = pair, tau, edit.targets
        self.lengths = [p.length for p in pair.prompts]
        self.step = -1

    def apply_model(self, *args, **more):
        self.step += 1
        return super().apply_model(*args, **more)

    def whole_run(self):
        side, longest = self.family.padding, max(self.lengths)
        rows = [
            padded(p.conditioning, longest - p.length, side) if p.length < longest else p.conditioning
            for p in self.pair.prompts
        ]
        return self.run(*rows, steps=STEPS)

    def real(self, row, span):
        """The tokens of a row's text that are no padding."""
        if self.family.padding == "front":
            return slice(span.stop - self.lengths[row], span.stop)
        return slice(span.start, span.start + self.lengths[row])

    def attention(self, here, attend):
        call = here.tensors
        q, k, v = (split_heads(x, here.heads) for x in (call.q, call.k, call.v))
        out = torch.zeros(*q.shape[:2], q.shape[2], v.shape[-1], dtype=torch.float64)
        for row in range(q.shape[0]):
            for head in range(q.shape[1]):
                at = head * k.shape[1] // q.shape[1]
                one = [(q[n, head], k[n, at], v[n, at]) for n in (0, row)]
                self.fill(here, row, *one, out[row, head])
        return rearrange(out, "b h l d -> b l (h d)").to(call.q.dtype)

    def fill(self, here, row, source, own, out):
        if here.layer.kind == "text":
            real = self.real(row, slice(0, own[0].shape[0]))
            out[:] = naive.joint_map(own[0], own[1][real]) @ own[2][real]
            return
        if here.layer.kind == "self":
            weight = self.windows(row)[1] if row else 0.0
            taken = naive.joint_map(source[0], source[1]) if self.tau.self_mode == "map" else None
            edited = naive.joint_map(own[0], own[1])
            if taken is not None:
                out[:] = (weight * taken + (1 - weight) * edited) @ own[2]
            else:
                looking = naive.joint_map(own[0], source[1]) @ source[2]
                out[:] = weight * looking + (1 - weight) * edited @ own[2]
            return
        own_parts, image = self.parts(here, row, own), here.tokens.image
        result = self.joint(row, self.parts(here, 0, source), own_parts)
        out[self.real(row, here.tokens.text[0])] = result.text.v
        out[image] = result.image.v

    def parts(self, here, row, tensors):
        spans = self.real(row, here.tokens.text[0]), here.tokens.image, slice(0, 0)
        return naive.Joint(*(naive.Part(*(x[span] for x in tensors)) for span in spans))

    def windows(self, row):
        progress = self.step / STEPS
        return [window.weight(progress, self.tau.fade) for window in (self.tau.cross, self.tau.self_)]

    def joint(self, row, source, own):
        others = torch.ones(len(own.image.k) + len(own.other.k), dtype=torch.float64)
        if row == 0:
            return naive.joint_image(own, own, 1.0, torch.cat([torch.ones(len(own.text.k)), others]))
        target = self.targets[row - 1]
        cross, self_ = self.windows(row)
        gain = torch.cat([cross * target.gain.double() + 1 - cross, others])
        if self.tau.self_mode == "mutual" and self_:
            return naive.joint_mutual(source, own, self_, gain)
        if cross:
            share = cross * target.inherits.double()
            return naive.joint_words(source, own, target.mapping.double(), share, max(cross, self_), gain)
        return naive.joint_image(source, own, self_, gain)


def split_heads(x, heads):
    """(b, h, L, d) in float64, of whatever layout."""
    if x.ndim == 4:
        return x.double()
    return rearrange(x.double(), "b l (h d) -> b h l d", h=heads)


@pytest.mark.parametrize("name", ["Flux", "SD3", "Qwen-Image", "Lumina 2", "Chroma"])
@pytest.mark.parametrize("schedule", ["words", "faded", "image", "mutual"])
def test_law_4_a_run_equals_one_with_materialised_maps(name, schedule, model_of):
    pair, tau = pair_of(name, model_of(name)), SCHEDULES[schedule]
    edit = pair.edit.reweighted("w0", 2.0).reweighted("y2", -0.5)
    assert_close(pair.run(tau, edit=edit), Materialised(pair, tau, edit).whole_run())


def seen_rows(model, monkeypatch):
    """The number of rows of each call of the network."""
    rows, inner = [], model.model._apply_model

    def apply_model(x, *args, **kwargs):
        rows.append(x.shape[0])
        return inner(x, *args, **kwargs)

    monkeypatch.setattr(model.model, "_apply_model", apply_model)
    return rows


@every_family
def test_law_5_one_conditioning_and_one_target_at_a_time_give_the_same(name, model_of, monkeypatch):
    model = model_of(name)
    pair = pair_of(name, model)
    negative = pair_of(name, model).prompts[1].conditioning  # as long as the pair
    rows = seen_rows(model, monkeypatch)
    together = pair.run(PART, 4.0, negative=negative)
    assert max(rows) == 6
    rows.clear()
    monkeypatch.setattr(model.model, "memory_required", lambda *args, **kwargs: 1e30)
    apart = pair.run(PART, 4.0, negative=negative)
    assert set(rows) == {2}
    assert_close(apart, together, 1e-4)


@every_family
def test_law_6_a_batch_of_pairs_equals_the_pairs_one_by_one(name, model_of):
    pair = pair_of(name, model_of(name))
    both = pair.run(PART, 4.0, pairs=2)
    assert_close(both[: pair.branches], pair.run(PART, 4.0), 1e-4)
    assert difference(both[pair.branches :], both[: pair.branches]) > EDITED


@every_family
def test_law_7_negative_prompts_are_left_alone_unless_asked(name, model_of):
    def negatives(tau):
        seen = []

        def guidance(args):
            seen.append(args["uncond_denoised"])
            return args["uncond"] + 4.0 * (args["cond"] - args["uncond"])

        model = model_of(name).clone()
        model.set_model_sampler_cfg_function(guidance)
        pair_of(name, model).run(tau, 4.0, model=model)
        return seen[0]  # of the first step, to which all runs come with the same noise

    plain = negatives(EMPTY)
    assert torch.equal(negatives(FULL), plain)
    assert torch.equal(negatives(HALVES)[0], plain[0])


@pytest.mark.parametrize("name", ["Z-Image", "PixArt Sigma", "Hunyuan Image 2.1"])
def test_law_8_nothing_outlives_a_run_that_ends_or_fails(name, model_of):
    model = model_of(name)
    pair, family, network = pair_of(name, model), family_of(model.model), model.model.diffusion_model
    module = importlib.import_module(family.module) if family.module else None
    before = module and module.optimized_attention

    def fail(*args, **kwargs):
        raise InterruptedError

    broken = model.clone()
    broken.model_options["transformer_options"] = {OVERRIDE: fail}
    pair.run(PART)
    with pytest.raises(InterruptedError):
        pair.run(PART, model=broken)
    assert (module and module.optimized_attention) is before
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in network.modules())
    assert KEY not in model.model_options.get("transformer_options", {})


@every_family
def test_law_9_an_override_that_is_lost_is_an_error(name, model_of):
    pair = pair_of(name, model_of(name))
    controlled, positive = control(pair.model, pair.edit, FULL)

    def lose(executor, x, t, concat, context, control, options, **kwargs):
        module = family_of(pair.model.model).module
        options = {key: value for key, value in options.items() if key != OVERRIDE}
        if module is None:
            return executor(x, t, concat, context, control, options, **kwargs)
        with standing_in(importlib.import_module(module), options):
            return executor(x, t, concat, context, control, options, **kwargs)

    controlled.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "thief", lose)
    with pytest.raises(ValueError, match="Nothing was injected"):
        sampled(controlled, latent(name, pair.branches), positive, pair.negative, 1.0)


@every_family
def test_another_nodes_override_attends_for_the_edit(name, model_of):
    pair, calls = pair_of(name, model_of(name)), []

    def override(function, *args, **kwargs):
        calls.append(function)
        return function(*args, **kwargs)

    model = pair.model.clone()
    model.model_options["transformer_options"] = {OVERRIDE: override}
    assert torch.equal(pair.run(PART, model=model), pair.run(PART))
    assert calls
    assert model.model_options["transformer_options"][OVERRIDE] is override


@pytest.mark.parametrize("name", ["Flux", "Lumina 2", "SD3.5 Medium", "PixArt Sigma"])
def test_a_kept_source_is_left_out_of_the_next_edit(name, model_of, monkeypatch):
    """Law 3's other half: what the targets take from a kept source is what it gives."""
    cache = SourceCache()
    monkeypatch.setattr("p2p.sampling.reuse.CACHE", cache)
    pair = pair_of(name, model_of(name))
    rows = seen_rows(pair.model, monkeypatch)
    first = pair.run(PART, keep=Keep(1.0))
    assert set(rows) == {3}
    rows.clear()
    again = pair.run(PART, edit=pair.edit.reweighted("x1", 2.0), keep=Keep(1.0))
    assert set(rows) == {2}
    assert_close(again, pair.run(PART, edit=pair.edit.reweighted("x1", 2.0)), 1e-4)
    assert torch.equal(again[0], first[0])


def test_the_mask_of_a_blend_keeps_the_source_in_latents_with_frames(model_of):
    pair = pair_of("Qwen-Image", model_of("Qwen-Image"))
    mask = torch.zeros(1, 8, 8)
    mask[:, :, 4:] = 1.0
    rows = pair.run(EMPTY, blend=LocalBlend(mask=mask))
    assert torch.equal(rows[1:, ..., :4], rows[:1, ..., :4].expand(2, -1, -1, -1, -1))
    assert difference(rows[1:, ..., 4:], rows[:1, ..., 4:].expand(2, -1, -1, -1, -1)) > EDITED


def test_the_paired_sampler_takes_latents_with_frames(model_of):
    pair = pair_of("Qwen-Image", model_of("Qwen-Image"))
    empty = {"samples": torch.zeros(1, *TINY["Qwen-Image"].latent)}
    source, targets, _ = sample_pairs(
        pair.model,
        pair.edit,
        FULL,
        negative=pair.negative,
        latent=empty,
        seed=1,
        steps=STEPS,
        cfg=1.0,
        sampler_name="euler",
        scheduler="simple",
    )
    assert source["samples"].shape == empty["samples"].shape
    assert targets["samples"].shape[0] == 2


@pytest.mark.parametrize("name", [name for name in ("OmniGen2", "HiDream") if name in TINY])
def test_unequal_lengths_are_an_error_where_padding_is_not_exact(name, model_of):
    model = model_of(name)
    prompts = (prompt(name, model, 1), prompt(name, model, 2, longer=1))
    with pytest.raises(ValueError, match=r"have \d+ and \d+ tokens, and"):
        Pair(name, model, prompts).run(FULL)


def test_z_image_wants_prompts_that_it_fills_up_to_the_same_length(model_of):
    model = model_of("Z-Image")
    prompts = (prompt("Z-Image", model, 1), prompt("Z-Image", model, 2, longer=30))
    with pytest.raises(ValueError, match="multiple of 32 tokens, which here are 32 and 64"):
        Pair("Z-Image", model, prompts).run(FULL)


def test_what_only_u_nets_have_is_an_error_before_sampling(model_of):
    pair = pair_of("Flux", model_of("Flux"))
    with pytest.raises(ValueError, match="Plug-and-Play.*Flux is a transformer.*mutual"):
        plug_and_play(pair.model, pair.edit, 0.5, 0.5)
    with pytest.raises(ValueError, match="Invert Image.*transformers.*Flux"):
        invert(pair.model, pair.negative, {"samples": latent("Flux")}, 3, "simple")


def test_a_positive_that_was_taken_apart_or_is_the_negative_is_an_error(model_of):
    pair = pair_of("Flux", model_of("Flux"))
    controlled, positive = control(pair.model, pair.edit, FULL)
    noise = latent("Flux", pair.branches)
    for given, negative, message in (
        (positive[1:], pair.negative, "took conditionings .* apart"),
        (pair.negative, pair.negative, "but the positive conditioning does not"),
        (positive, positive, "connected to a negative input"),
    ):
        with pytest.raises(ValueError, match=message):
            sampled(controlled, noise, given, negative, 4.0)
