"""Launching the sampling kernels: sizes, scratch memory, and the first compilation."""

from __future__ import annotations

import torch
import triton
from triton import knobs

from engine.kernels.sampling import CHUNK, GROUP, choose_tokens, scan_chunks, work_of
from engine.sampling.record import FIRST_FORBIDDEN

SHORT = 512  # groups in a shortlist
SCAN_WARPS, CHOOSE_WARPS = 8, 16


def can_run_on(device: torch.device) -> bool:
    return device.type == "cuda" or bool(knobs.runtime.interpret)


class TritonSampling:
    """Two launches for any batch. Construction compiles and runs the kernels once, and raises what they raise."""

    def __init__(self, vocab: int, device: torch.device, dtype: torch.dtype) -> None:
        self._device = device
        short = min(SHORT, triton.next_power_of_2(triton.cdiv(vocab, GROUP.value)))
        self._sizes = {"VOCAB": vocab, "SHORT": short}
        self._chunks = triton.cdiv(vocab, CHUNK.value)
        self._work = torch.empty((1, work_of(vocab, short)), dtype=torch.float32, device=device)
        table = torch.zeros((1, FIRST_FORBIDDEN + 4), dtype=torch.int32, device=device)
        counts = torch.zeros((1, 1), dtype=torch.int16, device=device)
        slot = torch.zeros(1, dtype=torch.int32, device=device)
        self(torch.zeros((1, vocab), dtype=dtype, device=device), slot, table, counts, slot.clone())

    def __call__(
        self,
        logits: torch.Tensor,
        slots: torch.Tensor,
        table: torch.Tensor,
        counts: torch.Tensor,
        tokens: torch.Tensor,
    ) -> torch.Tensor:
        rows = len(slots)
        if rows > len(self._work):
            self._work = torch.empty((rows, self._work.shape[1]), dtype=torch.float32, device=self._device)
        results = torch.empty(rows, dtype=torch.int32, device=self._device)
        stride, words = logits.stride(0), table.shape[1]
        # without fused multiply-add a penalised logit has the same bits in both kernels
        scan_chunks[(self._chunks, rows)](
            logits, stride, slots, table, counts, self._work, words, **self._sizes,
            num_warps=SCAN_WARPS, enable_fp_fusion=False,
        )  # fmt: skip
        choose_tokens[(rows,)](
            logits, stride, slots, table, counts, self._work, tokens, results, words,
            **self._sizes, num_warps=CHOOSE_WARPS, enable_fp_fusion=False,
        )  # fmt: skip
        return results
