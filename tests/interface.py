"""What shared workflows depend on: every node's inputs and outputs, with their order, types and defaults.

Nothing here may go, move or change. New inputs go at the end, optional, with a default under which old
workflows give the same images; new outputs go at the end.
"""

from __future__ import annotations

from typing import Any

INTERFACE = {
    "P2PPromptPair": (
        "clip: CLIP, source: STRING, target: STRING, mode: auto | swap | refine",
        "edit: P2P_EDIT",
    ),
    "P2PAddTarget": (
        "clip: CLIP, edit: P2P_EDIT, target: STRING, mode: auto | swap | refine",
        "edit: P2P_EDIT",
    ),
    "P2PTokenReweight": (
        "edit: P2P_EDIT, words: STRING, scale: FLOAT = 1.0, target: INT = 0",
        "edit: P2P_EDIT",
    ),
    "P2PTauScheduler": (
        "cross_start: FLOAT = 0.0, cross_end: FLOAT = 0.8, self_start: FLOAT = 0.0, self_end: FLOAT = 0.4, "
        "fade: FLOAT = 0.0, self_resolution: FLOAT = 0.5, words: STRING, "
        "[self_mode: map | mutual | map in both halves], [mutual_layer: FLOAT = 0.63], "
        "[measure: steps | percent]",
        "tau: P2P_TAU",
    ),
    "P2PTauSweep": (
        "edit: P2P_EDIT, tau: P2P_TAU, count: INT = 5, parameter: cross_end | self_end | scale, "
        "[words: STRING]",
        "edit: P2P_EDIT, labels: STRING",
    ),
    "P2PLocalBlend": (
        "words: STRING, source_words: STRING, exclude: STRING, threshold: FLOAT = 0.3, start: FLOAT = 0.2, "
        "[mask: MASK], [softness: FLOAT = 0.0]",
        "blend: P2P_BLEND",
    ),
    "P2PAttentionController": (
        "model: MODEL, edit: P2P_EDIT, tau: P2P_TAU, "
        "[blend: P2P_BLEND], [trajectory: P2P_TRAJECTORY], [reuse_gb: FLOAT = 0.0]",
        "model: MODEL, positive: CONDITIONING, maps: P2P_MAPS",
    ),
    "P2PPairedLatent": ("latent: LATENT, edit: P2P_EDIT", "latent: LATENT"),
    "P2PSampler": (
        "model: MODEL, edit: P2P_EDIT, tau: P2P_TAU, negative: CONDITIONING, latent: LATENT, seed: INT = 0, "
        "steps: INT = 20, cfg: FLOAT = 7.0, sampler_name: COMBO, scheduler: COMBO, denoise: FLOAT = 1.0, "
        "[blend: P2P_BLEND], [trajectory: P2P_TRAJECTORY], [reuse_gb: FLOAT = 0.0]",
        "source: LATENT, targets: LATENT, maps: P2P_MAPS, paired: LATENT",
    ),
    "P2PSplitBranches": ("images: IMAGE, edit: P2P_EDIT", "source: IMAGE, targets: IMAGE"),
    "P2PAttentionMaps": (
        "maps: P2P_MAPS, samples: LATENT, words: STRING, branch: INT = 0, "
        "[image: IMAGE], [layers: quarter | half | eighth | all], [start: FLOAT = 0.0], [end: FLOAT = 1.0]",
        "heat-maps: IMAGE, mask: MASK",
    ),
    "P2PInvert": (
        "model: MODEL, positive: CONDITIONING, latent: LATENT, steps: INT = 20, scheduler: COMBO, "
        "[cfg: FLOAT = 1.0], [refinement: INT = 0], [reconstruction: direct | negative prompt], "
        "[negative: CONDITIONING]",
        "trajectory: P2P_TRAJECTORY, noise: LATENT",
    ),
    "P2PFeatureInjection": (
        "model: MODEL, edit: P2P_EDIT, feature_end: FLOAT = 0.8, attention_end: FLOAT = 0.5, "
        "[trajectory: P2P_TRAJECTORY], [source_conditioning: CONDITIONING]",
        "model: MODEL, positive: CONDITIONING, maps: P2P_MAPS",
    ),
    "P2PComparisonGrid": (
        "images: IMAGE, columns: INT = 2, [labels: STRING], [images_2: IMAGE], [images_3: IMAGE], "
        "[images_4: IMAGE]",
        "image: IMAGE",
    ),
    "P2PSavePairs": (
        "edit: P2P_EDIT, source: IMAGE, targets: IMAGE, filename_prefix: STRING = pairs/pair, "
        "[instruction: STRING]",
        "",
    ),
    "P2PDemoModel": ("", "model: MODEL, clip: CLIP, vae: VAE, picture: IMAGE"),
}
"""Node id -> (inputs, outputs). [Optional inputs] follow those that are required, as the page orders them.

A default is left out where it is empty or the first of the options.
"""

HOSTS_CHOICES = ("sampler_name", "scheduler")
"""Inputs whose options are the host's."""


def interface_of(info: dict[str, Any]) -> tuple[str, str]:
    """A node's inputs and outputs in the notation of `INTERFACE`.

    info: the node as the host's /object_info describes it.
    """
    inputs = []
    for group, frame in (("required", "{}"), ("optional", "[{}]")):
        for name in info["input_order"].get(group, []):
            kind, options = info["input"][group][name]
            choices = kind if isinstance(kind, list) else options.get("options", [])
            default = options.get("default")
            written = "COMBO" if name in HOSTS_CHOICES else " | ".join(choices) or kind
            if default not in (None, "", *choices[:1]):
                written += f" = {default}"
            inputs.append(frame.format(f"{name}: {written}"))
    outputs = [f"{name}: {kind}" for name, kind in zip(info["output_name"], info["output"], strict=True)]
    return ", ".join(inputs), ", ".join(outputs)
