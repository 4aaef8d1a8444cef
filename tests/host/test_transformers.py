"""What the pack's table of transformers says of each family, read from the running host."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import comfy.patcher_extension
import pytest
import torch
import torch.nn.functional as F
from comfy import model_base
from p2p.attention.inject import paired_rows
from p2p.attention.joint import Call, image_attention
from p2p.sampling.families import FAMILIES, family_of, layers_of
from p2p.tests.host.transformers import TINY, build, conditioning, latent, sample

every_family = pytest.mark.parametrize("name", TINY)


@pytest.fixture(scope="module")
def network_of():
    """Each family's network, made once for this module."""
    made = functools.cache(build)
    yield made
    made.cache_clear()


@dataclass
class Seen:
    """One attention call: its tensors, what the table says it is, where the tokens of a joint one lie."""

    tensors: Call
    heads: int
    layer: Any
    tokens: Any


class Forward:
    """A family's forwards with an override in place. edit: what it makes of a call and the way to attend."""

    def __init__(self, name: str, model: Any, edit: Callable | None = None):
        self.name, self.edit = name, edit
        self.model = model.clone()
        self.network = self.model.model.diffusion_model
        self.family = family_of(self.model.model)
        self.seen: list[Seen] = []
        self.arguments: dict[str, Any] = {}
        wrapper = comfy.patcher_extension.WrappersMP.APPLY_MODEL
        self.model.add_wrapper_with_key(wrapper, "test", self.apply_model)

    @property
    def multiple(self):
        return getattr(self.network, self.family.multiple) if self.family.multiple else 1

    @property
    def texts(self):
        return self.family.text_lengths(self.arguments)

    @property
    def image(self):
        frames, height, width = self.family.grid(self.arguments["x"])
        return frames * height * width

    @property
    def first_joint(self):
        return next((here for here in self.seen if here.layer.kind == "joint"), None)

    def apply_model(self, executor, x, t, concat, context, control, options, **more):
        self.arguments = {**more, "c_crossattn": context, "x": x}
        self.seen = []
        layers = iter(layers_of(self.family, self.network, more.get("ref_latents") is not None))

        def override(function, q, k, v, heads, *args, **more):
            layer = next(layers)
            joint = layer.kind == "joint"
            tokens = self.family.tokens(self.texts, self.image, q.shape[-2], self.multiple) if joint else None
            mask = args[0] if args else more.get("mask")
            here = Seen(Call(q, k, v, mask), heads, layer, tokens)
            self.seen.append(here)
            more = {key: value for key, value in more.items() if key != "mask"}

            def attend(q, k, v, mask=None):
                return function(q, k, v, heads, mask, *args[1:], **more)

            return here.tensors.attend(attend) if self.edit is None else self.edit(here, attend)

        options = {**options, "optimized_attention_override": override}
        with self.reached(options):
            out = executor(x, t, concat, context, control, options, **more)
        assert next(layers, None) is None, "the table has more calls than the forward made"
        return out

    @contextmanager
    def reached(self, options):
        """Modules that call attention without the forward's options get them."""
        with ExitStack() as stack:
            if self.family.module:
                module = importlib.import_module(self.family.module)
                given = functools.partial(module.optimized_attention, transformer_options=options)
                stack.enter_context(mock.patch.object(module, "optimized_attention", given))
            yield

    def run(self, *conditionings, seed=0, steps=1):
        """Sample these prompts from one noise, in one batch, without guidance."""
        noise = latent(self.name, len(conditionings), seed)
        return sample(self.model, noise, stacked(conditionings), conditioning(self.name, 99), 1.0, steps)


def stacked(conditionings):
    """Several prompts as one CONDITIONING, row by row; what has no row for each is the first one's.

    Anima's adapter takes one prompt at a time: the features go to the network without it.
    """
    if len(conditionings) == 1:
        return conditionings[0]
    features = torch.cat([entry[0][0] for entry in conditionings])
    options = {key: value for key, value in conditionings[0][0][1].items() if not key.startswith("t5xxl_")}
    for key in options:
        if key.startswith("conditioning_") or key == "pooled_output":
            options[key] = torch.cat([entry[0][1][key] for entry in conditionings])
    return [[features, options]]


PART_OPTIONS = {
    "txt_byt5": "conditioning_byt5small",
    "encoder_hidden_states_llama3": "conditioning_llama3",
    "encoder_hidden_states_t5": "conditioning_mt5xl",
}


def with_part(prompt, other, key):
    """A prompt with one part of its text as another's."""
    (features, options), (other_features, other_options) = prompt[0], other[0]
    if key == "c_crossattn":
        ids = {name: other_options[name] for name in ("t5xxl_ids",) if name in options}
        return [[other_features, {**options, **ids}]]
    return [[features, {**options, PART_OPTIONS[key]: other_options[PART_OPTIONS[key]]}]]


