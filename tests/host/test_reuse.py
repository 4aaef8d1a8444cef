"""A source run that is kept: the next edit leaves the source out of the model and comes out the same."""

from __future__ import annotations

import gc
import sys
import weakref
from functools import partial

import comfy.controlnet
import comfy.model_management
import pytest
import torch
from comfy.patcher_extension import PatcherInjection
from p2p.attention.blend import read_blend
from p2p.attention.schedule import TauSchedule, Window
from p2p.demo.loader import load_demo_model
from p2p.nodes import AttentionController, PairedLatent, PairedSampler
from p2p.sampling.fingerprint import frozen, same
from p2p.sampling.host_memory import host_bytes, host_memory
from p2p.sampling.invert import invert
from p2p.sampling.reuse import CACHE, GIGABYTE
from p2p.sampling.run import Run
from p2p.tests.host.beside.models import ImagePrompt
from p2p.tests.host.runs import (
    FULL,
    HOST_WARNINGS,
    PART,
    STOCK,
    WAYS,
    Settings,
    assert_close,
    difference,
    empty,
    in_graph,
    paired_sampler,
    picture,
)

SOURCE = "a cat riding a bicycle"
FIRST, SECOND = "a dog riding a bicycle", "a cat riding a red car at night"


pytestmark = pytest.mark.usefixtures("nothing_kept")


def sample(studio, edit, tau=PART, settings=None, latent=None, way="P2PSampler", reuse=1.0, **given):
    """A paired run: (sources, targets). reuse: GB; 0 stands for another node, which keeps nothing."""
    s, latent = settings or Settings(), latent or empty()
    place = ("1", "2") if reuse else ("2", "1")
    sampler, controller = (in_graph(node, *place) for node in (PairedSampler, AttentionController))
    model, negative = given.pop("model", studio.model), given.pop("negative", studio.negative)
    if way == "P2PSampler":
        output = paired_sampler(
            model, edit, tau, negative, latent, s, sampler, reuse_gb=reuse, **given
        )
        return output[0]["samples"], output[1]["samples"]
    controlled, positive = controller.execute(model, edit, tau, reuse_gb=reuse, **given).args[:2]
    paired = PairedLatent.execute(latent, edit).args[0]
    return studio.split(edit, STOCK[way](controlled, positive, negative, paired, s))


def check(found, expected):
    """The source bit for bit, the targets as close as a batch of other rows comes."""
    assert torch.equal(found[0], expected[0])
    assert_close(found[1], expected[1])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("pairs", [1, 2])
def test_a_further_edit_runs_the_targets_alone_with_the_same_result(studio, forwards, way, pairs):
    latent = empty(pairs)
    first = sample(studio, studio.edit(SOURCE, FIRST), latent=latent, way=way)
    assert set(forwards) == {4 * pairs}
    check(first, sample(studio, studio.edit(SOURCE, FIRST), latent=latent, way=way, reuse=0.0))
    forwards.clear()
    edit = studio.edit(SOURCE, SECOND).reweighted("red", 1.7)
    second = sample(studio, edit, latent=latent, way=way)
    assert set(forwards) == {2 * pairs}
    check(second, sample(studio, edit, latent=latent, way=way, reuse=0.0))


SAMPLERS = ["heun", "euler_ancestral", "dpmpp_2m_sde", "uni_pc"]


@pytest.mark.parametrize("sampler", [pytest.param(name, marks=HOST_WARNINGS) for name in SAMPLERS])
def test_samplers_of_every_kind_reuse(studio, forwards, sampler):
    settings = Settings(sampler=sampler)
    sample(studio, studio.edit(SOURCE, FIRST), settings=settings)
    forwards.clear()
    edit = studio.edit(SOURCE, SECOND)
    found = sample(studio, edit, settings=settings)
    assert set(forwards) == {2}
    check(found, sample(studio, edit, settings=settings, reuse=0.0))


@pytest.mark.parametrize("targets", [(FIRST, SECOND), (SECOND, FIRST, "a castle")])
def test_the_number_of_targets_may_change(studio, forwards, targets):
    sample(studio, studio.edit(SOURCE, FIRST))
    forwards.clear()
    edit = studio.edit(SOURCE, *targets)
    found = sample(studio, edit)
    assert set(forwards) == {2 * len(targets)}
    check(found, sample(studio, edit, reuse=0.0))


