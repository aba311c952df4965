"""Vision towers on the CPU: sequences of one length per call, MultiHeadAttention."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from engine.checkpoints.artifact import Artifact
from engine.graphs.builder import MICROSOFT, GraphBuilder
from engine.graphs.cpu.decoder import rms_norm
from engine.graphs.cpu.linear import linears
from engine.graphs.qwen_vision import TAPS, LearnedPositions, qwen_vision_graph
from engine.graphs.siglip import siglip_graph
from engine.spec import QwenVisionSpec, SiglipSpec

_GELU = {"gelu": "none", "gelu_pytorch_tanh": "tanh"}

# ai.onnx Attention holds all scores at once, batch * heads * L * L, and is twice as fast where they stay in the cache;
# MultiHeadAttention works through them in blocks.
_SHORT = 400
_ANY = 1 << 30


class TowerInputs:
    """Names in the graph. B sequences of L patches each."""

    PIXELS = "pixels"  # uint8: SigLIP [tiles, 3, tile, tile], Qwen2-VL [B * L, 3, frames or 1, patch**2]
    SHAPE = "shape"  # int64 [3]: B, L, -1; Qwen2-VL only
    COSINE = "cosine"  # float32 [L, head_dim / 2]; Qwen2-VL only
    SINE = "sine"
    TAPS = "taps"  # int64 [4, B * L]; with learned positions that are interpolated only
    TAP_WEIGHTS = "tap_weights"  # float32 [4, B * L, 1]
    WINDOWS = "windows"  # int64 [W, P]: the patches of each window, padded to P; with windows only, as are these:
    WINDOW_MASK = "window_mask"  # bool [W, 1, P, P]: real patches, for each
    UNWINDOWED = "unwindowed"  # int64 [B * L]: each patch's place in WINDOWS, flat
    FEATURES = "features"  # float32 [tokens, feature_width of the decoder]


def cpu_tower(artifact: Artifact) -> bytes:
    """A serialised model of the tower and its connector."""
    builder = GraphBuilder(artifact)
    spec = artifact.spec.vision
    if isinstance(spec, SiglipSpec):
        pixels = builder.input(TowerInputs.PIXELS, np.uint8, ["tiles", 3, spec.tile, spec.tile])
        patches = (spec.tile // spec.patch) ** 2
        shape = builder.constant([-1, patches, 3 * spec.hidden], np.int64)
        features = siglip_graph(CpuTowerDialect(builder, artifact, spec, shape, patches=patches), spec, pixels)
    else:
        assert isinstance(spec, QwenVisionSpec)
        pixels = builder.input(TowerInputs.PIXELS, np.uint8, ["N", 3, "F", spec.patch**2])
        shape = builder.input(TowerInputs.SHAPE, np.int64, [3])
        half = spec.hidden // spec.heads // 2
        rotary = tuple(builder.input(name, np.float32, ["L", half]) for name in (TowerInputs.COSINE, TowerInputs.SINE))
        windows = _windows(builder) if spec.window else None
        dialect = CpuTowerDialect(builder, artifact, spec, shape, rotary=rotary, windows=windows)
        features = qwen_vision_graph(dialect, spec, pixels, _positions(builder) if spec.position_side else None)
    builder.output(features, TowerInputs.FEATURES, np.float32)
    return builder.serialise()


@dataclass(frozen=True, slots=True)
class Windows:
    """The inputs WINDOWS, WINDOW_MASK and UNWINDOWED."""

    rows: ir.Value
    mask: ir.Value
    places: ir.Value


def _windows(builder: GraphBuilder) -> Windows:
    rows = builder.input(TowerInputs.WINDOWS, np.int64, ["W", "P"])
    mask = builder.input(TowerInputs.WINDOW_MASK, np.bool_, ["W", 1, "P", "P"])
    return Windows(rows, mask, builder.input(TowerInputs.UNWINDOWED, np.int64, ["N"]))


def _positions(builder: GraphBuilder) -> LearnedPositions:
    rows = builder.input(TowerInputs.TAPS, np.int64, [TAPS, "N"])
    return LearnedPositions(rows, builder.input(TowerInputs.TAP_WEIGHTS, np.float32, [TAPS, "N", 1]))


class CpuTowerDialect:
    """Implements `TowerDialect`."""

    def __init__(
        self,
        builder: GraphBuilder,
        artifact: Artifact,
        spec: SiglipSpec | QwenVisionSpec,
        shape: ir.Value,
        *,
        patches: int = _ANY,
        rotary: tuple[ir.Value, ...] = (),
        windows: Windows | None = None,
    ) -> None:
        """`shape` makes [B, L, 3 * hidden] of packed queries, keys and values.

        `patches` is L if it is always the same; `rotary` is (cosine, sine) or empty.
        """
        self.builder = builder
        self._linears = linears(builder, artifact.precision)
        self._spec = spec
        self._shape = shape
        self._patches = patches
        self._rotary = rotary
        self._windows = windows

    def linear(self, x: ir.Value, name: str) -> ir.Value:
        return self._linears.linear(x, name)

    def weight(self, name: str) -> ir.Value:
        return self.builder.weight(name)

    def activations(self, x: ir.Value) -> ir.Value:
        return x

    def activated(self, x: ir.Value, name: str, kind: str) -> ir.Value:
        x = self.linear(x, name)
        if kind == "silu_gate":
            gate, up = self.builder.ops("Split", x, outputs=2, axis=-1, num_outputs=2)
            return self.builder.op("Mul", self.builder.op("QuickGelu", gate, domain=MICROSOFT, alpha=1.0), up)
        if kind == "quick_gelu":
            return self.builder.op("QuickGelu", x, domain=MICROSOFT, alpha=1.702)
        return self.builder.op("Gelu", x, approximate=_GELU[kind])

    def layer_norm(self, x: ir.Value, name: str, epsilon: float) -> ir.Value:
        if not self.builder.has(f"{name}.bias"):
            return rms_norm(self.builder, x, name, epsilon)
        affine = (self.builder.weight(f"{name}.weight"), self.builder.weight(f"{name}.bias"))
        return self.builder.op("LayerNormalization", x, *affine, axis=-1, epsilon=epsilon)

    def add_layer_norm(
        self, x: ir.Value, name: str, residual: ir.Value, norm: str, epsilon: float
    ) -> tuple[ir.Value, ir.Value]:
        # SkipLayerNormalization does both in one node, three to six times slower on this provider.
        total = self.builder.op("Add", self.linear(x, name), residual)
        return self.layer_norm(total, norm, epsilon), total

    def attention(self, x: ir.Value, name: str, *, windowed: bool = False) -> ir.Value:
        builder, heads = self.builder, self._spec.heads
        packed = builder.op("Reshape", self.linear(x, name), self._shape)
        query, key, value = builder.ops("Split", packed, outputs=3, axis=-1, num_outputs=3)
        if self._rotary:
            start = builder.constant([0], np.int64)
            query, key = (
                builder.op("RotaryEmbedding", x, start, *self._rotary, domain=MICROSOFT) for x in (query, key)
            )
        if windowed:
            return self._in_windows(query, key, value)
        if self._patches <= _SHORT:
            output = builder.op("Attention", query, key, value, q_num_heads=heads, kv_num_heads=heads)
        else:
            output = builder.op("MultiHeadAttention", query, key, value, domain=MICROSOFT, num_heads=heads)
        return builder.reshape(output, -1, self._spec.hidden)

    def _in_windows(self, *query_key_value: ir.Value) -> ir.Value:
        """Patches are brought together by window and back: everything else is the same in any order."""
        builder, windows, heads = self.builder, self._windows, self._spec.heads
        assert windows is not None, "This is a bug: attention in windows that were not given."
        rows = (builder.reshape(x, -1, self._spec.hidden) for x in query_key_value)
        gathered = (builder.op("Gather", x, windows.rows, axis=0) for x in rows)
        output = builder.op("Attention", *gathered, windows.mask, q_num_heads=heads, kv_num_heads=heads)
        return builder.op("Gather", builder.reshape(output, -1, self._spec.hidden), windows.places, axis=0)
