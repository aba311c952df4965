"""The int8 linear layers against float64; run by test_linear.py, interpreted or on a GPU.

Without a GPU Triton must interpret the kernels, which is decided when triton is imported.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import pytest
import torch

from engine.errors import DeviceOutOfMemory
from engine.kernels.linear.gemm import gemm
from engine.kernels.linear.layer import Int8Linear, LinearParameters, Path
from engine.kernels.overlap import copies_in_bulk
from engine.kernels.tiles import GemmTile, GemvTile, Product, Tiles, rows_bucket
from engine.kernels.workspace import Workspace

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON_GPU = DEVICE.type == "cuda"
UNIT = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8 if ON_GPU else 2.0**-7}  # which the interpreter cuts off
SMALL = GemmTile(outputs=16, tokens=16, depth=32, splits=1, warps=4, stages=3)
if ON_GPU:
    SMALL = dataclasses.replace(SMALL, outputs=64)
FUSED = [
    ("none", "none"), ("none", "gelu_tanh"), ("rms", "silu_gate"), ("rms", "quick_gelu"), ("layer", "silu_gate"),
    ("layer", "gelu"),
]  # fmt: skip
Inputs = dict[str, torch.Tensor | None]


def draw(rows: int, n: int, k: int, parameters: LinearParameters, dtype: torch.dtype, seed: int = 0) -> Inputs:
    """A layer with a bias and a residual whose results are about 1."""
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=random)

    width = n // 2 if parameters.gate else n
    norm, layer = parameters.norm != "none", parameters.norm == "layer"
    drawn = {
        "x": normal(rows, k).to(dtype),
        "weight": torch.randint(-127, 128, (n, k), generator=random).to(torch.int8),
        "scale": (0.5 + torch.rand(n, generator=random)) / (73 * k**0.5),
        "bias": normal(n).to(dtype),
        "norm_weight": (1 + normal(k) / 4).to(dtype) if norm else None,
        "norm_bias": (normal(k) / 4).to(dtype) if layer else None,
        "residual": normal(rows, width).to(dtype),
    }
    return {name: None if value is None else value.to(DEVICE) for name, value in drawn.items()}


def activated(value: torch.Tensor, kind: str) -> torch.Tensor:
    match kind:
        case "gelu" | "gelu_tanh":
            return torch.nn.functional.gelu(value, approximate="tanh" if kind == "gelu_tanh" else "none")
        case "quick_gelu":
            return value * torch.sigmoid(1.702 * value)
        case "silu_gate":
            gate, up = value.chunk(2, dim=1)
            return torch.nn.functional.silu(gate) * up
    return value


def normed(inputs: Inputs, parameters: LinearParameters) -> torch.Tensor:
    x, weight, bias = (tensor(inputs, name) for name in ("x", "norm_weight", "norm_bias"))
    if parameters.norm == "none":
        return x
    if parameters.norm == "layer":
        x = x - x.mean(1, keepdim=True)
    x = x / (x.pow(2).mean(1, keepdim=True) + parameters.epsilon).sqrt() * weight
    return x + bias if inputs["norm_bias"] is not None else x


def quantised(x: torch.Tensor) -> torch.Tensor:
    """Each row to 127 steps on either side and back, half to even; which is half is up to float32.

    A device multiplies and rounds to an integer at once, the interpreter rounds the product to float32 between.
    """
    peak = x.abs().amax(1, keepdim=True)
    steps = x * (127 / peak).float().double()
    steps = (steps if ON_GPU else steps.float().double()).round()
    return torch.where(peak > 0, steps * (peak / 127), 0.0)


def tensor(inputs: Inputs, name: str) -> torch.Tensor:
    value = inputs[name]
    return torch.zeros((), dtype=torch.float64) if value is None else value.double().cpu()


def reference(inputs: Inputs, parameters: LinearParameters, kernel: str = "gemv") -> torch.Tensor:
    x = normed(inputs, parameters)
    x_type = inputs["x"]
    assert x_type is not None
    if kernel != "gemv":  # the kernel before the product rounds once
        x = x.to(x_type.dtype).double()
    if kernel == "int8":
        x = quantised(x)
    product = x @ (tensor(inputs, "weight") * tensor(inputs, "scale")[:, None]).T
    return activated(product + tensor(inputs, "bias"), parameters.activation) + tensor(inputs, "residual")


def run(
    inputs: Inputs, parameters: LinearParameters, tiles: Tiles | None = None, workspace: Workspace | None = None
) -> torch.Tensor:
    x, weight = inputs["x"], inputs["weight"]
    assert x is not None
    assert weight is not None
    tiles = tiles or Tiles()
    (rows, k), n = x.shape, weight.shape[0]
    needed = Int8Linear.workspace_bytes(parameters, tiles, max(rows, 1), n, k)
    workspace = workspace or Workspace(needed, DEVICE)
    y = torch.full((rows, n // 2 if parameters.gate else n), torch.nan, dtype=x.dtype, device=DEVICE)
    Int8Linear(parameters, workspace, tiles)(**inputs, y=y)  # type: ignore[arg-type]
    assert not workspace.tickets.any(), "tickets are as they were"
    return y


def assert_near(y: torch.Tensor, expected: torch.Tensor, *, slack: float = 2e-5) -> None:
    """To one rounding of the result's type, and slack for sums in float32."""
    unit = UNIT[y.dtype]
    error = (y.double().cpu() - expected).abs()
    assert (error <= unit * expected.abs() + slack).all(), f"{error.max()} at {expected.abs().max()}"


