"""The nodes, and the extension that presents them to ComfyUI."""

from comfy_api.latest import ComfyExtension, io

from .control import AttentionController, LocalBlendNode, TauScheduler
from .demo import DemoModel
from .features import FeatureInjection
from .grid import ComparisonGrid
from .invert import InvertImage
from .maps import AttentionMaps
from .prompts import AddTarget, PromptPair, TokenReweight
from .sample import PairedLatent, PairedSampler, SplitBranches
from .save import SavePairs
from .sweep import TauSweep

NODES: list[type[io.ComfyNode]] = [
    PromptPair,
    AddTarget,
    TokenReweight,
    TauScheduler,
    TauSweep,
    LocalBlendNode,
    AttentionController,
    PairedLatent,
    PairedSampler,
    SplitBranches,
    AttentionMaps,
    InvertImage,
    FeatureInjection,
    ComparisonGrid,
    SavePairs,
    DemoModel,
]


class PromptToPromptExtension(ComfyExtension):
    """All nodes of the pack."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return NODES
