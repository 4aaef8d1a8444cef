"""Law 9: what should be injected and is not is an error. Law 12: so are sigmas that do not descend."""

from __future__ import annotations

from dataclasses import replace

import comfy.samplers
import pytest
import torch
from comfy.patcher_extension import WrappersMP
from comfy_extras import nodes_custom_sampler as custom
from p2p.attention.schedule import TauSchedule, Window
from p2p.nodes import AttentionController, FeatureInjection
from p2p.sampling.notice import changes
from p2p.tests.host.runs import EMPTY, FULL, STOCK, WAYS, Settings, empty, ksampler


def overwriting(model):
    """A model on which another node empties the slots of attention, inside of our hooks."""
    model = model.clone()

    def apply(executor, x, t, c_concat, c_crossattn, control, options, **kwargs):
        return executor(x, t, c_concat, c_crossattn, control, {**options, "patches_replace": {}}, **kwargs)

    model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "other", apply)
    return model


@pytest.mark.parametrize("way", STOCK)
def test_a_node_that_empties_the_slots_is_an_error_in_the_first_forward(studio, way):
    edit = studio.edit()
    controlled, positive = AttentionController.execute(studio.model, edit, FULL).args[:2]
    model = overwriting(controlled)
    with pytest.raises(ValueError, match="Nothing was injected.*Torch Compile Model"):
        STOCK[way](model, positive, studio.negative, studio.rows(edit, empty()), Settings())


def test_where_the_network_may_be_left_out_the_error_comes_at_the_end_of_the_run(studio):
    """Nodes that answer a forward from a cache wrap the network itself."""
    edit = studio.edit()
    controlled, positive = AttentionController.execute(studio.model, edit, FULL).args[:2]
    forwards = []

    def forward(executor, x, *args, **kwargs):
        forwards.append(1)
        return torch.zeros_like(x)

    model = controlled.clone()
    model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "other", forward)
    with pytest.raises(ValueError, match="Nothing was injected"):
        ksampler(model, positive, studio.negative, studio.rows(edit, empty()), Settings())
    assert len(forwards) == 4


def test_a_cache_that_leaves_out_some_forwards_is_no_error(studio):
    edit = studio.edit()
    controlled, positive = AttentionController.execute(studio.model, edit, FULL).args[:2]
    seen = []

    def forward(executor, x, *args, **kwargs):
        seen.append(1)
        return executor(x, *args, **kwargs) if len(seen) in (1, 4) else torch.zeros_like(x)

    model = controlled.clone()
    model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "other", forward)
    assert torch.isfinite(
        ksampler(model, positive, studio.negative, studio.rows(edit, empty()), Settings())
    ).all()


def test_with_nothing_due_nothing_is_missed(studio):
    edit = studio.edit()
    controlled, positive = AttentionController.execute(studio.model, edit, EMPTY).args[:2]
    model = overwriting(controlled)
    ksampler(model, positive, studio.negative, studio.rows(edit, empty()), Settings())


def test_plug_and_play_is_told_too(studio):
    edit = studio.edit()
    controlled, positive = FeatureInjection.execute(studio.model, edit, 0.0, 1.0).args[:2]
    model = overwriting(controlled)
    with pytest.raises(ValueError, match="Nothing was injected"):
        ksampler(model, positive, studio.negative, studio.rows(edit, empty()), Settings())


def sample(studio, sigmas):
    """A paired run on a list of sigmas."""
    edit = studio.edit()
    controlled, positive = AttentionController.execute(studio.model, edit, FULL).args[:2]
    custom.SamplerCustom.execute(
        controlled,
        True,
        5,
        4.0,
        positive,
        studio.negative,
        comfy.samplers.sampler_object("euler"),
        torch.tensor(sigmas),
        studio.rows(edit, empty()),
    )


LISTS = {"flipped": [0.5, 1.0, 5.0, 14.0], "restarted": [14.0, 5.0, 1.0, 5.0, 1.0, 0.0]}


@pytest.mark.parametrize("sigmas", LISTS.values(), ids=LISTS)
def test_law_12_sigmas_that_rise_are_an_error_that_says_where(studio, sigmas):
    rise = next(n for n in range(len(sigmas) - 1) if sigmas[n + 1] > sigmas[n])
    expected = f"rise from {sigmas[rise]:.4g} to {sigmas[rise + 1]:.4g} at step {rise + 1}"
    with pytest.raises(ValueError, match=expected):
        sample(studio, sigmas)


@pytest.mark.parametrize("sigmas", [[14.0, 5.0, 5.0, 0.0], [14.0], []], ids=str)
def test_law_12_lists_with_equal_entries_or_none_descend(studio, sigmas):
    sample(studio, sigmas)


FROZEN = TauSchedule(Window(0, 1), Window(0, 1), self_resolution=1.0)


@pytest.mark.parametrize("way", WAYS)
def test_a_target_that_came_out_as_its_source_is_told(studio, caplog, way):
    edit = studio.edit("a cat on a beach", "a cat on the beach", "a castle at night")
    free = replace(edit.targets[1], tau=EMPTY)
    edit = replace(edit, targets=(edit.targets[0], free))
    studio.paired(edit, FROZEN, Settings(steps=6), empty(1, 16, 16), way)
    (record,) = [record for record in caplog.records if "came out" in record.message]
    assert 'target 1 ("a cat on the beach")' in record.message and "target 2" not in record.message
    assert "Lower cross_end or self_end" in record.message


def test_prompts_that_ask_for_no_change_and_edits_that_happened_are_not(studio, caplog):
    for edit, tau in ((studio.edit("a cat", "a cat"), FROZEN), (studio.edit("a cat", "a castle"), EMPTY)):
        studio.paired(edit, tau, Settings(steps=6), empty(1, 16, 16))
    assert "came out" not in caplog.text


def test_the_change_is_that_of_the_formula():
    rows = torch.randn(2, 3, 4, 5, 6, generator=torch.Generator().manual_seed(1))
    found = changes(rows.flatten(0, 1), 3)
    for target in (1, 2):
        each = []
        for pair in rows:
            source = pair[0] - pair[0].mean((-2, -1), keepdim=True)
            each.append(float((pair[target] - pair[0]).norm() / source.norm()))
        assert found[target - 1] == pytest.approx(max(each))
