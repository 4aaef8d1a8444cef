"""Law 11: every tensor is on its device and no layer waits for it, in a forward of real width on a GPU.

Fake tensors have a device and a dtype but no values, and need no GPU: operations between devices raise, and
so does reading a value. The networks are SD1.5's and SDXL's own, of real width.
"""

from __future__ import annotations

import uuid
import weakref
from dataclasses import replace
from types import SimpleNamespace

import comfy.ops
import pytest
import torch
from comfy.ldm.modules.attention import attention_pytorch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from p2p.attention.blend import read_blend
from p2p.attention.schedule import TauSchedule, Window, parse_word_windows
from p2p.sampling import reuse
from p2p.sampling.controller import control, plug_and_play
from p2p.sampling.host import KEY
from p2p.sampling.maps import MapsHandle
from p2p.sampling.reuse import Keep
from p2p.sampling.run import Forward, Run, Start
from p2p.sampling.trajectory import ModelIdentity, Trajectory
from p2p.tests.host.checkpoints import COMMON, FAMILIES
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensorMode

SOURCE, TARGET = "a cat riding a bicycle", "a fluffy dog riding a red car"
CUDA = torch.device("cuda")
REAL = {
    "SD1.5": FAMILIES["SD1.5"].unet | {"channel_mult": [1, 2, 4, 4]},
    "SDXL": FAMILIES["SDXL"].unet | {"channel_mult": [1, 2, 4]},
}

FADED = TauSchedule(Window(0, 0.8), Window(0, 0.8), fade=0.9, self_resolution=1.0)
WORDS = TauSchedule(Window(0, 1), words=parse_word_windows("car: 0, red: 0.5-1"))
MUTUAL = TauSchedule(Window(0, 1), Window(0, 1), self_mode="mutual")
ALL = TauSchedule(Window(0, 1), Window(0, 1), self_resolution=1.0)


def controlled(studio, case):
    """The hooks of a case, and what it adds to the run."""
    edit = studio.edit(SOURCE, TARGET)
    if case == "refine":
        edit = studio.edit("a castle", "children drawing of a castle", mode="refine")
    if case == "several targets":
        edit = studio.edit(SOURCE, TARGET, "a cat", "a cat riding a boat")
    if case == "re-weight":
        edit = edit.reweighted("red", -1.5)
    tau = {"faded": FADED, "word windows": WORDS, "mutual": MUTUAL}.get(case, ALL)
    handle = MapsHandle(wanted=case == "maps")
    if case == "Plug-and-Play":
        model, _ = plug_and_play(studio.model, edit, 1.0, 1.0)
    else:
        given = {
            "words' blend": {"blend": read_blend("car", "bicycle", "dog", 0.3, 0.0, 0.1)},
            "mask's blend": {"blend": read_blend("", "", "", 0.3, 0.0, 0.0, torch.eye(8)[None])},
            "kept sources": {"keep": Keep(64.0)},
        }.get(case, {})
        if case == "trajectory":
            latents = tuple(torch.randn(1, 4, 64, 64) for _ in range(5))
            identity = ModelIdentity.of(studio.model)
            given = {"trajectory": Trajectory(latents, (14.0, 5.0, 2.0, 1.0, 0.0), identity)}
        model, _ = control(studio.model, edit, tau, maps=handle, **given)
    (hooks,) = {
        wrapper.__self__
        for wrappers in model.wrappers.values()
        for kind in wrappers.values()
        for wrapper in kind
    }
    return hooks, handle


CASES = [
    "swap",
    "refine",
    "re-weight",
    "faded",
    "word windows",
    "several targets",
    "mutual",
    "Plug-and-Play",
    "words' blend",
    "mask's blend",
    "maps",
    "kept sources",
    "trajectory",
]


OVER_STEPS = ("words' blend", "mask's blend", "kept sources", "trajectory")
"""Cases whose second step differs from the first."""


def as_fake(guest, mode):
    """A guest whose own tensors, which come from the user's memory, are fake too."""
    if getattr(guest, "blend", None) is not None and guest.blend.mask is not None:
        guest.blend = replace(guest.blend, mask=mode.from_tensor(guest.blend.mask))
    if hasattr(guest, "trajectory"):
        latents = tuple(map(mode.from_tensor, guest.trajectory.latents))
        guest.trajectory = replace(guest.trajectory, latents=latents)


