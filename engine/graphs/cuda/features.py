"""Image features among a step's tokens."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from engine.graphs.cuda.inputs import StepInputs
from engine.graphs.cuda.weights import CudaBuilder
from engine.graphs.dialect import Residual
from engine.spec import DecoderSpec


class Features:
    """The inputs FEATURE_INDEX and FEATURES, declared here."""

    def __init__(self, builder: CudaBuilder, spec: DecoderSpec) -> None:
        self._builder = builder
        self._spec = spec
        self.index = builder.input(StepInputs.FEATURE_INDEX, np.int32, ["T"])
        self._features = builder.input(StepInputs.FEATURES, builder.dtype.type, ["F", spec.feature_width])

    def part(self, number: int) -> ir.Value:
        """[F, hidden] of [F, feature_width]: 0 replaces embeddings, the others are added behind a layer each."""
        spec = self._spec
        if not spec.deepstack:
            return self._features
        return self._builder.columns(self._features, number * spec.hidden, (number + 1) * spec.hidden)

    def placed(self, number: int, others: ir.Value) -> ir.Value:
        """A part's rows in the places of the tokens they stand for, and `others` [T, hidden] or scalar for text."""
        builder, zero = self._builder, self._builder.constant(0, np.int32)
        images = builder.op("Gather", self.part(number), builder.op("Max", self.index, zero), axis=0)
        is_text = builder.reshape(builder.op("Less", self.index, zero), -1, 1)
        return builder.op("Where", is_text, others, images)

    def add(self, residual: Residual, number: int) -> None:
        """Into what the next norm adds in passing, if something waits for that."""
        builder = self._builder
        features = self.placed(number, builder.constant(0, builder.dtype.type))
        if residual.added is None:
            residual.value = builder.op("Add", residual.value, features)
        else:
            residual.added = builder.op("Add", residual.added, features)
