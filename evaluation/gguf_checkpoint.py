"""A GGUF file of a Llama as a checkpoint folder: dequantised weights in fp32, configuration and tokenizer.

Source: the file's layout as the package gguf reads it, and the names and the order of queries' and keys' rows as
llama.cpp's convert_hf_to_gguf.py writes them (class LlamaModel), turned back here.
"""

from __future__ import annotations

import importlib
import json
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from engine.errors import CheckpointError

Values = Mapping[str, Any]
Dequantise = Callable[[NDArray[Any], Any], NDArray[np.float32]]

_TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_MODULES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_CONTROL = 3  # token_type of tokens that are no text
# How llama.cpp splits text of each named kind before merging (llama_vocab, LLAMA_VOCAB_PRE_TYPE_SMOLLM).
_SPLITS: dict[str, Callable[[], pre_tokenizers.PreTokenizer]] = {
    "smollm": lambda: pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
}


class StoredTensor(Protocol):
    """As gguf.ReaderTensor has it: `data` holds rows in the order of the checkpoint, in the file's own encoding."""

    name: str
    data: NDArray[Any]
    tensor_type: Any


def write_gguf_checkpoint(file: Path, folder: Path) -> None:
    """Make `folder`, which must not be there, from a GGUF file; all at once, by rename.

    Raises CheckpointError for a file of another architecture or tokenizer, ModuleNotFoundError without gguf.
    """
    gguf = importlib.import_module("gguf")  # not among the requirements: only evaluation reads such files
    reader = gguf.GGUFReader(file)
    values = {name: field.contents() for name, field in reader.fields.items()}
    partial = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        _write_folder(partial, values, reader.tensors, gguf.quants.dequantize)
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _write_folder(folder: Path, values: Values, tensors: Iterable[StoredTensor], dequantise: Dequantise) -> None:
    weights = checkpoint_tensors(values, tensors, dequantise)
    config = model_config(values, tied="lm_head.weight" not in weights)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    (folder / "tokenizer_config.json").write_text(json.dumps(_tokenizer_config(values), indent=1))
    byte_level_tokenizer(values).save(str(folder / "tokenizer.json"))
    save_file(weights, folder / "model.safetensors")


def checkpoint_tensors(
    values: Values, tensors: Iterable[StoredTensor], dequantise: Dequantise
) -> dict[str, NDArray[np.float32]]:
    """fp32 tensors by the names that transformers gives them. Raises CheckpointError for a tensor that is unknown."""
    heads = int(_value(values, "llama.attention.head_count"))
    kv_heads = int(values.get("llama.attention.head_count_kv", heads))
    weights = {}
    for tensor in tensors:
        weight = np.ascontiguousarray(dequantise(tensor.data, tensor.tensor_type), np.float32)
        if ".attn_q." in tensor.name or ".attn_k." in tensor.name:
            weight = halves(weight, heads if ".attn_q." in tensor.name else kv_heads)
        weights[_checkpoint_name(tensor.name)] = weight
    return weights


def halves(rows: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """[heads * d, n] whose rotary pairs are neighbours, with pairs d / 2 apart as transformers has them."""
    pairs = rows.reshape(heads, rows.shape[0] // heads // 2, 2, *rows.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(rows.shape)


def _checkpoint_name(name: str) -> str:
    if name in _TOP:
        return _TOP[name]
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
    if match is None or match[2] not in _MODULES:
        raise CheckpointError(f"the GGUF file has a tensor {name} that a Llama does not have")
    return f"model.layers.{match[1]}.{_MODULES[match[2]]}.{match[3]}"


def model_config(values: Values, *, tied: bool) -> dict[str, Any]:
    """config.json. Raises CheckpointError for another architecture, or a value that is missing."""
    if (found := values.get("general.architecture")) != "llama":
        raise CheckpointError(f"the GGUF file holds a model of architecture {found}; only llama is read")

    def value(name: str) -> Any:
        return _value(values, f"llama.{name}")

    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": "float32",
        "hidden_act": "silu",
        "hidden_size": value("embedding_length"),
        "intermediate_size": value("feed_forward_length"),
        "num_hidden_layers": value("block_count"),
        "num_attention_heads": value("attention.head_count"),
        "num_key_value_heads": value("attention.head_count_kv"),
        "max_position_embeddings": value("context_length"),
        "rms_norm_eps": value("attention.layer_norm_rms_epsilon"),
        "rope_theta": value("rope.freq_base"),
        "vocab_size": len(_value(values, "tokenizer.ggml.tokens")),
        "tie_word_embeddings": tied,
        "bos_token_id": values.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": _value(values, "tokenizer.ggml.eos_token_id"),
        "pad_token_id": values.get("tokenizer.ggml.padding_token_id"),
    }


def byte_level_tokenizer(values: Values) -> Tokenizer:
    """Raises CheckpointError for a kind of tokenizer that is not known here."""
    kind, split = values.get("tokenizer.ggml.model"), values.get("tokenizer.ggml.pre")
    if kind != "gpt2" or split not in _SPLITS:
        raise CheckpointError(f"the GGUF file's tokenizer is {kind} ({split}); known are gpt2 ({', '.join(_SPLITS)})")
    tokens = _value(values, "tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in _value(values, "tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = _SPLITS[split]()
    tokenizer.decoder = decoders.ByteLevel()
    types = _value(values, "tokenizer.ggml.token_type")
    control = [token for token, type_ in zip(tokens, types, strict=True) if type_ == _CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    return tokenizer


def _tokenizer_config(values: Values) -> dict[str, Any]:
    tokens = _value(values, "tokenizer.ggml.tokens")
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": False}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown")):
        if (number := values.get(f"tokenizer.ggml.{key}_token_id")) is not None:
            config[f"{name}_token"] = tokens[number]
    if (template := values.get("tokenizer.chat_template")) is not None:
        config["chat_template"] = template
    return config


def _value(values: Values, name: str) -> Any:
    if name not in values:
        raise CheckpointError(f"the GGUF file does not say {name}")
    return values[name]
