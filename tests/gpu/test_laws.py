"""The laws of paired sampling in half precision on a GPU, with models of real layout and width."""

from __future__ import annotations

from dataclasses import replace

import comfy.sampler_helpers
import pytest
import torch
from edits import SOURCE
from p2p.attention.blend import LocalBlend
from p2p.attention.schedule import parse_word_windows
from p2p.sampling.reuse import CACHE
from p2p.tests.gpu.lab import EMPTY, FULL, PART, TARGET, difference

WORDS = replace(FULL, words=parse_word_windows("car: 0, red: 0.5-1"))
MUTUAL = replace(FULL, self_mode="mutual")


def test_the_tolerance_tells_one_prompt_from_another(lab):
    source, target = lab.plain_pair.split(1)
    assert difference(target, source) > lab.tolerance


@pytest.mark.parametrize("tau", [PART, WORDS, MUTUAL], ids=["faded", "word windows", "mutual"])
def test_law_1_equal_prompts_give_equal_images(lab, tau):
    prompt = "a red car and a cat"
    source, target = lab.paired(lab.edit(prompt, prompt), tau)
    assert difference(target, source) <= lab.tolerance


def test_law_2_tau_empty_gives_the_plain_batch_bit_for_bit(lab):
    edit = lab.edit(SOURCE, TARGET).reweighted("car", 2.0)
    assert torch.equal(torch.cat(lab.paired(edit, EMPTY)), lab.plain_pair)


EDITS = {
    "faded": (PART, {}),
    "all of the source's maps": (FULL, {}),
    "word windows": (WORDS, {}),
    "mutual": (MUTUAL, {}),
    "blend": (FULL, {"blend": LocalBlend(words=("car",), start=0.0)}),
    "maps": (FULL, {"maps": True}),
    "kept sources": (FULL, {"reuse": 64.0}),
}


@pytest.mark.parametrize(("tau", "parts"), EDITS.values(), ids=EDITS.keys())
def test_law_3_the_source_never_changes(lab, tau, parts):
    source, target = lab.paired(lab.edit(SOURCE, TARGET).reweighted("red", -1.0), tau, **parts)
    plain_source, plain_target = lab.plain_pair.split(1)
    assert torch.equal(source, plain_source)
    assert not torch.equal(target, plain_target)


def test_law_3_with_several_targets(lab):
    edit = lab.edit(SOURCE, TARGET, "a dog riding a bicycle")
    assert torch.equal(lab.paired(edit, FULL)[0], lab.paired(edit, EMPTY)[0])


def test_a_further_edit_of_a_kept_source_is_the_same_edit_as_a_fresh_pair(lab):
    both = lab.edit(SOURCE, TARGET, "a dog riding a bicycle")
    first, further = (replace(both, targets=(target,)) for target in both.targets)
    fresh = torch.cat(lab.paired(further, FULL))
    CACHE.clear()
    lab.paired(first, FULL, reuse=64.0)
    again = torch.cat(lab.paired(further, FULL, reuse=64.0))
    CACHE.clear()
    assert difference(again, fresh) <= lab.tolerance


def test_law_5_cond_and_uncond_in_one_model_call_or_in_two(lab, monkeypatch):
    """As near to each other as the host's own runs are."""
    edit = lab.edit(SOURCE, TARGET)
    plain, ours = lab.plain(edit), lab.ours(edit, PART)
    together = [lab.sample(plain), lab.sample(ours)]
    estimate = comfy.sampler_helpers.estimate_memory

    def then_short(*args, **kwargs):
        """Memory is short once the model is loaded."""
        enough = estimate(*args, **kwargs)
        monkeypatch.setattr(lab.model.patcher.model, "memory_required", lambda *_, **__: 1e30)
        return enough

    monkeypatch.setattr(comfy.sampler_helpers, "estimate_memory", then_short)
    apart = [lab.sample(plain), lab.sample(ours)]
    host, found = (difference(a, b) for a, b in zip(apart, together, strict=True))
    assert found <= max(lab.tolerance, 4 * host)


@pytest.mark.parametrize("targets", [[TARGET], [TARGET, "a castle"]], ids=["one target", "two targets"])
def test_law_6_a_batch_of_pairs_equals_the_pairs_one_by_one(lab, targets):
    edit = lab.edit(SOURCE, *targets)
    sources, edited = lab.paired(edit, PART, items=(0, 1))
    singles = [lab.paired(edit, PART, items=(n,)) for n in (0, 1)]
    for found, expected in zip((sources, edited), map(torch.cat, zip(*singles, strict=True)), strict=True):
        assert difference(found, expected) <= lab.tolerance
