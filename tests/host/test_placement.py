"""Law 11: every tensor is on its device and no layer waits for it, in a forward of real width on a GPU.

Fake tensors have a device and a dtype but no values, and need no GPU: operations between devices raise, and
so does reading a value. The networks are SD1.5's and SDXL's own, and Flux's and Qwen-Image's with two blocks
of each kind, of real width.
"""

from __future__ import annotations

import functools
import uuid
import weakref
from dataclasses import replace
from types import SimpleNamespace

import comfy.ops
import pytest
import torch
from comfy.ldm.flux.model import Flux
from comfy.ldm.modules.attention import attention_pytorch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from comfy.ldm.qwen_image.model import QwenImageTransformer2DModel
from p2p.attention.blend import read_blend
from p2p.attention.schedule import TauSchedule, Window, parse_word_windows
from p2p.sampling import overrides, reuse
from p2p.sampling.controller import control, plug_and_play
from p2p.sampling.host import KEY
from p2p.sampling.maps import MapsHandle
from p2p.sampling.reuse import Keep
from p2p.sampling.run import Forward, Run, Start
from p2p.sampling.trajectory import ModelIdentity, Trajectory
from p2p.tests.host.checkpoints import COMMON, FAMILIES
from p2p.tests.host.test_transformers_laws import pair_of
from p2p.tests.host.transformers import FLUX, build
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

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
    """The hooks of a case on a U-Net."""
    edit = studio.edit(SOURCE, TARGET)
    if case == "refine":
        edit = studio.edit("a castle", "children drawing of a castle", mode="refine")
    if case == "several targets":
        edit = studio.edit(SOURCE, TARGET, "a cat", "a cat riding a boat")
    if case == "re-weight":
        edit = edit.reweighted("red", -1.5)
    tau = {"faded": FADED, "word windows": WORDS, "mutual": MUTUAL}.get(case, ALL)
    if case == "Plug-and-Play":
        return hooks_of(plug_and_play(studio.model, edit, 1.0, 1.0))
    given = {}
    if case == "trajectory":
        latents = tuple(torch.randn(1, 4, 64, 64) for _ in range(5))
        identity = ModelIdentity.of(studio.model)
        given = {"trajectory": Trajectory(latents, (14.0, 5.0, 2.0, 1.0, 0.0), identity)}
    given |= given_in(case, read_blend("car", "bicycle", "dog", 0.3, 0.0, 0.1))
    return hooks_of(control(studio.model, edit, tau, **given))


def given_in(case, blend):
    """What a case adds to an edit."""
    return {
        "words' blend": {"blend": blend},
        "mask's blend": {"blend": read_blend("", "", "", 0.3, 0.0, 0.0, torch.eye(8)[None])},
        "kept sources": {"keep": Keep(64.0)},
        "maps": {"maps": KEPT},
    }.get(case, {})


KEPT = MapsHandle(wanted=True)
"""A run's entry holds it weakly."""


def hooks_of(controlled):
    model, _ = controlled
    (hooks,) = {
        wrapper.__self__
        for wrappers in model.wrappers.values()
        for kind in wrappers.values()
        for wrapper in kind
    }
    return hooks


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


class UNet:
    """What the host's executor of APPLY_MODEL does, for a U-Net of fake weights: casts, and calls it."""

    latent = (4, 64, 64)

    def __init__(self, name, dtype):
        self.name, self.dtype, self.class_obj = name, dtype, self
        config = COMMON | REAL[name] | {"in_channels": 4}
        self.diffusion_model = UNetModel(
            **config, device=CUDA, dtype=dtype, operations=comfy.ops.disable_weight_init
        )

    def given(self, rows, length):
        """Arguments of the model, and named ones."""
        context = torch.empty(rows, length, REAL[self.name]["context_dim"], device=CUDA)
        named = {"y": torch.empty(rows, 2816, device=CUDA)} if self.name == "SDXL" else {}
        return (torch.empty(rows, device=CUDA), None, context, None), named

    def __call__(self, x, t, c_concat, context, control, options, **named):
        cast = {name: value.to(self.dtype) for name, value in named.items()}
        given = x.to(self.dtype), t, context.to(self.dtype)
        return self.diffusion_model(*given, transformer_options=options, **cast).float()