def test_a_longer_tau_runs_what_is_missing_and_keeps_that_too(studio, forwards):
    short = TauSchedule(Window(0, 0.5), Window(0, 0.25), self_resolution=1.0)
    sample(studio, studio.edit(SOURCE, FIRST), short)
    forwards.clear()
    edit = studio.edit(SOURCE, SECOND)
    found = sample(studio, edit, FULL)
    assert forwards == [2, 4, 4, 4]  # self-attention of step 1 and everything from step 2 on was not kept
    check(found, sample(studio, edit, FULL, reuse=0.0))
    for tau in (short, FULL):
        forwards.clear()
        found = sample(studio, studio.edit(SOURCE, FIRST), tau)
        assert forwards == [2, 2, 2, 2]
        check(found, sample(studio, studio.edit(SOURCE, FIRST), tau, reuse=0.0))


def other_seed(studio):
    return {"settings": Settings(seed=6)}


def other_steps(studio):
    return {"settings": Settings(steps=5)}


def other_guidance(studio):
    return {"settings": Settings(cfg=7.0)}


def other_sampler(studio):
    return {"settings": Settings(sampler="dpmpp_2m")}


def other_latent(studio):
    return {"latent": picture(), "settings": Settings(denoise=0.6)}


def other_mask(studio):
    return {"latent": {**empty(), "noise_mask": torch.ones(1, 8, 8) * 0.5}}


def other_negative(studio):
    return {"negative": studio.encode("a castle")}


def other_weights(studio):
    model = studio.model.clone()
    key = "diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_q.weight"
    weight = model.model_state_dict()[key]
    model.add_patches({key: ("diff", (torch.full_like(weight, 0.02),))}, 1.0)
    return {"model": model}


def other_patch(studio):
    model = studio.model.clone()
    model.set_model_output_block_patch(lambda h, hsp, options: (h * 1.05, hsp))
    return {"model": model}


def other_prediction(studio):
    model = studio.model.clone()
    model.set_model_sampler_cfg_function(lambda args: args["cond"] * 1.1)
    return {"model": model}


OTHERS = [
    other_seed,
    other_steps,
    other_guidance,
    other_sampler,
    other_latent,
    other_mask,
    other_negative,
    other_weights,
    other_patch,
    other_prediction,
]


@pytest.mark.parametrize("other", OTHERS, ids=lambda other: other.__name__)
def test_a_run_that_differs_in_anything_is_not_answered_with_the_kept_one(studio, other):
    edit = studio.edit(SOURCE, SECOND)
    kept = sample(studio, studio.edit(SOURCE, FIRST))
    found = sample(studio, edit, **other(studio))
    check(found, sample(studio, edit, **other(studio), reuse=0.0))
    if found[0].shape == kept[0].shape:
        assert difference(found[0], kept[0]) > 1e-3


def test_a_model_with_injections_is_another(studio):
    """What later hosts' LoRAs in bypass mode use; neither the patches nor the options tell of them."""
    layer = studio.model.model.diffusion_model.middle_block[1].transformer_blocks[0].attn2.to_q

    def inject(_):
        layer.forward = lambda x: type(layer).forward(layer, x) * 30.0

    def eject(_):
        layer.__dict__.pop("forward", None)

    model, edit = studio.model.clone(), studio.edit(SOURCE, SECOND)
    model.set_injections("bypass", [PatcherInjection(inject, eject)])
    kept = sample(studio, studio.edit(SOURCE, FIRST))
    try:
        found = sample(studio, edit, model=model)
        check(found, sample(studio, edit, model=model, reuse=0.0))
    finally:
        eject(model)
    assert difference(found[0], kept[0]) > 1e-3


def test_another_source_prompt_is_another_run(studio, forwards):
    sample(studio, studio.edit(SOURCE, FIRST))
    forwards.clear()
    edit = studio.edit("a cat riding a boat", FIRST)
    check(sample(studio, edit), sample(studio, edit, reuse=0.0))
    assert set(forwards) == {4}


