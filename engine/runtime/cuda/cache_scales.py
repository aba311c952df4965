"""Scales of an int8 KV cache, from keys and values that a 16-bit one holds."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from engine.graphs.cuda import PARTS, StepInputs
from engine.runtime.cuda.decoder import PagedDecoder
from engine.runtime.cuda.step import PackedStep

_HEAD_ROOM = 1.25  # other texts reach further; it costs a third of a bit
_LEAST = 1e-3  # of a head's largest range: a channel that was silent may not stay so


def measure_ranges(decoder: PagedDecoder, step: PackedStep) -> NDArray[np.float32]:
    """Run one sequence from its beginning; the largest magnitude in each channel, [L, 2, kv_heads, head_dim].

    L is the number of layers with a cache. Rotary embedding turns a key's channels in pairs, by another angle at each
    position: a pair's length is the most that either of them can be anywhere.
    """
    decoder.run(step)
    ranges = []
    for layer in decoder.spec.attention_layers:
        key, value = (decoder.cached(part, layer, step.tables[0], int(step.counts[0])).float() for part in PARTS)
        width = decoder.spec.rope.width
        first, second = key[..., :width].chunk(2, dim=-1)
        length = torch.hypot(first, second)
        reached = torch.cat([length, length, key[..., width:].abs()], -1)
        ranges.append(torch.stack([reached.amax(0), value.abs().amax(0)]))
    result: NDArray[np.float32] = torch.stack(ranges).cpu().numpy()
    return result


def scale_inputs(ranges: NDArray[np.float32], layers: Sequence[int], device: torch.device) -> dict[str, torch.Tensor]:
    """The graph's inputs of ranges [L, 2, kv_heads, head_dim] of the L `layers`, on the device."""
    least = np.maximum(_LEAST * ranges.max(axis=-1, keepdims=True), np.finfo(np.float32).tiny * 1e6)
    scales = torch.from_numpy((np.maximum(ranges, least) * _HEAD_ROOM / 127).astype(np.float32)).to(device)
    return {
        StepInputs.cache_scale(part, layer): scales[place, number].unsqueeze(1).contiguous()
        for place, layer in enumerate(layers)
        for number, part in enumerate(PARTS)
    }