def tiles_of(kernel: Literal["int8", "float"], inputs: Inputs, gate: bool, tile: GemmTile) -> Tiles:
    x, weight = inputs["x"], inputs["weight"]
    assert x is not None
    assert weight is not None
    n, k = weight.shape
    return Tiles({Product(kernel, rows_bucket(len(x)), n, k, gate): tile}, gemv_rows=0)


@pytest.mark.parametrize(("norm", "activation"), FUSED)
@pytest.mark.parametrize(("rows", "dtype"), [(1, torch.float16), (3, torch.bfloat16)], ids=str)
def test_a_few_rows_are_those_of_float64(norm: Any, activation: Any, rows: int, dtype: torch.dtype) -> None:
    parameters = LinearParameters(1e-5, norm, activation)
    inputs = draw(rows, 14, 192, parameters, dtype)
    assert_near(run(inputs, parameters), reference(inputs, parameters))


@pytest.mark.parametrize("k", [1, 15, 576, 577, 1536])
def test_a_few_rows_of_any_depth(k: int) -> None:
    parameters = LinearParameters(1e-6, "rms")
    inputs = draw(2, 5, k, parameters, torch.float16)
    assert_near(run(inputs, parameters), reference(inputs, parameters), slack=1e-4)


@pytest.mark.parametrize("norm", ["none", "rms", "layer"])
def test_a_deep_row_is_shared_by_several_warps(norm: Any) -> None:
    parameters = LinearParameters(1e-6, norm)
    inputs = draw(1, 5, 8960, parameters, torch.bfloat16)
    assert_near(run(inputs, parameters), reference(inputs, parameters))


@pytest.mark.parametrize("outputs", [1, 2, 8])
def test_tiles_of_other_widths_give_the_same(outputs: int) -> None:
    parameters = LinearParameters(1e-6, "rms", "silu_gate")
    inputs = draw(2, 14, 200, parameters, torch.float16)
    tiles = Tiles({Product("gemv", 2, 14, 200, True): GemvTile(outputs, 128, 2, 1)})
    assert_near(run(inputs, parameters, tiles), reference(inputs, parameters))


def test_a_layer_norm_of_a_large_mean_keeps_its_digits() -> None:
    parameters = LinearParameters(1e-6, "layer")
    inputs = draw(1, 6, 576, parameters, torch.float16)
    x = inputs["x"]
    assert x is not None
    inputs["x"] = x / 4 + 1000
    assert_near(run(inputs, parameters), reference(inputs, parameters), slack=1e-4)


@pytest.mark.parametrize(("norm", "activation"), FUSED)
def test_int8_rows_are_those_of_float64(norm: Any, activation: Any) -> None:
    parameters = LinearParameters(1e-5, norm, activation)
    inputs = draw(19, 42, 96, parameters, torch.float16)
    y = run(inputs, parameters, tiles_of("int8", inputs, parameters.gate, SMALL))
    # the norm's rounding may go either way, and then that of a quantised value
    assert_near(y, reference(inputs, parameters, "int8"), slack=2e-5 if norm == "none" else 2e-2)


@pytest.mark.parametrize(
    ("norm", "activation", "dtype"),
    [("none", "silu_gate", torch.bfloat16), *((norm, activation, torch.float16) for norm, activation in FUSED[1:4])],
    ids=str,
)
def test_16_bit_rows_are_those_of_float64(norm: Any, activation: Any, dtype: torch.dtype) -> None:
    parameters = LinearParameters(1e-5, norm, activation, "float")
    inputs = draw(19, 42, 96, parameters, dtype)
    y = run(inputs, parameters, tiles_of("float", inputs, parameters.gate, SMALL))
    assert_near(y, reference(inputs, parameters, "float"), slack=2e-3)  # the norm's rounding may go either way


