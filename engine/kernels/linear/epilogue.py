"""What the kernels do with a finished sum."""

# mypy: disallow-untyped-decorators=False

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_columns(vector: tl.tensor, columns: tl.tensor, WIDTH: tl.constexpr) -> tl.tensor:
    """vector[columns] in float32, 0 from WIDTH on."""
    return tl.load(vector + columns, mask=columns < WIDTH, other=0.0).to(tl.float32)
