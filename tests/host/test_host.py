"""What the pack leans on in the host beyond its public interface is there."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import comfy.controlnet
import comfy.samplers
import pytest
import torch
from comfy.patcher_extension import WrappersMP
from p2p.sampling import host
from p2p.tests.host.runs import Settings, empty, ksampler


def found(path: str) -> Any:
    """A module, or a class of one."""
    try:
        return importlib.import_module(path)
    except ModuleNotFoundError:
        module, _, name = path.rpartition(".")
        return getattr(importlib.import_module(module), name)


@pytest.mark.parametrize("path", host.ATTRIBUTES)
def test_the_hosts_classes_and_modules_have_what_is_used_of_them(path):
    owner = found(path)
    assert isinstance(owner, type | ModuleType)
    assert [name for name in host.ATTRIBUTES[path] if not hasattr(owner, name)] == []


@pytest.fixture(scope="module")
def objects(studio):
    """What a run of the host meets, by what it is, in mid-run."""
    seen: dict[str, Any] = {"model patcher": studio.model, "model": studio.model.model}
    names: dict[str, set[str]] = {}

    def look(executor, x, timestep, *args, **kwargs):
        seen["guider"] = executor.class_obj
        names["guider"] = set(dir(seen["guider"]))
        names["entry"] = {name for entry in seen["guider"].conds["positive"] for name in entry}
        names["model_conds"] = set(seen["guider"].conds["positive"][0]["model_conds"])
        names["transformer_options"] = set()
        return executor(x, timestep, *args, **kwargs)

    def forward(executor, x, t, c_concat, c_crossattn, control, options, **kwargs):
        names["transformer_options"] |= set(options)
        return executor(x, t, c_concat, c_crossattn, control, options, **kwargs)

    model = studio.model.clone()
    model.add_wrapper(WrappersMP.PREDICT_NOISE, look)
    model.add_wrapper(WrappersMP.APPLY_MODEL, forward)
    with torch.inference_mode():
        ksampler(model, studio.encode("a cat"), studio.negative, empty(), Settings(steps=1))
    seen["sampler"] = comfy.samplers.sampler_object("euler")
    seen["control"] = comfy.controlnet.ControlBase()
    return seen, names


@pytest.mark.parametrize("kind", host.INSTANCE_ATTRIBUTES)
def test_the_hosts_objects_have_what_is_used_of_them(objects, kind):
    seen, names = objects
    there = names.get(kind) or {name for name in host.INSTANCE_ATTRIBUTES[kind] if hasattr(seen[kind], name)}
    assert set(host.INSTANCE_ATTRIBUTES[kind]) - there == set()


@pytest.mark.parametrize("kind", host.ENTRIES)
def test_the_hosts_dictionaries_have_the_entries_that_are_read(objects, kind):
    assert set(host.ENTRIES[kind]) - objects[1][kind] == set()


def test_noise_outside_of_an_inpainting_mask_is_the_hosts_own(studio):
    """The rule for its seed is copied from the host."""
    seen = []

    class Inner:
        def __call__(self, x, sigma, *args, **kwargs):
            return x

        class inner_model:
            model_sampling = studio.model.get_model_object("model_sampling")
            scale_latent_inpaint = studio.model.model.scale_latent_inpaint

    sampler = comfy.samplers.sampler_object("ddim")

    def function(model, x, sigmas, **kwargs):
        seen.append(model.noise)
        return x

    sampler.sampler_function = function
    noise = torch.ones(2, 4, 8, 8)
    sampler.sample(
        type("Guider", (Inner,), {})(), torch.tensor([1.0, 0.0]), {"seed": 7}, None, noise, noise, None, True
    )
    assert torch.equal(seen[0], host.inpainting_noise(noise, 7))
