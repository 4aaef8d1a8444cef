"""A node pack for tests: a model of a kind that has no cross-attention layers to hook."""

import comfy.model_base
import comfy.model_patcher
import comfy.supported_models
import torch

CONFIG = {
    "in_channels": 16,
    "patch_size": 2,
    "depth": 1,
    "input_size": None,
    "adm_in_channels": 8,
    "pos_embed_max_size": 4,
    "num_patches": 16,
    "qk_norm": "rms",
    "context_embedder_config": {
        "target": "torch.nn.Linear",
        "params": {"in_features": 4, "out_features": 64},
    },
}


class JointAttentionModel:
    RETURN_TYPES = ("MODEL",)
    FUNCTION = "make"
    CATEGORY = "tests"

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {"required": {}}

    def make(self) -> tuple:
        config = comfy.supported_models.SD3(CONFIG)
        config.set_inference_dtype(torch.float32, None)
        cpu = torch.device("cpu")
        return (comfy.model_patcher.ModelPatcher(comfy.model_base.SD3(config, device=cpu), cpu, cpu),)


NODE_CLASS_MAPPINGS = {"TestJointAttentionModel": JointAttentionModel}