def test_two_sources_are_kept_side_by_side(studio, forwards):
    for seed in (1, 2):
        sample(studio, studio.edit(SOURCE, FIRST), settings=Settings(seed=seed))
    forwards.clear()
    for seed in (1, 2):
        sample(studio, studio.edit(SOURCE, SECOND), settings=Settings(seed=seed))
    assert set(forwards) == {2}


def test_memory_stays_within_its_limit_and_the_older_run_goes_first(studio, forwards):
    sample(studio, studio.edit(SOURCE, FIRST), FULL)
    whole = CACHE.nbytes
    assert whole == sum(
        x.nbytes
        for run in CACHE.runs
        for forward in run.forwards.values()
        for x in (forward.x, forward.out, *(x for pair in forward.attention.values() for x in pair))
    )
    for share in (0.0001, 0.4, 1.0, 1.5):
        CACHE.clear()
        limit = whole * share / GIGABYTE
        for seed in (1, 2):
            for target in (FIRST, SECOND):
                edit, settings = studio.edit(SOURCE, target), Settings(seed=seed)
                forwards.clear()
                found = sample(studio, edit, FULL, settings, reuse=limit)
                assert CACHE.nbytes <= limit * GIGABYTE
                check(found, sample(studio, edit, FULL, settings, reuse=0.0))
        assert share < 1 or forwards[:4] == [2, 2, 2, 2]


@pytest.mark.parametrize("way", WAYS)
def test_a_lower_limit_gives_up_at_once_what_is_beyond_it(studio, way):
    edit = studio.edit(SOURCE, FIRST)

    def run(limit, seed=5):
        """By one node alone, whose limit was changed."""
        latent, s = empty(), Settings(seed=seed)
        if way == "P2PSampler":
            paired_sampler(studio.model, edit, FULL, studio.negative, latent, s, reuse_gb=limit)
            return
        controlled, positive = AttentionController.execute(studio.model, edit, FULL, reuse_gb=limit).args[:2]
        STOCK[way](controlled, positive, studio.negative, studio.rows(edit, latent), s)

    for seed in (1, 2, 3):
        run(1.0, seed)
    whole = CACHE.nbytes
    assert len(CACHE.runs) == 3
    run(whole / 2 / GIGABYTE, 3)
    assert CACHE.nbytes <= whole / 2 and len(CACHE.runs) == 1
    run(0.0, 3)
    assert CACHE.nbytes == 0 and CACHE.runs == []


def test_a_node_that_is_gone_from_the_graph_keeps_no_limit(studio):
    edit, s = studio.edit(SOURCE, FIRST), Settings()
    for node, limit in ((in_graph(PairedSampler, "1"), 1.0), (in_graph(PairedSampler, "2"), 0.0)):
        paired_sampler(studio.model, edit, FULL, studio.negative, empty(), s, node, reuse_gb=limit)
    assert CACHE.nbytes == 0


def test_nothing_is_kept_unless_it_was_asked_for(studio):
    sample(studio, studio.edit(SOURCE, FIRST), reuse=0.0)
    assert CACHE.runs == []


def test_a_model_that_is_gone_takes_its_runs_along(studio):
    model = load_demo_model()[0]
    sample(studio, studio.edit(SOURCE, FIRST), model=model)
    assert len(CACHE.runs) == 1
    comfy.model_management.unload_all_models()
    del model
    gc.collect()
    comfy.model_management.cleanup_models_gc()
    gc.collect()
    assert CACHE.runs == []


def collected(thing):
    """Whether nothing but this test's own names kept the thing, given as a list of it, alive."""
    kept = weakref.ref(thing.pop())
    comfy.model_management.unload_all_models()
    gc.collect()
    comfy.model_management.cleanup_models_gc()
    gc.collect()
    return kept() is None


def test_a_model_that_a_patch_of_its_own_refers_to_goes_too(studio):
    model = load_demo_model()[0]
    patched = model.clone()
    patched.set_model_unet_function_wrapper(
        lambda apply, given, _model=model: apply(given["input"], given["timestep"], **given["c"])
    )
    sample(studio, studio.edit(SOURCE, FIRST), model=patched)
    things = [model.model]
    del model, patched
    assert collected(things)
    assert CACHE.runs == []


