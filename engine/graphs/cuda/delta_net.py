"""Gated DeltaNet layers on a device: one packed call for all sequences, each with a state that the runtime owns."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from engine.graphs.builder import MICROSOFT
from engine.graphs.cuda.inputs import STATE_PARTS, StepInputs
from engine.graphs.cuda.weights import CudaBuilder
from engine.spec import DeltaNetSpec


class CudaDeltaNet:
    """Implements `LinearAttention` in the operators that ONNX Runtime has for this.

    They take prompts in chunks of matrix products and single tokens one by one, so that the last bits depend on how a
    text is cut. GatedDeltaNet's unit length of queries and keys adds 1e-12 to the sum of squares, where the reference
    implementation adds 1e-6; it shows in none of them that is not near zero.
    """

    def __init__(self, builder: CudaBuilder, spec: DeltaNetSpec, norm_eps: float, starts: ir.Value) -> None:
        """`starts` is the graph's input of that name."""
        self._builder = builder
        self._spec = spec
        self._norm_eps = norm_eps
        self._starts = starts
        self._written: list[tuple[str, ir.Value, type[np.generic]]] = []

    def mix(self, qkvz: ir.Value, gates: ir.Value, layer: int) -> ir.Value:
        builder, spec = self._builder, self._spec
        name = f"layers.{layer}"
        widths = builder.constant([spec.conv_width, spec.value_width], np.int64)
        qkv, z = builder.ops("Split", qkvz, widths, outputs=2, axis=-1)
        wide = builder.op("Cast", gates, to=int(ir.DataType.FLOAT)) if builder.dtype != np.float32 else gates
        decay, beta = builder.ops("Split", wide, outputs=2, axis=-1, num_outputs=2)
        recurrent = (spec.value_heads, spec.value_dim, spec.key_dim)
        output, state = builder.ops(
            "GatedDeltaNet",
            *(self._convolved(qkv, layer), None, None),  # queries, keys and values side by side
            *(self._starts, decay, beta, self._state(0, layer, np.float32, recurrent)),
            *(builder.device_weight(f"{name}.{part}.weight", form="float32") for part in ("a_log", "dt_bias")),
            outputs=2,
            domain=MICROSOFT,
            update_rule="gated_delta",
            gate_activation="qwen",
            beta_activation="sigmoid",
            qk_l2_norm=1,
        )
        self._keep(0, layer, state, np.float32)
        return builder.op(
            "GatedRMSNorm",
            *(builder.reshape(output, -1, spec.value_width), builder.device_weight(f"{name}.delta_norm.weight"), z),
            domain=MICROSOFT,
            epsilon=self._norm_eps,
            activation="silu",
        )

    def output_state(self) -> None:
        for name, value, dtype in self._written:
            self._builder.output(value, name, dtype)

    def _convolved(self, qkv: ir.Value, layer: int) -> ir.Value:
        """Each channel over the last `kernel` tokens of its sequence, [T, conv_width]."""
        builder, spec, dtype = self._builder, self._spec, self._builder.dtype.type
        weight = builder.device_weight(f"layers.{layer}.conv.weight")
        window = self._state(1, layer, dtype, (spec.conv_width, spec.kernel - 1))
        convolved, after = builder.ops(
            *("VarlenCausalConvWithState", qkv, weight, self._starts, None, window),
            outputs=2,
            domain=MICROSOFT,
            activation="silu",
        )
        self._keep(1, layer, after, dtype)
        return convolved

    def _state(self, part: int, layer: int, dtype: type[np.generic], shape: tuple[int, ...]) -> ir.Value:
        return self._builder.input(StepInputs.state(STATE_PARTS[part], layer), dtype, ("B", *shape))

    def _keep(self, part: int, layer: int, value: ir.Value, dtype: type[np.generic]) -> None:
        self._written.append((StepInputs.state_out(STATE_PARTS[part], layer), value, dtype))