def with_reference(name, prompt, seed=5):
    """A prompt with a reference image as large as the latents."""
    return [[prompt[0][0], {**prompt[0][1], "reference_latents": [latent(name, seed=seed)]}]]


def test_every_family_of_the_table_that_the_host_has_is_tested(network_of):
    tested = {family_of(network_of(name).model) for name in TINY}
    for family in FAMILIES:
        assert not any(hasattr(model_base, name) for name in family.models) or family.name in {
            other.name for other in tested if other
        }


@every_family
def test_the_table_predicts_each_attention_call_and_its_size(name, network_of):
    forward = Forward(name, network_of(name))
    forward.run(conditioning(name, 1))
    every, first, image = (
        n + -n % forward.multiple for n in (sum(forward.texts), forward.texts[0], forward.image)
    )
    sizes = {
        "joint": (forward.family.registers + every + image,) * 2,
        "self": (image, image),
        "cross": (image, every),
        "text": (first, first),
    }
    kinds = [here.layer.kind for here in forward.seen]
    assert {"joint", "cross"} & set(kinds)
    assert all(kinds.count(kind) >= 2 for kind in kinds)  # in the first block a pair's images are equal
    for here in forward.seen:
        if here.layer.kind != "features":
            assert (here.tensors.q.shape[-2], here.tensors.k.shape[-2]) == sizes[here.layer.kind]
            assert here.tensors.q.shape[0] == 1


def keys_of_first(forward, kind, prompt, seed):
    """The keys of the first call of a kind, token by token: (L, numbers)."""
    forward.run(prompt, seed=seed)
    k = next(here for here in forward.seen if here.layer.kind == kind).tensors.k
    return k[0].transpose(0, 1).flatten(1) if k.ndim == 4 else k[0]


def changed(one, other):
    return set((one != other).any(-1).nonzero().flatten().tolist())


def places(*spans):
    return {n for span in spans for n in range(span.start, span.stop)}


@every_family
def test_the_table_says_where_text_and_image_lie(name, network_of):
    """A token's first key depends on the noise where the image is, on a part of the text where that is."""
    forward = Forward(name, network_of(name))
    one, other = conditioning(name, 1), conditioning(name, 2)
    kind = "joint" if forward.family.joint else "cross"
    plain = keys_of_first(forward, kind, one, 0)
    noise = changed(plain, keys_of_first(forward, kind, one, 1))
    if forward.family.joint:
        tokens = forward.first_joint.tokens
        image = places(tokens.image)
        refined = any(here.layer.kind == "self" for here in forward.seen)  # fills of the image see it there
        assert image == noise or (refined and image <= noise and not noise & places(*tokens.text))
        texts = tokens.text
    else:
        assert not noise
        ends = [sum(forward.texts[: n + 1]) for n in range(len(forward.texts))]
        texts = [slice(end - size, end) for end, size in zip(ends, forward.texts, strict=True)]
    keys = [part.key for part in forward.family.texts]
    for key in dict.fromkeys(keys):
        part = places(*(span for span, k in zip(texts, keys, strict=True) if k == key))
        if part:
            found = changed(plain, keys_of_first(forward, kind, with_part(one, other, key), 0))
            front = max(part) + 1 - TINY[name].tokens if forward.family.front else 0
            assert {n for n in part if n >= front} <= found or name == "Anima"
            assert found <= part or forward.multiple > 1


WITH_REFERENCES = [
    name for name in TINY if name.startswith(("Flux", "Qwen", "OmniGen2", "Boogu", "Krea", "Joy"))
]


@pytest.mark.parametrize("name", [*WITH_REFERENCES])
def test_reference_images_are_neither_text_nor_image(name, network_of):
    forward = Forward(name, network_of(name))
    prompt = conditioning(name, 1)
    plain = keys_of_first(forward, "joint", with_reference(name, prompt), 0)
    noise = changed(plain, keys_of_first(forward, "joint", with_reference(name, prompt), 1))
    tokens = forward.first_joint.tokens
    assert noise == places(tokens.image)
    reference = changed(plain, keys_of_first(forward, "joint", with_reference(name, prompt, 6), 0))
    assert len(reference) == forward.image
    assert not reference & places(tokens.image, *tokens.text)


def image_injection(rows):
    """The source's queries and keys of image tokens in the targets' rows, in every layer."""

    def edit(here, attend):
        call = here.tensors
        if here.layer.kind == "joint":
            return image_attention(attend, call, tokens=here.tokens, rows=rows, heads=here.heads)
        if here.layer.kind == "self":
            return attend(call.q[rows.origin], call.k[rows.origin], call.v)
        if here.layer.kind == "cross":
            return attend(call.q[rows.origin], call.k, call.v, call.mask)
        return call.attend(attend)

    return edit


