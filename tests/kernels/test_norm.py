"""The norm kernels: norm_cases.py interpreted, the same on a GPU, and what the compiler makes of them without one."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
CASES = Path(__file__).with_name("norm_cases.py")
CHIPS = [("fp16", 80), ("bf16", 80), ("fp16", 90), ("bf16", 90)]  # the type, and the compute capability
AFFINE = {"none": (), "rms": ("weight",), "layer": ("weight", "bias")}
ACTIVATED = [("silu_gate", 18944), ("gelu", 5120), ("gelu_tanh", 3072), ("quick_gelu", 5120)]
NORMED = [  # the norm, to int8, with a residual, rows and their width
    ("none", True, False, 1, 8960),
    ("rms", True, False, 2048, 192),
    ("layer", True, True, 1, 18944),
    ("layer", False, True, 1, 1536),
]


def run_cases(**environment: str) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-W", "ignore", str(CASES)],
        env={key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"} | environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]


def test_interpreted_kernels_agree_with_float64() -> None:
    run_cases(TRITON_INTERPRET="1")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_compiled_kernels_agree_with_float64() -> None:
    run_cases()


def compiled(name: str, pointers: dict[str, str], constants: dict[str, Any], warps: int, capability: int) -> Any:
    """The kernel for a GPU that need not be there. Arguments that are named nowhere are None."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from engine.kernels import norm

    kernel = getattr(norm, name)
    types = pointers | {"count": "i32"}
    signature = {argument: types.get(argument, "constexpr") for argument in kernel.arg_names}
    known = {(index,): constants.get(key) for index, key in enumerate(signature) if key not in types}
    aligned = {(index,): [["tt.divisibility", 16]] for index, key in enumerate(signature) if key in pointers}
    source = ASTSource(kernel, signature, known, aligned)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})


def machine_code(kernel: Any, folder: Path, *arguments: str) -> str:
    """What the toolkit's disassembler says of the compiled kernel."""
    import triton

    cubin = folder / "kernel.cubin"
    cubin.write_bytes(kernel.kernel)
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    return subprocess.run([tool, *arguments, cubin], capture_output=True, text=True, check=True).stdout


def assert_fits_in_registers(kernel: Any, folder: Path) -> None:
    usage = machine_code(kernel, folder, "--dump-resource-usage")
    found = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", usage)
    assert found, usage
    assert found[2] == found[3] == "0", f"{found[0]}: registers were spilled"


def assert_loads_come_first(kernel: Any, folder: Path) -> None:
    """Memory is waited for once: no load is behind a sum, whose first step across threads is a shuffle."""
    code = machine_code(kernel, folder, "-sass")
    loads, shuffles = ([found.start() for found in re.finditer(rf"\b{name}\.", code)] for name in ("LDG", "SHFL"))
    assert max(loads) < min(shuffles)


def loads_of(kernel: Any) -> list[str]:
    """The instructions that read global memory."""
    return re.findall(r"ld\.global[\w.:]*", kernel.asm["ptx"])


@pytest.mark.parametrize(("dtype", "capability"), CHIPS)
@pytest.mark.parametrize(("norm", "quantised", "added", "count", "width"), NORMED)
def test_norms_compile_to_wide_loads_and_spill_nothing(
    norm: str, quantised: bool, added: bool, count: int, width: int, dtype: str, capability: int, tmp_path: Path
) -> None:
    from engine.kernels.norm import tile_of

    pointers = {"x": f"*{dtype}", "out": "*i8" if quantised else f"*{dtype}"}
    pointers |= {"scales": "*fp32"} if quantised else {}
    pointers |= {name: f"*{dtype}" for name in ("residual", "total") if added}
    pointers |= dict.fromkeys(AFFINE[norm], f"*{dtype}")
    columns, rows, warps = tile_of(count, width)
    constants = {"WIDTH": width, "NORM": norm, "EPSILON": 1e-6, "COLUMNS": columns, "ROWS": rows}
    kernel = compiled("_normalised_rows", pointers, constants, warps, capability)
    assert_fits_in_registers(kernel, tmp_path)
    assert_loads_come_first(kernel, tmp_path)
    inputs, loads = len({"x", "residual", "weight", "bias"} & pointers.keys()), loads_of(kernel)
    assert len(loads) == inputs * -(-width // columns), "every value is read once"
    assert all(load.endswith("v4.b32") for load in loads), "16 bytes at a time"


@pytest.mark.parametrize(("dtype", "capability"), CHIPS[::3])
def test_activations_compile_to_wide_loads_and_spill_nothing(dtype: str, capability: int, tmp_path: Path) -> None:
    from engine.kernels.norm import tile_of

    pointers = {"x": f"*{dtype}", "rows": "*i8", "scales": "*fp32"}
    for kind, width in ACTIVATED:
        columns, rows, warps = tile_of(1, width)
        constants = {"WIDTH": width, "KIND": kind, "COLUMNS": columns, "ROWS": rows}
        kernel = compiled("_activated_rows", pointers, constants, warps, capability)
        assert_fits_in_registers(kernel, tmp_path)
        assert all(load.endswith("v4.b32") for load in loads_of(kernel)), "16 bytes at a time"
