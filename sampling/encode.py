"""From text to prompts: ComfyUI's tokenizers and text encoders."""

from __future__ import annotations

import copy
import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from comfy.sd import CLIP

from ..attention.edit import Edit, Source
from ..attention.prompt import WORD_END, Prompt, read_prompt, spell
from ..attention.vocabulary import PROBE
from .streams import Given, as_read, parts_of, read_streams

CLIPS = frozenset({"l", "g", "h"})
"""Encoders with CLIP's vocabulary: U-Nets have no others."""
EMBEDDING = "embedding:"
"""So the host's tokenizers mark the name of a textual inversion."""


@dataclass(frozen=True)
class EncodedPrompt(Prompt):
    """A prompt as the host encoded it.

    missing: textual inversions that the text names and the host did not find; it leaves them out.
    plain: whether the text has weights in parentheses that are plain text for this text encoder.
    conditioning: the host's CONDITIONING, or None where only the words were read.
    encoder: what the CLIP is known by, see `_known_by`.
    """

    missing: tuple[str, ...] = ()
    plain: bool = False
    conditioning: Any = field(default=None, repr=False, compare=False)
    encoder: tuple | None = field(default=None, repr=False, compare=False)


def encoded(edit: Edit) -> tuple[EncodedPrompt, ...]:
    """The prompt of each branch with its encoding. Raises ValueError for a prompt that was never encoded."""
    prompts = tuple(prompt for prompt in edit.prompts if isinstance(prompt, EncodedPrompt))
    if len(prompts) != edit.branches:
        raise ValueError("A prompt of the edit was not encoded; make edits with start_edit and add_target.")
    return prompts


def check_prompt(text: str, role: str) -> None:
    """Raise ValueError for an empty prompt; role is "source" or "target"."""
    if not text.strip():
        raise ValueError(f"The {role} prompt is empty; expected at least one word.")


def encode(clip: Any, text: str, role: str) -> EncodedPrompt:
    """Tokenize and encode a prompt with a ComfyUI CLIP object.

    role: "source" or "target", for messages.
    Raises ValueError for an empty prompt, for text encoders that are not known or whose tokenizer does not
    work, and for textual inversions that were made for another text encoder.
    """
    read(clip, text, role)  # for its errors, before the host's work or its own ones
    conditioning = _conditioning(clip, text)
    prompt = read(clip, text, role, conditioning)
    return replace(prompt, conditioning=conditioning, encoder=_known_by(clip))


def _conditioning(clip: Any, text: str) -> list:
    return clip.encode_from_tokens_scheduled(clip.tokenize(text))


def read(clip: Any, text: str, role: str, conditioning: Sequence = ()) -> EncodedPrompt:
    """The words of a prompt; raises what `encode` raises.

    clip: a ComfyUI CLIP object, of which only `tokenize` and `tokenizer` are used. conditioning: the host's,
    of this prompt, for where its tokens lie among all that a transformer's attention sees.
    """
    check_prompt(text, role)
    encoders, given = _tokenize(clip, text)
    inversions = _inversions(given)
    if CLIPS.isdisjoint(encoders) or set(encoders) - CLIPS:
        parts = parts_of(clip, [*encoders])
        for key, chunks in encoders.items():
            _check_widths(clip, key, chunks, [name for name, found in inversions if found])
        prompt = read_streams(text, parts, encoders, given, _templates(clip, text, given), conditioning)
    else:
        pieces = _pieces(clip, encoders, [name for name, found in inversions if found])
        prompt = read_prompt(text, pieces)
    if not prompt.words:
        raise ValueError(f'The {role} prompt "{text}" has no word that the text encoder reads.')
    missing = tuple(name for name, found in inversions if not found)
    plain = any(one.plain for one in given.values()) and as_read(text, False) != as_read(text, True)
    return EncodedPrompt(text, prompt.words, prompt.chunks, missing, plain)


def start_edit(clip: Any, source: str, target: str, mode: str) -> Edit:
    """An edit of one source and one target prompt."""
    return Edit(Source(encode(clip, source, "source"))).with_target(encode(clip, target, "target"), mode)


