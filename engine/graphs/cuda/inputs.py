"""Names of what a step's call reads and writes."""

from __future__ import annotations

PARTS = ("key", "value")  # of the KV cache
STATE_PARTS = ("recurrent", "window")  # of linear attention's state


class StepInputs:
    """Names in the graph. B sequences with T new tokens in all; int32 and on the device unless said otherwise."""

    IDS = "ids"  # [T]: token ids; -1 - s takes the token that was last chosen for slot s
    SLOT_TOKENS = "slot_tokens"  # [slots]: those tokens
    SLOTS = "slots"  # [B]: each sequence's slot; only for steps of one token for each, the one last chosen for it
    FEATURE_INDEX = "feature_index"  # [T]: the row of `features` that stands for the token, -1 for text
    FEATURES = "features"  # activations [F, feature_width], F > 0
    POSITIONS = "positions"  # [3, T]; only for three-axis rotary embedding
    STARTS = "starts"  # [B + 1]: where each sequence's tokens begin, and T
    PAST = "past"  # [B]: tokens that are in the cache already
    BLOCK_TABLE = "block_table"  # [B, blocks of the longest]
    BOUNDS = "bounds"  # [3] on the host: most new tokens and most tokens of any sequence, and a lower bound of these
    LOGITS_ROWS = "logits_rows"  # [R]: tokens whose logits are wanted
    LOGITS = "logits"  # activations [R, vocab]

    @staticmethod
    def cache(part: str, layer: int) -> str:
        """Activations or int8 [blocks, block_size, kv_heads, head_dim], read and written in place.

        `part` is key or value.
        """
        return f"cache.{part}.{layer}"

    @staticmethod
    def cache_out(part: str, layer: int) -> str:
        """The same memory."""
        return f"cache_out.{part}.{layer}"

    @staticmethod
    def cache_scale(part: str, layer: int) -> str:
        """float32 [kv_heads, 1, head_dim]: what 1 in an int8 cache stands for; only with one."""
        return f"cache_scale.{part}.{layer}"

    @staticmethod
    def state(part: str, layer: int) -> str:
        """Of each sequence of the step, in the step's order, read and written in place.

        `part` is recurrent, float32 [B, value_heads, value_dim, key_dim], or window, activations
        [B, conv_width, kernel - 1]: the last inputs of the convolution.
        """
        return f"state.{part}.{layer}"

    @staticmethod
    def state_out(part: str, layer: int) -> str:
        """The same memory."""
        return f"state_out.{part}.{layer}"


class UnfusedInputs:
    """What attention without PagedAttention takes instead of PAST, BOUNDS and mostly STARTS; int32, on the device."""

    PLACES = "places"  # [T]: a token's place in its sequence
    WRITTEN = "written"  # [T, 2]: block and place in it where the token's key and value go
    QUERIES = "queries"  # [B, S]: new tokens of each sequence, S being the most of any; 0 behind the last
    UNPADDED = "unpadded"  # [T]: a token's place in QUERIES, flat
    LENGTHS = "lengths"  # [B]: tokens of each sequence, the new ones included
    KEY_PLACES = "key_places"  # [L]: 0 to L - 1, L being M blocks of tokens