class Network:
    """What the host's executor of APPLY_MODEL does, for a U-Net of fake weights: casts, and calls it."""

    def __init__(self, layout, dtype):
        config = COMMON | layout | {"in_channels": 4}
        self.diffusion_model = UNetModel(
            **config, device=CUDA, dtype=dtype, operations=comfy.ops.disable_weight_init
        )
        self.dtype = dtype

    def __call__(self, x, t, c_concat, context, control, options, y=None):
        y = None if y is None else y.to(self.dtype)
        given = (x.to(self.dtype), t, context.to(self.dtype), y, control)
        return self.diffusion_model(*given, transformer_options=options).float()

    @property
    def class_obj(self):
        return self


@pytest.fixture(autouse=True)
def no_constants(monkeypatch):
    """PyTorch computes with the values of fake tensors of one number, for real, on their device."""
    monkeypatch.setattr(fake_tensor, "CONSTANT_NUMEL_LIMIT", 0)


@pytest.fixture(autouse=True)
def kernels_of_a_gpu(monkeypatch):
    """The host's choice for the CPU asks a device how much memory is free."""
    for module in ("comfy.ldm.modules.attention", "p2p.sampling.attentions"):
        monkeypatch.setattr(f"{module}.optimized_attention", attention_pytorch)


NETWORKS = [("SD1.5", "float16"), ("SDXL", "bfloat16")]


@pytest.fixture(scope="module", params=NETWORKS, ids="{0[0]} {0[1]}".format)
def network(request):
    name, dtype = request.param
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with torch.no_grad(), mode:
        return mode, name, Network(REAL[name], getattr(torch, dtype))


@pytest.mark.parametrize("case", CASES)
def test_a_forward_mixes_no_devices_and_reads_no_value(studio, network, monkeypatch, case):
    mode, name, unet = network
    hooks, handle = controlled(studio, case)
    branches, length = hooks.edit.branches, hooks.edit.source.prompt.length
    sigmas = [14.0, 5.0, 2.0, 1.0, 0.0]
    run = Run(sigmas, (branches, 4, 64, 64), branches, hooks.layers)
    sampler = SimpleNamespace(sampler_function=SimpleNamespace(__name__="sample_ddim"))
    own, negative = uuid.uuid4(), uuid.uuid4()
    run.lengths = {own: length}
    with monkeypatch.context() as patch:
        patch.setattr("p2p.sampling.trajectory.check_first_order", lambda _: None)
        patch.setattr(Trajectory, "offset_in", lambda *_: 0)
        start = Start(torch.ones(branches, 4, 64, 64), sampler, None, lambda: None)
        run.guests = tuple(entry.begin(run, start) for entry in hooks.entries)
    options = {
        KEY: run,
        "uuids": [negative, own],
        "cond_or_uncond": [1, 0],
        "patches_replace": {},
    }
    tokens = torch.zeros(2 * branches, length, 8)
    run.injecting = True
    forward = Forward(torch.zeros(2 * branches, 4, 64, 64), (None, None, tokens, None), options, {})
    for method in hooks.methods:  # what is worked out once per run, on the CPU: it reads values
        method.taken(run.call(forward))
    # With a kept source, comparing its rows is the one read of a forward.
    monkeypatch.setattr(reuse.SourceForward, "is_for", lambda *_: True)
    for guest in run.guests:
        if isinstance(guest, reuse.Reuse):
            guest.source = reuse.SourceRun(weakref.ref(hooks), None)
    context = REAL[name]["context_dim"]
    with torch.no_grad(), mode:
        for guest in run.guests:
            as_fake(guest, mode)
        for step in range(2 if case in OVER_STEPS else 1):
            run.at(sigmas[step])
            x = torch.empty(branches, 4, 64, 64, device=CUDA)
            for guest in run.guests:
                guest.step(x, step)
            batch = torch.cat([x, x])
            y = torch.empty(2 * branches, 2816, device=CUDA) if name == "SDXL" else None
            given = (
                torch.empty(2 * branches, device=CUDA),
                None,
                torch.empty(2 * branches, length, context, device=CUDA),
                None,
            )
            out = hooks.apply_model(unet, batch, *given, options, **({} if y is None else {"y": y}))
            assert (out.device.type, out.shape, out.dtype) == ("cuda", batch.shape, torch.float32)
            for guest in run.guests:
                if isinstance(guest, reuse.Reuse):
                    guest.forwards = step  # the next forward finds this one kept
        for guest in run.guests:
            guest.step(x, run.steps)
    assert run.injected == run.due > 0 or case == "Plug-and-Play"


def test_the_test_can_fail():
    """A read and a mixed device are found."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.empty(2, device=CUDA)
        with pytest.raises(Exception, match="two devices"):
            x + torch.empty(2)
        with pytest.raises(Exception, match="_local_scalar_dense"):
            float(x[0])
