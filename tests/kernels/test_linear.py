"""The linear layers' kernels: linear_cases.py interpreted, the same on a GPU, and what is compiled without one."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from engine.kernels.tiles import (
    LEAST_SHARED_BYTES,
    SHARED_BYTES,
    GemmTile,
    GemvTile,
    Product,
    Tiles,
    candidates,
    default_gemm,
    default_gemv,
)
from tests.kernels.triton_tests import assert_no_spills, compiled, run_cases

pytest.importorskip("triton")
CASES = Path(__file__).with_name("linear_cases.py")
CHIPS = [("fp16", 80), ("bf16", 90)]  # the type, and the compute capability
SHARED = {80: LEAST_SHARED_BYTES, 90: SHARED_BYTES}


def test_interpreted_kernels_agree_with_float64() -> None:
    run_cases(CASES, interpreted=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_compiled_kernels_agree_with_float64() -> None:
    run_cases(CASES, interpreted=False)


def assert_fits(kernel: Any, capability: int, folder: Path) -> None:
    assert kernel.metadata.shared <= SHARED[capability]
    assert_no_spills(kernel, folder)


@pytest.mark.parametrize(("dtype", "capability"), CHIPS)
@pytest.mark.parametrize(
    ("rows", "n", "k", "norm", "activation"),
    [
        (1, 17920, 1536, "rms", "silu_gate"),
        (4, 17920, 1536, "rms", "silu_gate"),
        (4, 2048, 1536, "rms", "none"),
        (2, 1536, 8960, "none", "none"),
    ],
)
def test_a_gemv_compiles_to_wide_loads_and_spills_nothing(
    rows: int, n: int, k: int, norm: str, activation: str, dtype: str, capability: int, tmp_path: Path
) -> None:
    from engine.kernels.linear.gemv import gemv

    tile = default_gemv(Product("gemv", rows, n, k, activation == "silu_gate"))
    pointers = {"weight": "*i8", "scale": "*fp32"} | dict.fromkeys(("x", "bias", "residual", "y"), f"*{dtype}")
    pointers |= {"norm_weight": f"*{dtype}"} if norm != "none" else {}
    constants = {"N": n, "K": k, "NORM": norm, "EPSILON": 1e-6, "ACTIVATION": activation, "ROWS": rows}
    constants |= {"OUTPUTS": tile.outputs, "DEPTH": tile.depth, "UNROLL": tile.unroll}
    kernel = compiled(gemv, pointers, ["rows"], constants, capability, num_warps=tile.warps)
    assert_fits(kernel, capability, tmp_path)
    weights, rest = kernel.asm["ptx"].split("bar.sync", maxsplit=1)
    early = re.findall(r"ld\.global[\w.:]*", weights)
    loads = early + re.findall(r"ld\.global[\w.:]*", rest.split("shfl.sync")[0])  # until the threads exchange sums
    parts = 2 if activation == "silu_gate" else 1
    asked = 2 * parts  # scales and biases, for the end
    weights_and_norms = tile.unroll * (tile.outputs * parts + (2 if norm != "none" else 0))
    assert len(early) == asked + weights_and_norms, "all weights are asked for at first"
    assert len(loads) == len(early) + tile.unroll * rows * 2
    assert all(load.endswith("v4.b32") for load in loads[asked:]), "16 bytes at a time"


@pytest.mark.parametrize(("dtype", "capability"), CHIPS)
@pytest.mark.parametrize(
    ("kernel", "rows", "n", "k", "activation"),
    [
        ("int8", 16, 2048, 1536, "none"),
        ("int8", 128, 17920, 1536, "silu_gate"),
        ("int8", 2048, 17920, 1536, "silu_gate"),
        ("float", 16, 1536, 8960, "none"),
        ("float", 128, 151936, 1536, "none"),
        ("float", 2048, 17920, 1536, "silu_gate"),
        ("int8", 16, 12288, 2048, "silu_gate"),
        ("int8", 32, 12288, 2048, "silu_gate"),
        ("int8", 32, 4096, 2048, "none"),
        ("int8", 2048, 5120, 1280, "quick_gelu"),  # of towers, as the next
        ("int8", 2048, 4304, 1152, "gelu_tanh"),
        ("int8", 2048, 1152, 4304, "none"),
        ("int8", 1024, 5120, 5120, "gelu"),
    ],
)
def test_a_gemm_compiles_to_tensor_cores_and_spills_nothing(
    kernel: Literal["int8", "float"], rows: int, n: int, k: int, activation: str, dtype: str, capability: int,
    tmp_path: Path,
) -> None:  # fmt: skip
    from engine.kernels.linear.gemm import gemm

    tile = default_gemm(Product(kernel, rows, n, k, activation == "silu_gate"))
    pointers = {"weight": "*i8", "scale": "*fp32"} | dict.fromkeys(("x", "bias", "residual", "y"), f"*{dtype}")
    pointers |= {"x": "*i8", "row_scale": "*fp32"} if kernel == "int8" else {}
    pointers |= {"parts": "*i32" if kernel == "int8" else "*fp32", "tickets": "*i32"} if tile.splits > 1 else {}
    constants = {"N": n, "K": k, "ACTIVATION": activation, "OUTPUTS": tile.outputs, "TOKENS": tile.tokens}
    constants |= {"DEPTH": tile.depth, "SPLITS": tile.splits, "AHEAD": tile.ahead}
    built = compiled(gemm, pointers, ["rows"], constants, capability, num_warps=tile.warps, num_stages=tile.stages)
    assert_fits(built, capability, tmp_path)
    instruction = {80: r"mma\.sync", 90: r"wgmma\.mma_async"}[capability]
    types = r"s32\.s8\.s8" if kernel == "int8" else rf"f32\.{dtype.replace('fp', 'f')}"
    assert re.search(rf"{instruction}[\w.:]*{types}", built.asm["ptx"])


@pytest.mark.parametrize(
    ("tile", "n", "k", "gate"),
    [
        (GemmTile(64, 16, 256, 1, 4, 4, ahead=2), 2048, 1536, False),
        (GemmTile(64, 32, 256, 3, 4, 4, ahead=2), 2048, 1536, False),
        (GemmTile(16, 16, 256, 1, 2, 4, ahead=4), 1536, 1536, False),
        (GemmTile(64, 32, 128, 1, 4, 4, ahead=2), 17920, 1536, True),
    ],
)
def test_weights_are_asked_for_before_the_rows_are_waited_for(
    tile: GemmTile, n: int, k: int, gate: bool, tmp_path: Path
) -> None:
    from engine.kernels.linear.gemm import gemm

    pointers = {"weight": "*i8", "scale": "*fp32", "x": "*i8", "row_scale": "*fp32", "y": "*bf16"}
    pointers |= {"parts": "*i32", "tickets": "*i32"} if tile.splits > 1 else {}
    constants = {"N": n, "K": k, "ACTIVATION": "silu_gate" if gate else "none", "OUTPUTS": tile.outputs}
    constants |= {"TOKENS": tile.tokens, "DEPTH": tile.depth, "SPLITS": tile.splits, "AHEAD": tile.ahead, "EARLY": True}
    built = compiled(gemm, pointers, ["rows"], constants, 90, num_warps=tile.warps, num_stages=tile.stages)
    assert_fits(built, 90, tmp_path)
    before, after = built.asm["ptx"].split("griddepcontrol.wait")
    nbytes = tile.ahead * tile.depth * tile.outputs * (2 if gate else 1)
    assert 16 * 32 * tile.warps * len(re.findall(r"ld\.global[\w.:]*v4", before)) == nbytes
    assert "griddepcontrol.launch_dependents" in after
    assert "st.global" not in before, "nothing is written before the wait"


@pytest.mark.parametrize(
    ("rows", "n", "k", "activation"),
    [
        (2048, 2048, 1536, "none"),
        (2048, 17920, 1536, "silu_gate"),
        (2048, 1536, 8960, "none"),
        (256, 1536, 1536, "none"),
    ],
)
def test_the_copy_engine_brings_many_rows_once_they_are_there(
    rows: int, n: int, k: int, activation: str, tmp_path: Path
) -> None:
    from engine.kernels.linear.gemm import gemm

    tile = default_gemm(Product("int8", rows, n, k, activation == "silu_gate"), bulk=True)
    pointers = {"scale": "*fp32", "row_scale": "*fp32", "y": "*bf16"}
    pointers |= {} if activation == "silu_gate" else {"bias": "*bf16", "residual": "*bf16"}
    pointers |= {"parts": "*i32", "tickets": "*i32"} if tile.splits > 1 else {}
    pointers |= {"x": f"tensordesc<i8[{tile.tokens}, {tile.depth}]>"}
    pointers |= {"weight": f"tensordesc<i8[{tile.outputs}, {tile.depth}]>"}
    constants = {"N": n, "K": k, "ACTIVATION": activation, "OUTPUTS": tile.outputs, "TOKENS": tile.tokens}
    constants |= {"DEPTH": tile.depth, "SPLITS": tile.splits, "AHEAD": 0, "BULK": True, "EARLY": True}
    built = compiled(gemm, pointers, ["rows"], constants, 90, num_warps=tile.warps, num_stages=tile.stages)
    assert_fits(built, 90, tmp_path)
    before, after = built.asm["ptx"].split("griddepcontrol.wait")
    assert "cp.async.bulk.tensor" not in before
    assert "cp.async.bulk.tensor" in after
    assert "cp.async.cg" not in built.asm["ptx"], "threads copy nothing themselves"


@pytest.mark.parametrize(
    ("rows", "n", "activation"), [(16, 2048, "none"), (32, 17920, "silu_gate"), (64, 2048, "none")]
)
def test_the_end_of_a_product_waits_for_nothing_but_its_sums(rows: int, n: int, activation: str) -> None:
    from engine.kernels.linear.gemm import gemm

    tile = default_gemm(Product("int8", rows, n, 1536, activation == "silu_gate"))
    assert tile.splits == 1
    pointers = {"weight": "*i8", "scale": "*fp32", "x": "*i8", "row_scale": "*fp32", "bias": "*bf16", "y": "*bf16"}
    pointers |= {"residual": "*bf16"} if rows <= 32 else {}
    constants = {"N": n, "K": 1536, "ACTIVATION": activation, "OUTPUTS": tile.outputs, "TOKENS": tile.tokens}
    constants |= {"DEPTH": tile.depth, "SPLITS": 1, "AHEAD": 0, "EARLY": True}
    built = compiled(gemm, pointers, ["rows"], constants, 90, num_warps=tile.warps, num_stages=tile.stages)
    before, after = built.asm["ptx"].rsplit("wgmma.mma_async", maxsplit=1)
    assert "ld.global" in before, "scales, biases, what is added"
    assert "ld.global" not in after


SHAPES = [(2048, 1536, False), (17920, 1536, True), (1536, 8960, False), (151936, 1536, False), (288, 192, False)]


@pytest.mark.parametrize(("n", "k", "gate"), SHAPES)
@pytest.mark.parametrize("rows", [1, 4, 16, 128, 1024, 4096])
@pytest.mark.parametrize("bulk", [False, True])
def test_candidates_fit_begin_with_the_default_and_cover_the_depth(
    rows: int, n: int, k: int, gate: bool, bulk: bool
) -> None:
    for kernel in ("gemv", "int8", "float") if rows <= 4 else ("int8", "float"):
        wanted = Product(kernel, rows, n, k, gate)
        tiles = list(candidates(wanted, bulk=bulk))
        assert tiles[0] == (default_gemv(wanted) if kernel == "gemv" else default_gemm(wanted, bulk=bulk))
        assert len(set(tiles)) == len(tiles) <= 200
        for tile in tiles:
            if isinstance(tile, GemvTile):
                assert tile.depth % (16 * 32 * tile.warps) == 0 or k < 512
            else:
                assert tile.bulk == (bulk and kernel == "int8" and rows > 128)
                steps = -(-k // tile.depth)
                assert -(-steps // tile.splits) * (tile.splits - 1) < steps, "no split is without work"


def test_measured_tiles_are_taken_and_others_are_the_default() -> None:
    measured = GemmTile(128, 16, 256, 2, 8, 3)
    tiles = Tiles({Product("int8", 16, 2048, 1536, False): measured, Product("gemv", 1, 8, 8, False): measured})
    assert tiles.gemm("int8", 9, 2048, 1536, gate=False) == measured
    assert tiles.gemm("int8", 17, 2048, 1536, gate=False) == default_gemm(Product("int8", 32, 2048, 1536, False))
    assert tiles.gemv(1, 8, 8, gate=False) == default_gemv(Product("gemv", 1, 8, 8, False)), "of the wrong kernel"
    assert not tiles.gemm("int8", 512, 2048, 1536, gate=False).bulk
    assert Tiles(bulk=True).gemm("int8", 512, 2048, 1536, gate=False).bulk
    assert not Tiles(bulk=True).gemm("int8", 512, 2048, 1544, gate=False).bulk, "rows the copy engine cannot find"


@pytest.mark.parametrize("path", ["auto", "int8", "float"])
@pytest.mark.parametrize(("n", "k", "gate"), SHAPES)
def test_the_workspace_of_many_rows_is_enough_for_fewer(
    path: Literal["auto", "int8", "float"], n: int, k: int, gate: bool
) -> None:
    from engine.kernels.linear.layer import Int8Linear, LinearParameters

    parameters = LinearParameters(norm="rms", activation="silu_gate" if gate else "none", path=path)
    needed = [Int8Linear.workspace_bytes(parameters, Tiles(), rows, n, k) for rows in (1, 3, 8, 64, 100, 500, 9000)]
    assert needed == sorted(needed)
