"""The hooks: Prompt-to-Prompt on ComfyUI's model patcher, by wrappers under one key and nothing else.

A controller is immutable and may be shared or copied; what changes lives in a `Run`, made when sampling
begins and dropped when it ends, which travels in the run's own `transformer_options`.
"""

from __future__ import annotations

import uuid
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import comfy.ldm.modules.attention as host_attention
import latent_preview
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import Downsample, UNetModel, Upsample
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ..attention.blend import LocalBlend, regions, tokens_of
from ..attention.edit import Edit
from ..attention.maps import Tokens
from ..attention.plan import check_words
from ..attention.schedule import TauSchedule
from .blend import BlendState
from .encode import KEY, encoded
from .injection import Injection, PromptToPrompt
from .layout import lay_out
from .low_memory import fitting_groups, forward_in_groups, replaces_attention
from .maps import MapsHandle, MapStore, nearest
from .noise import takes_noise_sampler, tied_noise_sampler, with_tied_inpainting
from .pairing import check_rows, paired_conditioning, tie_rows, unguided_sources
from .reuse import GIGABYTE, SourceForward, begin_reuse
from .run import BlockKey, Call, Part, Run, begin_call, run_of
from .state import StateEdit, with_edited_state
from .trajectory import Trajectory, follow

SUPPORTED = "SD1.x, SD2.x, SDXL and other models of ComfyUI's UNetModel class with cross-attention to text"