class Transformer(UNet):
    """The same for a transformer."""

    def __init__(self, name, dtype):
        self.name, self.dtype, self.class_obj = name, dtype, self
        kind, layout, self.latent, self.width = TRANSFORMERS[name]
        self.diffusion_model = kind(
            **layout, device=CUDA, dtype=dtype, operations=comfy.ops.disable_weight_init
        )

    def given(self, rows, length):
        context = torch.empty(rows, length, self.width, device=CUDA)
        more = {"y": torch.empty(rows, 768, device=CUDA), "guidance": torch.empty(rows, device=CUDA)}
        return (torch.empty(rows, device=CUDA), None, context, None), more if self.name == "Flux" else {}


TRANSFORMERS = {
    "Flux": (
        Flux,
        FLUX
        | {
            "vec_in_dim": 768,
            "context_in_dim": 4096,
            "hidden_size": 3072,
            "mlp_ratio": 4.0,
            "num_heads": 24,
            "axes_dim": [16, 56, 56],
        },
        (16, 64, 64),
        4096,
    ),
    "Qwen-Image": (QwenImageTransformer2DModel, {"num_layers": 2}, (16, 1, 64, 64), 3584),
}
"""Class, layout, latent, width of the text's features."""


@pytest.fixture(autouse=True)
def no_constants(monkeypatch):
    """PyTorch computes with the values of fake tensors of one number, for real, on their device."""
    monkeypatch.setattr(fake_tensor, "CONSTANT_NUMEL_LIMIT", 0)


@pytest.fixture(autouse=True)
def kernels_of_a_gpu(monkeypatch):
    """The host's choice for the CPU asks a device how much memory is free."""
    for module in ("comfy.ldm.modules.attention", "comfy.ldm.flux.math", "p2p.sampling.attentions"):
        monkeypatch.setattr(f"{module}.optimized_attention", attention_pytorch)
    monkeypatch.setattr("comfy.ldm.qwen_image.model.optimized_attention_masked", attention_pytorch)


