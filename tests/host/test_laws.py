"""The laws of paired sampling, on the real host with the bundled model, through every sampler node."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from types import SimpleNamespace

import comfy.sampler_helpers
import comfy.samplers
import pytest
import torch
from comfy.patcher_extension import WrappersMP
from comfy_extras import nodes_custom_sampler as custom
from comfy_extras.nodes_pag import PerturbedAttentionGuidance
from comfy_extras.nodes_perpneg import PerpNegGuider
from p2p.attention.plan import cross_weights
from p2p.attention.schedule import TauSchedule, Window
from p2p.sampling.controller import control
from p2p.tests import naive
from p2p.tests.host.runs import (
    EDITED,
    EMPTY,
    FULL,
    HOST_WARNINGS,
    PART,
    SOURCE,
    TARGET,
    WAYS,
    Settings,
    assert_close,
    difference,
    empty,
    ksampler,
    picture,
    sampler_custom,
    sampler_custom_advanced,
    sigmas_of,
)

import nodes as host_nodes

pytestmark = HOST_WARNINGS

LONG = "a photo of " + ", ".join(
    f"{colour} {thing}"
    for colour in ("red", "blue", "green", "white")
    for thing in ("cat", "dog", "car", "castle", "house", "tree", "boat", "bicycle", "beach", "mountain")
)
"""A prompt of two chunks."""


# Laws 1, 2 and 3, however the run is set up


def mask(rows=1, height=8, width=8):
    half = torch.zeros(rows, height, width)
    for row in range(rows):
        half[row, :, row : width // 2 + row] = 1.0
    return half


CASES = {
    "empty latent": (Settings(), empty()),
    "guidance off": (Settings(cfg=1.0), empty()),
    "img2img": (Settings(denoise=0.5), picture()),
    "img2img, stochastic": (Settings(denoise=0.5, sampler="dpmpp_2m_sde"), picture()),
    "wide": (Settings(), empty(1, 8, 16)),
    "tall, odd sides": (Settings(), empty(1, 13, 9)),
    "77 pixels": (Settings(), empty(1, 7, 11)),
    "noise mask": (Settings(), {**picture(), "noise_mask": mask()}),
    "noise mask, ddim": (Settings(sampler="ddim"), {**picture(), "noise_mask": mask()}),
    "noise mask, ddim, batch": (Settings(sampler="ddim"), {**picture(3), "noise_mask": mask(3)}),
    "noise mask, stochastic": (Settings(sampler="euler_ancestral"), {**picture(), "noise_mask": mask()}),
    "noise mask in pixels": (Settings(), {**picture(), "noise_mask": mask(1, 64, 64)}),
    "from step 2": (Settings(advanced={"start_step": 2}), picture()),
    "to step 3, noise left": (Settings(advanced={"last_step": 3}), empty()),
    "from step 1 to 3, no noise": (
        Settings(advanced={"disable_noise": True, "start_step": 1, "last_step": 3}),
        picture(),
    ),
    "batch index": (Settings(), {**empty(), "batch_index": [3]}),
}
cases = pytest.mark.parametrize(("settings", "latent"), CASES.values(), ids=CASES.keys())


@cases
def test_law_1_equal_prompts_give_equal_images(studio, settings, latent):
    source, target = studio.paired(studio.edit(SOURCE, SOURCE), PART, settings, latent)
    assert_close(target, source)


@cases
def test_law_2_tau_empty_gives_plain_runs(studio, settings, latent):
    source, target = studio.paired(studio.edit().reweighted("car", 2.0), EMPTY, settings, latent)
    assert_close(source, studio.plain(SOURCE, settings, latent))
    assert_close(target, studio.plain(TARGET, settings, latent))


@cases
def test_law_3_the_source_never_changes(studio, settings, latent):
    source, target = studio.paired(studio.edit(), EMPTY, settings, latent)
    again, edited = studio.paired(studio.edit().reweighted("car", -1.0), FULL, settings, latent)
    assert torch.equal(source, again)
    assert difference(edited, target) > EDITED / 10


@pytest.mark.parametrize("way", WAYS)
def test_law_1_through_every_sampler_node(studio, way):
    source, target = studio.paired(studio.edit(SOURCE, SOURCE), PART, way=way)
    assert_close(target, source)


@pytest.mark.parametrize("way", WAYS)
def test_law_2_through_every_sampler_node(studio, way):
    source, target = studio.paired(studio.edit(), EMPTY, way=way)
    assert_close(source, studio.plain(SOURCE))
    assert_close(target, studio.plain(TARGET))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m_sde"])
def test_every_sampler_node_gives_the_same_pair(studio, way, sampler):
    settings = Settings(sampler=sampler)
    for found, expected in zip(
        studio.paired(studio.edit(), PART, settings, way=way),
        studio.paired(studio.edit(), PART, settings),
        strict=True,
    ):
        assert torch.equal(found, expected)


@pytest.mark.parametrize(
    "way", [ksampler, sampler_custom, sampler_custom_advanced], ids=lambda way: way.__name__
)
def test_a_pair_starts_from_one_noise_whatever_made_the_batch(studio, way):
    """A batch of the user's own has no tied batch_index: all branches get the noise of the source's row."""
    controlled, positive = control(studio.model, studio.edit(SOURCE, SOURCE), PART)
    source, target = way(controlled, positive, studio.negative, empty(2), Settings()).split(1)
    assert_close(target, source)
    assert_close(source, studio.plain(SOURCE))


def test_a_run_in_two_parts_with_leftover_noise_keeps_the_laws(studio):
    """KSamplerAdvanced twice: the second part gets the first one's pairs."""
    first = Settings(steps=6, advanced={"last_step": 3})
    second = Settings(steps=6, advanced={"start_step": 3, "disable_noise": True, "force_full_denoise": True})

    def run(edit, tau):
        controlled, positive = control(studio.model, edit, tau)
        rows = studio.rows(edit, empty())
        rows = {**rows, "samples": ksampler(controlled, positive, studio.negative, rows, first)}
        return studio.split(edit, ksampler(controlled, positive, studio.negative, rows, second))

    source, target = run(studio.edit(), EMPTY)
    for found, text in ((source, SOURCE), (target, TARGET)):
        assert_close(found, studio.plain(text, second, {"samples": studio.plain(text, first, empty())}))
    assert torch.equal(run(studio.edit(), FULL)[0], source)
    source, target = run(studio.edit(SOURCE, SOURCE), FULL)
    assert_close(target, source)


