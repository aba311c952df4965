"""Settings are refused with a sentence that says what to write instead."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest

from engine.config import EngineConfig
from engine.errors import InvalidConfig


@pytest.mark.parametrize(
    ("device", "indices"),
    [("auto", ()), ("cpu", ()), ("cuda", ()), ("cuda:0", (0,)), ("cuda:0,2", (0, 2)), ("cuda:10,3", (10, 3))],
)
def test_a_device_may_number_its_gpus(device: str, indices: tuple[int, ...]) -> None:
    assert EngineConfig(device=device).cuda_indices == indices


@pytest.mark.parametrize(
    "device",
    ["", "gpu", "CUDA", "cuda:", "cuda:a", "cuda:0,", "cuda:,0", "cuda:-1", "cuda:0 1", "cpu:0", "cuda:0\n", 0],
)
def test_another_spelling_of_a_device_is_refused(device: Any) -> None:
    with pytest.raises(InvalidConfig, match="write auto, cpu, cuda, or GPUs by number"):
        EngineConfig(device=device)


@pytest.mark.parametrize("device", ["cuda:0,0", "cuda:1,2,01"])
def test_a_gpu_is_not_named_twice(device: str) -> None:
    with pytest.raises(InvalidConfig, match="names a GPU twice"):
        EngineConfig(device=device)


@pytest.mark.parametrize("memory", ["0.05", "0.85", " 0.95 ", "256", "20000"])
def test_gpu_memory_is_a_share_or_mebibytes(memory: str) -> None:
    assert EngineConfig.from_mapping({"gpu_memory": memory}).gpu_memory == float(memory)


@pytest.mark.parametrize("memory", [0, 0.01, 0.96, 1, 100, -0.5, float("nan"), float("inf"), 1 << 30])
def test_gpu_memory_between_the_two_is_refused(memory: float) -> None:
    with pytest.raises(InvalidConfig, match=re.escape("a share of the free memory between 0.05 and 0.95, or MiB")):
        EngineConfig(gpu_memory=memory)


@pytest.mark.parametrize("memory", ["85%", "20 GB", True])
def test_gpu_memory_is_a_number(memory: Any) -> None:
    with pytest.raises(InvalidConfig, match="must be a number"):
        EngineConfig.from_mapping({"gpu_memory": memory})


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_sixteen_bits_on_the_cpu_are_refused_with_what_to_choose(precision: str) -> None:
    settings = {"device": "cpu", "precision": precision}
    with pytest.raises(InvalidConfig, match=f"precision {precision} needs a CUDA device; choose int8 or fp32"):
        EngineConfig.from_mapping(settings)
    assert EngineConfig.from_mapping(settings | {"device": "auto"}).precision == precision


@pytest.mark.parametrize("name", ["kv_precision", "precision"])
def test_an_unknown_precision_is_refused_with_the_known_ones(name: str) -> None:
    with pytest.raises(InvalidConfig, match=r"choose one of auto, .*int8"):
        EngineConfig.from_mapping({name: "int4"})


def test_a_model_may_stay_for_ever_but_not_for_less_than_no_time() -> None:
    assert EngineConfig.from_mapping({"idle_unload_minutes": "0"}).idle_unload_minutes == 0
    with pytest.raises(InvalidConfig, match="idle_unload_minutes is -1"):
        EngineConfig.from_mapping({"idle_unload_minutes": "-1"})


@pytest.mark.parametrize(("cores", "threads"), [(1, 1), (2, 1), (4, 2), (64, 2)])
def test_images_are_prepared_by_as_many_threads_as_leave_cores_to_the_model(
    cores: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    assert EngineConfig().preparing_threads == threads
    assert EngineConfig(preprocess_workers=3).preparing_threads == 3


def test_settings_survive_the_way_to_another_process(tmp_path: Path) -> None:
    config = EngineConfig(
        storage=tmp_path,
        device="cuda:0,2",
        precision="bf16",
        gpu_memory=20000,
        kv_precision="int8",
        kernel_fusion="on",
        idle_unload_minutes=0.5,
    )
    assert EngineConfig.from_mapping(config.to_mapping()) == config


@pytest.mark.parametrize("endpoint", ["https://huggingface.co", "http://127.0.0.1:8080/modelscope", "off", ""])
def test_a_hub_is_an_address_or_off(endpoint: str) -> None:
    assert EngineConfig.from_mapping({"hub_endpoint": endpoint}).hub_endpoint == (endpoint or "https://huggingface.co")


@pytest.mark.parametrize("endpoint", ["huggingface.co", "ftp://x", "https://", "https://x?y=1", "http://x:port", "//x"])
def test_what_is_no_address_of_a_hub_is_refused(endpoint: str) -> None:
    with pytest.raises(InvalidConfig, match=r"give an address such as https://huggingface\.co"):
        EngineConfig(hub_endpoint=endpoint)


def test_no_message_quotes_a_secret() -> None:
    assert "hf_secret" not in repr(EngineConfig(hub_token="hf_secret"))
    with pytest.raises(InvalidConfig) as refused:
        EngineConfig(hub_token="hf_secret two")
    assert "hf_secret" not in str(refused.value)
    for endpoint in ("https://me:hf_secret@hub.example", "https://me:hf_secret@hub.example:port"):
        with pytest.raises(InvalidConfig, match="put the token into hub_token") as refused:
            EngineConfig(hub_endpoint=endpoint)
        assert "hf_secret" not in str(refused.value)


def test_storage_is_on_the_persistent_volume_of_difys_containers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLUGIN_WORKING_PATH", "/app/storage/cwd")
    assert EngineConfig().storage == Path("/app/storage/tessera")


@pytest.mark.parametrize("plugins", ["", "./storage/cwd"])
def test_elsewhere_storage_is_where_the_account_keeps_its_data(monkeypatch: pytest.MonkeyPatch, plugins: str) -> None:
    monkeypatch.setenv("PLUGIN_WORKING_PATH", plugins)
    monkeypatch.setenv("XDG_DATA_HOME", "/home/somebody/data")
    assert EngineConfig().storage == Path("/home/somebody/data/tessera")