def faked(kind, name, dtype):
    """A network of fake weights, and the mode in which it works."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with torch.no_grad(), mode:
        return mode, kind(name, getattr(torch, dtype))


networks = functools.partial(pytest.fixture, scope="module", ids="{0[0]} {0[1]}".format)


@networks(params=[("SD1.5", "float16"), ("SDXL", "bfloat16")])
def unet(request):
    return faked(UNet, *request.param)


@networks(params=[("Flux", "bfloat16"), ("Qwen-Image", "float16")])
def transformer(request):
    return faked(Transformer, *request.param)


@pytest.mark.parametrize("case", CASES)
def test_a_forward_mixes_no_devices_and_reads_no_value(studio, unet, monkeypatch, case):
    hooks = controlled(studio, case)
    check(hooks, *unet, monkeypatch, case in OVER_STEPS, must_inject=case != "Plug-and-Play")


ON_TRANSFORMERS = {
    "words": ALL,
    "image": TauSchedule(Window(0, 0), Window(0, 1)),
    "faded": FADED,
    "word windows": TauSchedule(Window(0, 1), words=parse_word_windows("x1: 0, y2: 0.5-1")),
    "mutual": MUTUAL,
    "map in both halves": TauSchedule(Window(0, 1), Window(0, 1), self_mode="map in both halves"),
    "re-weight": ALL,
    "words' blend": FADED,
    "mask's blend": ALL,
    "maps": FADED,
    "kept sources": FADED,
}


@pytest.mark.parametrize("case", ON_TRANSFORMERS)
def test_so_does_a_forward_of_a_transformer(transformer, monkeypatch, case):
    """With two targets of unequal length."""
    mode, network = transformer
    pair = pair_of(network.name, build(network.name))
    edit = pair.edit.reweighted("w0", 1.5) if case == "re-weight" else pair.edit
    given = given_in(case, read_blend("x1, y2", "w0", "w2", 0.3, 0.0, 0.1))
    hooks = hooks_of(control(pair.model, edit, ON_TRANSFORMERS[case], **given))
    for name in ("edits_of", "word_step"):  # what is worked out once per run, on the CPU: it reads values
        monkeypatch.setattr(overrides, name, unfaked(getattr(overrides, name)))
    check(hooks, mode, network, monkeypatch, case in OVER_STEPS)


def unfaked(function):
    """A function that works on tensors of its own."""

    def call(*args):
        with unset_fake_temporarily():
            return function(*args)

    return call


def check(hooks, mode, network, monkeypatch, over_steps=False, must_inject=True):
    """Forwards of a guided run in fake tensors, what the run's guests do included."""
    branches, lengths = hooks.edit.branches, [prompt.length for prompt in hooks.edit.prompts]
    length, shape = max(lengths), (branches, *network.latent)
    sigmas = [14.0, 5.0, 2.0, 1.0, 0.0]
    run = Run(sigmas, shape, branches, hooks.layers, family=hooks.family)
    sampler = SimpleNamespace(sampler_function=SimpleNamespace(__name__="sample_ddim"))
    own, negative = uuid.uuid4(), uuid.uuid4()
    run.lengths = {own: length}
    if hooks.family is not None:
        run.texts = {own: tuple((tokens,) for tokens in lengths)}
    with monkeypatch.context() as patch:
        patch.setattr("p2p.sampling.trajectory.check_first_order", lambda _: None)
        patch.setattr(Trajectory, "offset_in", lambda *_: 0)
        start = Start(torch.ones(shape), sampler, None, lambda: None)
        run.guests = tuple(entry.begin(run, start) for entry in hooks.entries)
    options = {
        KEY: run,
        "uuids": [negative, own],
        "cond_or_uncond": [1, 0],
        "patches_replace": {},
    }
    tokens = torch.zeros(2 * branches, length, 8)
    run.injecting = True
    forward = Forward(torch.zeros(2 * branches, *network.latent), (None, None, tokens, None), options, {})
    for method in hooks.methods:  # what is worked out once per run, on the CPU: it reads values
        method.taken(run.call(forward))
    # With a kept source, comparing its rows is the one read of a forward.
    monkeypatch.setattr(reuse.SourceForward, "is_for", lambda *_: True)
    for guest in run.guests:
        if isinstance(guest, reuse.Reuse):
            guest.source = reuse.SourceRun(weakref.ref(hooks), None)
    with torch.no_grad(), mode:
        for guest in run.guests:
            as_fake(guest, mode)
        for step in range(2 if over_steps else 1):
            run.at(sigmas[step])
            x = torch.empty(shape, device=CUDA)
            for guest in run.guests:
                guest.step(x, step)
            batch = torch.cat([x, x])
            given, named = network.given(2 * branches, length)
            out = hooks.apply_model(network, batch, *given, options, **named)
            assert (out.device.type, out.shape, out.dtype) == ("cuda", batch.shape, torch.float32)
            for guest in run.guests:
                if isinstance(guest, reuse.Reuse):
                    guest.forwards = step  # the next forward finds this one kept
        for guest in run.guests:
            guest.step(x, run.steps)
    assert run.injected == run.due > 0 or not must_inject


def test_the_test_can_fail():
    """A read and a mixed device are found."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.empty(2, device=CUDA)
        with pytest.raises(Exception, match="two devices"):
            x + torch.empty(2)
        with pytest.raises(Exception, match="_local_scalar_dense"):
            float(x[0])
