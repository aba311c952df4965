"""What Dify is told about a checkpoint comes from the code that runs it."""

from __future__ import annotations

import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from engine import errand
from engine.catalog import ROOT
from engine.describe import Description, describe
from engine.errors import CheckpointError
from tests.prompts.checkpoints import QWEN_TEMPLATE
from tests.prompts.tool_templates import JSON_TOOLS


def folder_with(tmp_path: Path, **config: Any) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def test_the_demo_sees_and_its_context_is_known() -> None:
    assert describe(ROOT / "demo") == Description(context=4096, vision=True)


def test_a_text_model_has_no_vision(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, model_type="qwen3", max_position_embeddings=40960)
    assert describe(folder) == Description(context=40960, vision=False)


@pytest.mark.parametrize(
    ("template", "tools", "thinking"),
    [(JSON_TOOLS, True, True), (QWEN_TEMPLATE, False, False), ("{% oops", False, False)],
)
def test_its_template_says_whether_it_calls_tools_and_thinks(
    tmp_path: Path, template: str, tools: bool, thinking: bool
) -> None:
    (tmp_path / "chat_template.jinja").write_text(template)
    folder = folder_with(tmp_path, model_type="qwen3", max_position_embeddings=100)
    assert describe(folder) == Description(context=100, tools=tools, thinking=thinking)


def test_a_model_reads_videos_where_family_and_template_do(tmp_path: Path) -> None:
    template = tmp_path / "chat_template.jinja"
    template.write_text(QWEN_TEMPLATE)
    folder = folder_with(tmp_path, model_type="qwen2_5_vl", max_position_embeddings=100)
    assert describe(folder) == Description(context=100, vision=True, video=True)
    template.write_text(QWEN_TEMPLATE.replace("<|vision_start|><|video_pad|><|vision_end|>", ""))
    assert describe(folder) == Description(context=100, vision=True, video=False)


def test_a_configuration_that_changed_is_read_again(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, model_type="qwen3", max_position_embeddings=100)
    assert describe(folder).context == 100
    folder_with(tmp_path, model_type="qwen3", max_position_embeddings=200)
    os.utime(folder / "config.json", ns=(1, 1))  # whatever the clock's steps are
    assert describe(folder).context == 200


def test_many_at_once_have_it_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = folder_with(tmp_path, model_type="qwen3", max_position_embeddings=500)
    asked: list[str] = []

    def slowly(module: str, question: str, limit_s: float) -> list[errand.Line]:
        asked.append(question)
        time.sleep(0.05)
        return [{"context": 500}]

    monkeypatch.setattr(errand, "ask", slowly)
    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(describe, [folder] * 8)) == {Description(500)}
    assert asked == [str(folder)]


def test_it_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = folder_with(tmp_path, model_type="qwen3", max_position_embeddings=300)
    first = describe(folder)
    monkeypatch.setattr(errand, "ask", None)
    assert describe(folder) == first


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"model_type": "mamba"}, "model_type 'mamba'; this engine runs .*smolvlm"),
        ({}, "model_type None"),
        ({"model_type": "qwen3", "max_position_embeddings": "many"}, "max_position_embeddings is 'many'"),
    ],
)
def test_a_model_that_the_engine_does_not_run_is_refused(tmp_path: Path, config: dict[str, Any], reason: str) -> None:
    with pytest.raises(CheckpointError, match=reason):
        describe(folder_with(tmp_path, **config))


def test_what_is_no_json_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        describe(tmp_path)


def test_a_folder_without_a_configuration_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        describe(tmp_path / "nothing")
