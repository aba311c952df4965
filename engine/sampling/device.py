"""The sampler of a CUDA device: everything it needs of a sequence stays there, in a slot."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from engine.request import SamplingParams
from engine.sampling.device_torch import TorchSampling
from engine.sampling.record import FIRST_FORBIDDEN, IN_PROMPT, seen_tokens, write_record

_log = logging.getLogger(__name__)
LOGIT_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_VOCAB = 1 << 24


class Sampling(Protocol):
    """How logits become tokens; TorchSampling and engine.kernels.launch.TritonSampling."""

    def __call__(
        self,
        logits: torch.Tensor,
        slots: torch.Tensor,
        table: torch.Tensor,
        counts: torch.Tensor,
        tokens: torch.Tensor,
    ) -> torch.Tensor:
        """Tokens int32 [R], also written to tokens[slots]; steps in table and counts move on."""
        ...

    def forbid(self, logits: torch.Tensor, rows: torch.Tensor, masks: torch.Tensor) -> None:
        """As `DeviceSampler.constrain`, with masks int32 [n, words] on the device."""
        ...


class DeviceSampler:
    """Samples for `slots` sequences at a time over a vocabulary of `vocab` tokens.

    Order of operations and meaning of every parameter as in engine/sampling/sampler.py. A row's token depends on its
    logits and its slot alone: seed, step and penalties are the slot's, and no reduction crosses rows. Not thread-safe;
    all work goes to the device's current stream and nothing waits for it.

    dtype: the logits' type to prepare for, so that no request waits for a kernel to compile. sampling: which of the two
    it is, instead of the faster one that works.
    """

    def __init__(
        self,
        slots: int,
        vocab: int,
        device: torch.device,
        dtype: torch.dtype = torch.float16,
        *,
        sampling: Sampling | None = None,
    ) -> None:
        if slots < 1 or not 1 <= vocab <= MAX_VOCAB:
            raise ValueError(
                f"{slots} slots and {vocab} tokens; there must be 1 or more, and at most {MAX_VOCAB} tokens"
            )
        self.slots, self.vocab, self.device = slots, vocab, device
        self.slot_tokens = torch.zeros(slots + 1, dtype=torch.int32, device=device)
        self._table = torch.zeros((slots + 1, FIRST_FORBIDDEN + 4), dtype=torch.int32, device=device)
        self._counts = torch.zeros((1, 1), dtype=torch.int16, device=device)
        self._sampling = sampling or _choose_sampling(vocab, device, dtype)

    def assign(
        self,
        slot: int,
        params: SamplingParams,
        seed: int,
        prompt: NDArray[np.int64],
        output: Sequence[int],
        forbidden: Sequence[int],
    ) -> None:
        """Give slot to a sequence. Its next draw has the number len(output); forbidden tokens are never chosen.

        prompt and output are read for penalties only; ids outside the vocabulary (placeholders) count for nothing.
        """
        if not 0 <= slot < self.slots:
            raise ValueError(f"slot {slot}; there are {self.slots}")
        width = FIRST_FORBIDDEN + len(forbidden)
        if width > self._table.shape[1]:
            self._table = torch.nn.functional.pad(self._table, (0, width - self._table.shape[1]))
        staged = self._staging(width, torch.int32)
        write_record(staged.numpy(), params, self.vocab, seed, len(output), forbidden)
        self._table[slot, :width].copy_(staged, non_blocking=True)
        if params.has_penalties:
            self._count(slot, *seen_tokens(params, prompt, output, self.vocab))

    def sample(self, logits: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        """The next token of each row: int32 [R], also in slot_tokens[slots]; NO_TOKEN for a row that is not a number.

        logits [R, vocab] float16, bfloat16 or float32, left as they are; slots int32 [R], each once (the last one,
        `slots`, as often as there are padding rows). Steps and counts of the slots move on, not where there is no
        token. Asynchronous.
        """
        rows = len(slots)
        if logits.shape != (rows, self.vocab) or logits.dtype not in LOGIT_DTYPES or logits.stride(1) != 1:
            raise ValueError(f"logits {logits.dtype} {tuple(logits.shape)} for {rows} slots of {self.vocab} tokens")
        if not rows:
            return torch.empty(0, dtype=torch.int32, device=self.device)
        return self._sampling(logits, slots, self._table, self._counts, self.slot_tokens)

    def rows(self, rows: Sequence[int]) -> torch.Tensor:
        """Rows of logits for `constrain`, int32 [n] on the device; asynchronous."""
        staged = self._staging(len(rows), torch.int32)
        staged.numpy()[:] = rows
        return staged.to(self.device, non_blocking=True)

    def mask_memory(self, count: int, words: int) -> torch.Tensor:
        """Host memory int32 [count, words] for the masks of one call of `constrain`."""
        return self._staging(count * words, torch.int32).view(count, words)

    def constrain(self, logits: torch.Tensor, rows: torch.Tensor, masks: torch.Tensor) -> None:
        """Set to minus infinity, in place, what the masks [n, words] do not allow in n rows of logits [R, vocab].

        A bit per token, 32 to a word, the first token lowest, for at least the vocabulary. All masks cross to the
        device in one copy; asynchronous.
        """
        self._sampling.forbid(logits, rows, masks.to(self.device, non_blocking=True))

    @property
    def memory(self) -> int:
        """Bytes of the tables kept for the slots; grows once, with the first penalty."""
        return sum(tensor.nbytes for tensor in (self.slot_tokens, self._table, self._counts))

    def _count(self, slot: int, given: NDArray[np.int64], chosen: NDArray[np.int64], times: NDArray[np.int64]) -> None:
        if len(self._counts) == 1:  # only now: few requests ask for penalties, and this is slots * vocab * 2 bytes
            self._counts = torch.zeros((self.slots + 1, self.vocab), dtype=torch.int16, device=self.device)
        row = self._counts[slot].zero_()
        staged = self._staging(len(given) + 2 * len(chosen), torch.int64)
        staged.numpy()[:] = np.concatenate([given, chosen, times])
        places = staged.to(self.device, non_blocking=True)
        in_output, counts = places[len(given) :].view(2, -1)
        row.index_fill_(0, places[: len(given)], IN_PROMPT)
        row.index_add_(0, in_output, counts.to(torch.int16))

    def _staging(self, size: int, dtype: torch.dtype) -> torch.Tensor:
        """Host memory that a copy can leave from at its own pace: the allocator reuses it only after the copy."""
        return torch.empty(size, dtype=dtype, pin_memory=self.device.type == "cuda")


def _choose_sampling(vocab: int, device: torch.device, dtype: torch.dtype) -> Sampling:
    """Triton's kernels where they compile and run, else plain torch, which is slower and needs no C compiler."""
    try:
        from engine.kernels.launch import TritonSampling, can_run_on

        if can_run_on(device):
            chosen = TritonSampling(vocab, device, dtype)
            _log.info("sampling on %s by Triton kernels", device)
            return chosen
        reason = "kernels run on CUDA devices only"
    except Exception as error:  # noqa: BLE001 - a compiler or driver fails in its own ways; each has the same remedy
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
    _log.info("sampling on %s by torch, which is slower: %s", device, reason)
    return TorchSampling()