@dataclass(frozen=True, eq=False)
class Controller:
    """One edit, for one model: the wrappers that the host calls.

    injection: what the targets take from their source in each forward of the model.
    blocks: the model's transformer blocks, with the downsampling of each.
    maps: where the words' maps go, as long as somebody has it: it leads back to the model.
    reads: tokens whose maps `state` needs during the run, or None.
    state: what acts on the sampler's state between steps, in this order.
    unguided: whether the sources' positive conditioning is their negative one too.
    reuse: bytes of host memory in which the sources of runs are kept for later ones; 0 for none.
    mark: what tells this controller's conditioning from others.
    """

    edit: Edit
    injection: Injection
    blocks: dict[BlockKey, int]
    maps: weakref.ref[MapsHandle]
    reads: Tokens | None = None
    state: tuple[StateEdit, ...] = ()
    unguided: bool = False
    reuse: int = 0
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
        maps = self.maps()
        wanted = maps is not None and maps.wanted
        run = Run(sigmas.tolist(), tuple(noise.shape), self.edit.branches, self._map_store(wanted))
        for edit in self.state:
            edit.begin(run, noise, sampler, args[0] if args else kwargs.get("denoise_mask"))
        guider = executor.class_obj
        if "context_handler" in guider.model_options:
            raise ValueError(
                "The model has Context Windows, which compute a batch in overlapping parts; Prompt-to-Prompt "
                "needs a pair's rows in one call. Take Context Windows out."
            )
        lay_out(guider.conds, noise.shape[0] // self.edit.branches, self.edit.branches)
        options = guider.model_options.setdefault("transformer_options", {})
        options[KEY] = run
        try:
            samples = executor(
                tie_rows(noise, self.edit.branches), latent_image, sampler, sigmas, *args, **kwargs
            )
        finally:
            options.pop(KEY, None)
        if run.reuse is not None:
            run.reuse.report()
        if maps is not None:
            maps.record(
                samples,
                run.maps.finish(run) if run.maps is not None and wanted else None,
                lambda: _sample_again(guider, noise, latent_image, sampler, sigmas, args, kwargs),
            )
        return samples

    def _map_store(self, wanted: bool) -> MapStore | None:
        """Where this run keeps maps: of all words if they are wanted, else of those that blending needs."""
        if wanted:
            coarse = {block: factor for block, factor in self.blocks.items() if factor > 1} or self.blocks
            return MapStore(self.edit, self.edit.tokens, coarse, keep_steps=True)
        if self.reads is not None:
            factor = nearest(self.blocks.values())
            blocks = {block: scale for block, scale in self.blocks.items() if scale == factor}
            return MapStore(self.edit, self.reads, blocks, keep_steps=False)
        return None

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
        if run is not None:
            run.lengths = self._own_conditionings(guider.conds)
            if self.unguided:
                unguided_sources(guider.conds, run.lengths, self.edit.branches)
            if self.reuse:
                run.reuse = begin_reuse(guider, run, (noise, *args, kwargs), self.reuse)
        sampler = executor.class_obj
        function = getattr(sampler, "sampler_function", None)
        options = getattr(sampler, "extra_options", None)
        changed: dict[str, Any] = {}
        if function is not None and options is not None and takes_noise_sampler(function):
            draw = self._noise_sampler(function, options, noise, sigmas, extra_args)
            changed["extra_options"] = {**options, "noise_sampler": draw}
        if function is not None and getattr(sampler, "inpaint_options", {}).get("random", False):
            function = changed["sampler_function"] = with_tied_inpainting(function, self.edit.branches)
        if run is not None and self.state:
            if function is None:
                raise ValueError(
                    f"The sampler {type(sampler).__name__} does not step through a state that could be "
                    "edited; use one of ComfyUI's own samplers."
                )
            changed["sampler_function"] = with_edited_state(function, run, self.state)
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
                    if "negative" not in name:  # PerpNegGuider's is "empty_negative_prompt"
                        tensors.append(entry["model_conds"]["c_crossattn"])
                    elif any(
                        _begins_with(entry["cross_attn"], cond)
                        for cond, _ in encoded(self.edit)[0].conditioning
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
        run = run_of(executor.class_obj.model_options)
        if run is not None:
            run.predicted = False
        return executor(*args, **kwargs)

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
        """Once per forward: the step, the pair's rows, and what they take from the source."""
        run: Run | None = transformer_options.get(KEY)
        if run is None:
            return executor(x, timesteps, context, y, control, transformer_options, **kwargs)
        network, args = executor.class_obj, (timesteps, context, y, control)
        sigma = 0.0
        if run.injecting or run.reuse is not None:  # who needs it; to read it is to wait for the GPU
            sigma = float(transformer_options["sigmas"][0])

        def forward(part: Part, x: Tensor, args: tuple, options: dict, kwargs: dict) -> Tensor:
            call = begin_call(x, args[1], options, sigma, part, network)
            if call is None:
                return executor(x, *args, options, **kwargs)
            with self.injection.injected(call) as options:
                if call.run.maps is not None:
                    options = call.run.maps.watch(call, self.injection, options)
                return executor(x, *args, options, **kwargs)

        if run.reuse is None or x.shape[0] % run.branches:
            return forward_in_groups(run, x, args, transformer_options, kwargs, forward)
        sources, roles = x[:: run.branches], _roles(run, transformer_options)
        known = run.reuse.next(sources, sigma, roles)
        everyone = Part(tuple(range(run.branches - 1)))
        if known is not None and not _sees_all_rows(transformer_options):
            call = begin_call(x, context, transformer_options, sigma, everyone, network)
            if call is None or self._suffices(call, known):
                run.reuse.reused += 1
                return forward_in_groups(run, x, args, transformer_options, kwargs, forward, known)
        kept = run.reuse.begin(sources, sigma, roles, known)
        out = forward_in_groups(run, x, args, transformer_options, kwargs, forward, kept=kept)
        run.reuse.keep(kept, out[:: run.branches])
        return out

    def _suffices(self, call: Call, known: SourceForward) -> bool:
        """Whether what is known of the sources in a forward is all that the targets take from them."""
        reads = self.injection.reads(call, known.grids)
        return call.run.maps is None and reads is not None and reads <= known.attention.keys()


def control(
    model: Any,
    edit: Edit,
    tau: TauSchedule,
    blend: LocalBlend | None = None,
    trajectory: Trajectory | None = None,
    maps: MapsHandle | None = None,
    reuse: float = 0.0,
) -> tuple[Any, list]:
    """A clone of the model that samples the edit, and the positive CONDITIONING that goes with it.

    maps: where the runs are to leave their words' maps. reuse: host memory, in GB (2^30 bytes), in which runs
    keep their sources for later runs with the same ones.
    Raises ValueError for an unsupported model, a model with a controller on it or a trajectory of another
    model, WordNotFound for words of the schedule that are in no target or of the blend that are in no prompt.
    """
    check_words(edit, tau)
    blocks = cross_attention_blocks(model.get_model_object("diffusion_model"))
    follows = follow(model, trajectory)
    state: list[StateEdit] = [] if follows is None else [follows]
    reads = None
    if blend is not None:
        found = regions(blend, edit)
        state.append(BlendState(blend, found))
        reads = tokens_of(found, edit.branches) if blend.needs_maps else None
    controller = Controller(
        edit,
        PromptToPrompt(edit, tau, tuple(blocks)),
        blocks,
        weakref.ref(maps or MapsHandle()),
        reads,
        tuple(state),
        unguided=follows is not None and follows.trajectory.reconstruction == "negative prompt",
        reuse=int(reuse * GIGABYTE),
    )
    return controlled(model, controller)


def controlled(model: Any, controller: Controller) -> tuple[Any, list]:
    """A clone of the model with the controller on it, and the positive CONDITIONING that goes with it.

    Raises ValueError for a model that has a controller already.
    """
    if model.get_wrappers(WrappersMP.OUTER_SAMPLE, KEY):
        raise ValueError(
            "The model already comes from an Attention Controller or Plug-and-Play Features; "
            "connect the model from before it. One node takes several targets."
        )
    patched = model.clone()
    controller.install(patched)
    return patched, paired_conditioning(controller.edit, controller.mark)


def cross_attention_blocks(diffusion_model: torch.nn.Module) -> dict[BlockKey, int]:
    """A U-Net's transformer blocks, as the host's patches name them -> their downsampling of the latent.

    Keys are (name, block, depth). Raises ValueError that names the class of a model without them.
    """
    blocks: dict[BlockKey, int] = {}
    if isinstance(diffusion_model, UNetModel):
        factor = 1
        middle = [diffusion_model.middle_block] if diffusion_model.middle_block is not None else []
        for name, modules in (
            ("input", diffusion_model.input_blocks),
            ("middle", middle),
            ("output", diffusion_model.output_blocks),
        ):
            for number, module in enumerate(modules):
                for layer in module:
                    if type(layer) is host_attention.SpatialTransformer:
                        depths = range(len(layer.transformer_blocks))
                        blocks |= {(name, number, depth): factor for depth in depths}
                    changes = getattr(layer, "h_upd", layer)  # residual blocks may do it themselves
                    if isinstance(changes, Downsample):
                        factor *= 2
                    elif isinstance(changes, Upsample):
                        factor //= 2
    if not blocks:
        raise ValueError(
            f"The model's class {type(diffusion_model).__name__} is not supported; "
            f"Prompt-to-Prompt works on {SUPPORTED}."
        )
    return blocks


def _sample_again(
    guider: Any, noise: Tensor, latent_image: Tensor, sampler: Any, sigmas: Tensor, args: tuple, kwargs: dict
) -> Tensor:
    """Repeat a run, given what the host's OUTER_SAMPLE was called with; progress goes to the running node."""
    names = ("denoise_mask", "callback", "disable_pbar", "seed")
    given = dict(zip(names, args, strict=False)) | {name: kwargs[name] for name in names if name in kwargs}
    given["callback"] = latent_preview.prepare_callback(guider.model_patcher, len(sigmas) - 1)
    return guider.sample(noise, latent_image, sampler, sigmas, **given)


def _roles(run: Run, options: dict) -> tuple:
    """Whose conditionings a forward computes, which with its sigma tells it from the run's others."""
    own = [chunk in run.lengths for chunk in options["uuids"]]
    return (*options["cond_or_uncond"], *own, run.injecting)


def _sees_all_rows(options: dict) -> bool:
    """Whether another node acts inside attention, where it may mix the batch's rows or split them."""
    patches = options.get("patches", {})
    return replaces_attention(options) or bool(patches.get("attn1_patch") or patches.get("attn2_patch"))


def _has_own_tensors(entry: dict) -> bool:
    """Whether a conditioning's tensors are those that its options were made with."""
    used, made = entry["model_conds"].get("c_crossattn"), entry.get("cross_attn")
    return used is not None and made is not None and used.cond.shape == made.shape and _same(used.cond, made)


def _begins_with(cond: Tensor, source: Tensor) -> bool:
    return cond.shape[1] >= source.shape[1] and _same(cond[:1, : source.shape[1]], source)


def _same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.to(b.device, b.dtype), b)
