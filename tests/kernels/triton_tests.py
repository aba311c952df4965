"""Kernels without a GPU: cases in a process whose Triton interprets, and what the compiler makes of a kernel."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any


def run_cases(cases: Path, *, interpreted: bool) -> None:
    """A file of tests in a process of its own: Triton decides once whether it interprets or compiles."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-W", "ignore", str(cases)]
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"TRITON_INTERPRET": "1"} if interpreted else {}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]


def compiled(
    kernel: Any,
    pointers: Mapping[str, str],
    integers: Collection[str],
    constants: Mapping[str, Any],
    capability: int,
    *,
    unaligned: Collection[str] = (),
    **options: int | None,
) -> Any:
    """The kernel for a GPU that need not be there. Arguments that are named nowhere are None."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = {**pointers, **dict.fromkeys(integers, "i32")}
    signature = {argument: types.get(argument, "constexpr") for argument in kernel.arg_names}
    known = {(index,): constants.get(key) for index, key in enumerate(signature) if key not in types}
    wide = pointers.keys() - set(unaligned)
    aligned = {(index,): [["tt.divisibility", 16]] for index, key in enumerate(signature) if key in wide}
    source = ASTSource(kernel, signature, known, aligned)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def machine_code(kernel: Any, folder: Path, *arguments: str) -> str:
    """What the toolkit's disassembler says of a compiled kernel."""
    import triton

    cubin = folder / "kernel.cubin"
    cubin.write_bytes(kernel.kernel)
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    return subprocess.run([tool, *arguments, cubin], capture_output=True, text=True, check=True).stdout


def usage(kernel: Any, folder: Path) -> dict[str, int]:
    """REG: registers of a thread; STACK and LOCAL: bytes of it that lie in memory, where registers were spilled to."""
    said = machine_code(kernel, folder, "--dump-resource-usage")
    return {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", said)}


def assert_no_spills(kernel: Any, folder: Path) -> None:
    used = usage(kernel, folder)
    assert used["STACK"] == used["LOCAL"] == 0, f"registers were spilled: {used}"
