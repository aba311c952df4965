"""The device sampler in plain torch, for devices without Triton: it sorts whole rows; nothing waits for the device."""

from __future__ import annotations

import torch

from engine.sampling.record import DRAWN, FIRST_FORBIDDEN, MOST_SEEN, PENALISED, Word
from engine.sampling.sampler import NO_TOKEN

_LOW = 0xFFFFFFFF
_ROUNDS = 10


class TorchSampling:
    """Tokens of a batch. Arguments as in engine/sampling/device.py; sums are in float64."""

    def __call__(
        self,
        logits: torch.Tensor,
        slots: torch.Tensor,
        table: torch.Tensor,
        counts: torch.Tensor,
        tokens: torch.Tensor,
    ) -> torch.Tensor:
        places = slots.long()
        records = table[places]
        x = logits.float()
        penalised = (records[:, Word.FLAGS] & PENALISED) != 0
        if len(counts) > 1:
            x = torch.where(penalised[:, None], _penalise(x, counts[places], records), x)
        x = _forbid(x, records)
        x = torch.where(x < torch.inf, x, torch.inf)  # NaN to inf
        peak = x.amax(1, keepdim=True)
        columns = torch.arange(x.shape[1], device=x.device)
        greedy = torch.where(x == peak, columns, x.shape[1]).amin(1)
        drawn = (records[:, Word.FLAGS] & DRAWN) != 0
        chosen = torch.where(drawn, _draw(x, peak, records), greedy)
        valid = peak[:, 0].isfinite()
        table[places, Word.STEP] += valid.int()
        if len(counts) > 1:
            seen = counts[places, chosen]
            counts[places, chosen] = seen + (valid & penalised & ((seen & MOST_SEEN) < MOST_SEEN)).short()
        results = torch.where(valid, chosen, NO_TOKEN).int()
        tokens[places] = results
        return results

    def forbid(self, logits: torch.Tensor, rows: torch.Tensor, masks: torch.Tensor) -> None:
        places = rows.long()
        bits = 1 << torch.arange(8, dtype=torch.uint8, device=logits.device)
        allowed = masks.view(torch.uint8)[:, :, None] & bits
        forbidden = allowed.flatten(1)[:, : logits.shape[1]] == 0
        logits.index_copy_(0, places, logits.index_select(0, places).masked_fill_(forbidden, -torch.inf))


def _real(records: torch.Tensor, word: Word) -> torch.Tensor:
    """The float32 in a word of each record, [R, 1]."""
    return records[:, word : word + 1].contiguous().view(torch.float32)


def _penalise(x: torch.Tensor, seen: torch.Tensor, records: torch.Tensor) -> torch.Tensor:
    times = (seen & MOST_SEEN).float()
    repetition = _real(records, Word.REPETITION)
    lower = torch.where(x > 0, x / repetition, x * repetition)
    lower = lower - _real(records, Word.FREQUENCY) * times
    lower = lower - torch.where(times > 0, _real(records, Word.PRESENCE), 0.0)
    return torch.where(seen != 0, lower, x)


def _forbid(x: torch.Tensor, records: torch.Tensor) -> torch.Tensor:
    """x [R, V] with -inf at each record's forbidden tokens."""
    width = x.shape[1]
    forbidden = records[:, FIRST_FORBIDDEN:].long()
    given = torch.arange(forbidden.shape[1], device=x.device) < records[:, Word.FORBIDDEN, None]
    given &= (forbidden >= 0) & (forbidden < width)
    spare = torch.nn.functional.pad(x, (0, 1))  # a column for what is not given
    return spare.scatter(1, torch.where(given, forbidden, width), -torch.inf)[:, :width]


def _draw(x: torch.Tensor, peak: torch.Tensor, records: torch.Tensor) -> torch.Tensor:
    """Tokens [R] by inverse CDF over what the filters keep; any value for a row that is not finite."""
    d = (peak - x) * _real(records, Word.SCALE)
    limit = _limits(d, records)
    weights = torch.where(d <= limit, torch.exp2(-d.double()), 0.0)
    sums = weights.cumsum(1)
    goal = uniforms(records) * sums[:, -1:]
    columns = torch.arange(x.shape[1], device=x.device)
    first = torch.where((weights > 0) & (sums > goal), columns, x.shape[1]).amin(1)
    last = torch.where(weights > 0, columns, 0).amax(1)
    return torch.minimum(first, last)


def _limits(d: torch.Tensor, records: torch.Tensor) -> torch.Tensor:
    """The largest d that min-p, then top-k, then top-p keep: [R, 1]."""
    ordered = d.sort(1).values
    limit = _real(records, Word.LIMIT)
    top_k = records[:, Word.TOP_K, None].long()
    kth = ordered.gather(1, (top_k - 1).clamp(min=0))
    limit = torch.where(top_k > 0, torch.minimum(limit, kth), limit)
    top_p = _real(records, Word.TOP_P)
    sums = torch.where(ordered <= limit, torch.exp2(-ordered.double()), 0.0).cumsum(1)
    reached = (sums < top_p * sums[:, -1:]).sum(1, keepdim=True)
    nucleus = ordered.gather(1, reached.clamp(max=d.shape[1] - 1))
    return torch.where(top_p < 1.0, torch.minimum(limit, nucleus), limit)


def uniforms(records: torch.Tensor) -> torch.Tensor:
    """The number of [0, 1) for each record's seed and step, bit for bit that of engine/sampling/philox.py: [R, 1]."""
    words = records.long() & _LOW
    key, second_key, a = (words[:, word, None] for word in (Word.SEED, Word.SEED + 1, Word.STEP))
    b = c = d = torch.zeros_like(a)
    for _ in range(_ROUNDS):
        first, second = a * 0xD2511F53, c * 0xCD9E8D57  # wrap; the bits are those of the unsigned products
        a, b = ((second >> 32) & _LOW) ^ b ^ key, second & _LOW
        c, d = ((first >> 32) & _LOW) ^ d ^ second_key, first & _LOW
        key, second_key = (key + 0x9E3779B9) & _LOW, (second_key + 0xBB67AE85) & _LOW
    return ((a << 21) ^ (b >> 11)).double() * 2.0**-53
