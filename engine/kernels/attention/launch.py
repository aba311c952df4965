"""Launching decode attention: the grid, scratch memory, and what the arguments must be."""

from __future__ import annotations

from dataclasses import replace

import torch
from triton import knobs

from engine.kernels.attention.decode import decode_attention
from engine.kernels.attention.parameters import (
    AttentionParameters,
    AttentionTile,
    default_tile,
    power_of_2,
    splits_of,
)
from engine.kernels.overlap import early, launch_options
from engine.kernels.pointer import Tensor
from engine.kernels.workspace import Workspace, bytes_of

_TYPES = (torch.float16, torch.bfloat16)


class PagedDecodeAttention:
    """Attention of one layer for one new token of each sequence, which it writes to the cache, in one launch.

    The same arguments give the same bits; the grid depends on shapes alone, so that a captured launch serves every
    length up to its block table's end. Launches that share a workspace must follow one another on one stream.
    """

    def __init__(
        self,
        parameters: AttentionParameters,
        workspace: Workspace,
        multiprocessors: int,
        tile: AttentionTile | None = None,
    ) -> None:
        """`multiprocessors` of the device; without `tile` it is the default one for a call's sizes."""
        self.parameters = parameters
        self._workspace = workspace
        self._multiprocessors = multiprocessors
        self._tile = tile

    def cut(self, batch: int, context: int, page: int, *, int8: bool) -> tuple[AttentionTile, int]:
        """How the kernel is cut for sequences whose block table has room for `context` tokens, in blocks of `page`, and
        how many programs share a sequence."""
        chip = self._multiprocessors
        tile = self._tile or default_tile(self.parameters, batch, chip, int8=int8)
        tokens = min(tile.tokens, page)
        tile = replace(tile, tokens=tokens, least=max(tile.least, tokens))
        return tile, splits_of(self.parameters, tile, batch, context, chip)

    def scratch_bytes(self, batch: int, context: int, page: int, *, int8: bool) -> int:
        """What a call takes of the workspace. The largest batch is not the one that takes most: ask for each."""
        _, splits = self.cut(batch, context, page, int8=int8)
        return bytes_of((self._scratch_size(batch, splits), torch.float32)) if splits > 1 else 0

    def __call__(
        self,
        qkv: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        past: Tensor,
        block_table: Tensor,
        cosine: Tensor,
        sine: Tensor,
        positions: Tensor | None,
        query_norm: Tensor | None,
        key_norm: Tensor | None,
        key_scale: Tensor | None,
        value_scale: Tensor | None,
        out: Tensor,
    ) -> None:
        """Launch on the current stream. A is float16 or bfloat16, D the head's channels.

        qkv A [B, (heads + 2 * kv_heads) * D]; caches A or int8 [blocks, block_size, kv_heads, D] with a block size of
        2 ** n >= 16; past int32 [B], tokens in the cache; block_table int32 [B, M], whose rows have a block for place
        past[b] at least; tables A [P, D / 2] with P > every position; positions int32 [3, B], for three axes only;
        norms A [D]; scales float32 [kv_heads, 1, D], for int8 only; out A [B, heads * D].

        Caches hold keys and values after norm and rotary embedding, int8 ones round(x / scale) with halves to even.
        What lies behind past[b] is not read. Raises ValueError for shapes and types that do not fit together,
        DeviceOutOfMemory if the workspace is too small.
        """
        self._check(qkv, key_cache, value_cache, block_table, positions, query_norm, key_norm, key_scale, out)
        if (value_scale is None) != (key_scale is None):
            raise ValueError("keys and values have scales, or neither has")
        parameters, (batch, columns), page = self.parameters, block_table.shape, key_cache.shape[1]
        if not batch:
            return
        tile, splits = self.cut(batch, columns * page, page, int8=key_scale is not None)
        with self._workspace.scope():
            scratch = None
            if splits > 1:
                scratch = self._workspace.take((self._scratch_size(batch, splits),), torch.float32)
            overlaps = early()
            grid = (parameters.kv_heads * parameters.head_tiles, splits, batch)
            decode_attention[grid](
                qkv, key_cache, value_cache, past, block_table, cosine, sine,
                positions, query_norm, key_norm, key_scale, value_scale, out, scratch, self._workspace.tickets,
                columns, tile.least,
                **constants(parameters, tile, qkv.dtype, key_cache.dtype, page, split=splits > 1),
                EARLY=overlaps, num_warps=tile.warps, num_stages=1, maxnreg=tile.registers,
                **launch_options(early=overlaps),
            )  # fmt: skip

    def _scratch_size(self, batch: int, splits: int) -> int:
        """Values in float32: see `leave`."""
        parameters = self.parameters
        units = batch * parameters.kv_heads * parameters.head_tiles * splits
        return units * parameters.kept_rows * (parameters.head_dim + 1)

    def _check(
        self,
        qkv: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        block_table: Tensor,
        positions: Tensor | None,
        query_norm: Tensor | None,
        key_norm: Tensor | None,
        key_scale: Tensor | None,
        out: Tensor,
    ) -> None:
        """What would make the kernel read or write beside its arguments."""
        parameters, batch = self.parameters, block_table.shape[0]
        page = key_cache.shape[1]
        types = (qkv.dtype, out.dtype, key_cache.dtype, value_cache.dtype)
        cached = torch.int8 if key_scale is not None else qkv.dtype
        if qkv.dtype not in _TYPES or types != (qkv.dtype, qkv.dtype, cached, cached):
            raise ValueError(f"queries, output and caches are {types}; one 16-bit type, or int8 caches with scales")
        if tuple(qkv.shape) != (batch, parameters.width) or out.shape[0] != batch:
            raise ValueError(f"queries of {batch} sequences are {tuple(qkv.shape)}, not [B, {parameters.width}]")
        if tuple(key_cache.shape) != tuple(value_cache.shape) or page < 16 or page & (page - 1):
            raise ValueError(
                f"caches are {tuple(key_cache.shape)} and {tuple(value_cache.shape)}; 2 ** n tokens a block"
            )
        if tuple(key_cache.shape[2:]) != (parameters.kv_heads, parameters.head_dim):
            raise ValueError(f"blocks are {tuple(key_cache.shape)}, not of {parameters.kv_heads} key heads")
        three = len(parameters.mrope_section) == 3
        if three != (positions is not None) or (positions is not None and tuple(positions.shape) != (3, batch)):
            raise ValueError("three-axis rotary embedding takes positions [3, B], plain takes none")
        if {query_norm is not None, key_norm is not None} != {parameters.qk_norm_epsilon is not None}:
            raise ValueError("both norms are given with an epsilon, or none of them")