def test_a_kept_run_keeps_no_other_nodes_objects(studio):
    control = comfy.controlnet.ControlBase()
    control.get_control = lambda *_: None
    negative = [[cond, {**options, "control": control}] for cond, options in studio.negative]
    sample(studio, studio.edit(SOURCE, FIRST), negative=negative)
    things = [control]
    del control, negative
    assert collected(things)


def test_what_can_be_compared_only_while_it_lives_is_another_once_it_is_gone():
    class Options:
        def patch(self):
            pass

    run = Run([1.0, 0.0], (2, 4, 8, 8), 2, ())
    one = Options()
    for value in (one, one.patch, Options.patch, torch.float16, "text", 3, None, [one, {"a": 1.0}]):
        assert same(frozen(value, run), frozen(value, run))
    for value in (one, one.patch):
        before = frozen(value, run)
        assert not same(before, frozen(Options(), run))
        assert not same(before, frozen(Options().patch, run))
    before = [frozen(value, run) for value in (one, one.patch)]
    del one, value
    gc.collect()
    assert not any(same(value, value) for value in before)
    assert not same(*(frozen(object(), run) for _ in range(2)))


@pytest.mark.parametrize(
    ("blend", "alone"),
    [
        (read_blend("", "", "", 0.3, 0.2, 0.0, torch.eye(8)[None]), True),
        (read_blend("a", "", "", 0.5, 0.2), False),
    ],
)
def test_local_blend_is_right_with_a_kept_source(studio, forwards, blend, alone):
    sample(studio, studio.edit(SOURCE, FIRST), blend=blend)
    forwards.clear()
    edit = studio.edit(SOURCE, SECOND)
    found = sample(studio, edit, blend=blend)
    assert set(forwards) == {2 if alone else 4}  # words' maps need the source's own
    check(found, sample(studio, edit, blend=blend, reuse=0.0))


def test_mutual_self_attention_runs_the_source(studio):
    tau = TauSchedule(Window(0, 0.5), Window(0.25, 1), self_mode="mutual")
    sample(studio, studio.edit(SOURCE, FIRST), tau)
    edit = studio.edit(SOURCE, SECOND)
    check(sample(studio, edit, tau), sample(studio, edit, tau, reuse=0.0))


class Share:
    """A patch of attention in which all rows attend to the first one's keys, as nodes for one style do."""

    def __call__(self, q, k, v, extra_options):
        return q, (k + k[:1]) / 2, v

    def __deepcopy__(self, memo):
        return self


@pytest.mark.parametrize("way", ["KSampler", "P2PSampler"])
@pytest.mark.parametrize("slot", ["attn2_replace", "attn1_patch", "attn2_patch"])
def test_another_nodes_attention_sees_the_whole_batch(studio, forwards, way, slot):
    """It may take other rows into account, or count them."""
    model, changed = studio.model.clone(), ImagePrompt()
    if slot == "attn2_replace":
        changed.on(model)
    else:
        getattr(model, f"set_model_{slot}")(Share())
    sample(studio, studio.edit(SOURCE, FIRST), model=model, way=way)
    forwards.clear()
    edit = studio.edit(SOURCE, SECOND)
    found = sample(studio, edit, model=model, way=way)
    assert set(forwards) == {4}
    assert {batch for batch, _ in changed.batches} <= {4}
    check(found, sample(studio, edit, model=model, way=way, reuse=0.0))


def test_other_nodes_see_the_runs_list_of_sigmas(studio, forwards):
    """Also where it is as long as the batch, whose rows other tensors of the options have."""
    seen = []
    model = studio.model.clone()

    def patch(h, hsp, options):
        seen.append(options["sample_sigmas"].tolist())
        return h, hsp

    model.set_model_output_block_patch(patch)
    settings = Settings(steps=3)
    sample(studio, studio.edit(SOURCE, FIRST), settings=settings, model=model)
    expected = seen[0]
    forwards.clear()
    sample(studio, studio.edit(SOURCE, SECOND), settings=settings, model=model)
    assert set(forwards) == {2} and len(expected) == 4
    assert all(sigmas == expected for sigmas in seen)