@pytest.mark.parametrize("path", ["int8", "float"])
@pytest.mark.parametrize(("k", "splits"), [(31, 2), (96, 3), (200, 2), (200, 5)])
def test_a_split_depth_is_added_up(path: Any, k: int, splits: int) -> None:
    parameters = LinearParameters(activation="silu_gate", path=path)
    inputs = draw(6, 36, k, parameters, torch.float16)
    y = run(inputs, parameters, tiles_of(path, inputs, True, dataclasses.replace(SMALL, splits=splits)))
    assert_near(y, reference(inputs, parameters, path))


@pytest.mark.parametrize(("k", "splits", "ahead"), [(96, 1, 2), (96, 1, 3), (200, 2, 4), (200, 3, 1)])
def test_weights_that_are_asked_for_ahead_change_no_bit(k: int, splits: int, ahead: int) -> None:
    parameters = LinearParameters(activation="silu_gate", path="int8")
    inputs = draw(6, 36, k, parameters, torch.float16)
    tile = dataclasses.replace(SMALL, splits=splits)
    y = run(inputs, parameters, tiles_of("int8", inputs, True, tile))
    assert torch.equal(
        run(inputs, parameters, tiles_of("int8", inputs, True, dataclasses.replace(tile, ahead=ahead))), y
    )


@pytest.mark.parametrize("rows", [1, 5, 40])
def test_products_in_the_tiles_of_the_default(rows: int) -> None:
    parameters = LinearParameters(path="int8")
    inputs = draw(rows, 100, 192, parameters, torch.float16)
    assert_near(run(inputs, parameters), reference(inputs, parameters, "int8"))


def test_more_row_tiles_than_a_group_has() -> None:
    parameters = LinearParameters(path="float")
    inputs = draw(SMALL.tokens * 17 + 3, 20, 32, parameters, torch.float16)
    y = run(inputs, parameters, tiles_of("float", inputs, False, SMALL))
    assert_near(y, reference(inputs, parameters, "float"))


@pytest.mark.skipif(ON_GPU and not copies_in_bulk(DEVICE), reason="a GPU without a copy engine for tiles")
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize(
    ("rows", "n", "k", "norm", "activation"),
    [(37, 50, 96, "none", "none"), (20, 44, 80, "rms", "silu_gate"), (1, 16, 112, "layer", "gelu")],
)
def test_tiles_that_the_copy_engine_brings_give_the_same_bits(
    rows: int, n: int, k: int, norm: Any, activation: Any, splits: int
) -> None:
    """Also where a tile reaches beyond rows, outputs or depth, and where gate ends and up begins."""
    parameters = LinearParameters(1e-6 * (norm != "none"), norm, activation, "int8")
    inputs = draw(rows, n, k, parameters, torch.float16)
    tile = dataclasses.replace(SMALL, splits=splits)
    y = run(inputs, parameters, tiles_of("int8", inputs, parameters.gate, dataclasses.replace(tile, bulk=True)))
    assert torch.equal(y, run(inputs, parameters, tiles_of("int8", inputs, parameters.gate, tile)))
    assert_near(y, reference(inputs, parameters, "int8"))


@pytest.mark.skipif(not ON_GPU or not copies_in_bulk(DEVICE), reason="a GPU without a copy engine for tiles")
@pytest.mark.parametrize(("n", "k", "gate"), [(2048, 1536, False), (17920, 1536, True), (1536, 8960, False)])
@pytest.mark.parametrize("rows", [129, 528, 2056])
def test_many_rows_in_the_default_tiles_give_the_same_bits(rows: int, n: int, k: int, gate: bool) -> None:
    parameters = LinearParameters(1e-6, "rms", "silu_gate" if gate else "none", "int8")
    inputs = draw(rows, n, k, parameters, torch.bfloat16)
    assert torch.equal(run(inputs, parameters, Tiles(bulk=True)), run(inputs, parameters, Tiles()))


def test_int8_sums_are_exact_at_the_largest_depth() -> None:
    """1.4e8, beyond what float32 counts; the interpreter's product must be one of integers too."""
    k, tile = 8960, dataclasses.replace(SMALL, depth=128 if ON_GPU else 1024, splits=2)
    x = torch.full((2, k), 127, dtype=torch.int8, device=DEVICE)
    weight = torch.full((1, k), 127, dtype=torch.int8, device=DEVICE)
    x[1, 0], one = 126, torch.ones(2, device=DEVICE)
    y, workspace = torch.zeros(2, 1, device=DEVICE), Workspace(1 << 16, DEVICE)
    parts = workspace.take((2 * tile.outputs * tile.tokens,), torch.int32)
    gemm[(1, 2)](
        x, one, weight, one[:1], None, None, y, parts, workspace.tickets, 2, N=1, K=k, ACTIVATION="none",
        OUTPUTS=tile.outputs, TOKENS=tile.tokens, DEPTH=tile.depth, SPLITS=2, num_warps=4,
    )  # fmt: skip
    sums = parts.view(2, tile.outputs, tile.tokens)[:, 0, :2].sum(0)
    assert sums.tolist() == [k * 127 * 127, k * 127 * 127 - 127]


