"""A GGUF file's tensors, numbers and vocabulary become a checkpoint that the engine opens."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from transformers import PreTrainedModel

from engine.checkpoints import Checkpoint
from engine.errors import CheckpointError
from engine.prompts.tokenizer import Tokenizer
from evaluation.gguf_checkpoint import byte_level_tokenizer, checkpoint_tensors, model_config, write_gguf_checkpoint
from tests.runtime import models

LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
BYTES = ["<|end|>", "<|start|>", "h", "e", "l", "o", "Ġ", "1", "2", "he", "ll", "hell", "hello", "Ġhello", "12"]
MERGES = ["h e", "l l", "he ll", "hell o", "Ġ hello", "1 2"]


@dataclass
class Stored:
    name: str
    data: NDArray[Any]
    tensor_type: str = "F32"


def as_stored(data: NDArray[Any], kind: str) -> NDArray[np.float32]:
    assert kind == "F32"
    return data


def written(model: PreTrainedModel) -> list[Stored]:
    """As convert_hf_to_gguf.py names tensors and orders the rows of queries and keys."""
    stored = []
    for name, tensor in model.state_dict().items():
        data = tensor.numpy()
        if name == "lm_head.weight":
            continue
        if name.startswith("model.layers."):
            _, _, layer, rest = name.split(".", 3)
            module, kind = rest.rsplit(".", 1)
            heads = {"attn_q": 4, "attn_k": 2}.get(LAYER[module])
            if heads:
                data = data.reshape(heads, 2, data.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(data.shape)
            stored.append(Stored(f"blk.{layer}.{LAYER[module]}.{kind}", data))
        else:
            top = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
            stored.append(Stored(top[name], data))
    return stored


@pytest.fixture
def model() -> PreTrainedModel:
    return models.randomise(models.llama(tie_word_embeddings=True, vocab_size=len(BYTES)))


@pytest.fixture
def values() -> dict[str, Any]:
    return {
        "general.architecture": "llama",
        "llama.embedding_length": 64,
        "llama.feed_forward_length": 96,
        "llama.block_count": 2,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.context_length": 256,
        "llama.rope.freq_base": 10000.0,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": BYTES,
        "tokenizer.ggml.merges": MERGES,
        "tokenizer.ggml.token_type": [3, 3] + [1] * (len(BYTES) - 2),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 0,
        "tokenizer.chat_template": "{{ messages }}",
    }


def test_every_tensor_comes_back_under_its_name_and_in_its_order(
    model: PreTrainedModel, values: dict[str, Any]
) -> None:
    found = checkpoint_tensors(values, written(model), as_stored)
    wanted = {name: tensor.numpy() for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        np.testing.assert_array_equal(found[name], tensor, err_msg=name)


def test_the_folder_is_a_checkpoint_that_the_engine_opens(
    model: PreTrainedModel, values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = {name: SimpleNamespace(contents=lambda value=value: value) for name, value in values.items()}
    reader = SimpleNamespace(fields=fields, tensors=written(model))
    package = SimpleNamespace(GGUFReader=lambda file: reader, quants=SimpleNamespace(dequantize=as_stored))
    monkeypatch.setitem(sys.modules, "gguf", package)
    write_gguf_checkpoint(tmp_path / "model.gguf", tmp_path / "made")
    checkpoint = Checkpoint.open(tmp_path / "made")
    assert checkpoint.spec.decoder.tied_head
    assert checkpoint.spec.tokens.eos == (0,)
    assert checkpoint.spec.decoder.rope.inv_freq[1] == pytest.approx(10000 ** (-2 / 16))
    assert Tokenizer.load(tmp_path / "made").encode("<|start|>hello hello12") == [1, 12, 13, 7, 8]
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


def test_digits_are_tokens_of_their_own_and_text_comes_back(values: dict[str, Any]) -> None:
    tokenizer = byte_level_tokenizer(values)
    encoded = tokenizer.encode("hello hello<|end|>1212")
    assert encoded.ids == [12, 13, 0, 7, 8, 7, 8]
    assert tokenizer.decode(encoded.ids) == "hello hello1212"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"general.architecture": "gemma3"}, "gemma3"),
        ({"llama.block_count": None}, "llama.block_count"),
    ],
)
def test_another_architecture_and_a_missing_number_are_said(
    values: dict[str, Any], change: dict[str, Any], said: str
) -> None:
    changed = {name: value for name, value in (values | change).items() if value is not None}
    with pytest.raises(CheckpointError, match=said):
        model_config(changed, tied=True)


def test_an_unknown_tokenizer_and_an_unknown_tensor_are_said(values: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match="qwen2"):
        byte_level_tokenizer(values | {"tokenizer.ggml.pre": "qwen2"})
    with pytest.raises(CheckpointError, match="ffn_gate_exps"):
        checkpoint_tensors(values, [Stored("blk.0.ffn_gate_exps.weight", np.zeros((2, 2), np.float32))], as_stored)


def test_a_conversion_that_fails_leaves_nothing(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = {"general.architecture": SimpleNamespace(contents=lambda: "bert")}
    fields |= {"llama.attention.head_count": SimpleNamespace(contents=lambda: 4)}
    package = SimpleNamespace(
        GGUFReader=lambda file: SimpleNamespace(fields=fields, tensors=[]), quants=SimpleNamespace(dequantize=as_stored)
    )
    monkeypatch.setitem(sys.modules, "gguf", package)
    with pytest.raises(CheckpointError, match="bert"):
        write_gguf_checkpoint(tmp_path / "model.gguf", tmp_path / "made")
    assert not list(tmp_path.iterdir())
