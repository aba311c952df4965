"""Shapes of published models: their configuration files without their weights, under benchmarks/shapes/."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from engine.errors import InvalidConfig

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks" / "shapes"
BUNDLED = "demo"  # its weights are there; it stands in for a shape where there is no GPU

Part = Literal["whole", "plain", "mrope", "tower"]
_TEXT_MODELS = {
    "qwen2_vl": ("qwen2", "Qwen2ForCausalLM"),
    "qwen2_5_vl": ("qwen2", "Qwen2ForCausalLM"),
    "qwen3_vl": ("qwen3", "Qwen3ForCausalLM"),
    "idefics3": ("llama", "LlamaForCausalLM"),
}
_NOT_TEXT = ("vision_config", "rope_scaling", "architectures")
_FEWEST_LAYERS = 3  # of a decoder: Qwen3-VL's tower gives features to so many
_SMALLEST_TOWER = {"depth": 1, "embed_dim": 64, "num_heads": 1}


def shape_names() -> list[str]:
    return [BUNDLED, *sorted(path.name for path in FOLDER.iterdir() if path.is_dir())]


def shape_config(name: str, part: Part) -> dict[str, Any]:
    """`config.json` of a shape, or of its decoder or tower alone.

    "plain" is the decoder as a text model with one rotary position per token. "mrope" keeps the three positions of
    the Qwen-VL decoders, which need a tower to be an architecture of their own: the smallest that is one. "tower" is
    the tower with the first layers of its decoder. Raises InvalidConfig for an unknown shape, or one whose positions
    were never of three axes.
    """
    if name not in shape_names() or name == BUNDLED:
        raise InvalidConfig(f"unknown shape {name!r}; known shapes: {', '.join(shape_names())}")
    config: dict[str, Any] = json.loads((FOLDER / name / "config.json").read_text(encoding="utf-8"))
    if part == "plain":
        return _text_model(config)
    if part == "tower":
        few = {"num_hidden_layers": _FEWEST_LAYERS}
        return config | ({"text_config": config["text_config"] | few} if "text_config" in config else few)
    return config if part == "whole" else _smallest_tower(name, config)


def _text_model(config: dict[str, Any]) -> dict[str, Any]:
    model_type, architecture = _TEXT_MODELS[config["model_type"]]
    text = {key: value for key, value in config.get("text_config", config).items() if key not in _NOT_TEXT}
    tied = config["tie_word_embeddings"]
    return text | {"model_type": model_type, "architectures": [architecture], "tie_word_embeddings": tied}


def _smallest_tower(name: str, config: dict[str, Any]) -> dict[str, Any]:
    match config["model_type"]:
        case "qwen2_vl" | "qwen2_5_vl":  # the same decoder
            tower = {"mlp_ratio": 1, "in_chans": 3, "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2}
            tower |= _SMALLEST_TOWER | {"hidden_size": config["hidden_size"]}
            architecture = "Qwen2VLForConditionalGeneration"
            return config | {"model_type": "qwen2_vl", "architectures": [architecture], "vision_config": tower}
        case "qwen3_vl":
            return config | {"vision_config": config["vision_config"] | {"depth": 1, "deepstack_visual_indexes": []}}
        case _:
            raise InvalidConfig(f"the decoder of {name} has plain rotary positions; leave --rotary out")
