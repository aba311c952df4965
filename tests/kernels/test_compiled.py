"""What Triton compiles is found by the next process, in the storage folder."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
SCRIPT = Path(__file__).with_name("compile_once.py")
ROOT = SCRIPT.parents[2]


def compile_in(folder: Path, **environment: str) -> str:
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("TRITON_")}
    inherited["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, str(SCRIPT), str(folder)]
    run = subprocess.run(command, env=inherited | environment, capture_output=True, text=True, check=False, timeout=120)
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


def test_the_next_start_compiles_nothing(tmp_path: Path) -> None:
    folder, home = tmp_path / "storage" / "compiled", str(tmp_path / "home")
    assert compile_in(folder, TRITON_HOME=home) == "False"
    assert compile_in(folder, TRITON_HOME=home) == "True"
    assert not (tmp_path / "home" / ".triton" / "cache").exists()
    kinds = {path.suffix for path in folder.rglob("*") if path.is_file()}
    assert ".cubin" in kinds
    assert not kinds & {".ttir", ".ttgir", ".llir", ".ptx"}


def test_a_cache_folder_named_by_the_environment_is_left_to_it(tmp_path: Path) -> None:
    named = tmp_path / "named"
    compile_in(tmp_path / "storage", TRITON_CACHE_DIR=str(named))
    assert any(named.rglob("*.cubin"))
    assert not (tmp_path / "storage").exists()


def test_a_storage_that_cannot_be_written_leaves_tritons_own_folder(tmp_path: Path) -> None:
    (tmp_path / "storage").write_bytes(b"")
    compile_in(tmp_path / "storage" / "compiled", TRITON_HOME=str(tmp_path))
    assert any((tmp_path / ".triton" / "cache").rglob("*.cubin"))


@pytest.mark.parametrize("first", ["engine.kernels.linear.gemv.gemv", "engine.kernels.norm._normalised_rows"])
def test_a_kernels_key_does_not_depend_on_which_was_launched_first(first: str) -> None:
    module, name = first.rsplit(".", 1)
    print_key = "from engine.kernels.linear.gemm import gemm; print(gemm.cache_key)"
    keys = [
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        for code in (print_key, f"from {module} import {name} as first; first.cache_key; {print_key}")
    ]
    assert len(keys[0].strip()) == 64
    assert keys[0] == keys[1]
