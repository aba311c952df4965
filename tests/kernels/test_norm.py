"""The norm kernels: norm_cases.py interpreted, the same on a GPU, and what the compiler makes of them without one."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.kernels.triton_tests import assert_no_spills, compiled, machine_code, run_cases

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


def test_interpreted_kernels_agree_with_float64() -> None:
    run_cases(CASES, interpreted=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_compiled_kernels_agree_with_float64() -> None:
    run_cases(CASES, interpreted=False)


def compiled_norm(name: str, pointers: dict[str, str], constants: dict[str, Any], warps: int, capability: int) -> Any:
    from engine.kernels import norm

    return compiled(getattr(norm, name), pointers, ["count"], constants, capability, num_warps=warps)


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
    kernel = compiled_norm("_normalised_rows", pointers, constants, warps, capability)
    assert_no_spills(kernel, tmp_path)
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
        kernel = compiled_norm("_activated_rows", pointers, constants, warps, capability)
        assert_no_spills(kernel, tmp_path)
        assert all(load.endswith("v4.b32") for load in loads_of(kernel)), "16 bytes at a time"
