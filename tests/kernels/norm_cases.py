"""The norm kernels against float64. test_norm.py runs this file: interpreted on the CPU, and compiled on a GPU."""

from __future__ import annotations

import os
from dataclasses import dataclass
from math import erf, pi, sqrt
from typing import Any, get_args

import numpy as np
import pytest
import torch

from engine.checkpoints import quantise
from engine.kernels import norm
from engine.kernels.activation import Activation
from engine.kernels.norm import Norm, act_quantise, normalise_rows, quantise_rows

INTERPRETED = bool(os.environ.get("TRITON_INTERPRET"))
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
TYPES = [torch.float16, torch.bfloat16]
WIDTHS = [1, 30, 576, 1536, 18944]
ROUNDING = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-7 if INTERPRETED else 2.0**-8}  # the interpreter cuts off
SUMS = 4e-6  # of a float32 sum and the roots and exponentials after it
SMALLEST = {torch.float16: 2.0**-25, torch.bfloat16: 2.0**-126}  # half of what is rounded to a multiple of it
Quantised = tuple[torch.Tensor, torch.Tensor]


def draw(*shape: int, dtype: torch.dtype = torch.float16, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    values = np.random.default_rng(seed).standard_normal(shape) * scale
    return torch.from_numpy(values).to(dtype).to(DEVICE)


def affine(kind: Norm, width: int, dtype: torch.dtype) -> dict[str, Any]:
    """Arguments of a norm over rows of this width."""
    if kind == "none":
        return {"norm": kind}
    arguments: dict[str, Any] = {"norm": kind, "epsilon": 1e-6, "norm_weight": draw(width, dtype=dtype, seed=7)}
    return arguments | ({"norm_bias": draw(width, dtype=dtype, seed=8)} if kind == "layer" else {})


def reference(x: torch.Tensor, arguments: dict[str, Any]) -> torch.Tensor:
    """The norm of float64 rows, the slow and obvious way."""
    kind, epsilon = arguments["norm"], arguments.get("epsilon", 0.0)
    if kind == "none":
        return x
    if kind == "layer":
        x = x - x.mean(1, keepdim=True)
    y: torch.Tensor = x / (x.square().mean(1, keepdim=True) + epsilon).sqrt() * arguments["norm_weight"].double()
    if "norm_bias" in arguments:
        y += arguments["norm_bias"].double()
    return y


def normalised(x: torch.Tensor, **arguments: Any) -> torch.Tensor:
    out = torch.full_like(x, 77.0)
    normalise_rows(x, out, **arguments)
    return out


def quantised(x: torch.Tensor, **arguments: Any) -> Quantised:
    rows, scales = torch.full_like(x, 77, dtype=torch.int8), torch.full((len(x),), 77.0, device=x.device)
    quantise_rows(x, rows, scales, **arguments)
    return rows, scales


def activated(x: torch.Tensor, width: int, activation: Activation) -> Quantised:
    rows = torch.full((len(x), width), 77, dtype=torch.int8, device=x.device)
    scales = torch.full((len(x),), 77.0, device=x.device)
    act_quantise(x, rows, scales, activation=activation)
    return rows, scales


def assert_same(found: Quantised, expected: Quantised) -> None:
    assert torch.equal(found[1], expected[1])
    assert torch.equal(found[0], expected[0])


def assert_follows_the_format(found: Quantised, values: torch.Tensor, error: torch.Tensor | float = 0.0) -> None:
    """values float64, known up to an absolute error per row: the bytes are the nearest that there are."""
    rows, scales = found[0].double(), found[1].double()
    error = torch.as_tensor(error, dtype=torch.float64, device=DEVICE).expand(len(rows))
    peaks = values.abs().amax(1)
    assert ((scales - peaks / 127).abs() <= error / 127 + 1e-7 * scales).all()
    assert (scales > 0).all()
    distance = (rows - values / scales[:, None]).abs().amax(1)
    assert (distance <= 0.5 + 1e-4 + 2 * error / scales).all(), distance
    assert (rows.abs().amax(1) == 127).all()


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("kind", get_args(Norm))
def test_rows_are_normalised(kind: Norm, width: int, dtype: torch.dtype) -> None:
    x, arguments = draw(2, width, dtype=dtype), affine(kind, width, dtype)
    x[1] *= 50
    expected = reference(x.double(), arguments)
    error = (normalised(x, **arguments).double() - expected).abs()
    bound = expected.abs() * ROUNDING[dtype] + expected.abs().amax(1, keepdim=True) * SUMS + SMALLEST[dtype]
    assert (error <= bound).all(), (error / bound).max()


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_rows_that_no_norm_precedes_follow_the_int8_format(width: int, dtype: torch.dtype) -> None:
    x = draw(2, width, dtype=dtype, scale=3)
    found = quantised(x)
    assert_follows_the_format(found, x.double())
    rows, scales = quantise.quantise_rows(x.float().cpu().numpy())
    assert found[1].tolist() == scales.tolist()
    assert np.abs(found[0].cpu().numpy().astype(np.int32) - rows).max() <= 1  # where a value is between two bytes


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("width", [30, 1536, 8960])
@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_norm_and_quantisation_in_one_are_the_two_in_turn(kind: Norm, width: int, dtype: torch.dtype) -> None:
    x, arguments = draw(2, width, dtype=dtype), affine(kind, width, dtype)
    found, expected = quantised(x, **arguments), reference(x.double(), arguments)
    assert_same(found, quantised(normalised(x, **arguments)))
    assert_follows_the_format(found, expected, expected.abs().amax(1) * (ROUNDING[dtype] + SUMS))


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("kind", get_args(Norm))
def test_a_residual_is_added_first_and_the_sum_is_kept(kind: Norm, dtype: torch.dtype) -> None:
    width = 300
    x, residual, arguments = (
        draw(3, width, dtype=dtype),
        draw(3, width, dtype=dtype, seed=1),
        affine(kind, width, dtype),
    )
    totals = [torch.full_like(x, 77.0) for _ in range(2)]
    out = normalised(x, residual=residual, total=totals[0], **arguments)
    bytes_and_scales = quantised(x, residual=residual, total=totals[1], **arguments)
    expected = x.double() + residual.double()
    assert ((totals[0].double() - expected).abs() <= expected.abs() * ROUNDING[dtype] + SMALLEST[dtype]).all()
    assert torch.equal(totals[0], totals[1])
    assert torch.equal(out, normalised(totals[0], **arguments)), "added here or in the layer before: the same bits"
    assert_same(bytes_and_scales, quantised(totals[0], **arguments))
    assert_same(quantised(x, residual=residual, **arguments), bytes_and_scales)  # the sum need not be kept


def test_a_total_may_take_the_place_of_what_is_added() -> None:
    x, residual, arguments = draw(3, 600), draw(3, 600, seed=1), affine("rms", 600, torch.float16)
    expected = normalised(x, residual=residual, **arguments)
    for place in (0, 1):
        pair = [x.clone(), residual.clone()]
        assert torch.equal(normalised(pair[0], residual=pair[1], total=pair[place], **arguments), expected)
        assert torch.equal(pair[place], x + residual)


def test_halves_are_rounded_to_even() -> None:
    row = torch.tensor([127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 62.5, 63.5, -126.5, 126.5, 0.25, -127.0])
    rows, scales = quantised(row.half().to(DEVICE)[None])
    assert scales.tolist() == [1.0]
    assert rows.tolist() == [[127, 0, 2, 2, 0, -2, -2, 62, 64, -126, 126, 0, -127]]


@pytest.mark.parametrize("kind", get_args(Norm))
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_a_row_of_zeros_is_one_with_scale_0(kind: Norm, dtype: torch.dtype) -> None:
    arguments = affine(kind, 40, dtype) | {"epsilon": 0.0}
    arguments.pop("norm_bias", None)
    x = draw(3, 40, dtype=dtype)
    x[1] = 0.0
    rows, scales = quantised(x, **arguments)
    assert scales[1] == 0
    assert not rows[1].any()
    assert not normalised(x, **arguments)[1].any()
    assert (scales[[0, 2]] > 0).all()


def test_a_layer_norm_of_equal_values_is_its_bias() -> None:
    arguments = affine("layer", 100, torch.float16)
    out = normalised(torch.full((2, 100), 1234.0, dtype=torch.float16, device=DEVICE), **arguments)
    assert torch.equal(out, arguments["norm_bias"].expand(2, 100))


def test_the_smallest_numbers_of_float16_are_quantised_like_any() -> None:
    x = (torch.arange(-40, 41) * 2.0**-24).half().to(DEVICE)[None]
    assert_follows_the_format(quantised(x), x.double())
    arguments = affine("rms", 81, torch.float16) | {"epsilon": 0.0}
    expected = reference(x.double(), arguments)
    assert_follows_the_format(quantised(x, **arguments), expected, expected.abs().amax(1) * (ROUNDING[x.dtype] + SUMS))


def test_bfloat16_rows_far_below_anything_count_as_zeros() -> None:
    x = draw(2, 64, dtype=torch.bfloat16)
    rows, scales = quantised(x * torch.tensor([[2.0**-124], [2.0**-110]], dtype=x.dtype, device=DEVICE))
    assert scales[0] == 0
    assert not rows[0].any()
    assert rows[1].abs().max() == 127
    arguments = affine("rms", 64, torch.bfloat16) | {"epsilon": 0.0}
    assert normalised(x * 2.0**-75, **arguments).isfinite().all(), "their squares are less than any number"


@pytest.mark.parametrize("width", [30, 1536])
@pytest.mark.parametrize("kind", get_args(Norm))
def test_one_outlier_of_float16(kind: Norm, width: int) -> None:
    x, arguments = draw(3, width), affine(kind, width, torch.float16)
    x[0, width // 2], x[1, 0], x[2, width - 1] = 1e4, -6e4, 65504
    expected = reference(x.double(), arguments)
    error = expected.abs().amax(1) * (ROUNDING[x.dtype] + SUMS)
    assert_follows_the_format(quantised(x, **arguments), expected, error if kind != "none" else 0.0)
    assert ((normalised(x, **arguments).double() - expected).abs().amax(1) <= error).all()


def test_an_epsilon_that_outweighs_the_row() -> None:
    x = draw(2, 300, scale=1e-3)
    for kind in get_args(Norm)[1:]:
        arguments = affine(kind, 300, x.dtype) | {"epsilon": 0.5}
        expected = reference(x.double(), arguments)
        error = (normalised(x, **arguments).double() - expected).abs()
        assert (error <= expected.abs() * ROUNDING[x.dtype] + 1e-6).all()


def test_a_mean_that_outweighs_the_deviations() -> None:
    x = draw(2, 1000) + 2000.0  # where neighbours in float16 are 1 or 2 apart
    arguments = affine("layer", 1000, x.dtype)
    expected = reference(x.double(), arguments)
    error = (normalised(x, **arguments).double() - expected).abs()
    assert (error <= expected.abs() * ROUNDING[x.dtype] + 2e-3).all()


@pytest.mark.parametrize(("bad", "dtype"), [(np.nan, TYPES[0]), (-np.inf, TYPES[0]), (np.inf, TYPES[1])], ids=str)
@pytest.mark.parametrize("kind", get_args(Norm))
def test_what_is_not_finite_stays_in_its_row(kind: Norm, bad: float, dtype: torch.dtype) -> None:
    x, arguments = draw(3, 200, dtype=dtype), affine(kind, 200, dtype)
    good, good_out = quantised(x, **arguments), normalised(x, **arguments)
    x[1, 150] = bad
    rows, scales = quantised(x, **arguments)
    out = normalised(x, **arguments)
    others = [0, 2]
    assert_same((rows[others], scales[others]), (good[0][others], good[1][others]))
    assert torch.equal(out[others], good_out[others])
    assert scales[1].isnan()
    assert not out[1].isfinite().all()
    weight = torch.from_numpy(np.random.default_rng(0).integers(-127, 128, (200, 5))).int()
    products = (rows.cpu().int() @ weight).float() * scales.cpu()[:, None]
    assert products.isnan().all(1).tolist() == [False, True, False]
    assert products[others].isfinite().all()


def test_a_sum_beyond_float16_stays_in_its_row() -> None:
    x, arguments = draw(3, 64), affine("rms", 64, torch.float16)
    x[1, 5] = 6e4
    total = torch.empty_like(x)
    _, scales = quantised(x, residual=x.clone(), total=total, **arguments)
    assert total[1, 5].isinf()
    assert scales.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("width", [192, 600])
def test_a_row_does_not_depend_on_its_neighbours(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x, arguments = draw(3, width), affine("layer", width, torch.float16)
    alone = [(quantised(row[None], **arguments), normalised(row[None], **arguments)) for row in x]
    for many in (norm.MANY_ROWS, 3):
        monkeypatch.setattr(norm, "MANY_ROWS", many)  # from which on a program may have several rows
        rows, scales = quantised(x, **arguments)
        out = normalised(x, **arguments)
        for index, (expected, expected_out) in enumerate(alone):
            assert_same((rows[index : index + 1], scales[index : index + 1]), expected)
            assert torch.equal(out[index : index + 1], expected_out)


def activation_of(x: torch.Tensor, width: int, kind: Activation) -> torch.Tensor:
    if kind == "silu_gate":
        return x[:, :width] / (1 + (-x[:, :width]).exp()) * x[:, width:]
    if kind == "gelu":
        return x * 0.5 * (1 + torch.tensor([[erf(v / sqrt(2)) for v in row] for row in x.tolist()], device=DEVICE))
    if kind == "gelu_tanh":
        return 0.5 * x * (1 + (sqrt(2 / pi) * (x + 0.044715 * x**3)).tanh())
    return x / (1 + (-1.702 * x).exp())


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("width", [1, 30, 5120])
@pytest.mark.parametrize("kind", get_args(Activation))
def test_activations_are_quantised(kind: Activation, width: int, dtype: torch.dtype) -> None:
    x = draw(2, width * (2 if kind == "silu_gate" else 1), dtype=dtype, scale=2) + 0.5
    x[1] *= 20
    expected = activation_of(x.double(), width, kind)
    assert_follows_the_format(activated(x, width, kind), expected, expected.abs().amax(1) * SUMS)


def test_a_gated_product_beyond_float16_is_a_number() -> None:
    x = torch.tensor([[300.0, -1e4, 2.0, 300.0, 6e4, 1.0]], dtype=torch.float16, device=DEVICE)
    rows, scales = activated(x, 3, "silu_gate")
    assert rows.tolist() == [[127, 0, 0]]
    assert scales.tolist() == pytest.approx([9e4 / 127], rel=1e-6)


@pytest.mark.parametrize("kind", get_args(Activation))
def test_activated_rows_of_zeros_and_of_what_is_not_finite(kind: Activation) -> None:
    width = 50
    x = draw(4, width * (2 if kind == "silu_gate" else 1))
    good = activated(x, width, kind)
    x[1], x[2, 3] = 0.0, np.nan
    rows, scales = activated(x, width, kind)
    assert_same((rows[[0, 3]], scales[[0, 3]]), (good[0][[0, 3]], good[1][[0, 3]]))
    assert scales[1] == 0
    assert not rows[1].any()
    assert scales[2].isnan()


def test_activated_rows_that_share_a_program_are_what_they_are_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    x = draw(6, 60)
    alone = activated(x, 30, "silu_gate")
    monkeypatch.setattr(norm, "MANY_ROWS", 6)
    assert_same(activated(x, 30, "silu_gate"), alone)


def test_a_program_with_rows_to_spare_writes_nothing_behind_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(norm, "MANY_ROWS", 1)
    x, residual = draw(3, 40), draw(3, 40, seed=1)
    memory = [torch.full((4, 40), 77, dtype=dtype, device=DEVICE) for dtype in (torch.int8, x.dtype, x.dtype)]
    scales = torch.full((4,), 77.0, device=DEVICE)
    rows, out, total = (tensor[:3] for tensor in memory)
    quantise_rows(x, rows, scales[:3], residual=residual, total=total)
    normalise_rows(x, out, norm="none", residual=residual)
    act_quantise(x, rows, scales[:3], activation="gelu")
    assert all((tensor[3] == 77).all() for tensor in (*memory, scales))
    assert torch.equal(out, total)


def test_no_rows_are_no_launch() -> None:
    assert quantised(draw(0, 8))[0].shape == normalised(draw(0, 8), norm="none").shape == (0, 8)
    assert activated(draw(0, 8), 8, "gelu")[1].shape == (0,)


def test_what_does_not_fit_is_refused() -> None:
    x, weight = draw(2, 8), draw(8)
    with pytest.raises(ValueError, match="norm none: rms and layer take a weight"):
        normalised(x, norm="none", norm_weight=weight)
    with pytest.raises(ValueError, match="norm rms: rms and layer take a weight"):
        quantised(x, norm="rms")
    with pytest.raises(ValueError, match="norm rms"):
        quantised(x, norm="rms", norm_weight=weight, norm_bias=weight)
    with pytest.raises(ValueError, match=r"has weights torch.float16 \[8\], not torch.float16 \[7\]"):
        normalised(x, norm="rms", norm_weight=weight[:7])
    with pytest.raises(ValueError, match="there is no residual"):
        quantised(x, total=x.clone())
    with pytest.raises(ValueError, match=r"\[2, 8\] are needed, not torch.float16 \[3, 8\]"):
        quantised(x, residual=draw(3, 8))
    with pytest.raises(ValueError, match="16-bit floats"):
        quantised(x.float())
    with pytest.raises(ValueError, match="normalised rows are of x's type"):
        normalise_rows(x, x.bfloat16(), norm="none")
    with pytest.raises(ValueError, match=r"float32 scales \[2\]"):
        quantise_rows(x, x.to(torch.int8), weight.float())
    with pytest.raises(ValueError, match=r"takes 16-bit floats \[2, 16\]"):
        activated(x, 8, "silu_gate")


@dataclass(frozen=True)
class Address:
    """A tensor's place, as an operator gets it from ONNX Runtime."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    address: int

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Address:
        return cls(tuple(tensor.shape), tensor.dtype, tensor.data_ptr())

    def data_ptr(self) -> int:
        return self.address


@pytest.mark.skipif(INTERPRETED, reason="the interpreter needs tensors")
def test_addresses_will_do() -> None:
    x = draw(3, 1536)
    expected, rows, scales = quantised(x), torch.empty_like(x, dtype=torch.int8), torch.empty(3, device=DEVICE)
    quantise_rows(Address.of(x), Address.of(rows), Address.of(scales))
    assert_same((rows, scales), expected)
