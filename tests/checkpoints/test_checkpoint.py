"""A checkpoint is read in every layout that transformers writes, and what is wrong with one is said by name."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from engine.checkpoints import Checkpoint
from engine.checkpoints import checkpoint as module
from engine.errors import CheckpointError
from engine.preprocess import read_settings
from tests.runtime import models


def change_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def weights_of(folder: Path) -> dict[str, np.ndarray]:
    checkpoint = Checkpoint.open(folder)
    return {weight.name: np.concatenate(list(checkpoint.blocks(weight))) for weight in checkpoint.weights()}


def test_weights_are_those_in_the_file_fused_and_flattened(saved: Path) -> None:
    weights, stored = weights_of(saved), load_file(saved / "model.safetensors")
    layer = "model.text_model.layers.1.self_attn."
    fused = np.concatenate([stored[f"{layer}{part}_proj.weight"] for part in "qkv"])
    assert np.array_equal(weights["layers.1.qkv.weight"], fused)
    patch = stored["model.vision_model.embeddings.patch_embedding.weight"]
    assert np.array_equal(weights["vision.patch.weight"], patch.reshape(len(patch), -1))
    assert all(weight.dtype == np.float32 for weight in weights.values())


def test_many_shards_are_read_as_one_file(saved: Path, tmp_path: Path) -> None:
    model = models.randomise(models.smolvlm())
    sharded = models.save(model, tmp_path / "sharded", max_shard_size="60KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    whole = weights_of(saved)
    assert all(np.array_equal(weight, whole[name]) for name, weight in weights_of(sharded).items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_widened(saved: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    model = models.randomise(models.smolvlm())
    narrow = models.save(model.to(dtype), tmp_path / "narrow")  # type: ignore[arg-type]
    whole = weights_of(saved)
    for name, weight in weights_of(narrow).items():
        assert np.array_equal(weight, torch.tensor(whole[name]).to(dtype).float().numpy()), name


def drop_dtype(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    for section in (config, config["text_config"]):
        section.pop("dtype", None)
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_the_stored_type_is_known_from_the_configuration_or_else_from_the_weights(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    model = models.randomise(models.smolvlm())
    folder = models.save(model.to(dtype), tmp_path / "model")  # type: ignore[arg-type]
    named = str(dtype).removeprefix("torch.")
    assert Checkpoint.open(folder).spec.dtype == named
    drop_dtype(folder)
    assert Checkpoint.open(folder).spec.dtype == named


@pytest.mark.parametrize(
    ("fields", "dtype"),
    [
        ({"torch_dtype": "bfloat16"}, "bfloat16"),
        ({"dtype": "torch.float16"}, "float16"),
        ({"dtype": "auto"}, "float32"),
        ({"dtype": None, "torch_dtype": 16}, "float32"),
        ({"dtype": "bfloat16", "torch_dtype": "float16"}, "bfloat16"),
    ],
    ids=str,
)
def test_every_spelling_of_the_type_is_read(folder: Path, fields: dict[str, Any], dtype: str) -> None:
    drop_dtype(folder)
    change_config(folder, **fields)
    assert Checkpoint.open(folder).spec.dtype == dtype


def test_the_type_may_be_named_for_the_text_model_only(folder: Path) -> None:
    drop_dtype(folder)
    config = json.loads((folder / "config.json").read_text())
    change_config(folder, text_config=config["text_config"] | {"torch_dtype": "bfloat16"})
    assert Checkpoint.open(folder).spec.dtype == "bfloat16"


def test_where_nothing_is_said_most_of_the_numbers_decide(folder: Path) -> None:
    drop_dtype(folder)
    tensors = load_file(folder / "model.safetensors")
    save_file(
        {name: array.astype(np.float16) if array.ndim > 1 else array for name, array in tensors.items()},
        folder / "model.safetensors",
    )
    assert Checkpoint.open(folder).spec.dtype == "float16"


def test_blocks_are_bounded_and_make_the_whole(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = weights_of(saved)
    monkeypatch.setattr(module, "_BLOCK_BYTES", 1000)
    checkpoint = Checkpoint.open(saved)
    for weight in checkpoint.weights():
        blocks = list(checkpoint.blocks(weight))
        assert np.array_equal(np.concatenate(blocks), whole[weight.name])
        assert all(block.nbytes <= 1000 or len(block) == 1 for block in blocks)


@pytest.mark.parametrize("threshold", [0, 1 << 40], ids=["by header", "by content"])
def test_the_digest_changes_with_weights_and_configuration(
    folder: Path, monkeypatch: pytest.MonkeyPatch, threshold: int
) -> None:
    monkeypatch.setattr(module, "_HASH_WHOLE_BYTES", threshold)
    first = Checkpoint.open(folder).digest
    assert Checkpoint.open(folder).digest == first
    file = folder / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    os.utime(file, ns=(1, 1))
    second = Checkpoint.open(folder).digest
    (folder / "preprocessor_config.json").write_text('{"image_mean": [0.1, 0.1, 0.1]}')
    third = Checkpoint.open(folder).digest
    assert len({first, second, third}) == 3


def test_a_copy_of_a_small_checkpoint_is_the_same_checkpoint(saved: Path, folder: Path) -> None:
    os.utime(folder / "model.safetensors", ns=(1, 1))
    assert Checkpoint.open(folder).digest == Checkpoint.open(saved).digest


def test_the_image_processor_may_be_nested_in_the_processors_file(folder: Path) -> None:
    (folder / "processor_config.json").write_text('{"image_processor": {"image_mean": [0.1, 0.2, 0.3]}}')
    vision = Checkpoint.open(folder).spec.vision
    assert vision is not None
    assert vision.norm.mean == (0.1, 0.2, 0.3)


def expect(folder: Path, message: str) -> None:
    with pytest.raises(CheckpointError, match=re.escape(message)):
        Checkpoint.open(folder)


def test_where_both_files_describe_the_images_the_processors_comes_first(folder: Path) -> None:
    (folder / "processor_config.json").write_text('{"image_processor": {"image_mean": [0.1, 0.2, 0.3]}}')
    (folder / "preprocessor_config.json").write_text('{"image_mean": [0.7, 0.8, 0.9]}')
    assert module.read_config(folder).preprocessor == read_settings(folder).values


def test_a_missing_folder_or_file_is_named(folder: Path, tmp_path: Path) -> None:
    expect(tmp_path / "nowhere", "nowhere is not a folder")
    (folder / "model.safetensors").unlink()
    expect(folder, "model.safetensors is missing")
    (folder / "config.json").unlink()
    expect(folder, "config.json is missing")


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[1]", b"null"])
def test_a_malformed_configuration_is_named(folder: Path, content: bytes) -> None:
    (folder / "config.json").write_bytes(content)
    expect(folder, "config.json")


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_a_truncated_weights_file_is_named(folder: Path, keep: int) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    expect(folder, "model.safetensors is truncated or malformed")


def test_a_header_that_promises_too_much_is_malformed(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes((2**62).to_bytes(8, "little") + file.read_bytes()[8:])
    expect(folder, "model.safetensors is truncated or malformed")


def test_a_missing_shard_or_a_foreign_path_is_named(folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}')
    expect(folder, "model-2.safetensors is missing")
    index.write_text('{"weight_map": {"a": "../model.safetensors"}}')
    expect(folder, "names a file outside")
    index.write_text('{"weight_map": {}}')
    expect(folder, "has no weight_map")


def test_a_missing_tensor_is_named_with_its_shape(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.text_model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors")
    expect(folder, "has no tensor text.layers.1.mlp.up_proj.weight ([96, 64])")


def test_an_untied_head_that_is_missing_is_named(folder: Path) -> None:
    change_config(folder, tie_word_embeddings=False)
    expect(folder, "has no tensor head.weight")


def test_a_tensor_of_another_shape_is_named(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    change_config(folder, text_config=config["text_config"] | {"vocab_size": 99})
    expect(folder, "tensor text.embed_tokens.weight is [101, 64], but config.json asks for [99, 64]")


def test_integers_are_not_weights(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.text_model.norm.weight"] = np.ones(64, np.int8)
    save_file(tensors, folder / "model.safetensors")
    expect(folder, "model.text_model.norm.weight has type I8; supported are F32, F16, BF16")


@pytest.mark.parametrize("spelled", ["<end>", {"content": "<end>", "special": True}])
def test_where_no_configuration_names_a_last_token_the_tokenizers_counts(
    saved: Path, tmp_path: Path, spelled: object
) -> None:
    folder = shutil.copytree(saved, tmp_path / "copy")
    change_config(folder, eos_token_id=None)
    text = json.loads((folder / "config.json").read_text())["text_config"]
    change_config(folder, text_config=text | {"eos_token_id": None})
    (folder / "generation_config.json").unlink(missing_ok=True)
    without = Checkpoint.open(folder)
    assert without.spec.tokens.eos == ()
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": spelled}))
    added = [{"id": 7, "content": "<begin>"}, {"id": 9, "content": "<end>"}]
    (folder / "tokenizer.json").write_text(json.dumps({"added_tokens": added}))
    found = Checkpoint.open(folder)
    assert found.spec.tokens.eos == (9,)
    assert found.digest != without.digest
    (folder / "generation_config.json").write_text('{"eos_token_id": 5}')
    assert Checkpoint.open(folder).spec.tokens.eos == (5,)
