"""A node pack for tests: a model of a kind that is not supported."""

import comfy.model_base
import comfy.model_patcher
import comfy.supported_models
import torch

CONFIG = {
    "stable_cascade_stage": "c",
    "c_cond": 64,
    "c_hidden": [64, 64],
    "nhead": [2, 2],
    "blocks": [[1, 1], [1, 1]],
}


class CascadeModel:
    RETURN_TYPES = ("MODEL",)
    FUNCTION = "make"
    CATEGORY = "tests"

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {"required": {}}

    def make(self) -> tuple:
        config = comfy.supported_models.Stable_Cascade_C(CONFIG)
        config.set_inference_dtype(torch.float32, None)
        cpu = torch.device("cpu")
        model = comfy.model_base.StableCascade_C(config, device=cpu)
        return (comfy.model_patcher.ModelPatcher(model, cpu, cpu),)


NODE_CLASS_MAPPINGS = {"TestCascadeModel": CascadeModel}
