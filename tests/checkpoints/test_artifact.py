"""An artifact is complete or absent, whatever happens while it is written, and is checked when it is read."""

from __future__ import annotations

import dataclasses
import errno
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from engine.checkpoints import Artifact, Checkpoint, open_artifact
from engine.checkpoints import convert as module
from engine.checkpoints.artifact import FORMAT_VERSION
from engine.checkpoints.quantise import quantise_rows
from engine.errors import ArtifactError, CheckpointError, StorageError
from engine.spec import Precision
from tests.runtime import models

TYPES = {"int8": "float32", "fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}

# Slow enough that a kill or a second process meets it half-way.
CONVERT = """
import sys, time
from pathlib import Path
from engine.checkpoints import Checkpoint, convert
writer = convert._TensorWriter.write
def slow(self, block):
    time.sleep({pause})
    writer(self, block)
convert._TensorWriter.write = slow
checkpoint = Checkpoint.open(Path(sys.argv[1]))
print("ready", flush=True)
convert.open_artifact(checkpoint, "int8", Path(sys.argv[2]))
print("done", flush=True)
"""


def converting(checkpoint: Path, storage: Path, pause: float = 0.002) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", CONVERT.format(pause=pause), str(checkpoint), str(storage)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def contents(storage: Path) -> list[str]:
    """What is in the artifacts' folder besides lock files."""
    return sorted(path.name for path in (storage / "artifacts").iterdir() if path.suffix != ".lock")


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", "int8"])
def test_an_artifact_holds_every_weight_of_the_checkpoint(saved: Path, tmp_path: Path, precision: Precision) -> None:
    checkpoint = Checkpoint.open(saved)
    artifact = open_artifact(checkpoint, precision, tmp_path)
    for weight in checkpoint.weights():
        source = np.concatenate(list(checkpoint.blocks(weight)))
        if precision == "int8" and weight.kind != "plain":
            values, scale = quantise_rows(source)
            assert np.array_equal(artifact.tensor(weight.name), values)
            assert np.array_equal(artifact.tensor(weight.name.removesuffix(".weight") + ".scale"), scale)
        else:
            expected = source.astype(TYPES[precision])
            assert artifact.tensor(weight.name).dtype == expected.dtype
            assert np.array_equal(artifact.tensor(weight.name), expected)
    assert artifact.spec == checkpoint.spec
    assert artifact.weight_bytes <= artifact.weights_path.stat().st_size
    assert all(entry.offset % module.ALIGNMENT == 0 for entry in artifact.entries.values())


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", "int8"])
def test_an_offset_is_added_before_a_value_is_rounded(saved: Path, tmp_path: Path, precision: Precision) -> None:
    checkpoint = Checkpoint.open(saved)
    shifted = {"norm.weight": 1.0, "layers.0.qkv.weight": 0.25}
    weights = tuple(
        dataclasses.replace(weight, offset=shifted.get(weight.name, 0.0)) for weight in checkpoint.weights()
    )
    family = dataclasses.replace(checkpoint.family, weights=lambda spec: weights)
    artifact = open_artifact(dataclasses.replace(checkpoint, family=family), precision, tmp_path)
    for weight in weights:
        wanted = np.concatenate(list(checkpoint.blocks(weight))) + np.float32(shifted.get(weight.name, 0.0))
        if precision == "int8" and weight.kind != "plain":
            assert np.array_equal(artifact.tensor(weight.name), quantise_rows(wanted)[0]), weight.name
        else:
            assert np.array_equal(artifact.tensor(weight.name), wanted.astype(TYPES[precision])), weight.name


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
def test_a_matrix_that_is_stored_transposed_is_turned_in_blocks(
    saved: Path, tmp_path: Path, precision: Precision, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.checkpoints.checkpoint._BLOCK_BYTES", 4 * 64 * 5)
    checkpoint = Checkpoint.open(saved)
    name = "layers.0.down.weight"
    weights = tuple(dataclasses.replace(weight, transposed=weight.name == name) for weight in checkpoint.weights())
    family = dataclasses.replace(checkpoint.family, weights=lambda spec: weights)
    turned = open_artifact(dataclasses.replace(checkpoint, family=family), precision, tmp_path)
    source = np.concatenate(list(checkpoint.blocks(next(one for one in checkpoint.weights() if one.name == name)))).T
    wanted = quantise_rows(source)[0] if precision == "int8" else source.astype(TYPES[precision])
    assert source.shape[0] != source.shape[1]
    assert np.array_equal(turned.tensor(name), wanted)


def test_int8_is_less_than_a_third_of_fp32(saved: Path, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(saved)
    full, small = (open_artifact(checkpoint, precision, tmp_path) for precision in ("fp32", "int8"))
    assert small.weight_bytes < full.weight_bytes / 2.7
    assert small.digest != full.digest


def test_sixteen_bits_are_half_of_fp32(saved: Path, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(saved)
    full, half, brain = (open_artifact(checkpoint, precision, tmp_path) for precision in ("fp32", "fp16", "bf16"))
    assert full.weight_bytes == 2 * half.weight_bytes == 2 * brain.weight_bytes
    assert len({full.digest, half.digest, brain.digest}) == 3


def test_sixteen_bits_come_back_as_the_checkpoint_stores_them(saved: Path, tmp_path: Path) -> None:
    model = models.randomise(models.smolvlm())
    narrow = models.save(model.to(torch.bfloat16), tmp_path / "narrow")  # type: ignore[arg-type]
    stored = load_file(narrow / "model.safetensors")
    artifact = open_artifact(Checkpoint.open(narrow), "bf16", tmp_path)
    name = "model.text_model.layers.1.mlp.down_proj.weight"
    assert artifact.tensor("layers.1.down.weight").tobytes() == stored[name].tobytes()


@pytest.mark.parametrize(
    ("precision", "value", "advice"),
    [("fp16", 65_520.0, "choose precision bf16 or int8"), ("bf16", 3.4e38, "choose precision int8 or fp32")],
)
def test_a_value_beyond_a_types_range_is_named_with_a_type_that_holds_it(
    folder: Path, tmp_path: Path, precision: Precision, value: float, advice: str
) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.text_model.norm.weight"][3] = -value
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"text.norm.weight holds {re.escape(f'{value:g}')}, .*{advice}"):
        open_artifact(Checkpoint.open(folder), precision, tmp_path)
    assert contents(tmp_path) == []
    tensors["model.text_model.norm.weight"][3] = 65_519.0
    save_file(tensors, folder / "model.safetensors")
    assert open_artifact(Checkpoint.open(folder), precision, tmp_path).tensor("norm.weight")[3] >= 65_504


def test_tensors_cannot_be_written_to(saved: Path, tmp_path: Path) -> None:
    artifact = open_artifact(Checkpoint.open(saved), "fp32", tmp_path)
    with pytest.raises(ValueError, match="read-only"):
        artifact.tensor("norm.weight")[0] = 1


def test_a_second_opening_converts_nothing(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = open_artifact(Checkpoint.open(saved), "int8", tmp_path)
    monkeypatch.setattr(module, "_convert", lambda *_: pytest.fail("converted again"))
    assert open_artifact(Checkpoint.open(saved), "int8", tmp_path).digest == first.digest


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "no weights", "manifest", "no manifest", "format"])
def test_a_damaged_artifact_is_converted_again(saved: Path, tmp_path: Path, damage: str) -> None:
    checkpoint = Checkpoint.open(saved)
    artifact = open_artifact(checkpoint, "int8", tmp_path)
    wanted = artifact.tensor("layers.0.qkv.weight").copy()
    weights, manifest = artifact.weights_path, artifact.folder / "artifact.json"
    data = bytearray(weights.read_bytes())
    if damage == "flip":
        data[artifact.entries["layers.1.down.weight"].offset + 5] ^= 4
        weights.write_bytes(data)
    elif damage == "truncate":
        weights.write_bytes(data[:-100])
    elif damage == "empty":
        weights.write_bytes(b"")
    elif damage == "no weights":
        weights.unlink()
    elif damage == "manifest":
        manifest.write_text('{"tensors": [{"name": 3}]}')
    elif damage == "no manifest":
        manifest.unlink()
    else:
        manifest.write_text(manifest.read_text().replace(f'"format": {FORMAT_VERSION}', '"format": 0'))
    with pytest.raises(ArtifactError):
        Artifact.load(artifact.folder, artifact.digest, artifact.spec, "int8")
    again = open_artifact(checkpoint, "int8", tmp_path)
    assert np.array_equal(again.tensor("layers.0.qkv.weight"), wanted)
    assert contents(tmp_path) == [again.folder.name]


def test_an_artifact_of_another_spec_is_not_taken(saved: Path, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(saved)
    artifact = open_artifact(checkpoint, "int8", tmp_path)
    other = dataclasses.replace(artifact.spec, family="other")
    with pytest.raises(ArtifactError, match="describes another"):
        Artifact.load(artifact.folder, artifact.digest, other, "int8")


def test_a_conversion_killed_at_any_moment_leaves_no_artifact_and_the_next_one_cleans_up(
    saved: Path, tmp_path: Path
) -> None:
    random.seed(5)
    for _ in range(4):
        process = converting(saved, tmp_path, pause=0.02)
        time.sleep(random.uniform(0, 0.12))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert all(name.endswith(".partial") for name in contents(tmp_path))
    artifact = open_artifact(Checkpoint.open(saved), "int8", tmp_path)
    assert contents(tmp_path) == [artifact.folder.name]


def killed_half_way(checkpoint: Path, storage: Path) -> Path:
    """The folder of a conversion that was killed after some weights."""
    process = converting(checkpoint, storage, pause=0.01)
    journal: list[Path] = []
    while not journal or journal[0].read_text().count("\n") < 6:
        journal = list((storage / "artifacts").glob("*.partial/journal"))
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    return journal[0].parent


@pytest.mark.parametrize("damage", ["none", "weights", "journal", "line", "digest"])
def test_a_killed_conversion_goes_on_where_it_was_and_ends_the_same(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    checkpoint = Checkpoint.open(saved)
    whole = open_artifact(checkpoint, "int8", tmp_path / "whole")
    partial = killed_half_way(saved, tmp_path)
    journal = partial / "journal"
    lines = journal.read_text().splitlines()
    if damage == "weights":  # lost by the system, of the second weight
        with (partial / "weights.bin").open("r+b") as stream:
            stream.seek(whole.entries[checkpoint.weights()[1].name].offset)
            stream.write(b"\xaa\xbb\xcc\xdd")
    elif damage == "journal":
        journal.write_bytes(b"\xff\x00")
    elif damage == "line":
        journal.write_text("\n".join(lines[:4]) + '\n[{"name": "h')
    elif damage == "digest":
        journal.write_text("\n".join(['"another"', *lines[1:]]) + "\n")
    converted: list[int] = []
    again = open_artifact(checkpoint, "int8", tmp_path, lambda done, total: converted.append(done))
    skipped = {"none": len(lines) - 1, "weights": 1, "journal": 0, "line": 3, "digest": 0}[damage]
    assert len(converted) == len(checkpoint.weights()) - skipped
    assert again.weights_path.read_bytes() == whole.weights_path.read_bytes()
    assert again.entries == whole.entries
    assert sorted(path.name for path in again.folder.iterdir()) == ["artifact.json", "weights.bin"]


def test_a_long_conversion_is_in_the_log(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "LOG_EVERY_S", 0.0)
    with caplog.at_level("INFO", logger=module.__name__):
        open_artifact(Checkpoint.open(saved), "int8", tmp_path)
    assert re.fullmatch(r"converting tiny: \d+ of \d+ MB", caplog.messages[-1])


def test_an_interrupted_conversion_goes_on_too(saved: Path, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(saved)
    seen: list[tuple[int, int]] = []

    def interrupt(done: int, total: int) -> None:
        seen.append((done, total))
        if len(seen) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        open_artifact(checkpoint, "int8", tmp_path, interrupt)
    assert all(name.endswith(".partial") for name in contents(tmp_path))
    artifact = open_artifact(checkpoint, "int8", tmp_path, lambda done, total: seen.append((done, total)))
    assert len(seen) == len(checkpoint.weights())
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1][0] <= seen[-1][1]
    assert contents(tmp_path) == [artifact.folder.name]


def test_another_checkpoints_leftover_is_removed_but_not_a_running_conversion(
    saved: Path, folder: Path, tmp_path: Path
) -> None:
    dead = tmp_path / "artifacts" / "dead-int8-v1.partial"
    dead.mkdir(parents=True)
    (dead / "weights.bin").write_bytes(b"half")
    (folder / "generation_config.json").write_text('{"eos_token_id": 9}')
    process = converting(folder, tmp_path, pause=0.02)
    while not any((tmp_path / "artifacts").glob("*.partial/weights.bin")) or dead.exists():
        assert process.poll() is None
    running = [name for name in contents(tmp_path) if name.endswith(".partial")]
    open_artifact(Checkpoint.open(saved), "int8", tmp_path)
    assert process.poll() is None, "still converting, or this test shows nothing"
    assert running[0] in contents(tmp_path)
    assert process.communicate()[0] == "done\n"
    assert len(contents(tmp_path)) == 2


def test_processes_that_convert_at_the_same_time_end_with_one_good_artifact(saved: Path, tmp_path: Path) -> None:
    processes = [converting(saved, tmp_path, pause=0.001) for _ in range(3)]
    assert [process.communicate()[0] for process in processes] == ["done\n"] * 3
    artifact = open_artifact(Checkpoint.open(saved), "int8", tmp_path)
    assert contents(tmp_path) == [artifact.folder.name]


def test_a_full_disk_is_a_storage_error_and_leaves_nothing(saved: Path, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(saved)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(StorageError, match="no space left"):
            open_artifact(checkpoint, "int8", tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert contents(tmp_path) == []
    assert open_artifact(checkpoint, "int8", tmp_path).weight_bytes


@pytest.mark.parametrize("step", ["posix_fallocate", "fsync"])
def test_a_disk_that_fills_late_is_a_storage_error_and_leaves_nothing(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, step, full)
    with pytest.raises(StorageError, match="no space left"):
        open_artifact(Checkpoint.open(saved), "fp32", tmp_path)
    assert contents(tmp_path) == []


def test_a_read_only_storage_folder_is_a_storage_error_unless_the_artifact_is_there(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = Checkpoint.open(saved)
    # The kernel's own file system refuses new folders to everyone, root included.
    with pytest.raises(StorageError, match="cannot be"):
        open_artifact(checkpoint, "int8", Path("/sys/tessera"))
    artifact = open_artifact(checkpoint, "int8", tmp_path)

    def refused(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "mkdir", refused)
    assert open_artifact(checkpoint, "int8", tmp_path).digest == artifact.digest
    with pytest.raises(StorageError, match="cannot be written"):
        open_artifact(checkpoint, "fp32", tmp_path)


def test_a_file_in_the_artifacts_place_is_a_storage_error(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "artifacts").write_text("not a folder")
    with pytest.raises(StorageError):
        open_artifact(Checkpoint.open(saved), "int8", tmp_path)


def test_a_checkpoint_that_goes_away_meanwhile_is_a_checkpoint_error(folder: Path, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(folder)
    shutil.rmtree(folder)
    with pytest.raises(CheckpointError, match="cannot be read"):
        open_artifact(checkpoint, "int8", tmp_path)
    assert contents(tmp_path) == []


@pytest.mark.parametrize("precision", ["fp32", "int8"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_numbers_are_refused(
    folder: Path, tmp_path: Path, precision: Precision, value: float
) -> None:
    file = folder / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-4:] = np.float32(value).tobytes()
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match="not finite"):
        open_artifact(Checkpoint.open(folder), precision, tmp_path)
