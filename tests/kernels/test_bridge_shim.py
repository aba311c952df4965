"""The library that lets ONNX Runtime find Python operators: compiled once, found again, and what if not."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import onnxruntime as ort  # type: ignore[import-untyped]
import pytest
import torch

from engine.errors import DeviceUnavailable, KernelsUnavailable
from engine.kernels.bridge import Call, Input, Operator, shim, unavailable
from tests.kernels.bridge_sessions import model, node, open_session, run

F32 = torch.float32


def return_nothing(call: Call) -> None:
    call.output(0, (0,))


NOTHING = Operator("Nothing", (Input(F32),), (F32,), lambda _: return_nothing)


def use(folder: Path) -> None:
    session = open_session(model([node("Nothing", ["x"], ["y"])], {"x": F32}, {"y": F32}), [NOTHING], folder)
    assert run(session, x=torch.ones(1))[0].shape == (0,)


def files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*"))


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))


def test_the_library_is_compiled_into_the_folder_and_nothing_else_is_left(tmp_path: Path) -> None:
    folder = tmp_path / "not yet" / "there"
    use(folder)
    (library,) = files(folder)
    assert library.suffix == ".so"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_a_library_that_is_there_is_used_without_a_compiler(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    use(tmp_path)
    (library,) = files(tmp_path)
    before = library.stat()
    request.getfixturevalue("no_compiler")
    assert unavailable(tmp_path) is None
    use(tmp_path)
    assert library.stat() == before


@pytest.mark.parametrize("damage", [b"", b"\x7fELF", b"not a library"])
def test_a_damaged_library_is_compiled_again(damage: bytes, tmp_path: Path) -> None:
    use(tmp_path)
    (library,) = files(tmp_path)
    whole = library.read_bytes()
    library.unlink()  # this process has it mapped
    library.write_bytes(damage or whole[:5000])
    use(tmp_path)
    assert files(tmp_path) == [library]
    assert library.read_bytes() == whole


def test_a_folder_in_the_librarys_place_is_no_library(tmp_path: Path) -> None:
    use(tmp_path)
    (library,) = files(tmp_path)
    library.unlink()
    library.mkdir()
    with pytest.raises(KernelsUnavailable, match="cannot be written to"):
        use(tmp_path)


def test_two_storage_folders_in_one_process_both_work(tmp_path: Path) -> None:
    for name in ("a", "b", "a"):
        use(tmp_path / name)


def test_without_a_compiler_the_error_says_what_happens_and_what_to_install(no_compiler: None, tmp_path: Path) -> None:
    said = unavailable(tmp_path)
    assert said is not None
    assert "the stock operators are used" in said
    assert "install gcc" in said
    with pytest.raises(KernelsUnavailable) as caught:
        use(tmp_path)
    assert str(caught.value) == said
    assert isinstance(caught.value, DeviceUnavailable)


def test_an_untested_version_of_onnx_runtime_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(ort, "__version__", "1.99.0")
    said = unavailable(tmp_path)
    assert said is not None
    assert "1.99.0" in said
    assert "1.31.1" in said
    with pytest.raises(KernelsUnavailable, match=r"1\.99\.0"):
        use(tmp_path)


def test_the_installed_version_of_onnx_runtime_is_tested() -> None:
    assert ort.__version__ in shim.TESTED_VERSIONS


@pytest.mark.parametrize(
    ("compiler", "message"), [("false", "could not compile"), ("no-such-compiler", "No such file")]
)
def test_a_compiler_that_fails_is_named(
    compiler: str, message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CC", compiler)
    with pytest.raises(KernelsUnavailable, match=rf"{compiler}.*{message}.*the stock operators are used"):
        use(tmp_path)
    assert files(tmp_path) == []


def test_a_compiler_that_makes_no_library_is_an_error_and_not_a_crash(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    wrong = tmp_path / "wrong-compiler"
    wrong.write_text('#!/bin/sh\nwhile [ "$1" != -o ]; do shift; done\necho nonsense > "$2"\n')
    wrong.chmod(0o755)
    monkeypatch.setenv("CC", str(wrong))
    with pytest.raises(KernelsUnavailable, match="cannot be loaded"):
        use(tmp_path / "storage")


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(KernelsUnavailable, match=r"cannot be written to .*file.*the stock operators are used"):
        use(tmp_path / "file" / "storage")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_is_named(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(KernelsUnavailable, match="cannot be written to"):
        use(tmp_path)
