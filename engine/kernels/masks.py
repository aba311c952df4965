"""What a grammar does not allow becomes minus infinity, for all constrained rows of a step in one launch.

The logits are not read, and bytes of the masks are few: 128 rows of V = 151,936 in 16 bits are 39 MB to write at most.
"""

# mypy: disallow-untyped-decorators=False

from __future__ import annotations

import triton
import triton.language as tl

from engine.kernels.compiled import keyed
from engine.kernels.rows import CHUNK


@keyed
@triton.jit(do_not_specialize=["words"], do_not_specialize_on_alignment=["rows", "masks"])
def forbid_tokens(
    logits: tl.tensor,
    stride: tl.tensor,
    rows: tl.tensor,
    masks: tl.tensor,
    words: tl.tensor,
    VOCAB: tl.constexpr,
) -> None:
    """Program (chunk, index) writes a chunk of row rows[index] where masks[index] has no bit.

    logits [R, VOCAB] with rows `stride` apart; rows int32 [n]; masks int32 [n, words], a bit per token, 32 to a word,
    the first token lowest.
    """
    index = tl.program_id(1)
    columns = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    inside = columns < VOCAB
    bits = tl.load(masks + index * words + columns // 32, mask=inside, other=0)
    row = logits + tl.load(rows + index).to(tl.int64) * stride
    tl.store(row + columns, -float("inf"), mask=inside & (((bits >> (columns % 32)) & 1) == 0))