PROMPTS = {
    "several targets": (SOURCE, [TARGET, "a cat", "children drawing of a castle"]),
    "longer target": ("a cat", [LONG]),
    "longer source": (LONG, ["a cat"]),
    "both long": (LONG, [LONG.replace("dog", "elephant")]),
    "targets of different lengths": ("a cat", ["a dog", LONG]),
    "weights": ("a (cat:1.3) riding a bicycle", ["a (dog:0.8) riding a (red:1.4) car"]),
    "accents and emoji": ("a caf\u00e9 \U0001f389", ["a na\u00efve caf\u00e9"]),
}
prompts = pytest.mark.parametrize(("source", "targets"), PROMPTS.values(), ids=PROMPTS.keys())


@prompts
@pytest.mark.parametrize("negative", ["", LONG], ids=["short negative", "long negative"])
def test_law_2_for_prompts_of_any_length_and_weight(studio, source, targets, negative):
    negative = studio.encode(negative)
    found, edited = studio.paired(studio.edit(source, *targets), EMPTY, negative=negative)
    for row, text in zip((found, *edited.split(1)), (source, *targets), strict=True):
        assert_close(row, ksampler(studio.model, studio.encode(text), negative, empty(), Settings()))


@prompts
@pytest.mark.parametrize("negative", ["", LONG], ids=["short negative", "long negative"])
def test_law_3_for_prompts_of_any_length_and_weight(studio, source, targets, negative):
    negative = studio.encode(negative)
    before, _ = studio.paired(studio.edit(source, *targets), EMPTY, negative=negative)
    after, _ = studio.paired(studio.edit(source, *targets), PART, negative=negative)
    assert torch.equal(before, after)


@pytest.mark.parametrize("text", [LONG, "a (cat:1.3) riding a (red:0.6) bicycle"], ids=["long", "weights"])
@pytest.mark.parametrize("negative", ["", LONG], ids=["short negative", "long negative"])
def test_law_1_for_prompts_of_any_length_and_weight(studio, text, negative):
    source, target = studio.paired(studio.edit(text, text), PART, negative=studio.encode(negative))
    assert_close(target, source)


# Law 4, over a whole run


