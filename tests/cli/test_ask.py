"""./tessera ask: what is typed becomes Dify's messages; the answer goes to stdout, all else to stderr."""

from __future__ import annotations

import argparse
import base64
import subprocess
import sys
from pathlib import Path

import pytest

from cli import ask
from cli.settings import settings_from
from tests.plugin.fake_plugin import copy_with_fake_engine

ROOT = Path(__file__).resolve().parents[2]


def parse(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    ask.add_arguments(parser)
    return parser.parse_args(words)


@pytest.fixture
def fake_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`ask` starts a copy of the plugin whose engine is a fake."""
    monkeypatch.setattr(ask, "ROOT", copy_with_fake_engine(tmp_path))


def test_the_last_word_is_the_question_and_those_before_it_are_files() -> None:
    args = parse("a.png", "b.jpg", "what is it?", "--max-tokens", "5")
    assert (args.files, args.question) == ([Path("a.png"), Path("b.jpg")], "what is it?")
    assert parse("hello?").files == []


def test_images_come_before_the_question(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"pixels")
    system, user = ask.prompt_messages([tmp_path / "a.png"], "what?", system="be brief")
    assert system == {"role": "system", "content": "be brief"}
    image, text = user["content"]
    assert (image["mime_type"], image["base64_data"]) == ("image/png", base64.b64encode(b"pixels").decode())
    assert text == {"type": "text", "data": "what?"}


@pytest.mark.parametrize("name", ["a.mp4", "a.webm", "a.mov", "a.MKV", "a.avi"])
def test_videos_are_sent_as_videos(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"film")
    (user,) = ask.prompt_messages([tmp_path / name], "what?")
    assert (user["content"][0]["type"], user["content"][0]["mime_type"][:6]) == ("video", "video/")


def test_a_checkpoints_folder_goes_by_its_whole_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "owner" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert ask._model("owner/name") == "owner/name", "a repository: the folder is no checkpoint"
    (tmp_path / "owner" / "name" / "config.json").write_text("{}")
    assert ask._model("owner/name") == ask._model("./owner/name") == str(tmp_path / "owner" / "name")
    assert ask._model("demo") == "demo"


def test_settings_are_the_forms(tmp_path: Path) -> None:
    words = [
        "--precision",
        "fp16",
        "--device",
        "cuda:1",
        "--gpu-memory",
        "4096",
        "--kv-precision",
        "int8",
        "--kernel-fusion",
        "on",
    ]
    args = parse("q", *words, "--no-cache", "--storage", str(tmp_path), "--set", "max_waiting=3")
    assert settings_from(args) == {
        "max_waiting": "3",
        "device": "cuda:1",
        "precision": "fp16",
        "gpu_memory": "4096",
        "kv_precision": "int8",
        "kernel_fusion": "on",
        "storage": str(tmp_path),
        "cache_enabled": "false",
    }


@pytest.mark.usefixtures("fake_engine")
def test_the_answer_alone_goes_to_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    assert ask.run(parse("say 3 word")) == 0
    out, err = capsys.readouterr()
    assert out == "word word word \n"
    assert "7 tokens in, 3 out (stop)" in err


@pytest.mark.usefixtures("fake_engine")
def test_an_error_is_one_sentence_and_a_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert ask.run(parse("fail QueueFull")) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines()[-1] == "tessera: this is why"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nothing_here.png", "what?"], "nothing_here.png cannot be read"),
        (["what?", "--set", "max_waiting"], "write NAME=VALUE"),
        (["what?", "--set", "colour=red"], "unknown setting 'colour'"),
        (["what?", "--device", "gpu"], "device is 'gpu'; write auto, cpu, cuda"),
        (
            ["what?", "--device", "cpu", "--precision", "bf16"],
            "precision bf16 needs a CUDA device; choose int8 or fp32",
        ),
    ],
)
def test_what_cannot_work_is_said_before_anything_starts(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ask.run(parse(*words)) == 1
    assert message in capsys.readouterr().err


def test_asking_needs_no_engine_in_this_process() -> None:
    code = (
        "import sys, cli.ask; print({'torch', 'onnxruntime', 'dify_plugin'} & {n.split('.')[0] for n in sys.modules})"
    )
    shown = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert shown.stdout == "set()\n"
