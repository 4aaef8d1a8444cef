"""The hooks on ComfyUI's model patcher: wrappers under one key and nothing else.

What they do is said elsewhere: methods say what is taken, guests of a run do what they do, `attentions` fills
the layers. A `Hooks` is immutable and may be shared or copied; what changes lives in a `Run`, made when
sampling begins and dropped when it ends, which travels in the run's own `transformer_options`.
"""

from __future__ import annotations

import uuid
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import comfy.model_management
import latent_preview
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ..attention.edit import Edit
from ..attention.taken import NOTHING, Taken, together
from . import attentions, host, overrides
from .conditioning import lay_out, own_conditionings, unguided_sources
from .families import Family
from .forward import fitting_groups, is_whole, join, one_after_another, parts, shrink_groups
from .host import KEY
from .latents import check_rows, tie_rows
from .network import Layers
from .noise import tied_noise
from .plug_and_play import copied_features
from .run import IN_BATCH, Call, Entry, Forward, Reading, Run, Sources, Start, run_of
from .stacking import longest, stack_branches
from .state import with_edited_state


class Method(Protocol):
    """A method of editing."""

    def taken(self, call: Call) -> Taken:
        """What the targets of a forward take from their source."""
        ...


@dataclass(frozen=True, eq=False)
class Hooks:
    """One edit, for one model: the wrappers that the host calls.

    layers: of the model's network; family: of a transformer.
    methods: what the targets take from their source; they add up.
    entries: what takes part in a run, in this order.
    unguided: whether the sources' positive conditioning is their negative one too.
    mark: what tells this edit's conditioning from others.
    """

    edit: Edit
    layers: Layers
    methods: tuple[Method, ...]
    entries: tuple[Entry, ...] = ()
    family: Family | None = None
    unguided: bool = False
    mark: str = field(default_factory=lambda: uuid.uuid4().hex)

    def install(self, model: Any) -> None:
        """Add the wrappers to a model patcher that is this edit's own clone."""
        for kind, wrapper in (
            (WrappersMP.OUTER_SAMPLE, self.outer_sample),
            (WrappersMP.SAMPLER_SAMPLE, self.sampler_sample),
            (WrappersMP.PREDICT_NOISE, self.predict_noise),
            (WrappersMP.CALC_COND_BATCH, self.calc_cond_batch),
            (WrappersMP.APPLY_MODEL, self.apply_model),
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
        guider, branches = executor.class_obj, self.edit.branches
        check_rows(noise.shape[0], branches, "The latent")
        run = Run(
            check_sigmas(sigmas.tolist()),
            tuple(noise.shape),
            branches,
            self.layers,
            family=self.family,
            sigma_of=guider.model_patcher.get_model_object("model_sampling").percent_to_sigma,
        )
        again = _again(guider, noise, latent_image, sampler, sigmas, args, kwargs)
        mask = args[0] if args else kwargs.get("denoise_mask")
        run.guests = tuple(entry.begin(run, Start(noise, sampler, mask, again)) for entry in self.entries)
        if "context_handler" in guider.model_options:
            raise ValueError(
                "The model has Context Windows, which compute a batch in overlapping parts; Prompt-to-Prompt "
                "needs a pair's rows in one call. Take Context Windows out."
            )
        lay_out(guider.conds, noise.shape[0] // branches, branches)
        options = guider.model_options.setdefault("transformer_options", {})
        options[KEY] = run
        try:
            samples = executor(tie_rows(noise, branches), latent_image, sampler, sigmas, *args, **kwargs)
        finally:
            options.pop(KEY, None)
        if run.due and not run.injected:
            raise nothing_injected()
        for guest in run.guests:
            guest.end(samples)
        return samples

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
        run = run_of(extra_args["model_options"])
        sampler = executor.class_obj
        changed = tied_noise(sampler, noise, self.edit.branches, sigmas, extra_args)
        if run is not None:
            if self.family is not None:
                network = guider.inner_model.diffusion_model
                run.texts = stack_branches(guider.conds, self.edit, self.mark, self.family, network)
                run.lengths = {uuid: longest(texts) for uuid, texts in run.texts.items()}
            else:
                run.lengths = own_conditionings(guider.conds, self.edit, self.mark)
            if self.unguided:
                unguided_sources(guider.conds, run.lengths, self.edit.branches)
            for guest in run.guests:
                guest.conditioned(guider, (noise, *args, kwargs))
            if any(guest.acts_on_state for guest in run.guests):
                function = changed.get("sampler_function", getattr(sampler, "sampler_function", None))
                if function is None:
                    raise ValueError(
                        f"The sampler {type(sampler).__name__} does not step through a state that could be "
                        "edited; use one of ComfyUI's own samplers."
                    )
                changed["sampler_function"] = with_edited_state(function, run)
        before = {name: getattr(sampler, name) for name in changed}
        try:
            for name, value in changed.items():
                setattr(sampler, name, value)
            return executor(guider, sigmas, extra_args, callback, noise, *args, **kwargs)
        finally:
            for name, value in before.items():
                setattr(sampler, name, value)

    def predict_noise(self, executor: Any, x: Tensor, timestep: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """A new prediction begins: note its step. Only the first pass over the pair's prompts is edited."""
        run = run_of(executor.class_obj.model_options)
        if run is not None:
            run.predicted = False
            known, run.known_sigma = run.known_sigma, None
            run.at(float(timestep.flatten()[0]) if known is None else known)  # to read it waits for the GPU
        return executor(x, timestep, *args, **kwargs)

    def calc_cond_batch(
        self, executor: Any, model: Any, conds: list, x_in: Tensor, timestep: Tensor, model_options: dict
    ) -> list[Tensor]:
        """Open the model for injection while the pair's own prediction is computed; not for other passes."""
        run = run_of(model_options)
        if (
            run is None
            or run.predicted
            or not any(entry.get(KEY) == self.mark for cond in conds for entry in cond or ())
        ):
            return executor(model, conds, x_in, timestep, model_options)
        if run.branches > 2:
            run.groups = max(run.groups, fitting_groups(model, x_in, run), key=len)
        run.injecting = run.predicted = True
        try:
            return executor(model, conds, x_in, timestep, model_options)
        finally:
            run.injecting = False

    def apply_model(
        self,
        executor: Any,
        x: Tensor,
        timestep: Tensor,
        c_concat: Any = None,
        c_crossattn: Any = None,
        control: Any = None,
        transformer_options: dict | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """One forward: what the targets take from their source, in as many parts as memory asks for."""
        options = {} if transformer_options is None else transformer_options
        forward = Forward(x, (timestep, c_concat, c_crossattn, control), options, kwargs)
        run: Run | None = options.get(KEY)
        if run is None:
            return forward.to(executor)
        call = run.call(forward)
        taken = NOTHING
        if call is not None and run.injecting:
            taken = together([method.taken(call) for method in self.methods])
        sources = next(
            filter(None, (guest.sources(forward, call, taken) for guest in run.guests)), IN_BATCH
        )
        while True:
            groups = run.groups
            try:
                return self._in_parts(executor, run, forward, call, taken, sources)
            except Exception as error:
                whole = is_whole(run, forward)
                if whole or not host.is_out_of_memory(error) or not shrink_groups(run, groups):
                    raise
            comfy.model_management.soft_empty_cache()

    def _in_parts(
        self, executor: Any, run: Run, forward: Forward, call: Call | None, taken: Taken, sources: Sources
    ) -> Tensor:
        """The forward in groups of targets; what was read in it counts once all of them went well."""
        watched = call if run.injecting else None
        readings = [] if watched is None else [guest.watch(watched, taken) for guest in run.guests]
        read = [reading for reading in readings if reading is not None]
        sources.begin()
        pieces = parts(run, forward, sources)
        outs = []
        with one_after_another(run, pieces) as drawing:
            for number, (part, piece) in enumerate(pieces):
                with drawing(number):
                    part_call = None if call is None else call.of(part)
                    outs.append((part, _through(executor, piece, part_call, taken, read)))
        out = join(run, forward, sources, outs)
        sources.end(out)
        with run.lock:
            for reading in read:
                reading.commit()
        return out


def _through(
    executor: Any, forward: Forward, call: Call | None, taken: Taken, readings: list[Reading]
) -> Tensor:
    """A forward, or a part of one, in which the targets take from their source."""
    if call is None:
        return forward.to(executor)
    around: AbstractContextManager = nullcontext()
    if call.run.family is not None:
        network = executor.class_obj.diffusion_model
        options, reached = overrides.fill(call, taken, readings, forward, network)
        around = overrides.given(call, options, network)
    else:
        options, reached = attentions.fill(call, taken, readings, forward.options)
    if taken.features is not None:
        network = executor.class_obj.diffusion_model
        around = copied_features(network, taken.features, call.rows(everywhere=True))
    with around:
        out = Forward(forward.x, forward.args, options, forward.kwargs).to(executor)
    if attentions.due(call, taken):
        run = call.run
        with run.lock:
            run.due += 1
            run.injected += bool(reached)
        if not run.injected and not host.wraps_network(options):
            raise nothing_injected()  # with such wrappers the network may have been left out of this forward
    return out


def nothing_injected() -> ValueError:
    """What to say where attention was to be injected and no layer took any."""
    return ValueError(
        "Nothing was injected: the model ran without calling a single attention layer of those that should "
        "take their source's maps. A node that compiles the model (Torch Compile Model, TensorRT) or one "
        "that replaces its attention by its own is the likely cause; take it out."
    )


def check_sigmas(sigmas: list[float]) -> list[float]:
    """The sigmas themselves. Raises ValueError unless they descend: tau counts them as steps."""
    for n, (sigma, lower) in enumerate(zip(sigmas, sigmas[1:], strict=False)):
        if lower > sigma:
            raise ValueError(
                f"The sampler's sigmas rise from {sigma:.4g} to {lower:.4g} at step {n + 1}, but tau needs a "
                "descending list. Take out what flips or restarts it (Flip Sigmas, restart samplers)."
            )
    return sigmas


def _again(
    guider: Any,
    noise: Tensor,
    latent_image: Tensor,
    sampler: Any,
    sigmas: Tensor,
    args: tuple,
    kwargs: dict,
) -> Callable[[], object]:
    """What makes a run once more, from the arguments of the host's OUTER_SAMPLE; it keeps no model alive."""
    names = ("denoise_mask", "callback", "disable_pbar", "seed")
    given = dict(zip(names, args, strict=False)) | {name: kwargs[name] for name in names if name in kwargs}
    patcher = weakref.ref(guider.model_patcher)
    of_the_run = ("model_patcher", "model_options", "inner_model", "loaded_models", "conds")
    kept = {name: value for name, value in vars(guider).items() if name not in of_the_run}
    kind: Any = type(guider)

    def again() -> object:
        model = patcher()
        if model is None:
            raise ValueError(
                "The run ended without maps, and its model is no longer in memory. Sample again, for example "
                "with another seed, with the maps connected."
            )
        fresh = kind.__new__(kind)
        vars(fresh).update(kept, model_patcher=model, model_options=model.model_options)
        given["callback"] = latent_preview.prepare_callback(model, len(sigmas) - 1)
        return fresh.sample(noise, latent_image, sampler, sigmas, **given)

    return again
