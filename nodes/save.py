"""Pairs on disk: the pictures of an edit, and its prompts as training sets list them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import folder_paths
import numpy as np
from comfy_api.latest import io, ui
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from ..attention.edit import Edit
from ..pairs import fields
from ..sampling.choices import writes_metadata
from .types import CATEGORY, edit_input

METADATA = "metadata.jsonl"


class SavePairs(io.ComfyNode):
    """A training set of edited pairs that grows with every run."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="P2PSavePairs",
            display_name="Save Pairs",
            category=CATEGORY,
            description="Saves sources and targets as PNG files, and a line with the prompts of each pair in "
            "metadata.jsonl beside them: a training set of edited pairs, as for InstructPix2Pix.",
            inputs=[
                edit_input(),
                io.Image.Input("source", tooltip="The sources: one picture for each item of the batch."),
                io.Image.Input(
                    "targets",
                    tooltip="The targets as Paired Sampler and Split Branches order them: all of the first "
                    "item, then all of the second.",
                ),
                io.String.Input(
                    "filename_prefix",
                    default="pairs/pair",
                    tooltip="Folder and beginning of the names, as in Save Image. Lines are added to the "
                    "folder's metadata.jsonl, so give each set a folder of its own.",
                ),
                io.String.Input(
                    "instruction",
                    multiline=True,
                    default="",
                    optional=True,
                    tooltip="The text of the edit instruction, such as: turn the bicycle into a car. With "
                    "several target prompts one line for each, in their order. Empty for none.",
                ),
            ],
            outputs=[],
            hidden=[io.Hidden.prompt, io.Hidden.extra_pnginfo, io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls, edit: Edit, source: Tensor, targets: Tensor, filename_prefix: str, instruction: str = ""
    ) -> io.NodeOutput:
        instructions = instructions_of(edit, instruction)
        known = settings_of(getattr(cls.hidden, "prompt", None), getattr(cls.hidden, "unique_id", None))
        saved = save_pairs(
            edit, source, targets, filename_prefix, instructions, _png_metadata(cls.hidden), known
        )
        return io.NodeOutput(ui=ui.SavedImages(saved))


def instructions_of(edit: Edit, text: str) -> list[str]:
    """The instruction of each target: its line of the text, or "" for all where the text is empty.

    One line will do for targets that have the same prompt. Raises ValueError for another number of lines.
    """
    lines = [line.strip() for line in text.strip().splitlines()] or [""]
    count = len(edit.targets)
    if len(lines) == 1 and (not lines[0] or len({target.text for target in edit.targets}) == 1):
        return lines * count
    if len(lines) != count:
        raise ValueError(
            f"instruction has {len(lines)} line{'s' if len(lines) > 1 else ''} for {count} target "
            f"prompt{'s' if count > 1 else ''}; expected one for each, in their order, or none."
        )
    return lines


def save_pairs(
    edit: Edit,
    sources: Tensor,
    targets: Tensor,
    prefix: str,
    instructions: list[str],
    metadata: PngInfo | None = None,
    known: dict[str, Any] | None = None,
) -> list[ui.SavedResult]:
    """Write the pictures as NAME_NUMBER_source.png, NAME_NUMBER_target1.png ..., then a line for each pair.

    sources: (b, height, width, channels); targets: (b n, height, width, channels), the n of an item together;
        values 0 to 1.
    prefix: folder and NAME below the host's output folder, as the host reads it.
    instructions: one for each of the n targets.
    known: settings of the run, by the names of `pairs.fields`.

    A line has the columns of `pairs.fields`, null where nothing is known: first those of the data set
    timbrooks/instructpix2pix-clip-filtered. The library `datasets` turns the fields `*_file_name` into
    columns of pictures. No file is written over. The lines of a call are
    appended at once and last: whenever the host ends, every line's pictures are there.

    Raises ValueError for other numbers of pictures, before anything is written.
    """
    count = len(edit.targets)
    if not len(sources) or len(targets) != len(sources) * count:
        raise ValueError(
            f"source has {len(sources)} pictures and targets has {len(targets)}; for an edit with {count} "
            f"target prompt{'s' if count > 1 else ''}, {len(sources) * count} targets are expected. Connect "
            "source and targets of one sampler, decoded, and the edit that it sampled."
        )
    height, width = sources.shape[1:3]
    folder, name, number, subfolder, _ = folder_paths.get_save_image_path(
        prefix, folder_paths.get_output_directory(), width, height
    )
    originals, edited = [_picture(image) for image in sources], [_picture(image) for image in targets]
    names, lines = [], []
    for item, original in enumerate(originals):
        stem = name.replace("%batch_num%", str(item))
        number, files = _new_files(Path(folder), stem, number, count)
        pictures = [original, *edited[item * count : (item + 1) * count]]
        for file, picture in zip(files, pictures, strict=True):
            picture.save(file, pnginfo=metadata, compress_level=4)  # the host's level
        names += [file.name for file in files]
        run = {**(known or {}), "batch": len(sources), "item": item, "width": width, "height": height}
        lines += [
            fields.line(
                {
                    **run,
                    "id": file.stem,
                    "original_prompt": edit.source.text,
                    "edit_prompt": instruction,
                    "edited_prompt": target.text,
                    "original_image_file_name": files[0].name,
                    "edited_image_file_name": file.name,
                }
            )
            for target, instruction, file in zip(edit.targets, instructions, files[1:], strict=True)
        ]
    _append(Path(folder, METADATA), lines)
    return [ui.SavedResult(file, subfolder, io.FolderType.output) for file in names]


