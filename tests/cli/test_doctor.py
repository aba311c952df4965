"""./tessera doctor says what there is, and what is wrong with it."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from cli import doctor
from tests.plugin.fake_plugin import copy_with_fake_engine


def parse(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    doctor.add_arguments(parser)
    return parser.parse_args(words)


@pytest.fixture(autouse=True)
def fake_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "plugin"
    folder.mkdir()
    monkeypatch.setattr(doctor, "ROOT", copy_with_fake_engine(folder))


def test_a_healthy_machine_has_a_line_for_everything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.run(parse("--storage", str(tmp_path / "storage"))) == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert list(lines) == ["python", "packages", "processor", "memory", "onnxruntime", "storage", "demo"]
    assert "CPU" in lines["onnxruntime"]
    assert lines["demo"].startswith("answers")


def test_a_problem_is_named_and_the_other_checks_go_on(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.run(parse("--storage", "/proc/tessera")) == 1
    output = capsys.readouterr().out
    assert "storage      PROBLEM: /proc/tessera cannot be used" in output
    assert "demo         answers" in output  # the fake engine stores nothing