def add_target(clip: Any, edit: Edit, target: str, mode: str) -> Edit:
    """The edit with one more target.

    Raises ValueError for another text encoder than the source's: one that encodes the source differently.
    """
    if not _encoded_by(clip, encoded(edit)[0]):
        raise ValueError(
            "The clip is not the one that encoded the source prompt; connect the same CLIP, with the same "
            "LoRAs and clip skip, to Prompt Pair and Add Target."
        )
    return edit.with_target(encode(clip, target, "target"), mode)


def _encoded_by(clip: Any, prompt: EncodedPrompt) -> bool:
    """Whether a CLIP gives a prompt the encoding that it has.

    It is encoded again only by a CLIP that is known by something else, which a checkpoint or LoRA that was
    loaded anew is too.
    """
    if prompt.encoder is not None and prompt.encoder == _known_by(clip):
        return True
    before, again = prompt.conditioning, _conditioning(clip, prompt.text)
    return len(again) == len(before) and all(
        _alike(one, other) for (one, _), (other, _) in zip(again, before, strict=True)
    )


def _known_by(clip: Any) -> tuple | None:
    """What CLIPs that encode alike share: weights with their patches, clip skip and the tokenizer's options.

    Equal for a CLIP and its clones until one of them is changed. Keeps neither model nor tokenizer alive.
    None for a CLIP with hooks, or of other nodes' making, of which nothing is known.
    """
    if type(clip) is not CLIP:
        return None
    patcher = clip.patcher
    dtypes = patcher.object_patches  # later hosts patch in the dtype to compute in
    known = all(isinstance(value, torch.dtype) for value in dtypes.values())
    if patcher.forced_hooks or clip.use_clip_schedule or not known:
        return None
    return (
        patcher.patches_uuid,
        weakref.ref(clip.cond_stage_model),
        weakref.ref(clip.tokenizer),
        clip.layer_idx,
        tuple(sorted(clip.tokenizer_options.items())),
        tuple(sorted((name, str(dtype)) for name, dtype in dtypes.items())),
    )