def _picture(image: Tensor) -> Image.Image:
    return Image.fromarray(np.clip(255.0 * image.float().cpu().numpy(), 0, 255).astype(np.uint8))


def _new_files(folder: Path, name: str, number: int, targets: int) -> tuple[int, list[Path]]:
    """The first number from `number` on that no file has, and its files, the source's made and still empty.

    Making it reserves the number: another server may be saving into the folder.
    """
    roles = ["source", *(f"target{n}" for n in range(1, targets + 1))]
    while True:
        files = [folder / f"{name}_{number:05}_{role}.png" for role in roles]
        if not any(file.exists() for file in files):
            try:
                files[0].touch(exist_ok=False)
                return number, files
            except FileExistsError:
                pass
        number += 1


def _append(path: Path, lines: list[dict[str, Any]]) -> None:
    """Add lines of JSON in one write; a last line that was left without its end is ended first."""
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    with path.open("a+b") as file:
        if file.tell():
            file.seek(-1, 2)
            if file.read(1) != b"\n":
                text = "\n" + text
        file.write(text.encode())


INPUTS = {
    "seed": ("seed", "noise_seed"),
    "steps": ("steps",),
    "cfg": ("cfg",),
    "sampler": ("sampler_name",),
    "scheduler": ("scheduler",),
    "cross_end": ("cross_end",),
    "self_end": ("self_end",),
    "self_resolution": ("self_resolution",),
    "self_mode": ("self_mode",),
    "blend_words": ("words",),
    "blend_source_words": ("source_words",),
    "model": ("ckpt_name", "unet_name"),
}
"""Columns, and the inputs of nodes that tell them."""
ONLY_IN = {"blend_words": "P2PLocalBlend", "blend_source_words": "P2PLocalBlend"}
"""Columns whose input has a name that inputs of other nodes have too."""


def settings_of(prompt: dict[str, Any] | None, node: str | None) -> dict[str, Any]:
    """What the graph says of the run that made a node's pictures: column -> value.

    Each is from the nearest node before that one which has such an input; a wired input tells nothing.
    prompt: the graph as it was queued, id -> node. node: the id of Save Pairs.
    """
    found: dict[str, Any] = {}
    wave, seen = [str(node)], {str(node)}
    while wave and prompt:
        following = []
        for each in (prompt[name] for name in wave if name in prompt):
            inputs, kind = each.get("inputs", {}), each.get("class_type")
            for column, names in INPUTS.items():
                given = [inputs[name] for name in names if not isinstance(inputs.get(name, []), list)]
                if given and column not in found and ONLY_IN.get(column, kind) == kind:
                    found[column] = given[0]
            links = [str(value[0]) for value in inputs.values() if isinstance(value, list) and value]
            following += [link for link in dict.fromkeys(links) if link not in seen]
            seen.update(links)
        wave = following
    return found


def _png_metadata(hidden: Any) -> PngInfo | None:
    """Prompt and workflow as the host's Save Image writes them; None if it is told to write none."""
    if hidden is None or not writes_metadata():
        return None
    metadata = PngInfo()
    if hidden.prompt:
        metadata.add_text("prompt", json.dumps(hidden.prompt))
    for name, value in (hidden.extra_pnginfo or {}).items():
        metadata.add_text(name, json.dumps(value))
    return metadata
