"""Tables of rotary embedding."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from engine.graphs.builder import GraphBuilder
from engine.spec import RopeSpec


def rotary_tables(
    builder: GraphBuilder, rope: RopeSpec, positions: int, dtype: type[np.generic], name: str = "rotary"
) -> tuple[ir.Value, ir.Value]:
    """Cosine and sine [positions, head_dim / 2]. Angles are rounded to fp32 first, as the reference does.

    A graph with several of them has a `name` for each.
    """
    angles = np.arange(positions, dtype=np.float32)[:, None] * np.asarray(rope.inv_freq, np.float32)
    cosine, sine = (function(angles.astype(np.float64)) * rope.attention_scale for function in (np.cos, np.sin))
    return builder.table(f"{name}.cosine", cosine.astype(dtype)), builder.table(f"{name}.sine", sine.astype(dtype))
