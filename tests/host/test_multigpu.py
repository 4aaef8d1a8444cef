"""Several GPUs: the host's own way of sharing a prediction's conditionings among them gives what one gives.

Two clones of the bundled model stand on two names of the CPU, so everything is the host's but the devices:
its clones, its scheduler, its threads.
"""

from __future__ import annotations

import threading
import time

import comfy.model_management
import pytest
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from p2p.attention.blend import read_blend
from p2p.nodes import AttentionController
from p2p.nodes.maps import AttentionMaps
from p2p.tests.conftest import ROOT
from p2p.tests.host.runs import FULL, PART, SOURCE, STOCK, WAYS, Settings, assert_close, empty, paired_sampler

import nodes as host_nodes

multigpu = pytest.importorskip(
    "comfy.multigpu", reason="this ComfyUI does not share a run among several GPUs"
)

TARGETS = ("a dog riding a bicycle", "a cat riding a car", "a red cat riding a boat at night")
DEVICES = [torch.device("cpu"), torch.device("cpu", 0)]


@pytest.fixture
def forwards(monkeypatch):
    """Of every forward of a U-Net: its thread, its network, its rows."""
    seen: list[tuple[int, int, int]] = []
    forward = UNetModel._forward

    def noting(self, x, *args, **kwargs):
        seen.append((threading.get_ident(), id(self), x.shape[0]))
        return forward(self, x, *args, **kwargs)

    monkeypatch.setattr(UNetModel, "_forward", noting)
    return seen


@pytest.fixture
def interleaved():
    """Threads take turns at every line of the pack, so that what is not safe between them shows."""
    pack = str(ROOT / "sampling")

    def trace(frame, event, arg):
        if not frame.f_code.co_filename.startswith(pack):
            return None
        time.sleep(0)
        return trace

    threading.settrace(trace)
    yield
    threading.settrace(None)


@pytest.fixture
def shared(monkeypatch, demo_model, forwards, interleaved):
    """The bundled model on two devices; at the end both have computed, in threads of their own."""
    monkeypatch.setattr(comfy.model_management, "get_all_torch_devices", lambda *_, **__: DEVICES)
    yield multigpu.create_multigpu_deepclones(demo_model[0], 2)
    assert len({thread for thread, _, _ in forwards} - {threading.get_ident()}) >= 2
    assert len({network for _, network, _ in forwards}) == 2


def halves(conditioning):
    """The conditioning twice, for the left and for the right half: two entries, for two GPUs."""
    left, right = torch.zeros(2, 1, 64, 64)
    left[..., :32] = right[..., 32:] = 1.0
    parts = [
        host_nodes.ConditioningSetMask().append(conditioning, mask, "default", 1.0)[0]
        for mask in (left, right)
    ]
    return [*parts[0], *parts[1]]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("tau", [PART, FULL], ids=["part", "full"])
@pytest.mark.parametrize("target", ["a dog riding a bicycle", "a red cat riding a bicycle at night"])
def test_a_paired_run_is_that_of_one_device(
    studio, shared, way, tau, target
):
    edit = studio.edit(SOURCE, target).reweighted("bicycle", 1.4)
    expected = studio.paired(edit, tau, way=way)
    for found, one in zip(studio.paired(edit, tau, way=way, model=shared), expected, strict=True):
        assert_close(found, one)


@pytest.mark.parametrize("sampler", ["euler_ancestral", "dpmpp_2m_sde", "heun"])
def test_samplers_of_every_kind(studio, shared, sampler):
    settings, edit = Settings(sampler=sampler), studio.edit(SOURCE, *TARGETS)
    expected = studio.paired(edit, PART, settings)
    for found, one in zip(studio.paired(edit, PART, settings, model=shared), expected, strict=True):
        assert_close(found, one)


def test_the_controller_may_come_before_the_node_that_shares(studio, shared):
    edit = studio.edit(SOURCE, TARGETS[0])
    model, positive = AttentionController.execute(studio.model, edit, PART).args[:2]
    rows = [
        STOCK["KSampler"](each, positive, studio.negative, studio.rows(edit, empty()), Settings())
        for each in (model, multigpu.create_multigpu_deepclones(model, 2))
    ]
    assert_close(rows[1], rows[0])


class Meeting:
    """An attn2 patch at which two threads wait for each other, layer by layer."""

    def __init__(self):
        self._barrier = threading.Barrier(2, timeout=30)

    def __call__(self, n, context, value, extra_options):
        if threading.current_thread() is not threading.main_thread():
            self._barrier.wait()
        return n, context, value

    def __deepcopy__(self, memo):
        return self


