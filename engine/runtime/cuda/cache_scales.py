"""Scales of an int8 KV cache, from keys and values that a 16-bit one holds."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from engine.graphs.cuda import PARTS, StepInputs
from engine.runtime.cuda.decoder import PagedDecoder
from engine.runtime.cuda.step import PackedStep

_HEAD_ROOM = 1.25  # other texts reach further; it costs a third of a bit
_LEAST = 1e-3  # of a head's largest range: a channel that was silent may not stay so


def measure_ranges(decoder: PagedDecoder, step: PackedStep) -> NDArray[np.float32]:
    """Run one sequence from its beginning; the largest magnitude in each channel, [layers, 2, kv_heads, head_dim].

    Rotary embedding turns a key's channels in pairs, by another angle at each position: a pair's length is the most
    that either of them can be anywhere.
    """
    decoder.run(step)
    ranges = []
    for layer in range(decoder.spec.layers):
        key, value = (decoder.cached(part, layer, step.tables[0], int(step.counts[0])).float() for part in PARTS)
        first, second = key.chunk(2, dim=-1)
        length = torch.hypot(first, second)
        ranges.append(torch.stack([torch.cat([length, length], -1).amax(0), value.abs().amax(0)]))
    result: NDArray[np.float32] = torch.stack(ranges).cpu().numpy()
    return result


def scale_inputs(ranges: NDArray[np.float32], device: torch.device) -> dict[str, torch.Tensor]:
    """The graph's inputs of ranges [layers, 2, kv_heads, head_dim], on the device."""
    least = np.maximum(_LEAST * ranges.max(axis=-1, keepdims=True), np.finfo(np.float32).tiny * 1e6)
    scales = torch.from_numpy((np.maximum(ranges, least) * _HEAD_ROOM / 127).astype(np.float32)).to(device)
    return {
        StepInputs.cache_scale(part, layer): scales[layer, number].unsqueeze(1).contiguous()
        for layer in range(len(ranges))
        for number, part in enumerate(PARTS)
    }
