"""Names of what a step's call reads and writes."""

from __future__ import annotations


class StepInputs:
    """Names in the graph. B sequences with T new tokens in all; int32 and on the device unless said otherwise."""

    IDS = "ids"  # [T]: token ids; -1 - s takes the token that was last chosen for slot s
    SLOT_TOKENS = "slot_tokens"  # [slots]: those tokens
    FEATURE_INDEX = "feature_index"  # [T]: the row of `features` that stands for the token, -1 for text
    FEATURES = "features"  # activations [F, hidden], F > 0
    POSITIONS = "positions"  # [3, T]; only for three-axis rotary embedding
    STARTS = "starts"  # [B + 1]: where each sequence's tokens begin, and T
    PAST = "past"  # [B]: tokens that are in the cache already
    BLOCK_TABLE = "block_table"  # [B, blocks of the longest]
    BOUNDS = "bounds"  # [3] on the host: most new tokens and most tokens of any sequence, and a lower bound of these
    LOGITS_ROWS = "logits_rows"  # [R]: tokens whose logits are wanted
    LOGITS = "logits"  # activations [R, vocab]

    @staticmethod
    def cache(part: str, layer: int) -> str:
        """[blocks, block_size, kv_heads, head_dim], read and written in place; `part` is key or value."""
        return f"cache.{part}.{layer}"

    @staticmethod
    def cache_out(part: str, layer: int) -> str:
        """The same memory."""
        return f"cache_out.{part}.{layer}"