def halved(studio, model, edit, *, blend=None, pairs=2):
    """A run without guidance, each device computing one of the pair's own conditionings: (rows, maps)."""
    model = model.clone()
    model.set_model_attn2_patch(Meeting())
    model, positive, maps = AttentionController.execute(model, edit, PART, blend).args
    maps.wanted = blend is None
    rows = STOCK["KSampler"](
        model, halves(positive), studio.negative, studio.rows(edit, empty(pairs)), Settings(cfg=1.0)
    )
    return rows, maps


def test_two_conditionings_of_a_pair_on_two_devices(studio, shared):
    edit = studio.edit(SOURCE, *TARGETS).reweighted("boat", 1.5)
    assert_close(halved(studio, shared, edit)[0], halved(studio, studio.model, edit)[0])


def test_maps_of_two_devices_are_those_of_one(studio, shared):
    edit = studio.edit(SOURCE, *TARGETS)

    def read(model):
        rows, maps = halved(studio, model, edit)
        return [AttentionMaps.execute(maps, {"samples": rows}, "", n).args[1] for n in range(edit.branches)]

    for found, one in zip(read(shared), read(studio.model), strict=True):
        assert_close(found, one)


def test_local_blend_reads_the_maps_of_two_devices(studio, shared):
    edit = studio.edit(SOURCE, *TARGETS)
    blend = read_blend("dog, car, boat", "bicycle", "", 0.5, 0.2)
    expected = halved(studio, studio.model, edit, blend=blend)[0]
    assert_close(halved(studio, shared, edit, blend=blend)[0], expected)


@pytest.mark.parametrize("rows", [2, 3])
def test_memory_that_runs_out_on_both_devices_splits_the_run_on_both(studio, shared, monkeypatch, rows):
    """The second fails with the whole batch once the first goes on in parts."""
    edit = studio.edit(SOURCE, *TARGETS)
    expected = studio.paired(edit, PART)
    forward, refused = UNetModel._forward, []
    both, goes_on = threading.Event(), threading.Event()

    def limited(self, x, *args, **kwargs):
        if x.shape[0] <= rows:
            goes_on.set()
            return forward(self, x, *args, **kwargs)
        refused.append(threading.get_ident())
        if len(refused) == 1:
            assert both.wait(30)
        elif len(refused) == 2:
            both.set()
            assert goes_on.wait(30)
        raise comfy.model_management.OOM_EXCEPTION("out of memory")

    monkeypatch.setattr(UNetModel, "_forward", limited)
    for found, one in zip(studio.paired(edit, PART, model=shared), expected, strict=True):
        assert_close(found, one)


def test_parts_of_a_run_may_go_to_several_devices(studio, shared, monkeypatch):
    edit = studio.edit(SOURCE, *TARGETS)
    expected = studio.paired(edit, PART)
    monkeypatch.setattr(
        "comfy.model_base.BaseModel.memory_required", lambda self, shape, **_: 1e18 if shape[0] > 2 else 1.0
    )
    for found, one in zip(studio.paired(edit, PART, model=shared), expected, strict=True):
        assert_close(found, one)


def test_a_failure_on_one_device_is_told_and_leaves_nothing(studio, shared, monkeypatch):
    edit = studio.edit(SOURCE, TARGETS[0])
    expected = studio.paired(edit, PART)
    with monkeypatch.context() as broken:

        def fail(self, *args, **kwargs):
            raise ValueError("one device failed")

        broken.setattr(UNetModel, "_forward", fail)
        with pytest.raises(ValueError, match="one device failed"):
            studio.paired(edit, PART, model=shared)
    for found, one in zip(studio.paired(edit, PART, model=shared), expected, strict=True):
        assert_close(found, one)


def test_no_source_is_kept_where_devices_share_a_run(studio, shared):
    """Their forwards have no order by which a later run could find them."""
    edit = studio.edit(SOURCE, TARGETS[0])
    runs = [paired_sampler(shared, edit, PART, studio.negative, empty(), Settings(), reuse_gb=gb)[:2]
            for gb in (1.0, 1.0, 0.0)]  # fmt: skip
    for first, second, third in zip(*([part["samples"] for part in run] for run in runs), strict=True):
        assert_close(first, third)
        assert_close(second, third)
