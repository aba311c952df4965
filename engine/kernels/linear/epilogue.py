"""What the kernels do with a finished sum.

What that needs is asked for before the product. At its end nothing else would be on its way from memory, and a scale
that nobody has read in this step is as far away as the first weight was.
"""

# mypy: disallow-untyped-decorators=False

from __future__ import annotations

import triton
import triton.language as tl

# Tiles that leave room for it in registers:
EARLY_SUMS = tl.constexpr(128 * 128)  # in all; scales, biases and the rows' factors
EARLY_TOKENS = tl.constexpr(32)  # the residual


@triton.jit
def load_columns(vector: tl.tensor, columns: tl.tensor, WIDTH: tl.constexpr) -> tl.tensor:
    """vector[columns] in float32, 0 from WIDTH on."""
    return tl.load(vector + columns, mask=columns < WIDTH, other=0.0).to(tl.float32)


@triton.jit
def ask_columns(vector: tl.tensor, columns: tl.tensor, WIDTH: tl.constexpr, PARTS: tl.constexpr) -> tl.tuple:
    """What a vector [PARTS * WIDTH] has for columns of each part; an empty tuple if there is none."""
    asked = tl.tuple(())
    if vector is not None:
        for part in tl.static_range(PARTS):
            asked += (load_columns(vector + part * WIDTH, columns, WIDTH),)
    return asked


@triton.jit
def read_residual(
    residual: tl.tensor, columns: tl.tensor, tokens: tl.tensor, rows: tl.tensor, WIDTH: tl.constexpr
) -> tl.tensor:
    """[columns, tokens] of it."""
    places = tokens.to(tl.int64)[None, :] * WIDTH + columns[:, None]
    return tl.load(residual + places, mask=(tokens < rows)[None, :] & (columns < WIDTH)[:, None], other=0.0)


@triton.jit
def scaled(total: tl.tensor, scales: tl.tuple, biases: tl.tuple, PART: tl.constexpr) -> tl.tensor:
    """total [columns, tokens] * scale [columns] + bias [columns], if there is one."""
    value = total.to(tl.float32) * scales[PART][:, None]
    return value + biases[PART][:, None] if len(biases) > 0 else value