def naive_run(studio, edit, tau, settings, latent, negative=None):
    """A plain run of the host, a prompt per row, the paper's formula in the host's attention patches."""
    model = studio.model.clone()
    sigmas = sigmas_of(model, settings)[:-1]
    longest = max(edit.source.prompt.length, *(target.prompt.length for target in edit.targets))
    encoded = [prompt.conditioning for prompt in edit.prompts]
    positive = [[torch.cat([c[0][0].repeat(1, longest // c[0][0].shape[1], 1) for c in encoded]), {}]]
    size = max(latent["samples"].shape[-2:])

    def progress(options):
        return int((sigmas >= float(options["sigmas"][0]) * 0.9999).sum() - 1) / len(sigmas)

    def each_row(q, k, v, options, edited_row, everywhere=False):
        rows = q.shape[0] // len(options["cond_or_uncond"])
        out = []
        for n in range(q.shape[0]):
            branch, positive_chunk = n % rows, options["cond_or_uncond"][n // rows] == 0
            if (positive_chunk or everywhere) and branch:
                out.append(edited_row(n - branch, n, edit.targets[branch - 1]))
            else:
                out.append(naive.plain(q[n], k[n], v[n], options["n_heads"]))
        return torch.stack(out)

    def cross(q, k, v, options):
        def edited_row(s, n, target):
            weights = cross_weights(target, tau, progress(options))
            own, source = target.prompt.length, edit.source.prompt.length
            return naive.cross_row(
                q[s],
                k[s, :source],
                q[n],
                k[n, :own],
                v[n, :own],
                options["n_heads"],
                target.mapping,
                target.inherits,
                target.gain,
                weights.to(q),
            )

        return each_row(q, k, v, options, edited_row)

    def self_(q, k, v, options):
        down = {1: 1, 2: 2}[round((latent["samples"][0, 0].numel() / q.shape[1]) ** 0.5)]
        inside = -(-size // down) / size <= tau.self_resolution
        weight = tau.self_weight(progress(options), tau.self_mode) if inside else 0.0

        def edited_row(s, n, _target):
            return naive.self_row(q[s], k[s], q[n], k[n], v[n], options["n_heads"], weight)

        return each_row(q, k, v, options, edited_row, tau.self_mode == "map in both halves")

    for name, blocks in (("input", 12), ("middle", 1), ("output", 12)):
        for number in range(blocks):
            model.set_model_attn2_replace(cross, name, number)
            model.set_model_attn1_replace(self_, name, number)
    rows = {
        **latent,
        "samples": latent["samples"].repeat(edit.branches, 1, 1, 1),
        "batch_index": [0] * edit.branches,
    }
    samples = ksampler(model, positive, negative or studio.negative, rows, settings)
    return samples[:1], samples[1:]


ONLY_CROSS = TauSchedule(Window(0, 0.8), Window(0, 0))
ONLY_SELF = TauSchedule(Window(0, 0), Window(0, 0.8))
EDITS = {
    "swap": ((SOURCE, "a cat riding a car"), (), ONLY_CROSS),
    "swap, other number of words": ((SOURCE, TARGET), (), ONLY_CROSS),
    "refine": (("a castle", "children drawing of a castle at night"), (), ONLY_CROSS),
    "re-weight": ((SOURCE, SOURCE), (("bicycle", -2.0), ("cat", 1.5)), ONLY_CROSS),
    "re-weight a new word": (("a castle", "a red castle"), (("red", 2.0),), ONLY_CROSS),
    "self-attention": ((SOURCE, TARGET), (), ONLY_SELF),
    "self-attention, every layer": ((SOURCE, TARGET), (), TauSchedule(Window(0, 0), Window(0, 1), 0.0, 1.0)),
    "self-attention, no layer": ((SOURCE, TARGET), (), TauSchedule(Window(0, 0), Window(0, 1), 0.0, 0.4)),
    "self-attention in both halves": (
        (SOURCE, TARGET),
        (),
        replace(ONLY_SELF, self_mode="map in both halves"),
    ),
    "all, faded, in both halves": (
        (SOURCE, TARGET, "a cat"),
        (("red", 2.0),),
        replace(PART, self_mode="map in both halves"),
    ),
    "all, faded": ((SOURCE, TARGET), (("red", 2.0),), PART),
    "windows of words": (
        (SOURCE, TARGET),
        (),
        TauSchedule(words=(("car", Window(0, 0.3)), ("a", Window(0.5, 1)))),
    ),
    "several targets": ((SOURCE, TARGET, "a cat"), (), PART),
    "longer target": (("a cat", LONG), (), ONLY_CROSS),
}


@pytest.mark.parametrize(("texts", "gains", "tau"), EDITS.values(), ids=EDITS.keys())
def test_law_4_a_whole_run_equals_the_materialised_formula(studio, texts, gains, tau):
    edit = studio.edit(*texts)
    for word, scale in gains:
        edit = edit.reweighted(word, scale)
    found = studio.paired(edit, tau)
    for one, expected in zip(found, naive_run(studio, edit, tau, Settings(), empty()), strict=True):
        assert_close(one, expected)


def test_law_4_beside_a_negative_prompt_of_more_chunks(studio):
    """The host repeats the pair's tokens to the negative's length; a word's map is the sum of its copies'."""
    edit, negative = studio.edit().reweighted("red", 2.0), studio.encode(LONG)
    found = studio.paired(edit, PART, negative=negative)
    expected = naive_run(studio, edit, PART, Settings(), empty(), negative)
    for one, other in zip(found, expected, strict=True):
        assert_close(one, other)


@pytest.mark.parametrize("sampler", ["heun", "dpm_2", "heunpp2", "uni_pc", "dpm_fast"])
def test_mistake_of_counting_calls_the_step_comes_from_sigma_with_several_calls_per_step(studio, sampler):
    settings, tau = Settings(sampler=sampler), TauSchedule(Window(0.25, 0.75), Window(0.5, 0.75))
    found = studio.paired(studio.edit(), tau, settings)
    for one, expected in zip(found, naive_run(studio, studio.edit(), tau, settings, empty()), strict=True):
        assert_close(one, expected)


@pytest.mark.parametrize("size", [(7, 11), (16, 16), (9, 13)], ids=str)
def test_mistake_of_knowing_layers_by_their_shape_77_or_256_pixels_are_not_text_or_a_layer(studio, size):
    edit, latent = studio.edit(), empty(1, *size)
    tau = TauSchedule(Window(0, 0.5), Window(0, 0.5), self_resolution=1.0)
    settings = Settings(steps=2)
    found = studio.paired(edit, tau, settings, latent)
    for one, expected in zip(found, naive_run(studio, edit, tau, settings, latent), strict=True):
        assert_close(one, expected)


@pytest.mark.parametrize("size", [(16, 16), (40, 40), (40, 24)], ids=str)
def test_mistake_of_a_cap_of_16x16_self_attention_is_injected_at_half_the_latents_sides_whatever_its_size(
    studio, size
):
    settings, latent = Settings(steps=2), empty(1, *size)
    _, plain = studio.paired(studio.edit(), EMPTY, settings, latent)

    def injected(cap):
        tau = TauSchedule(Window(0, 0), Window(0, 1), self_resolution=cap)
        return studio.paired(studio.edit(), tau, settings, latent)[1]

    assert torch.equal(injected(0.4), plain)  # this U-Net has the latent's own sides and half of them
    assert difference(injected(0.5), plain) > EDITED / 10
    assert torch.equal(injected(0.5), injected(0.9))
    assert not torch.equal(injected(0.5), injected(1.0))


# Law 5


def calls_of(model):
    """A clone of the model that notes how many conditionings each of its calls holds."""
    clone, chunks = model.clone(), []

    def note(apply, given):
        chunks.append(len(given["cond_or_uncond"]))
        return apply(given["input"], given["timestep"], **given["c"])

    clone.set_model_unet_function_wrapper(note)
    return clone, chunks


@pytest.mark.parametrize("tau", [EMPTY, PART, FULL], ids=["empty", "part", "full"])
def test_law_5_cond_and_uncond_in_one_model_call_or_in_two(studio, monkeypatch, tau):
    model, chunks = calls_of(studio.model)
    together = studio.paired(studio.edit(), tau, model=model)
    assert set(chunks) == {2}
    chunks.clear()
    estimate = comfy.sampler_helpers.estimate_memory

    def then_short(*args, **kwargs):
        """Memory is short once the model is loaded."""
        enough = estimate(*args, **kwargs)
        monkeypatch.setattr(model.model, "memory_required", lambda *_, **__: 1e30)
        return enough

    monkeypatch.setattr(comfy.sampler_helpers, "estimate_memory", then_short)
    apart = studio.paired(studio.edit(), tau, model=model)
    assert set(chunks) == {1}
    for one, expected in zip(apart, together, strict=True):
        assert_close(one, expected)


# Law 6


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpmpp_2m", "uni_pc"])
@pytest.mark.parametrize("targets", [[TARGET], [TARGET, "a castle"]], ids=["one target", "two targets"])
def test_law_6_a_batch_of_pairs_equals_the_pairs_one_by_one(studio, sampler, targets):
    settings, edit = Settings(sampler=sampler, denoise=0.8), studio.edit(SOURCE, *targets)
    latent = picture(3)
    sources, edited = studio.paired(edit, PART, settings, latent)
    for n in range(3):
        one = {"samples": latent["samples"][n : n + 1], "batch_index": [n]}
        source, target = studio.paired(edit, PART, settings, one)
        assert_close(sources[n : n + 1], source)
        assert_close(edited[n * len(targets) : (n + 1) * len(targets)], target)


@pytest.mark.parametrize(
    "sampler", ["euler_ancestral", "dpmpp_2m_sde", "dpmpp_2m_sde_gpu", "dpmpp_sde", "lcm", "ddpm"]
)
def test_law_6_the_sources_of_a_batch_get_the_noise_of_a_plain_batch(studio, sampler):
    settings = Settings(sampler=sampler)
    sources, targets = studio.paired(studio.edit(), EMPTY, settings, empty(3))
    assert_close(sources, studio.plain(SOURCE, settings, empty(3)))
    assert_close(targets, studio.plain(TARGET, settings, empty(3)))


@pytest.mark.parametrize("masks", [1, 2, 3, 4])
def test_law_6_a_batch_with_masks_of_its_own_is_masked_as_the_host_does(studio, masks):
    """The host repeats or cuts masks to the number of latents: a pair has its item's mask on every branch."""
    latent = {**picture(3), "noise_mask": mask(masks)}
    sources, targets = studio.paired(studio.edit(), EMPTY, Settings(), latent)
    assert_close(sources, studio.plain(SOURCE, Settings(), latent))
    assert_close(targets, studio.plain(TARGET, Settings(), latent))


# Law 7


def first_call(run):
    """Outputs of the model at the first step: [(place among the conds, rows)], one for each conditioning.

    run: samples with a model that it is given. x is the same for every tau at the first step, so what differs
    between two runs was edited.
    """
    seen: list = []

    def note(apply, given):
        output = apply(given["input"], given["timestep"], **given["c"])
        options = given["c"]["transformer_options"]
        if float(options["sigmas"][0]) >= float(options["sample_sigmas"][0]):
            seen.extend(zip(given["cond_or_uncond"], output.chunk(len(given["cond_or_uncond"])), strict=True))
        return output

    run(note)
    return seen


def edited_rows(studio, make):
    """Which rows of which conditionings the edit changes: [(place among the conds, n-th such, rows)].

    make: (controlled model, its positive) -> samples, the rest of the graph.
    """
    edit = studio.edit()
    outputs = []
    for tau in (EMPTY, FULL):

        def run(note, tau=tau):
            controlled, positive = control(studio.model, edit, tau)
            controlled.set_model_unet_function_wrapper(note)
            make(controlled, positive, studio.rows(edit, empty(2)))

        outputs.append(first_call(run))
    before, after = outputs
    assert [place for place, _ in before] == [place for place, _ in after]
    changed = []
    for n, ((place, a), (_, b)) in enumerate(zip(before, after, strict=True)):
        rows = [row for row in range(a.shape[0]) if not torch.equal(a[row], b[row])]
        if rows:
            changed.append((place, n, rows))
    return len(before), changed


ONE_STEP = Settings(steps=2)


def test_law_7_the_negative_prompt_runs_untouched(studio):
    """Also the mistake of editing both halves of guidance: only the positive's target rows change."""
    calls, changed = edited_rows(
        studio, lambda model, positive, rows: ksampler(model, positive, studio.negative, rows, ONE_STEP)
    )
    assert calls == 2
    assert [(place, rows) for place, _, rows in changed] == [(0, [1, 3])]


def regions(studio, positive):
    """Ways to put another prompt beside the pair's: name -> (positive, negative)."""
    other = studio.encode("a castle on a mountain")
    area = host_nodes.ConditioningSetArea().append
    masked = host_nodes.ConditioningSetMask().append
    combine = host_nodes.ConditioningCombine().combine
    timed = host_nodes.ConditioningSetTimestepRange().set_range
    half = torch.ones(1, 64, 64)
    half[:, :, 32:] = 0
    negative = studio.negative
    return {
        "combined": (combine(positive, other)[0], negative),
        "combined, other first": (combine(other, positive)[0], negative),
        "other on an area": (combine(positive, area(other, 64, 64, 0, 0, 1.0)[0])[0], negative),
        "other on a small area": (combine(positive, area(other, 32, 64, 0, 0, 1.0)[0])[0], negative),
        "other under a mask": (combine(positive, masked(other, half, "default", 1.0)[0])[0], negative),
        "pair on an area": (area(positive, 32, 64, 0, 0, 1.0)[0], negative),
        "pair under a mask": (combine(masked(positive, half, "default", 1.0)[0], other)[0], negative),
        "pair under its mask's bounds": (
            combine(masked(positive, half, "mask bounds", 1.0)[0], other)[0],
            negative,
        ),
        "pair on an area, other elsewhere": (
            combine(area(positive, 32, 64, 0, 0, 1.0)[0], area(other, 32, 64, 32, 0, 1.0)[0])[0],
            negative,
        ),
        "pair for the first half of the run": (
            combine(timed(positive, 0.0, 0.5)[0], timed(other, 0.5, 1.0)[0])[0],
            negative,
        ),
        "two negatives": (positive, combine(negative, studio.encode("blurry"))[0]),
        "pair on an area, negative of two rows": (
            area(positive, 32, 64, 0, 0, 1.0)[0],
            [[torch.cat([studio.encode(text)[0][0] for text in ("blurry", "a tree")]), {}]],
        ),
        "long negative": (positive, studio.encode(LONG)),
        "negative zeroed out of the positive": (
            positive,
            host_nodes.ConditioningZeroOut().zero_out(positive)[0],
        ),
    }


REGIONS = [
    "combined",
    "combined, other first",
    "other on an area",
    "other on a small area",
    "other under a mask",
    "pair on an area",
    "pair under a mask",
    "pair under its mask's bounds",
    "pair on an area, other elsewhere",
    "pair for the first half of the run",
    "two negatives",
    "pair on an area, negative of two rows",
    "long negative",
    "negative zeroed out of the positive",
]


@pytest.mark.parametrize("name", REGIONS)
def test_law_7_other_conditionings_run_untouched(studio, name):
    def make(model, positive, rows):
        ksampler(model, *regions(studio, positive)[name], rows, ONE_STEP)

    calls, changed = edited_rows(studio, make)
    assert calls > 1
    assert [(place, rows) for place, _, rows in changed] == [(0, [1, 3])]


def test_an_edit_beside_a_longer_copy_of_itself_in_one_call_is_an_error_that_says_both_lengths(studio):
    controlled, positive = control(studio.model, studio.edit(), FULL)
    longer = [[torch.cat([cond, cond], dim=1), options] for cond, options in positive]
    both = host_nodes.ConditioningCombine().combine(positive, longer)[0]
    with pytest.raises(ValueError, match=r"\(77, 154\)"):
        ksampler(controlled, both, studio.negative, studio.rows(studio.edit(), empty()), Settings())


def test_law_7_where_a_negative_has_an_area_the_hosts_copy_of_the_pair_on_it_is_edited_too(studio):
    """The host then computes the positive on that area as well, from a copy without the mark."""

    def make(model, positive, rows):
        negative = host_nodes.ConditioningSetArea().append(studio.negative, 32, 64, 0, 0, 1.0)[0]
        ksampler(model, positive, negative, rows, ONE_STEP)

    _, changed = edited_rows(studio, make)
    assert [(place, rows) for place, _, rows in changed] == [(0, [1, 3])] * 2


@pytest.mark.parametrize("name", [name for name in REGIONS if "two rows" not in name])
def test_law_2_beside_other_conditionings(studio, name):
    edit = studio.edit()
    controlled, positive = control(studio.model, edit, EMPTY)
    pair = ksampler(controlled, *regions(studio, positive)[name], studio.rows(edit, empty()), Settings())
    for found, text in zip(pair.split(1), (SOURCE, TARGET), strict=True):
        plain = ksampler(studio.model, *regions(studio, studio.encode(text))[name], empty(), Settings())
        assert_close(found, plain)


@pytest.mark.parametrize("style", ["regular", "nested"])
@pytest.mark.parametrize(("pair", "place"), [("cond1", 2), ("cond2", 1)])
def test_law_7_the_pair_is_known_by_its_mark_not_by_its_place_among_the_conds(studio, style, pair, place):
    """DualCFG calls the model with negative, second and first conditioning, in this order."""
    other = studio.encode("a castle")

    def make(model, positive, rows):
        conds = {"cond1": other, "cond2": other, pair: positive}
        guider = custom.DualCFGGuider.execute(
            model, **conds, negative=studio.negative, cfg_conds=3.0, cfg_cond2_negative=2.0, style=style
        ).args[0]
        sampler_custom_advanced(model, None, None, rows, ONE_STEP, guider)

    calls, changed = edited_rows(studio, make)
    assert calls == 3
    assert [(at, rows) for at, _, rows in changed] == [(place, [1, 3])]


def test_law_7_a_guider_with_three_conditionings_in_another_order(studio):
    """PerpNeg calls the model with positive, negative and empty prompt."""

    def make(model, positive, rows):
        guider = value_of(
            PerpNegGuider.execute(model, positive, studio.encode("blurry"), studio.negative, 4.0, 1.0)
        )
        sampler_custom_advanced(model, None, None, rows, ONE_STEP, guider)

    calls, changed = edited_rows(studio, make)
    assert calls == 3
    assert [(place, rows) for place, _, rows in changed] == [(0, [1, 3])]


@pytest.mark.parametrize("order", ["before", "after"])
def test_law_7_the_extra_pass_of_perturbed_attention_guidance_runs_untouched(studio, order):
    def make(model, positive, rows):
        model = PerturbedAttentionGuidance.execute(model, 3.0).args[0] if order == "after" else model
        ksampler(model, positive, studio.negative, rows, ONE_STEP)

    before = studio.model
    if order == "before":
        studio.model = PerturbedAttentionGuidance.execute(before, 3.0).args[0]
    try:
        calls, changed = edited_rows(studio, make)
    finally:
        studio.model = before
    assert calls == 3
    assert [(place, rows) for place, n, rows in changed if n < 2] == [(0, [1, 3])]
    assert not [rows for _, n, rows in changed if n == 2]


def value_of(output):
    """The first output of a node, of either of the host's node APIs."""
    return getattr(output, "args", output)[0]


# Law 8


def snapshot(value):
    """Everything in nested options, by identity where it is not a container."""
    if isinstance(value, dict):
        return {key: snapshot(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [snapshot(entry) for entry in value]
    return id(value)


def module_state(model):
    return {
        name: (
            sorted(vars(module)),
            id(type(module).forward),
            len(module._forward_hooks),
            len(module._forward_pre_hooks),
        )
        for name, module in model.model.named_modules()
    }


def traces(*patchers):
    """All that a run could leave behind on models and in the host."""
    attention = comfy.ldm.modules.attention
    return (
        [snapshot(patcher.model_options) for patcher in patchers],
        [snapshot(patcher.wrappers) for patcher in patchers],
        [snapshot(patcher.callbacks) for patcher in patchers],
        [sorted(vars(patcher)) for patcher in patchers],
        [module_state(patcher) for patcher in patchers],
        {name: id(value) for name, value in vars(attention).items()},
        {name: id(value) for name, value in vars(comfy.k_diffusion.sampling).items()},
        {name: id(value) for name, value in vars(comfy.samplers).items()},
    )


class Stop(Exception):
    """An interrupt in the middle of a run."""


def interrupted(model, at=3):
    """A clone whose model call number `at` raises."""
    clone, calls = model.clone(), []

    def count(apply, given):
        calls.append(1)
        if len(calls) == at:
            raise Stop
        return apply(given["input"], given["timestep"], **given["c"])

    clone.set_model_unet_function_wrapper(count)
    return clone


def test_law_8_making_a_controller_leaves_the_model_that_it_was_given(studio):
    before = traces(studio.model)
    control(studio.model, studio.edit(), FULL)
    assert traces(studio.model) == before


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m_sde", "euler_ancestral_cfg_pp"])
@pytest.mark.parametrize("ends", ["normally", "interrupted"])
def test_law_8_a_run_leaves_nothing_behind_on_models_modules_or_the_host(studio, sampler, ends):
    edit, settings = studio.edit(), Settings(sampler=sampler)
    controlled, positive = control(studio.model, edit, PART)
    controlled = interrupted(controlled) if ends == "interrupted" else controlled
    rows = studio.rows(edit, empty())
    with suppress(Stop):
        ksampler(controlled, positive, studio.negative, rows, settings)
    before = traces(studio.model, controlled)
    values = [tensor.clone() for tensor in (rows["samples"], positive[0][0])]
    with suppress(Stop):
        ksampler(controlled, positive, studio.negative, rows, settings)
    assert traces(studio.model, controlled) == before
    assert torch.equal(rows["samples"], values[0]) and torch.equal(positive[0][0], values[1])
    assert len(positive) == 1 and len(positive[0]) == 2


@pytest.mark.parametrize("sampler", ["dpmpp_2m_sde", "euler_ancestral", "euler"])
@pytest.mark.parametrize("ends", ["normally", "interrupted"])
def test_law_8_the_sampler_value_has_its_own_options_back(studio, sampler, ends):
    edit = studio.edit()
    controlled, positive = control(studio.model, edit, PART)
    controlled = interrupted(controlled) if ends == "interrupted" else controlled
    options = {} if sampler == "euler" else {"s_noise": 0.9}
    value = comfy.samplers.ksampler(sampler, options, {"random": True})
    before = dict(vars(value))
    with suppress(Stop):
        sampler_custom(controlled, positive, studio.negative, studio.rows(edit, empty()), Settings(), value)
    assert vars(value) == before
    assert value.extra_options is options and options == ({} if sampler == "euler" else {"s_noise": 0.9})


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m_sde", "euler_ancestral"])
def test_law_8_running_again_gives_the_same_bits_after_an_interrupt_too(studio, sampler):
    edit, settings = studio.edit(), Settings(sampler=sampler)
    controlled, positive = control(studio.model, edit, PART)
    rows = studio.rows(edit, empty())
    first = ksampler(controlled, positive, studio.negative, rows, settings)
    with pytest.raises(Stop):
        ksampler(interrupted(controlled), positive, studio.negative, rows, settings)
    assert torch.equal(ksampler(controlled, positive, studio.negative, rows, settings), first)


def test_law_8_a_guider_that_was_interrupted_can_run_again(studio):
    edit = studio.edit()
    controlled, positive = control(studio.model, edit, PART)
    rows = studio.rows(edit, empty())
    expected = sampler_custom_advanced(controlled, positive, studio.negative, rows, Settings())
    broken = custom.CFGGuider.execute(interrupted(controlled), positive, studio.negative, 4.0).args[0]
    with pytest.raises(Stop):
        sampler_custom_advanced(controlled, None, None, rows, Settings(), broken)
    guider = custom.CFGGuider.execute(controlled, positive, studio.negative, 4.0).args[0]
    for _ in range(2):
        assert torch.equal(
            sampler_custom_advanced(controlled, None, None, rows, Settings(), guider), expected
        )


@pytest.mark.parametrize("ends", ["normally", "interrupted"])
def test_law_8_the_state_of_a_run_is_dropped_whoever_keeps_the_options(studio, ends):
    """The host samples on a copy of the options; whoever does not must find them as they were."""
    controlled, _ = control(studio.model, studio.edit(), PART)
    (outer_sample,) = [
        wrapper for wrappers in controlled.wrappers[WrappersMP.OUTER_SAMPLE].values() for wrapper in wrappers
    ]
    options = {"transformer_options": {"kept": 1}}
    seen = []

    def sample(*args):
        seen.append(len(options["transformer_options"]))
        if ends == "interrupted":
            raise Stop
        return args[0]

    sample.class_obj = SimpleNamespace(model_options=options, conds={}, model_patcher=controlled)
    with suppress(Stop):
        outer_sample(sample, torch.zeros(2, 4, 8, 8), torch.zeros(2, 4, 8, 8), None, torch.tensor([1.0, 0.0]))
    assert seen == [2]
    assert options == {"transformer_options": {"kept": 1}}


def test_law_8_a_plain_run_between_paired_runs_is_as_before(studio):
    plain = studio.plain(SOURCE, Settings(), empty())
    studio.paired(studio.edit(), FULL)
    assert torch.equal(studio.plain(SOURCE, Settings(), empty()), plain)


def test_nothing_needs_operations_that_apples_gpus_lack(studio, monkeypatch):
    """`index_copy` came to MPS late, and is slow there."""

    def missing(*args, **kwargs):
        raise NotImplementedError("index_copy on MPS")

    expected = studio.paired(studio.edit(SOURCE, TARGET, "a cat"), PART)
    for owner in (torch, torch.Tensor):
        for name in ("index_copy", "index_copy_"):
            if hasattr(owner, name):
                monkeypatch.setattr(owner, name, missing)
    monkeypatch.setattr("p2p.sampling.hooks.fitting_groups", lambda *_: ((0,), (1,)))
    for found, other in zip(studio.paired(studio.edit(SOURCE, TARGET, "a cat"), PART), expected, strict=True):
        assert_close(found, other)
