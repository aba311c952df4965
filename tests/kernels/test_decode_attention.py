"""Decode attention: decode_attention_cases.py interpreted, the same on a GPU, how it is cut, and what is compiled."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
from engine.kernels.attention.parameters import AttentionParameters, AttentionTile, default_tile, splits_of
from engine.kernels.workspace import TICKETS
from tests.kernels.triton_tests import compiled, run_cases, usage

CASES = Path(__file__).with_name("decode_attention_cases.py")
QWEN2_VL_2B = AttentionParameters(12, 2, 128, (16, 24, 24))
QWEN3_VL_2B = AttentionParameters(16, 8, 128, (24, 20, 20), mrope_interleaved=True, qk_norm_epsilon=1e-6)
SMOLVLM_256M = AttentionParameters(9, 3, 64)
PHI_3 = AttentionParameters(32, 32, 96)
GEMMA = AttentionParameters(8, 1, 256)
POINTERS = ("qkv", "key_cache", "value_cache", "cosine", "sine", "out", "scratch", "tickets")


def test_interpreted_kernels_agree_with_float64() -> None:
    run_cases(CASES, interpreted=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_compiled_kernels_agree_with_float64() -> None:
    run_cases(CASES, interpreted=False)


@pytest.mark.parametrize("parameters", [QWEN2_VL_2B, QWEN3_VL_2B, SMOLVLM_256M, PHI_3, GEMMA])
@pytest.mark.parametrize("int8", [False, True])
def test_no_split_begins_behind_the_context_and_none_is_too_long(parameters: AttentionParameters, int8: bool) -> None:
    for batch in (1, 3, 32, 128, 200):
        for context in (1, 64, 256, 512, 1000, 2048, 32768, 131072):
            tile = default_tile(parameters, batch, 132, int8=int8)
            splits = splits_of(parameters, tile, batch, context, 132)
            assert 1 <= splits <= 64
            assert tile.tokens <= tile.least
            assert (splits - 1) * tile.least < context
            assert context <= splits * 2048 or batch * parameters.kv_heads > TICKETS


def test_one_sequence_spreads_over_the_device_and_many_do_not_merge() -> None:
    for batch, count in ((1, 16), (8, 8), (32, 8), (128, 1), (256, 1)):
        tile = default_tile(QWEN2_VL_2B, batch, 132, int8=False)
        assert splits_of(QWEN2_VL_2B, tile, batch, 2048, 132) == count


@pytest.mark.parametrize(
    "sizes",
    [
        {"heads": 7, "kv_heads": 2, "head_dim": 64},
        {"heads": 8, "kv_heads": 0, "head_dim": 64},
        {"heads": 8, "kv_heads": 2, "head_dim": 72},
        {"heads": 8, "kv_heads": 2, "head_dim": 512},
        {"heads": 8, "kv_heads": 2, "head_dim": 64, "mrope_section": (16, 24, 24)},
    ],
)
def test_sizes_that_no_kernel_computes_are_refused(sizes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"heads|mrope_section"):
        AttentionParameters(**sizes)


def compiled_attention(
    parameters: AttentionParameters, tile: AttentionTile, name: str, int8: bool, page: int, capability: int
) -> Any:
    """The kernel for a GPU that need not be there, with splits."""
    from engine.kernels.attention.decode import decode_attention
    from engine.kernels.attention.launch import constants

    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}[name]
    cache, typed = (torch.int8, "*i8") if int8 else (dtype, f"*{name}")
    types = dict.fromkeys(("qkv", "cosine", "sine", "out"), f"*{name}") | dict.fromkeys(
        ("key_cache", "value_cache"), typed
    )
    types |= dict.fromkeys(("past", "block_table", "tickets"), "*i32") | {"scratch": "*fp32"}
    types |= {"positions": "*i32"} if parameters.mrope_section else {}
    types |= dict.fromkeys(("query_norm", "key_norm"), f"*{name}") if parameters.qk_norm_epsilon else {}
    types |= dict.fromkeys(("key_scale", "value_scale"), "*fp32") if int8 else {}
    known = constants(parameters, tile, dtype, cache, page, split=True)
    return compiled(
        *(decode_attention, types, ("columns", "least"), known, capability),
        unaligned=types.keys() - set(POINTERS),
        num_warps=tile.warps,
        num_stages=1,
        maxnreg=tile.registers,
    )


@pytest.mark.parametrize(
    ("parameters", "batch", "page", "int8", "name", "capability"),
    [
        (QWEN2_VL_2B, 1, 256, False, "fp16", 90),
        (QWEN2_VL_2B, 8, 256, False, "bf16", 90),
        (QWEN2_VL_2B, 8, 256, True, "bf16", 90),
        (QWEN2_VL_2B, 32, 256, False, "bf16", 90),
        (QWEN2_VL_2B, 64, 256, False, "bf16", 90),
        (QWEN2_VL_2B, 64, 256, True, "bf16", 90),
        (QWEN2_VL_2B, 128, 256, False, "bf16", 90),
        (QWEN2_VL_2B, 128, 256, True, "fp16", 90),
        (SMOLVLM_256M, 1, 256, False, "bf16", 90),
        (SMOLVLM_256M, 32, 256, False, "bf16", 90),
        (QWEN2_VL_2B, 32, 256, True, "fp16", 90),
        (QWEN3_VL_2B, 32, 256, True, "bf16", 90),
        (QWEN3_VL_2B, 32, 256, False, "fp16", 80),
        (SMOLVLM_256M, 1, 256, True, "fp16", 80),
        (GEMMA, 1, 64, False, "bf16", 80),
    ],
)
def test_default_tiles_compile_and_leave_room(
    parameters: AttentionParameters, batch: int, page: int, int8: bool, name: str, capability: int, tmp_path: Path
) -> None:
    tile = default_tile(parameters, batch, 132, int8=int8)
    kernel = compiled_attention(parameters, tile, name, int8, page, capability)
    used = usage(kernel, tmp_path)
    assert kernel.metadata.shared <= 40 * 1024  # four on a multiprocessor
    assert used["LOCAL"] == 0
    assert used["STACK"] <= 64, "registers were spilled"
    assert tile.registers is None or used["REG"] <= tile.registers
    ptx = kernel.asm["ptx"]
    assert "atom.global.gpu.acq_rel.add" in ptx or "atom.acq_rel.gpu.global.add" in ptx
    assert "mma.sync" in ptx
    assert len(re.findall(r"ld\.global[\w.:]*\.v4", ptx)) >= 8, "keys and values are read 16 bytes at a time"
