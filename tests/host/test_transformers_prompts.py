"""From prompts to pictures on transformers: the pack's nodes, ComfyUI's tokenizers, tiny networks."""

from __future__ import annotations

from functools import cache
from itertools import takewhile

import pytest
import torch
from p2p.nodes import AddTarget, AttentionController, PairedLatent, PairedSampler, PromptPair, TokenReweight
from p2p.sampling.families import family_of
from p2p.sampling.overrides import OVERRIDE
from p2p.tests.host import test_streams as streams
from p2p.tests.host.runs import EMPTY, FULL, Settings, assert_close, difference, ksampler
from p2p.tests.host.transformers import SD3, TINY, build

WIDTH = 64
SETTINGS = Settings(steps=3, cfg=2.0, scheduler="simple")
NETWORKS = {
    "Flux": "Flux",
    "SD3": "SD3",
    "Chroma, PixArt": "Chroma",
    "AuraFlow": "AuraFlow",
    "Cosmos": "Cosmos Predict2",
    "Qwen-Image": "Qwen-Image",
    "Z-Image": "Z-Image",
    "OmniGen2": "OmniGen2",
    "Lumina 2": "Lumina 2",
    "Wan": "Wan 2.1",
    "HunyuanDiT": "HunyuanDiT",
    "Flux.2 Klein": "Flux.2",
    **{name: name for name in streams.NEWER},
}
NETWORKS = {family: name for family, name in NETWORKS.items() if family in streams.MADE}
"""Text encoder -> network."""
EMBEDDER = SD3["context_embedder_config"]
LAYOUTS = {
    "SD3": {
        "context_embedder_config": EMBEDDER | {"params": {"in_features": 4096, "out_features": 128}}
    },
    "HunyuanDiT": {"text_len": 77, "text_len_t5": 256},
    "Flux.2 Klein": {"context_in_dim": 3 * WIDTH},
}
"""What networks have to have for as many tokens and features as their text encoders give."""
every_family = pytest.mark.parametrize("family", NETWORKS)


class Encoder:
    """In a text encoder of `test_streams`: a token's features are its own, whatever stands beside it."""

    def __init__(self, inner, width, pooled):
        self.inner, self.width, self.pooled = inner, width, pooled

    def encode_token_weights(self, chunks):
        zeros, _, *more = self.inner.encode_token_weights(chunks)
        tokens = [int(token) for chunk in chunks for token, *_ in chunk]
        each = [torch.randn(self.width, generator=torch.Generator().manual_seed(t)) for t in tokens]
        features = torch.stack(each).expand(*zeros.shape[:-1], -1)
        more = [{name: mask.long() for name, mask in given.items()} for given in more]
        return features, torch.zeros(1, self.pooled), *more


@cache
def clip_of(family):
    """The family's CLIP of `test_streams` with such encoders in it."""
    clip = streams.MADE[family]()
    for name, encoder in list(vars(clip.cond_stage_model).items()):
        if isinstance(encoder, streams.Encoder):
            width = 4096 if encoder.width == 4096 else WIDTH
            if family in ("Krea 2", "Ideogram 4"):
                width //= encoder.layers
            pooled = WIDTH // 2 if family == "SD3" else WIDTH
            vars(clip.cond_stage_model)[name] = Encoder(encoder, width, pooled)
    return clip


@cache
def model_of(family):
    return build(NETWORKS[family], **LAYOUTS.get(family, {}))


@pytest.fixture(scope="module", autouse=True)
def unloaded():
    """Models go before the host does."""
    yield
    model_of.cache_clear()


def pair_of(family, source="a cat on a mat", target="a dog on a mat"):
    return PromptPair.execute(clip_of(family), source, target, "auto").args[0]


def conditioning(family, text):
    clip = clip_of(family)
    return clip.encode_from_tokens_scheduled(clip.tokenize(text))