def constants(
    parameters: AttentionParameters,
    tile: AttentionTile,
    dtype: torch.dtype,
    cache: torch.dtype,
    page: int,
    *,
    split: bool,
) -> dict[str, object]:
    """The kernel's compile-time arguments. int8 is multiplied as float16 whatever the activations: it holds all of
    int8 and three bits more of a query than bfloat16.
    """
    import triton.language as tl

    dot = tl.bfloat16 if dtype == torch.bfloat16 and cache != torch.int8 else tl.float16
    if knobs.runtime.interpret and dot == tl.bfloat16:
        dot = tl.float32  # the interpreter multiplies bfloat16 as if it were whole numbers
    width = power_of_2(parameters.head_dim)
    return {
        "GROUP": parameters.group,
        "KV_HEADS": parameters.kv_heads,
        "HEAD_DIM": parameters.head_dim,
        "SECTION": tuple(parameters.mrope_section),
        "INTERLEAVED": parameters.mrope_interleaved,
        "EPSILON": parameters.qk_norm_epsilon,
        "PAGE": page,
        "TILE": tile.tokens,
        "DOT": dot,
        "SPLIT": split,
        "KEPT": parameters.kept_rows,
        "MERGED": tile.merged,
        "CHANNELS": width,
        "WIDE": max(1, min(4, parameters.kept_rows * width // (32 * tile.warps))),
    }
