"""When a session asks for ONNX Runtime's fast products of int8 weights."""

from __future__ import annotations

import numpy as np
import pytest

from engine.graphs.cuda import CudaGraph
from engine.graphs.cuda.weights import BLOCK, DeviceWeight, Form
from engine.runtime.cuda.session import _fits_fast_products


def weight(form: Form, *shape: int) -> DeviceWeight:
    return DeviceWeight("w", "w", (0, shape[0]), form, np.dtype(np.uint8), shape)


@pytest.mark.parametrize(("inputs", "fit"), [(64, True), (96, False), (1536, True), (1568, False)])
def test_layers_that_end_within_64_inputs_do_without_fast_products(inputs: int, fit: bool) -> None:
    weights = (weight("blocks", 8, 2, BLOCK), weight("blocks", 128, inputs // BLOCK, BLOCK))
    assert _fits_fast_products(CudaGraph(b"", weights, frozenset(), frozenset())) is fit


def test_other_weights_have_no_say() -> None:
    weights = (weight("plain", 96, 96), weight("stored", 96, 96), weight("block_scales", 96, 3))
    assert _fits_fast_products(CudaGraph(b"", weights, frozenset(), frozenset()))
