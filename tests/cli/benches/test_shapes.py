"""The published shapes as data, and checkpoints of random weights in their form."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers

from cli.benches.checkpoint import ensure_checkpoint, write_checkpoint
from cli.benches.shapes import FOLDER, Part, shape_config, shape_names
from cli.benches.tokenizer import tokenizer_file
from engine.checkpoints import Checkpoint
from engine.config import EngineConfig
from engine.engine import Engine
from engine.errors import CheckpointError, InvalidConfig
from engine.families import CheckpointConfig, family_for
from engine.request import Chunk, Image, Message, Request, SamplingParams, Text
from engine.spec import ModelSpec

BILLION = 1e9


def _spec(shape: str, part: Part) -> ModelSpec:
    config = shape_config(shape, part)
    return family_for(config).spec(CheckpointConfig(config, {}, {}))


def _weights(shape: str, part: Part) -> int:
    config = shape_config(shape, part)
    return sum(int(np.prod(weight.shape)) for weight in family_for(config).weights(_spec(shape, part)))


@pytest.mark.parametrize(
    ("shape", "part", "billions"),
    [
        ("qwen2-vl-2b", "whole", 2.209),  # as their model cards say
        ("qwen2-vl-2b", "plain", 1.544),
        ("qwen2.5-vl-7b", "plain", 7.616),
        ("smolvlm-256m", "whole", 0.256),
        ("smolvlm-2.2b", "whole", 2.246),
    ],
)
def test_a_shape_has_as_many_weights_as_was_published(shape: str, part: Part, billions: float) -> None:
    assert _weights(shape, part) / BILLION == pytest.approx(billions, abs=0.002)


def test_a_tower_alone_is_the_whole_shapes() -> None:
    for shape in ("qwen2-vl-2b", "qwen2.5-vl-7b", "qwen3-vl-2b", "smolvlm-256m"):
        whole, alone = _spec(shape, "whole"), _spec(shape, "tower")
        assert alone.vision == whole.vision
        assert alone.decoder == replace(whole.decoder, layers=3)


def test_a_decoder_alone_has_the_same_layers_with_either_rotary() -> None:
    plain, mrope = _spec("qwen2-vl-2b", "plain").decoder, _spec("qwen2-vl-2b", "mrope").decoder
    assert (plain.rope.axes, mrope.rope.axes) == (1, 3)
    assert (plain.layers, plain.hidden, plain.kv_heads, plain.tied_head) == (28, 1536, 2, True)
    assert (mrope.layers, mrope.hidden, mrope.kv_heads, mrope.tied_head) == (28, 1536, 2, True)


def test_special_tokens_are_inside_every_vocabulary_and_name_the_image_token() -> None:
    for shape in set(shape_names()) - {"demo"}:
        special = json.loads((FOLDER / shape / "special_tokens.json").read_text())
        config = shape_config(shape, "whole")
        assert max(special.values()) < config.get("text_config", config)["vocab_size"]
        assert config["image_token_id"] in special.values()


def test_an_unknown_shape_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfig, match="known shapes: demo, qwen2-vl-2b"):
        ensure_checkpoint("gpt-5", "whole", tmp_path)


def test_an_architecture_without_a_family_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="mamba"):
        write_checkpoint(tmp_path / "models" / "new", {"model_type": "mamba"}, {})
    assert not list(tmp_path.iterdir())


def test_rotary_of_three_axes_is_refused_for_a_decoder_that_has_one(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfig, match="plain rotary"):
        ensure_checkpoint("smolvlm-256m", "mrope", tmp_path)


def test_every_number_of_the_vocabulary_is_a_text_of_its_own() -> None:
    special = {"<|start|>": 1, "<|image|>": 998}
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(tokenizer_file(1000, special)))
    assert {number for text, number in special.items() if tokenizer.token_to_id(text) == number} == {1, 998}
    ordinary = sorted(set(range(1000)) - set(special.values()))
    assert len({tokenizer.id_to_token(number) for number in ordinary}) == len(ordinary)
    assert all(tokenizer.decode([number]).strip() for number in ordinary[256:])
    ids = tokenizer.encode("Ünïcode <|start|>?").ids
    assert len(ids) == len("Ünïcode ?".encode()) + 1
    assert tokenizer.decode(ids, skip_special_tokens=False) == "Ünïcode <|start|>?"


def test_a_text_is_cut_into_words_as_a_real_tokenizer_cuts_it() -> None:
    """The library remembers 10,000 words. Were whole prompts words, what it remembers would grow for minutes."""
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(tokenizer_file(1000, {})))
    words = [word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str("a page of text, no word")]
    assert words == ["a", "Ġpage", "Ġof", "Ġtext", ",", "Ġno", "Ġword"]


def _tiny(shape: str, part: Part) -> dict[str, Any]:
    config = shape_config(shape, part)
    text = config.get("text_config", config)
    text |= {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2, "vocab_size": 1000}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "bos_token_id": 2, "eos_token_id": 3}
    if "rope_scaling" in text:
        text["rope_scaling"] = {"type": "mrope", "mrope_section": [4, 6, 6]}
    return config


def _say(engine: Engine, model: str, *parts: Text | Image) -> tuple[str, int]:
    sampling = SamplingParams(max_tokens=12, ignore_eos=True)
    *chunks, finished = engine.submit(Request(model, (Message("user", parts),), sampling))
    assert all(isinstance(chunk, Chunk) for chunk in chunks)
    return "".join(chunk.text for chunk in chunks if isinstance(chunk, Chunk)), finished.usage.completion_tokens  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("shape", "part"), [("qwen2-vl-2b", "plain"), ("qwen2-vl-2b", "mrope"), ("smolvlm-256m", "plain")]
)
def test_the_engine_and_transformers_run_random_weights_alike(shape: str, part: Part, tmp_path: Path) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    folder = tmp_path / "models" / "tiny"
    special = {"<|a|>": 2, "<|im_end|>": 3, "<|image_pad|>": 4}
    extra = {name: (FOLDER / shape / name).read_bytes() for name in ("preprocessor_config.json", "chat_template.jinja")}
    config = _tiny(shape, part) | ({"image_token_id": 4} if part == "mrope" else {})
    if part == "mrope":
        config["vision_config"] |= {"hidden_size": 128}
    write_checkpoint(folder, config, special, extra)
    assert Checkpoint.open(folder).spec.decoder.hidden == 128
    engine = Engine(EngineConfig(storage=tmp_path, precision="fp32", cache_enabled=False))
    try:
        text, count = _say(engine, "tiny", Text("hello"))
        prompt = engine.load("tiny").prompts.build((Message("user", (Text("hello"),)),), [])
        decode = engine.load("tiny").prompts.tokenizer.decode
    finally:
        engine.close()
    assert count == 12
    auto = AutoModelForCausalLM if part == "plain" else AutoModelForImageTextToText
    assert AutoConfig.from_pretrained(folder).model_type == config["model_type"]
    model = auto.from_pretrained(folder, dtype=torch.float32)
    ids = torch.from_numpy(prompt.token_ids)[None]
    with torch.inference_mode():
        for _ in range(12):
            logits = model(input_ids=ids).logits[0, -1]
            assert torch.isfinite(logits).all()
            logits[3] = -torch.inf
            ids = torch.cat([ids, logits.argmax().view(1, 1)], 1)
    assert text == decode(ids[0, len(prompt.token_ids) :].tolist())
