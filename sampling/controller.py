"""The hooks: Prompt-to-Prompt on ComfyUI's model patcher, by wrappers under one key and nothing else.

A controller is immutable and may be shared or copied; what changes lives in a `Run`, made when sampling
begins and dropped when it ends, which travels in the run's own `transformer_options`.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import comfy.ldm.modules.attention as host_attention
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ..attention.edit import Edit
from ..attention.inject import Rows, cross_attention, paired_rows, self_attention
from ..attention.plan import Plan, make_plan
from ..attention.schedule import TauSchedule, step_of
from .encode import KEY
from .noise import takes_noise_sampler, tied_noise_sampler, with_tied_inpainting
from .pairing import check_rows, paired_conditioning, tie_rows

BlockKey = tuple[str, int, int]
SUPPORTED = "SD1.x, SD2.x, SDXL and other models of ComfyUI's UNetModel class with cross-attention to text"


@dataclass(eq=False)
class Run:
    """What one sampling run needs to remember; dropped at its end.

    lengths: uuid of each of the pair's own conditioning entries -> its number of tokens.
    injecting: whether the model calls that are under way belong to the pair's own prediction.
    """

    sigmas: list[float]
    lengths: dict[uuid.UUID, int] = field(default_factory=dict)
    injecting: bool = False
    predicted: bool = False
    plans: dict[tuple, Plan] = field(default_factory=dict)
    rows: dict[tuple, Rows] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Controller:
    """One edit on its schedule, for one model: the wrappers that the host calls."""

    edit: Edit
    tau: TauSchedule
    blocks: tuple[BlockKey, ...]
    mark: str = field(default_factory=lambda: uuid.uuid4().hex)

    def install(self, model: Any) -> None:
        """Add the wrappers to a model patcher that is this controller's own clone."""
        for kind, wrapper in (
            (WrappersMP.OUTER_SAMPLE, self.outer_sample),
            (WrappersMP.SAMPLER_SAMPLE, self.sampler_sample),
            (WrappersMP.PREDICT_NOISE, self.predict_noise),
            (WrappersMP.CALC_COND_BATCH, self.calc_cond_batch),
            (WrappersMP.DIFFUSION_MODEL, self.diffusion_model),
        ):
            model.add_wrapper_with_key(kind, KEY, wrapper)

    def outer_sample(
        self,
        executor: Any,
        noise: Tensor,
        latent_image: Tensor,
        sampler: Any,
        sigmas: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """Begin the run: check the batch, tie the pair's initial noise; drop the run's state at the end."""
        check_rows(noise.shape[0], self.edit.branches, "The latent")
        options = executor.class_obj.model_options.setdefault("transformer_options", {})
        options[KEY] = Run(sigmas.tolist())
        try:
            return executor(
                tie_rows(noise, self.edit.branches), latent_image, sampler, sigmas, *args, **kwargs
            )
        finally:
            options.pop(KEY, None)

    def sampler_sample(
        self,
        executor: Any,
        guider: Any,
        sigmas: Tensor,
        extra_args: dict,
        callback: Any,
        noise: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """Find the pair's conditioning, and give the sampler one noise per pair for its stochastic steps."""
        run = _run(extra_args["model_options"])
        if run is not None:
            run.lengths = self._own_conditionings(guider.conds)
        sampler = executor.class_obj
        function = getattr(sampler, "sampler_function", None)
        options = getattr(sampler, "extra_options", None)
        changed: dict[str, Any] = {}
        if function is not None and options is not None and takes_noise_sampler(function):
            draw = self._noise_sampler(function, options, noise, sigmas, extra_args)
            changed["extra_options"] = {**options, "noise_sampler": draw}
        if function is not None and getattr(sampler, "inpaint_options", {}).get("random", False):
            changed["sampler_function"] = with_tied_inpainting(function, self.edit.branches)
        before = {name: getattr(sampler, name) for name in changed}
        try:
            for name, value in changed.items():
                setattr(sampler, name, value)
            return executor(guider, sigmas, extra_args, callback, noise, *args, **kwargs)
        finally:
            for name, value in before.items():
                setattr(sampler, name, value)

    def _noise_sampler(
        self, function: Callable, options: dict, noise: Tensor, sigmas: Tensor, extra_args: dict
    ) -> Callable:
        given = options.get("noise_sampler")
        if given is not None:
            return lambda sigma, sigma_next: tie_rows(given(sigma, sigma_next), self.edit.branches)
        return tied_noise_sampler(function, noise, self.edit.branches, sigmas, extra_args.get("seed"))

    def _own_conditionings(self, conds: Mapping[str, list[dict]]) -> dict[uuid.UUID, int]:
        """The entries of this run's conditionings that are the pair's own: uuid -> length in tokens.

        For prompts with areas the host makes copies that have one entry's options, mark and uuid included,
        and another's tensors. A copy with the pair's own tensors is the pair's, any other loses the mark, and
        every copy gets a uuid of its own.
        """
        own: dict[uuid.UUID, int] = {}
        tensors: list[Any] = []
        for name, entries in conds.items():
            for entry in entries:
                if entry.get(KEY) == self.mark and _has_own_tensors(entry):
                    if name != "negative":
                        tensors.append(entry["model_conds"]["c_crossattn"])
                    elif any(
                        _begins_with(entry["cross_attn"], cond) for cond, _ in self.edit.source.conditioning
                    ):
                        raise ValueError(
                            "The Attention Controller's positive conditioning is connected to a "
                            "negative input."
                        )
        for entries in conds.values():
            for n, entry in enumerate(entries):
                used = entry["model_conds"].get("c_crossattn")
                if any(used is tensor for tensor in tensors):
                    entries[n] = {**entry, KEY: self.mark, "uuid": uuid.uuid4()}
                    own[entries[n]["uuid"]] = used.cond.shape[1]
                elif entry.get(KEY) == self.mark:
                    entries[n] = {k: v for k, v in entry.items() if k != KEY} | {"uuid": uuid.uuid4()}
        if not own:
            raise ValueError(
                "The model comes from an Attention Controller, but the positive conditioning does not. "
                "Connect that controller's positive output, or use the model from before the controller."
            )
        return own

    def predict_noise(self, executor: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Note that a new prediction begins; only its first pass over the pair's conditioning is edited."""
        run = _run(executor.class_obj.model_options)
        if run is not None:
            run.predicted = False
        return executor(*args, **kwargs)

    def calc_cond_batch(
        self, executor: Any, model: Any, conds: list, x_in: Tensor, timestep: Tensor, model_options: dict
    ) -> list[Tensor]:
        """Open the model for injection while the pair's own prediction is computed; not for other passes."""
        run = _run(model_options)
        if (
            run is None
            or run.predicted
            or not any(entry.get(KEY) == self.mark for cond in conds for entry in cond or ())
        ):
            return executor(model, conds, x_in, timestep, model_options)
        run.injecting = run.predicted = True
        try:
            return executor(model, conds, x_in, timestep, model_options)
        finally:
            run.injecting = False

    def diffusion_model(
        self,
        executor: Any,
        x: Tensor,
        timesteps: Tensor,
        context: Any,
        y: Any,
        control: Any,
        transformer_options: dict,
        **kwargs: Any,
    ) -> Tensor:
        """Once per forward: the step, the pair's rows, and replacements for the attention of each block."""
        replaced = self._replacements(x, context, transformer_options)
        if replaced:
            transformer_options = {**transformer_options, "patches_replace": replaced}
        return executor(x, timesteps, context, y, control, transformer_options, **kwargs)

    def _replacements(self, x: Tensor, context: Tensor, options: dict) -> dict | None:
        """`patches_replace` for this forward, or None where there is nothing to inject."""
        run: Run | None = options.get(KEY)
        if run is None or not run.injecting:
            return None
        chunks = options["uuids"]
        own = [n for n, chunk in enumerate(chunks) if chunk in run.lengths]
        if not own:
            return None
        size = x.shape[0] // len(chunks)
        step = step_of(float(options["sigmas"][0]), run.sigmas)
        lengths = {run.lengths[chunks[n]] for n in own}
        if len(lengths) > 1:
            raise ValueError(
                "Conditionings of one Attention Controller meet in a model call with different numbers of "
                f"tokens ({', '.join(map(str, sorted(lengths)))}); concatenate the same text to all of them."
            )
        (length,) = lengths
        plan_key = (length, x.device, x.dtype)
        if plan_key not in run.plans:
            run.plans[plan_key] = make_plan(
                self.edit, self.tau, len(run.sigmas) - 1, length, x.device, x.dtype
            )
        plan = run.plans[plan_key]
        cross, weight = plan.cross[step], plan.self_[step]
        if cross is None and weight == 0.0:
            return None
        rows_key = (x.shape[0], size, tuple(own), x.device)
        if rows_key not in run.rows:
            run.rows[rows_key] = paired_rows(
                x.shape[0], self.edit.branches, [n * size for n in own], size, x.device
            )
        rows = run.rows[rows_key]
        copies = context.shape[1] // length
        replaced = {name: dict(patches) for name, patches in options.get("patches_replace", {}).items()}
        if cross is not None:
            self._replace(
                replaced,
                "attn2",
                lambda attend, attend_own, q, k, v: cross_attention(
                    attend, attend_own, q, k, v, rows, cross, copies
                ),
            )
        if weight > 0.0:
            cap = self.tau.self_resolution

            def inject(attend: Callable, attend_own: Callable, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                parts = q.shape[0] // x.shape[0]
                if _grid_fraction(q.shape[1] * parts, x) > cap:
                    return attend(q, k, v)
                return self_attention(attend, attend_own, q, k, v, rows, weight)

            self._replace(replaced, "attn1", inject)
        return replaced

    def _replace(self, replaced: dict, name: str, inject: Callable) -> None:
        """Put `inject` around whatever sits in the slot of each block, or around the host's own attention."""
        slots = replaced.setdefault(name, {})
        for block in self.blocks:
            previous = slots.get(block, slots.get(block[:2]))
            slots[block] = _around(previous, inject)


def _around(previous: Callable | None, inject: Callable) -> Callable:
    """A replacement in the host's form: q, k, v, extra_options -> attention's output."""

    def replacement(q: Tensor, k: Tensor, v: Tensor, extra_options: dict) -> Tensor:
        def attend_own(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return host_attention.optimized_attention(
                q,
                k,
                v,
                extra_options["n_heads"],
                attn_precision=extra_options["attn_precision"],
                transformer_options=extra_options,
            )

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return attend_own(q, k, v) if previous is None else previous(q, k, v, extra_options)

        return inject(attend, attend_own, q, k, v)

    return replacement


def control(model: Any, edit: Edit, tau: TauSchedule) -> tuple[Any, list]:
    """A clone of the model that samples the edit, and the positive CONDITIONING that goes with it.

    Raises ValueError for an unsupported model, a model with a controller on it, and WordNotFound for words of
    the schedule that are in no target.
    """
    tau.check_words(edit)
    if model.get_wrappers(WrappersMP.OUTER_SAMPLE, KEY):
        raise ValueError(
            "The model already comes from an Attention Controller; connect the model from before it. "
            "One controller takes several targets."
        )
    controller = Controller(edit, tau, cross_attention_blocks(model.get_model_object("diffusion_model")))
    patched = model.clone()
    controller.install(patched)
    return patched, paired_conditioning(edit, controller.mark)


def cross_attention_blocks(diffusion_model: torch.nn.Module) -> tuple[BlockKey, ...]:
    """Keys (name, block, depth) of a U-Net's transformer blocks, as the host's patches name them.

    Raises ValueError that names the class of a model without them.
    """
    blocks: list[BlockKey] = []
    if isinstance(diffusion_model, UNetModel):
        middle = [diffusion_model.middle_block] if diffusion_model.middle_block is not None else []
        for name, modules in (
            ("input", diffusion_model.input_blocks),
            ("middle", middle),
            ("output", diffusion_model.output_blocks),
        ):
            for number, module in enumerate(modules):
                for layer in module:
                    if type(layer) is host_attention.SpatialTransformer:
                        blocks += [(name, number, depth) for depth in range(len(layer.transformer_blocks))]
    if not blocks:
        raise ValueError(
            f"The model's class {type(diffusion_model).__name__} is not supported; "
            f"Prompt-to-Prompt works on {SUPPORTED}."
        )
    return tuple(blocks)


def _run(model_options: dict) -> Run | None:
    return model_options.get("transformer_options", {}).get(KEY)


def _has_own_tensors(entry: dict) -> bool:
    """Whether a conditioning's tensors are those that its options were made with."""
    used, made = entry["model_conds"].get("c_crossattn"), entry.get("cross_attn")
    return used is not None and made is not None and used.cond.shape == made.shape and _same(used.cond, made)


def _begins_with(cond: Tensor, source: Tensor) -> bool:
    return cond.shape[1] >= source.shape[1] and _same(cond[:1, : source.shape[1]], source)


def _same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.to(b.device, b.dtype), b)


def _grid_fraction(tokens: int, x: Tensor) -> float:
    """Sides of a layer's grid of `tokens` as a fraction of the latent's, from the layer's downsampling."""
    factor = round((x.shape[-2] * x.shape[-1] / tokens) ** 0.5)
    return 1.0 / max(factor, 1)