@pytest.mark.parametrize(
    ("name", "reference"), [(name, False) for name in TINY] + [(name, True) for name in WITH_REFERENCES]
)
def test_the_image_injection_acts_on_targets_alone_and_keeps_equal_prompts_equal(name, reference, network_of):
    source, target = conditioning(name, 1), conditioning(name, 2)
    if reference:
        source, target = with_reference(name, source), with_reference(name, target)
    plain = Forward(name, network_of(name)).run(source, target, source)
    rows = paired_rows(3, range(2), [0], 3, torch.device("cpu"))
    edited = Forward(name, network_of(name), image_injection(rows)).run(source, target, source)
    assert torch.isfinite(edited).all()
    assert (edited[0] == plain[0]).all()  # the source's row, bit for bit
    assert (edited[2] == edited[0]).all()  # the target with its prompt
    moved = 5e-4 * plain.abs().max()
    assert (edited[1] - plain[1]).abs().max() > moved
    assert (edited[1] - edited[0]).abs().max() > moved


def padded(prompt, more, side):
    """A prompt with tokens of zeros on one side of each part of its text; masks that hide nothing."""

    def pad(x, axis):
        sides = (0, more) if side == "end" else (more, 0)
        return F.pad(x, (0, 0) * (x.ndim - 1 - axis) + sides)

    features, options = prompt[0]
    options = dict(options)
    for key in ("conditioning_llama3", "conditioning_byt5small"):
        if key in options:
            options[key] = pad(options[key], options[key].ndim - 2)
    if "attention_mask" in options:
        options["attention_mask"] = torch.ones(1, features.shape[1] + more, dtype=torch.int64)
    return [[pad(features, 1), options]]


def without_padding(forward, more, side):
    """Attention without the columns of padding, where the text's pads take no part."""

    def real(span):
        return slice(span.start, span.stop - more) if side == "end" else slice(span.start + more, span.stop)

    def edit(here, attend):
        call = here.tensors
        length = call.k.shape[-2]
        if forward.family.pad_token or here.layer.kind in ("self", "features"):
            return call.attend(attend)
        if here.layer.kind == "text":
            return call.keys((real(slice(0, length)),)).attend(attend)
        if here.layer.kind == "cross":
            return call.keys((real(slice(0, length)),)).attend(attend)
        pads = places(*(span for span in here.tokens.text if span.stop > span.start)) - places(
            *(real(span) for span in here.tokens.text if span.stop > span.start)
        )
        kept = tuple(slice(n, n + 1) for n in range(length) if n not in pads)
        return call.keys(kept).attend(attend)

    return edit


@contextmanager
def quirks(forward, tokens, more):
    """What the table says a family needs beside, where its text is padded."""
    with ExitStack() as stack:
        if forward.family.pad_token:
            module, token = forward.family.pad_token

            def fill(module, given, out):
                out[:, tokens:] = getattr(forward.network, token)
                return out

            handle = forward.network.get_submodule(module).register_forward_hook(fill)
            stack.callback(handle.remove)
        if forward.family.mean:

            def scale(module, given):
                return (given[0] * ((tokens + more) / tokens), *given[1:])

            handle = forward.network.get_submodule(forward.family.mean).register_forward_pre_hook(scale)
            stack.callback(handle.remove)
        yield


def padding_error(name, network, side, more=2):
    """How far a padded prompt is from the same prompt alone, of the largest value."""
    prompt = conditioning(name, 1)
    alone = Forward(name, network).run(prompt)
    forward = Forward(name, network)
    forward.edit = without_padding(forward, more, side)
    with quirks(forward, TINY[name].tokens, more):
        out = forward.run(padded(prompt, more, side))
    return float((out - alone).abs().max() / alone.abs().max())


@pytest.mark.parametrize("name", [name for name, tiny in TINY.items() if not tiny.fixed])
def test_a_padded_prompt_equals_the_prompt_alone_where_the_table_says_so(name, network_of):
    family = family_of(network_of(name).model)
    if family.padding:
        assert padding_error(name, network_of(name), family.padding) < 2e-6
    else:
        assert family.unequal
        assert min(padding_error(name, network_of(name), side) for side in ("end", "front")) > 1e-5


@every_family
@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_text_changes_the_image_and_runs_are_reproducible(name, cfg, network_of):
    negative = conditioning(name, 99, longer=2)
    one, again, other = (
        sample(network_of(name), latent(name), conditioning(name, seed), negative, cfg) for seed in (1, 1, 2)
    )
    assert torch.isfinite(one).all()
    assert (one == again).all()
    assert (one - other).abs().max() > 1e-2 * one.abs().max()