def empty(family, rows=1):
    """What users have: one empty latent without frames, whatever the model."""
    channels, *_, height, width = TINY[NETWORKS[family]].latent
    return {"samples": torch.zeros(rows, channels, height, width)}


def plain(family, text, model=None):
    negative = conditioning(family, "blurry")
    return ksampler(model or model_of(family), conditioning(family, text), negative, empty(family), SETTINGS)


def paired(family, edit, tau, model=None):
    """Source and targets by the Paired Sampler."""
    s, negative = SETTINGS, conditioning(family, "blurry")
    output = PairedSampler.execute(
        model or model_of(family),
        edit,
        tau,
        negative,
        empty(family),
        s.seed,
        s.steps,
        s.cfg,
        s.sampler,
        s.scheduler,
        s.denoise,
    )
    return [latent["samples"] for latent in output.args[:2]]


@every_family
def test_the_source_is_the_plain_image_and_the_target_is_edited(family):
    source, target = paired(family, pair_of(family), FULL)
    assert_close(source, plain(family, "a cat on a mat"), 1e-4)
    other = plain(family, "a dog on a mat")
    assert difference(target, other) > 1e-3 and difference(target, source) > 1e-3


@every_family
def test_without_windows_prompts_of_other_lengths_are_plain_images_too(family):
    text = "a dog with a red hat on a big mat"
    if family in ("OmniGen2", "Boogu"):
        with pytest.raises(ValueError, match="tokens, and .* needs as many"):
            paired(family, pair_of(family, target=text), EMPTY)
        return
    source, target = paired(family, pair_of(family, target=text), EMPTY)
    assert_close(source, plain(family, "a cat on a mat"), 1e-4)
    assert_close(target, plain(family, text), 1e-4)


@every_family
def test_words_are_where_the_network_reads_them(family):
    """What an encoder without context gives differs in the swapped word's tokens alone."""
    if family == "Anima":
        pytest.skip("its network gives a token features that depend on all others")
    seen = []

    def override(function, q, k, v, heads, *args, **kwargs):
        axis = -2 if v.shape[-2] == k.shape[-2] else 1
        seen.append(v.detach().clone().movedim(axis, 1).flatten(2))
        return function(q, k, v, heads, *args, **kwargs)

    model = model_of(family).clone()
    model.model_options["transformer_options"][OVERRIDE] = override
    edit = pair_of(family, target="a mat on a mat")
    paired(family, edit, EMPTY, model)
    source = edit.source.prompt
    differs = [(v[0::2] - v[1::2]).abs().amax((0, 2)) > 1e-6 for v in seen if v.shape[1] >= source.length]
    first = next(flags for flags in differs if flags.any())
    changed = first.nonzero().flatten().tolist()
    ahead = takewhile(lambda part: part != "text", family_of(model.model).order)
    before = {"registers": 8, "image": len(first) - source.length, "references": 0}
    offset = sum(before[part] for part in ahead)
    assert [place - offset for place in changed] == list(source.find("cat"))


@every_family
def test_a_re_weighted_word_changes_the_target_alone(family):
    edit = pair_of(family, target="a cat on a mat")
    source, same = paired(family, edit, FULL)
    assert_close(same, source, 1e-4)
    heavy = TokenReweight.execute(edit, "cat", 2.0, 0).args[0]
    source, target = paired(family, heavy, FULL)
    assert_close(source, same, 1e-4)
    assert difference(target, source) > 1e-4


@every_family
def test_a_stock_sampler_gives_the_same(family):
    edit = AddTarget.execute(clip_of(family), pair_of(family), "a cat on a sofa", "auto").args[0]
    source, targets = paired(family, edit, FULL)
    model, positive, *_ = AttentionController.execute(model_of(family), edit, FULL).args
    latent = PairedLatent.execute(empty(family), edit).args[0]
    rows = ksampler(model, positive, conditioning(family, "blurry"), latent, SETTINGS)
    assert_close(rows, torch.cat([source, targets]), 1e-6)
