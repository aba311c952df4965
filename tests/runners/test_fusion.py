"""When kernels are tuned as a model opens, and with what; the device is not there."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from engine.config import EngineConfig
from engine.errors import KernelsUnavailable
from engine.graphs.cuda.fused import STOCK, Fusion
from engine.runners.fusion import Parts, open_fusion, wanted_fusion
from engine.spec import QwenVisionSpec, SiglipSpec

pytest.importorskip("triton")
from engine.kernels import bridge, operators, tuning
from engine.kernels.tiles import Tiles
from tests.kernels.test_tuning import QWEN2_VL_2B

BOTH = Fusion(linear=True, attention=True)


class Opening:
    """Opens a model's operators, and remembers in which order what was asked for."""

    def __init__(self, storage: Path) -> None:
        self.storage = storage
        self.events: list[str] = []
        self.tuned: dict[str, Any] = {}
        self.properties = SimpleNamespace(
            name="H100", multi_processor_count=132, shared_memory_per_block_optin=227 * 1024
        )

    def __call__(self, precision: str = "int8", parts: Parts | None = None) -> Fusion:
        artifact: Any = SimpleNamespace(spec=SimpleNamespace(decoder=QWEN2_VL_2B, vision=None), precision=precision)
        config = EngineConfig(storage=self.storage, kernel_fusion="on", max_batch_size=24)
        device = torch.device("cpu")
        wanted = wanted_fusion(artifact, config, device, parts)
        return open_fusion(wanted, artifact, config, torch.bfloat16, device, 1024 + 24, block_size=256, parts=parts)[0]

    def keep_compiled(self, folder: Path) -> None:
        assert folder.is_relative_to(self.storage)
        self.events.append("keep compiled")

    def try_out(self, device: operators.Device) -> None:
        self.events.append("try out")

    def tune(self, spec: object, **given: Any) -> Tiles:
        self.events.append("tune")
        self.tuned = given
        return Tiles()


@pytest.fixture
def opening(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Opening:
    made = Opening(tmp_path)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: made.properties)
    monkeypatch.setattr(bridge, "unavailable", lambda folder: None)
    monkeypatch.setattr(operators, "try_out", made.try_out)
    monkeypatch.setattr("engine.kernels.compiled.keep_compiled", made.keep_compiled)
    monkeypatch.setattr(tuning, "tuned_tiles", made.tune)
    return made


def test_kernels_are_tuned_for_the_steps_of_the_settings(opening: Opening) -> None:
    assert opening() == BOTH
    assert opening.events == ["keep compiled", "try out", "tune"], "what cannot be compiled is not tuned"
    assert opening.tuned["decode_rows"] == {1, 2, 4, 8, 12, 16, 24}
    assert opening.tuned["step_tokens"] == 1024 + 24
    assert opening.tuned["budget"] == tuning.BUDGET_S < 60
    assert opening.tuned["folder"] == opening.storage / "kernels"


def test_a_bench_can_switch_tuning_off(opening: Opening) -> None:
    opening(parts=Parts(BOTH, tuning=False))
    assert opening.tuned["budget"] == 0
    opening(parts=Parts(BOTH))
    assert opening.tuned["budget"] == tuning.BUDGET_S


def test_a_model_without_int8_weights_has_nothing_to_tune(opening: Opening) -> None:
    assert opening("fp16") == Fusion(linear=False, attention=True)
    assert opening.tuned["budget"] == 0


def test_kernels_that_cannot_be_compiled_are_not_tuned(opening: Opening, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(device: object) -> None:
        raise KernelsUnavailable("no compiler")

    monkeypatch.setattr(operators, "try_out", fail)
    assert opening() == STOCK
    assert "tune" not in opening.events


def test_a_gpu_whose_programs_have_too_little_memory_runs_without(
    opening: Opening, caplog: pytest.LogCaptureFixture
) -> None:
    opening.properties.name, opening.properties.shared_memory_per_block_optin = "RTX 5090", 99 * 1024
    assert opening() == STOCK
    assert opening.events == []
    assert "need 163 KiB of shared memory a program" in caplog.text
    assert "RTX 5090 has 99" in caplog.text


@pytest.mark.parametrize(
    ("setting", "precision", "capability", "wanted"),
    [
        ("auto", "int8", (9, 0), BOTH),
        ("auto", "int8", (8, 6), STOCK),
        ("auto", "bf16", (9, 0), Fusion(linear=False, attention=True)),
        ("auto", "fp16", (8, 9), STOCK),
        ("auto", "int8", (12, 0), STOCK),
        ("on", "int8", (9, 0), BOTH),
        ("on", "bf16", (8, 6), Fusion(linear=False, attention=True)),
        ("on", "fp32", (9, 0), STOCK),
        ("off", "int8", (9, 0), STOCK),
    ],
)
def test_auto_takes_our_operators_where_they_were_measured(
    setting: Any, precision: str, capability: tuple[int, int], wanted: Fusion, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    artifact: Any = SimpleNamespace(spec=SimpleNamespace(decoder=QWEN2_VL_2B, vision=None), precision=precision)
    config = EngineConfig(kernel_fusion=setting)
    assert wanted_fusion(artifact, config, torch.device("cuda", 0)) == wanted
    for kind, few_rows in ((SiglipSpec, False), (QwenVisionSpec, True)):
        artifact.spec.vision = object.__new__(kind)
        with_tower = wanted_fusion(artifact, config, torch.device("cuda", 0))
        assert with_tower == replace(wanted, tower=wanted.linear and setting == "on" and not few_rows)