@pytest.mark.parametrize("path", ["auto", "int8", "float"])
def test_a_row_does_not_depend_on_its_neighbours(path: Any) -> None:
    parameters = LinearParameters(1e-6, "rms", "silu_gate", path)
    rows = 4 if path == "auto" else 9
    inputs = draw(rows, 12, 96, parameters, torch.float16)
    tile = dataclasses.replace(SMALL, splits=2)
    measured = {Product(path, bucket, 12, 96, True): tile for bucket in (1, 2, 4, 8, 16)} if path != "auto" else {}
    tiles = Tiles(measured, gemv_rows=4 if path == "auto" else 0)
    together = run(inputs, parameters, tiles)
    assert torch.equal(run(inputs, parameters, tiles), together), "two runs are equal to the bit"
    for row in range(rows):
        alone = {name: v[row : row + 1] if name in ("x", "residual") and v is not None else v
                 for name, v in inputs.items()}  # fmt: skip
        assert torch.equal(run(alone, parameters, tiles)[0], together[row])


@pytest.mark.parametrize("path", ["auto", "int8", "float"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_row_that_is_not_a_number_leaves_its_neighbours_alone(path: Any, bad: float) -> None:
    parameters = LinearParameters(1e-6, "rms" if path != "float" else "none", path=path)
    inputs = draw(3, 6, 70, parameters, torch.float16)
    tiles = Tiles() if path == "auto" else tiles_of(path, inputs, False, dataclasses.replace(SMALL, splits=2))
    good = run(inputs, parameters, tiles)
    x = inputs["x"]
    assert x is not None
    x[1, 5] = bad
    y = run(inputs, parameters, tiles)
    assert torch.equal(y[[0, 2]], good[[0, 2]])
    assert not y[1].isfinite().all()


@pytest.mark.parametrize("path", ["auto", "int8", "float"])
@pytest.mark.parametrize("norm", ["none", "rms", "layer"])
def test_a_row_of_zeros_gives_the_bias(path: Any, norm: Any) -> None:
    parameters = LinearParameters(0.0, norm, path=path)
    inputs = draw(3, 6, 70, parameters, torch.float16)
    x, bias = inputs["x"], inputs["bias"]
    assert x is not None
    assert bias is not None
    x[1] = 0
    inputs |= Inputs(residual=None, norm_bias=None)
    tiles = Tiles() if path == "auto" else tiles_of(path, inputs, False, SMALL)
    assert torch.equal(run(inputs, parameters, tiles)[1], bias)


def test_an_outlier_is_no_trouble_to_16_bit_rows() -> None:
    parameters = LinearParameters(path="float")
    inputs = draw(6, 20, 64, parameters, torch.float16)
    x = inputs["x"]
    assert x is not None
    x[:, 3] = 30000.0
    y = run(inputs, parameters, tiles_of("float", inputs, False, SMALL))
    assert_near(y, reference(inputs, parameters, "float"), slack=1e-2)


def test_neither_bias_nor_residual() -> None:
    paths: list[Path] = ["auto", "int8"]
    for path in paths:
        parameters = LinearParameters(path=path, activation="silu_gate")
        inputs = draw(3, 6, 70, parameters, torch.bfloat16) | Inputs(bias=None, residual=None)
        assert_near(run(inputs, parameters), reference(inputs, parameters, "gemv" if path == "auto" else "int8"))


def test_a_call_without_rows_launches_nothing() -> None:
    parameters = LinearParameters()
    assert run(draw(0, 20, 70, parameters, torch.float16), parameters).shape == (0, 20)


def test_what_does_not_fit_is_refused() -> None:
    parameters = LinearParameters(1e-6, "rms", "silu_gate")
    inputs = draw(2, 20, 70, parameters, torch.float16)
    x, scale = inputs["x"], inputs["scale"]
    assert x is not None
    assert scale is not None
    changes: list[tuple[Inputs, str]] = [
        ({"scale": scale.half()}, r"scale is torch.float16 \[20\]; .* must be torch.float32 \[20\]"),
        ({"x": x.float()}, "x is float16 or bfloat16"),
        ({"x": x[:, :69].contiguous()}, "weight is torch.int8"),
        ({"x": x.bfloat16()}, "must be torch.bfloat16"),
        ({"norm_weight": None}, "norm rms"),
    ]
    for change, message in changes:
        with pytest.raises(ValueError, match=message):
            run(inputs | change, parameters)
    with pytest.raises(DeviceOutOfMemory, match="256 of 256 are free"):
        run(draw(20, 20, 70, parameters, torch.float16), parameters, Tiles(gemv_rows=0), Workspace(1, DEVICE))
