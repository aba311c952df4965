"""Gated DeltaNet layers on the CPU: a state per sequence, which the runtime owns, in the place of a KV cache."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from engine.graphs.builder import MICROSOFT, GraphBuilder
from engine.spec import DeltaNetSpec

_UNIT_EPS = 1e-6  # fixed in the reference implementation
_END = 2**63 - 1  # of an axis, whatever its length


class DeltaNetInputs:
    """Names in the graph, beside `DecoderInputs`. B sequences of S tokens."""

    REAL = "real"  # float32 [B, S, 1]: 1 for a token that goes into the state, 0 for one that leaves it as it is
    WINDOW_ROWS = "window_rows"  # int64 [B, kernel - 1, 1]: the number of real tokens, plus 0, 1, ...

    @staticmethod
    def past(part: str, layer: int) -> str:
        """float32; `part` is recurrent [B, value_heads, key_dim, value_dim] or window [B, kernel - 1, conv_width]."""
        return f"past.{part}.{layer}"

    @staticmethod
    def present(part: str, layer: int) -> str:
        """The same memory as `past`, after the real tokens."""
        return f"present.{part}.{layer}"


class CpuDeltaNet:
    """Implements `LinearAttention`.

    ONNX Runtime's operator of that name works token by token on this provider: how a prompt is cut does not show in the
    last bit. A token with a decay of 1 and an update rate of 0 leaves the state as it is, to the bit.
    """

    def __init__(self, builder: GraphBuilder, spec: DeltaNetSpec, norm_eps: float, shape: ir.Value) -> None:
        """`shape` [3] makes [B, S, width] of [T, width]."""
        self._builder = builder
        self._spec = spec
        self._norm_eps = norm_eps
        self._shape = shape
        self._real = builder.input(DeltaNetInputs.REAL, np.float32, ["B", "S", 1])
        self._rows = builder.input(DeltaNetInputs.WINDOW_ROWS, np.int64, ["B", spec.kernel - 1, 1])
        self._unit = builder.table("delta_net.unit", np.full(spec.key_dim, spec.key_dim**-0.5, np.float32))
        self._presents: list[tuple[str, ir.Value]] = []

    def mix(self, qkvz: ir.Value, gates: ir.Value, layer: int) -> ir.Value:
        builder, spec = self._builder, self._spec
        qkv, z = self._split(qkvz, spec.conv_width, spec.value_width)
        mixed = self._convolved(builder.op("Reshape", qkv, self._shape), layer)
        query, key, value = self._split(mixed, spec.key_width, spec.key_width, spec.value_width)
        decay, beta = self._gates(builder.op("Reshape", gates, self._shape), layer)
        shape = ("B", spec.value_heads, spec.key_dim, spec.value_dim)
        output, present = builder.ops(
            "LinearAttention",
            *(self._unit_length(query), self._unit_length(key), value),
            builder.input(DeltaNetInputs.past("recurrent", layer), np.float32, shape),
            *(decay, beta),
            outputs=2,
            domain=MICROSOFT,
            update_rule="gated_delta",
            q_num_heads=spec.key_heads,
            kv_num_heads=spec.value_heads,
        )
        self._presents.append((DeltaNetInputs.present("recurrent", layer), present))
        heads = builder.reshape(output, -1, spec.value_dim)
        norm = builder.weight(f"layers.{layer}.delta_norm.weight")
        normed = builder.op("SimplifiedLayerNormalization", heads, norm, axis=-1, epsilon=self._norm_eps)
        # GatedRMSNorm does both in one node, forty times slower on this provider.
        return builder.op("Mul", builder.reshape(normed, -1, spec.value_width), self._silu(z))

    def output_state(self) -> None:
        for name, value in self._presents:
            self._builder.output(value, name, np.float32)

    def _convolved(self, qkv: ir.Value, layer: int) -> ir.Value:
        """Each channel over the last `kernel` tokens, [B, S, conv_width].

        Tap by tap: CausalConvWithState takes twice as long for a prompt, three times for a decode step. The new window,
        which lies where the past one does, is written when nothing is left to read of that: the one node that reads it
        comes before all others.
        """
        builder, spec = self._builder, self._spec
        kept = spec.kernel - 1
        past = builder.input(DeltaNetInputs.past("window", layer), np.float32, ["B", kept, spec.conv_width])
        window = builder.op("Concat", past, qkv, axis=1)
        present = builder.op("GatherND", window, self._rows, batch_dims=1)
        self._presents.append((DeltaNetInputs.present("window", layer), present))
        kernel = builder.op("Transpose", builder.weight(f"layers.{layer}.conv.weight"), perm=[2, 1, 0])
        convolved = self._tap(window, kernel, 0)
        for tap in range(1, spec.kernel):
            convolved = builder.op("Add", convolved, self._tap(window, kernel, tap))
        return self._silu(convolved)

    def _tap(self, window: ir.Value, kernel: ir.Value, tap: int) -> ir.Value:
        """What each token takes of the one `kernel - 1 - tap` before it; `kernel` is [kernel, 1, conv_width]."""
        builder = self._builder
        behind = self._spec.kernel - 1 - tap
        bounds = (builder.constant([bound], np.int64) for bound in (tap, -behind if behind else _END, 1))
        factor = builder.op("Gather", kernel, builder.constant(tap, np.int64), axis=0)
        return builder.op("Mul", builder.op("Slice", window, *bounds), factor)

    def _gates(self, gates: ir.Value, layer: int) -> tuple[ir.Value, ir.Value]:
        """Logarithm of the decay, and update rate, [B, S, value_heads] each."""
        builder, heads = self._builder, self._spec.value_heads
        a, b = self._split(gates, heads, heads)
        rate = builder.op("Neg", builder.op("Exp", builder.weight(f"layers.{layer}.a_log.weight")))
        bias = builder.weight(f"layers.{layer}.dt_bias.weight")
        decay, beta = builder.ops("LinearAttentionGate", a, bias, rate, b, outputs=2, domain=MICROSOFT)
        return builder.op("Mul", decay, self._real), builder.op("Mul", beta, self._real)

    def _unit_length(self, x: ir.Value) -> ir.Value:
        """x / sqrt(sum(x**2) + eps) of each head, by an RMS norm whose weight is one over the root of the width."""
        builder, width = self._builder, self._spec.key_dim
        heads = builder.reshape(x, -1, width)
        normed = builder.op("SimplifiedLayerNormalization", heads, self._unit, axis=-1, epsilon=_UNIT_EPS / width)
        return builder.op("Reshape", normed, self._shape)

    def _silu(self, x: ir.Value) -> ir.Value:
        return self._builder.op("QuickGelu", x, domain=MICROSOFT, alpha=1.0)

    def _split(self, x: ir.Value, *widths: int) -> list[ir.Value]:
        builder = self._builder
        sizes = builder.constant(widths, np.int64)
        return list(builder.ops("Split", x, sizes, outputs=len(widths), axis=-1))
