"""The laws of paired sampling on transformers: tiny networks of every family, edits made by hand.

A prompt's tokens are a start, words "w0 w1 ..." and an end; what the model is given for it is random features,
one for each token.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import comfy.sample
import pytest
import torch
from p2p.attention.edit import Edit, Source
from p2p.attention.prompt import END, START, WORD_END, read_prompt
from p2p.attention.schedule import TauSchedule, Window
from p2p.sampling.controller import control
from p2p.sampling.encode import EncodedPrompt
from p2p.sampling.families import family_of
from p2p.tests.host.runs import assert_close, difference
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
every_schedule = pytest.mark.parametrize("tau", SCHEDULES.values(), ids=SCHEDULES.keys())
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

    def run(self, tau, cfg=1.0, edit=None, pairs=1, model=None, negative=None):
        """A paired run: the rows of all pairs, source first."""
        edit = self.edit if edit is None else edit
        controlled, positive = control(model or self.model, edit, tau)
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


@every_family
@every_schedule
def test_law_3_the_source_never_changes_and_targets_do(name, tau, model_of):
    pair = pair_of(name, model_of(name))
    plain = pair.run(EMPTY)
    edited = pair.run(tau, edit=pair.edit.reweighted("w0", -1.0))
    assert torch.equal(edited[0], plain[0])
    for branch in range(1, pair.branches):
        assert difference(edited[branch], plain[branch]) > 1e-3