def test_several_gpus_keep_nothing_and_say_so(studio, forwards, caplog):
    model = studio.model.clone()
    model.model_options["multigpu_clones"] = {torch.device("cpu", 0): studio.model.clone()}
    edit = studio.edit(SOURCE, FIRST)
    with caplog.at_level("INFO"):
        found = sample(studio, edit, model=model)
    assert CACHE.runs == [] and "several GPUs" in caplog.text
    check(found, sample(studio, edit, reuse=0.0))


@pytest.mark.parametrize("reuse", [0.0, 1.0])
@pytest.mark.parametrize("acting", ["nothing", "a mask", "words", "a trajectory"])
def test_each_prediction_reads_its_sigma_once(studio, forwards, monkeypatch, reuse, acting):
    """A read waits for the GPU."""
    given = {"nothing": {}, "a mask": {"blend": read_blend("", "", "", 0.3, 0.2, 0.0, torch.eye(8)[None])}}
    given["words"] = {"blend": read_blend("a", "", "", 0.5, 0.2)}
    if acting == "a trajectory":
        given[acting] = {"trajectory": invert(studio.model, studio.encode(SOURCE), picture(), 4, "normal")[0]}
    run = partial(sample, studio, reuse=reuse, latent=picture(), **given[acting])
    reads, read = [], torch.Tensor.__float__

    def counting(self):
        reads.append(sys._getframe(1).f_globals["__name__"])
        return read(self)

    run(studio.edit(SOURCE, FIRST))
    forwards.clear()
    monkeypatch.setattr(torch.Tensor, "__float__", counting)
    run(studio.edit(SOURCE, SECOND))
    assert len([name for name in reads if name.startswith("p2p.sampling")]) == len(forwards) == 4


def test_memory_that_cannot_be_pinned_is_ordinary_memory(monkeypatch):
    def empty(*size, pin_memory=False, **kwargs):
        if pin_memory:
            raise RuntimeError("CUDA error: out of memory")
        return torch.zeros(*size, **kwargs)

    monkeypatch.setattr("torch.empty", empty)
    assert host_memory(torch.zeros(2, 3, dtype=torch.float16)).shape == (2, 3)


@pytest.mark.parametrize(("pinned", "expected"), [(True, 64), (False, 36)])
def test_pinned_memory_counts_as_the_blocks_that_pytorch_takes(monkeypatch, pinned, expected):
    """Blocks of powers of two, unless the host was told not to pin."""

    class OnGpu:
        device, nbytes = torch.device("cuda"), 36

        def is_pinned(self):
            return False

    monkeypatch.setattr("comfy.cli_args.args.disable_pinned_memory", not pinned, raising=False)
    assert host_bytes(OnGpu()) == expected


def test_an_interrupted_run_leaves_what_it_finished_and_nothing_half(studio, forwards):
    class Stop(Exception):
        pass

    def stopping(h, hsp, options):
        if stop and len(forwards) == 3:
            raise Stop
        return h, hsp

    stop = [True]
    model = studio.model.clone()
    model.set_model_output_block_patch(stopping)
    with pytest.raises(Stop):
        sample(studio, studio.edit(SOURCE, FIRST), model=model)
    stop.clear()
    forwards.clear()
    edit = studio.edit(SOURCE, SECOND)
    found = sample(studio, edit, model=model)
    assert forwards == [2, 2, 4, 4]
    check(found, sample(studio, edit, model=model, reuse=0.0))


def test_targets_in_groups_reuse_too(studio, forwards, monkeypatch):
    edit = studio.edit(SOURCE, FIRST, SECOND, "a castle")
    expected = sample(studio, edit, reuse=0.0)
    monkeypatch.setattr(
        "comfy.model_base.BaseModel.memory_required",
        lambda self, shape, **_: 1e18 if shape[0] > 3 else 1.0,
    )
    sample(studio, studio.edit(SOURCE, FIRST))
    forwards.clear()
    found = sample(studio, edit)
    assert set(forwards) == {2, 1}  # cond and uncond apart: two targets, and one
    for rows_found, rows_expected in zip(found, expected, strict=True):
        assert_close(rows_found, rows_expected)
