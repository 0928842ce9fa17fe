"""Tiny networks of the classes that real backbones have, saved as transformers saves them."""

from pathlib import Path
from typing import Any

import torch

SHAPE = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 8}
VISION: dict[str, dict[str, Any]] = {
    "siglip": {"model_type": "siglip_vision_model", "image_size": 32, **SHAPE},
    "siglip2": {"model_type": "siglip2_vision_model", "num_patches": 16, **SHAPE},
    "dinov3": {"model_type": "dinov3_vit", "image_size": 32, "num_register_tokens": 3, **SHAPE},
    "dinov2": {"model_type": "dinov2", "image_size": 32, **SHAPE},
    "clip": {"model_type": "clip_vision_model", "image_size": 32, **SHAPE},
    "vit": {"model_type": "vit", "image_size": 32, **SHAPE},
}
IMAGE, START, END = 257, 258, 259
WORDS = {
    "vocab_size": 264,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
    "bos_token_id": 1,
    "eos_token_id": 1,
}
EYES = {"depth": 2, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "patch_size": 8, "out_hidden_size": 16}
NUMBERS = {"image_token_id": IMAGE, "vision_start_token_id": START, "vision_end_token_id": END, "video_token_id": 260}
SEEING: dict[str, dict[str, Any]] = {
    "qwen3_vl": {
        "model_type": "qwen3_vl",
        "text_config": {**WORDS, "head_dim": 8},
        "vision_config": {**EYES, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
        **NUMBERS,
    },
    "qwen2_5_vl": {
        "model_type": "qwen2_5_vl",
        "text_config": WORDS,
        "vision_config": {**EYES, "window_size": 32, "fullatt_block_indexes": [1]},
        **NUMBERS,
    },
    "qwen2_vl": {
        "model_type": "qwen2_vl",
        "text_config": WORDS,
        "vision_config": {
            "depth": 2,
            "embed_dim": 16,
            "hidden_size": 16,
            "mlp_ratio": 2,
            "num_heads": 2,
            "patch_size": 8,
        },
        **NUMBERS,
    },
    "qwen3_5": {
        "model_type": "qwen3_5",
        "text_config": {
            **WORDS,
            "head_dim": 16,
            "layer_types": ["linear_attention", "full_attention"],
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 2,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "mrope_section": [2, 1, 1],
                "partial_rotary_factor": 0.5,
            },
        },
        "vision_config": {**EYES, "num_position_embeddings": 16},
        **NUMBERS,
    },
}


def network(config: dict[str, Any], seed: int = 1) -> Any:
    """A network of a configuration with random weights."""
    from transformers import AutoConfig, AutoModel

    torch.manual_seed(seed)
    values = dict(config)
    return AutoModel.from_config(AutoConfig.for_model(values.pop("model_type"), **values)).eval()


def saved(net: Any, folder: Path, mean: float = 0.4, std: float = 0.3) -> str:
    """The folder, with weights, configuration and preprocessor."""
    net.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(f'{{"image_mean": {[mean] * 3}, "image_std": {[std] * 3}}}')
    return str(folder)
