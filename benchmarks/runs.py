"""The runs that `quality.py` measures: every case sampled once for every method, kept in output/quality."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from cases import Case
from models import has_bfloat16

STEPS, CFG, SAMPLER, SCHEDULER, SIZE = 20, 4.0, "euler", "normal", 128
SETTINGS: dict[str, Any] = {"steps": STEPS, "cfg": CFG, "sampler_name": SAMPLER, "scheduler": SCHEDULER}
TAUS: dict[str, tuple[float, float, float]] = {
    "no control": (0.0, 0.0, 0.5),
    "cross 0.4, self 0.4": (0.4, 0.4, 0.5),
    "cross 0.6, self 0.4": (0.6, 0.4, 0.5),
    "cross 0.8, self 0.4": (0.8, 0.4, 0.5),
    "cross 1.0, self 0.4": (1.0, 0.4, 0.5),
    "cross 0.8, self 0.0": (0.8, 0.0, 0.5),
    "cross 0.8, self 0.4 in all layers": (0.8, 0.4, 1.0),
    "cross 0.8, self 0.8 in all layers": (0.8, 0.8, 1.0),
    "cross 0.6, self 0.8 in all layers": (0.6, 0.8, 1.0),
    "cross 0.4, self 0.8 in all layers": (0.4, 0.8, 1.0),
    "self only, 0.4": (0.0, 0.4, 1.0),
    "self only, 0.8": (0.0, 0.8, 1.0),
}
"""Ends of the windows of cross- and self-attention, and self_resolution."""
HALVES: dict[str, tuple[float, float, float, str]] = {
    "no control": (0.0, 0.0, 0.5, "map"),
    **{
        f"self only, {end}, {half}": (0.0, end, 1.0, mode)
        for end in (0.2, 0.4, 0.6, 0.8)
        for half, mode in (("one half", "map"), ("both halves", "map in both halves"))
    },
}
"""The same and self_mode: self-attention alone, in one half of guidance and, as published, in both."""
DEFAULT = "cross 0.8, self 0.4"
BLEND = "local blend"
METHODS = (*TAUS, BLEND)
"""`BLEND` is the default tau with Local Blend at its defaults on the words of the edit."""


class Runner:
    """The bundled model, in bfloat16 where the processor multiplies it natively.

    folder: where the latents of every run are kept; a run that is there is not repeated.
    taus: the schedules by their names. blend: whether Local Blend is a method too.
    """

    def __init__(self, folder: Path, taus: dict[str, Any] = TAUS, blend: bool = True):
        import torch
        from p2p.demo.loader import load_demo_model

        self.folder, self.taus, self.blend = folder, taus, blend
        self.model, self.clip, self.vae = load_demo_model()
        self.negative = self.clip.encode_from_tokens_scheduled(self.clip.tokenize(""))
        self.half = torch.cuda.is_available() or has_bfloat16()
        folder.mkdir(parents=True, exist_ok=True)

    def methods(self, case: Case) -> list[str]:
        """The names of what a case is sampled with; blending is left out where an edit is of no region."""
        return [*self.taus, *([BLEND] if self.blend and case.change != "style" else [])]

    def latents(self, case: Case, seed: int) -> dict[str, Any]:
        """Method, or "source" -> latent (4, 16, 16)."""
        from safetensors.torch import load_file, save_file

        path = self.folder / f"{case.kind}-{case.number:03d}-{seed}.safetensors"
        done = load_file(path) if path.exists() else {}
        taus = [name for name in self.taus if name not in done]
        if taus:
            sources, targets = self._sample(self.edit(case, taus), seed)
            done |= {"source": sources[0], **dict(zip(taus, targets, strict=True))}
        if BLEND in set(self.methods(case)) - set(done):
            _, targets = self._sample(self.edit(case, [DEFAULT]), seed, blend_of(case))
            done[BLEND] = targets[0]
        save_file({name: latent.contiguous() for name, latent in done.items()}, path)
        return done

    def edit(self, case: Case, taus: list[str]) -> Any:
        """An edit with one target for each of these names of the runner's schedules."""
        from p2p.attention.schedule import TauSchedule, Window

        return self.edits(
            case,
            {
                name: TauSchedule(
                    Window(0.0, cross),
                    Window(0.0, self_),
                    self_resolution=resolution,
                    **dict(zip(("self_mode",), mode, strict=False)),
                )
                for name, (cross, self_, resolution, *mode) in ((name, self.taus[name]) for name in taus)
            },
        )

    def edits(self, case: Case, schedules: dict[str, Any]) -> Any:
        """One target per schedule; a re-weighting without cross-attention control weights the word."""
        from p2p.sampling.encode import add_target, start_edit

        edit: Any = None
        for tau in schedules.values():
            text = case.target.caption()
            if case.kind == "re-weight" and tau.cross.end == 0.0:
                text = text.replace(case.word, f"({case.word}:{case.scale:g})")
            source = case.source.caption()
            edit = (
                start_edit(self.clip, source, text, "auto")
                if edit is None
                else add_target(self.clip, edit, text, "auto")
            )
            *before, target = edit.targets
            edit = replace(edit, targets=(*before, replace(target, tau=tau)))
            if case.kind == "re-weight" and tau.cross.end > 0.0:
                edit = edit.reweighted(case.word, case.scale, target=len(edit.targets))
        return edit

    def _sample(self, edit: Any, seed: int, blend: Any = None) -> tuple[Any, Any]:
        """Latents of source and targets."""
        import torch
        from p2p.attention.schedule import TauSchedule
        from p2p.sampling.sampler import sample_pairs

        latent = {"samples": torch.zeros(1, 4, SIZE // 8, SIZE // 8)}
        with self.precision():
            pair = sample_pairs(
                self.model,
                edit,
                TauSchedule(),
                negative=self.negative,
                latent=latent,
                seed=seed,
                blend=blend,
                **SETTINGS,
            )
        return pair[0]["samples"], pair[1]["samples"]

    @contextmanager
    def precision(self) -> Iterator[None]:
        import torch

        if not self.half or torch.cuda.is_available():  # on a GPU the host chooses
            yield
            return
        with torch.autocast("cpu", torch.bfloat16):
            yield

    def decode(self, latents: list[Any]) -> Any:
        """Pictures (latents, height, width, 3) in 0..1."""
        import torch

        with self.precision():
            return self.vae.decode(torch.stack(latents)).float()

    def materialised(self, case: Case, seed: int) -> tuple[Any, Any]:
        """Source and target at the default tau, in full precision: with maps that are built, and ours."""
        import comfy.sample
        import torch
        from materialised import materialised
        from p2p.sampling.sampler import sample_pairs

        edit = self.edit(case, [DEFAULT])
        tau = edit.targets[0].tau
        ours = sample_pairs(
            self.model,
            edit,
            tau,
            negative=self.negative,
            latent={"samples": torch.zeros(1, 4, SIZE // 8, SIZE // 8)},
            seed=seed,
            **SETTINGS,
        )
        model, positive = materialised(self.model, edit, tau)
        rows = torch.zeros(2, 4, SIZE // 8, SIZE // 8)
        noise = comfy.sample.prepare_noise(rows, seed, [0, 0])
        built = comfy.sample.sample(
            model,
            noise,
            STEPS,
            CFG,
            SAMPLER,
            SCHEDULER,
            positive,
            self.negative,
            rows,
            disable_pbar=True,
            seed=seed,
        )
        return built, torch.cat([ours[0]["samples"], ours[1]["samples"]])


def blend_of(case: Case) -> Any:
    """Local Blend on the words of an edit, with the node's defaults."""
    from p2p.attention.blend import LocalBlend

    return LocalBlend(words=(case.word,), source_words=(case.old,) if case.old else ())