def _alike(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two encodings are the same but for rounding."""
    if one.shape != other.shape:
        return False
    one, other = one.float(), other.to(one.device, torch.float32)
    return bool((one - other).norm() <= 0.01 * other.norm())


def _tokenize(clip: Any, text: str) -> tuple[dict, dict[str, Given]]:
    """The host's tokens of a text, and what each tokenizer was given, both by encoder.

    Which textual inversions the text names is for the host to say, whose versions read names differently:
    each name that its tokenizers look up, and whether one of them found a file.
    """
    given: dict[str, Given] = {}
    clip = copy.copy(clip)
    clip.tokenizer = copy.copy(clip.tokenizer)
    for name, tokenizer in list(vars(clip.tokenizer).items()):
        if hasattr(tokenizer, "_try_get_embedding"):
            setattr(clip.tokenizer, name, _listening(tokenizer, text, name, given))
    encoders = clip.tokenize(text, return_word_ids=True)
    return encoders, {key: found for key in encoders for found in [_of(given, key)] if found is not None}


def _of(by_name: Mapping[str, Any], key: str) -> Any:
    """What belongs to an encoder's key among attributes of the host's tokenizer: "l" is `clip_l` there."""
    return by_name.get(key, by_name.get(f"clip_{key}"))


def _listening(tokenizer: Any, text: str, name: str, given: dict[str, Given]) -> Any:
    """A tokenizer of the host that notes in `given`, under its name, what it is given and looks up."""
    listening = copy.copy(tokenizer)
    looked_up: list[tuple[str, bool]] = []
    listening._try_get_embedding = _noting(tokenizer._try_get_embedding, text, looked_up)
    tokenize = listening.tokenize_with_weights

    def noting(given_text: str, *args: Any, **options: Any) -> Any:
        looked_up.clear()
        tokens = tokenize(given_text, *args, **options)
        plain = options.get("disable_weights", False) or getattr(tokenizer, "disable_weights", False)
        given[name] = Given(tokenizer, given_text, bool(plain), tuple(looked_up))
        return tokens

    listening.tokenize_with_weights = noting
    return listening


def _inversions(given: Mapping[str, Given]) -> list[tuple[str, bool]]:
    """The textual inversions that a text names, in order, and whether an encoder found a file."""
    each = zip(*(one.looked_up for one in given.values() if one.looked_up), strict=False)
    return [(found[0][0], any(file for _, file in found)) for found in each]


def _templates(clip: Any, text: str, given: Mapping[str, Given]) -> dict[str, tuple[str, str]]:
    """What the host puts before and behind a prompt, by encoder: found with another prompt."""
    if all(one.text == text for one in given.values()):
        return {key: ("", "") for key in given}
    _, other = _tokenize(clip, PROBE)
    found = {key: tuple(other[key].text.split(PROBE, 1)) for key in given}
    return {
        key: ends if len(ends) == 2 and text.join(ends) == given[key].text else ("", "")
        for key, ends in found.items()
    }


def _noting(look_up: Callable[[str], tuple], text: str, noted: list[tuple[str, bool]]) -> Callable:
    """The host's look-up of a textual inversion, of which names and success are noted."""

    def noting(rest: str) -> tuple:
        """rest: the text from the name on. Later hosts give (vectors, name, text behind it)."""
        found = look_up(rest) if rest and not rest.isspace() else (None, "", "")
        name = (found[1] if len(found) == 3 else rest.split(maxsplit=1)[0]).strip(",")
        if not name:
            raise ValueError(f'The prompt "{text}" has "{EMBEDDING}" without a name behind it.')
        noted.append((EMBEDDING + name, found[0] is not None))
        return found

    return noting


def _pieces(clip: Any, encoders: dict, inversions: list[str]) -> list[list[str]]:
    """The vocabulary's strings of a text's tokens, chunk by chunk; a textual inversion counts as one word.

    encoders: the text's tokens. inversions: the names of its textual inversions, in order.
    """
    name = next(name for name in ("l", "h", "g") if name in encoders)
    layouts = [[[entry[2] for entry in chunk] for chunk in chunks] for chunks in encoders.values()]
    if any(layout != layouts[0] for layout in layouts):
        raise ValueError(
            f"The model's text encoders ({', '.join(encoders)}) get different numbers of vectors from the "
            f"textual inversions of the prompt ({', '.join(inversions)}); use files made for this model."
        )
    for encoder, chunks in encoders.items():
        _check_widths(clip, encoder, chunks, inversions)
    vectors = [entry[2] for chunk in encoders[name] for entry in chunk if torch.is_tensor(entry[0])]
    words = iter(_inversion_pieces(vectors, inversions))
    return [
        [
            next(words) if torch.is_tensor(token) else clip.tokenizer.untokenize([(token, weight)])[0][1]
            for token, weight, *_ in chunk
        ]
        for chunk in encoders[name]
    ]


def _inversion_pieces(words: list[int], inversions: list[str]) -> list[str]:
    """A piece for each vector: the name on an inversion's first one, the word's end on its last.

    words: which word of the prompt each vector belongs to.
    """
    pieces, names = [], iter(inversions)
    length, left = Counter(words), Counter(words)
    for word in words:
        letters = spell(next(names, EMBEDDING)) if left[word] == length[word] else ""
        left[word] -= 1
        pieces.append(letters if left[word] else letters + WORD_END)
    return pieces


def _check_widths(clip: Any, encoder: str, chunks: list[list[tuple]], inversions: list[str]) -> None:
    """Raise ValueError for vectors that the host leaves out while it encodes: they do not fit."""
    expected = getattr(_of(vars(clip.tokenizer), encoder), "embedding_size", None)
    widths = {entry[0].shape[-1] for chunk in chunks for entry in chunk if torch.is_tensor(entry[0])}
    if expected is not None and widths - {expected}:
        raise ValueError(
            f"A textual inversion of the prompt ({', '.join(inversions)}) has vectors of "
            f"{(widths - {expected}).pop()} numbers, but the text encoder {encoder} of this model takes "
            f"{expected}: it was made for another kind of model."
        )
