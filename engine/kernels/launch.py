"""Launching the sampling kernels: sizes, scratch memory, and the first compilation."""

from __future__ import annotations

from collections.abc import Hashable
from contextlib import nullcontext
from typing import Any

import torch
import triton
from triton import knobs

from engine.kernels.masks import forbid_tokens
from engine.kernels.rows import CHUNK, GROUP
from engine.kernels.sampling import choose_tokens, scan_chunks, work_of
from engine.request import SamplingParams
from engine.sampling.record import FIRST_FORBIDDEN, write_record

SHORT = 512  # groups in a shortlist
SCAN_WARPS, CHOOSE_WARPS, FORBID_WARPS = 8, 16, 8
_ALIGNED = 16  # bytes


def can_run_on(device: torch.device) -> bool:
    return device.type == "cuda" or bool(knobs.runtime.interpret)


class TritonSampling:
    """Two launches for any batch, one for masks. Construction compiles and tries them, and raises what they raise."""

    def __init__(self, vocab: int, device: torch.device, dtype: torch.dtype) -> None:
        self._device = device
        self._current = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
        short = min(SHORT, triton.next_power_of_2(triton.cdiv(vocab, GROUP.value)))
        # without fused multiply-add a penalised logit has the same bits in both kernels
        self._scan = _Launch(scan_chunks, vocab, short, num_warps=SCAN_WARPS, enable_fp_fusion=False)
        self._choose = _Launch(choose_tokens, vocab, short, num_warps=CHOOSE_WARPS, enable_fp_fusion=False)
        self._forbid = _Launch(forbid_tokens, vocab, num_warps=FORBID_WARPS)
        self._chunks = triton.cdiv(vocab, CHUNK.value)
        self._work = torch.empty((1, work_of(vocab, short)), dtype=torch.float32, device=device)
        self._try(vocab, dtype)

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
        with self._current:  # Triton launches on the current device
            self._scan((self._chunks, rows, 1), logits, stride, slots, table, counts, self._work, words)
            self._choose((rows, 1, 1), logits, stride, slots, table, counts, self._work, tokens, results, words)
        return results

    def forbid(self, logits: torch.Tensor, rows: torch.Tensor, masks: torch.Tensor) -> None:
        count, words = masks.shape
        with self._current:
            self._forbid((self._chunks, count, 1), logits, logits.stride(0), rows, masks, words)

    def _try(self, vocab: int, dtype: torch.dtype) -> None:
        """Draw from equal logits: compiles all kernels, takes the longest way through them, and waits."""
        record = torch.zeros((1, FIRST_FORBIDDEN), dtype=torch.int32)
        write_record(record[0].numpy(), SamplingParams(temperature=1.0, top_p=0.5), vocab, seed=0, step=0, forbidden=[])
        logits = torch.zeros((1, vocab), dtype=dtype, device=self._device)
        counts = torch.zeros((1, 1), dtype=torch.int16, device=self._device)
        slot = torch.zeros(1, dtype=torch.int32, device=self._device)
        everything = torch.full((1, triton.cdiv(vocab, 32)), -1, dtype=torch.int32, device=self._device)
        self.forbid(logits, slot, everything)
        token = int(self(logits, slot, record.to(self._device), counts, slot.clone())[0])
        if not 0 <= token < vocab:
            raise RuntimeError(f"the sampling kernels chose token {token} of {vocab}")


class _Launch:
    """One of the kernels. Triton looks at every argument of a launch, some 20 us; what it has compiled for arguments of
    a kind is from then on launched by addresses alone.
    """

    def __init__(self, kernel: Any, *constants: int, **options: int) -> None:
        self._kernel = kernel
        self._constants = constants
        self._options = options
        self._compiled: dict[Hashable, Any] = {}

    def __call__(self, grid: tuple[int, int, int], *arguments: torch.Tensor | int) -> None:
        kind = tuple([one if isinstance(one, int) else one.dtype for one in arguments])
        addresses = [one if isinstance(one, int) else one.data_ptr() for one in arguments]
        aligned = all(isinstance(one, int) or not address % _ALIGNED
                      for one, address in zip(arguments, addresses, strict=True))  # fmt: skip
        compiled = self._compiled.get(kind) if aligned else None
        if compiled is not None:
            compiled[grid](*addresses, *self._constants)
            return
        compiled = self._kernel[grid](*arguments, *self._constants, **self._options)
        if aligned:
            self._compiled[kind] = compiled  # None from Triton's interpreter
