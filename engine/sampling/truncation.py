"""Where top-k, top-p and min-p cut a distribution off, as one threshold per row: everything below it is dropped.

Ties with the last token kept are kept too, so that the outcome never depends on the order of equal logits. The order
is vLLM's (vllm/v1/sample/sampler.py): min-p, then top-k, then top-p over what these left, renormalised.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from engine.request import SamplingParams

GROUP = 64  # logits that share one maximum when a shortlist is made
SMALL_VOCAB = 2048  # up to here sorting all rows at once is faster than searching each
SHORTLIST = 256  # so many values are sorted in the end
UNDERFLOW = np.float32(-104.0)  # exp of less is 0 in float32


def cutoffs(z: NDArray[np.float32], params: Sequence[SamplingParams]) -> NDArray[np.float32]:
    """Thresholds [B] for scaled logits z [B, W] whose row maximum is 0 and whose W is a multiple of GROUP.

    The padding after the vocabulary is -inf. Minus infinity means that nothing is cut off.
    """
    cuts = np.array([_min_p_cut(p.min_p) for p in params], np.float32)
    rows = [row for row, p in enumerate(params) if 0 < p.top_k < z.shape[1] or p.top_p < 1.0]
    if rows and z.shape[1] <= SMALL_VOCAB:
        ordered = -np.sort(-z[rows], axis=1)
        cuts[rows] = _cut_sorted(ordered, cuts[rows], [params[row] for row in rows])
    elif rows:
        for row in rows:
            cuts[row] = _cut_long(z[row], cuts[row], params[row])
    return cuts


def _min_p_cut(min_p: float) -> float:
    """A token needs at least min_p times the probability of the likeliest (Nguyen et al. 2024)."""
    return float(np.log(min_p)) if min_p > 0.0 else -np.inf


def _cut_sorted(
    ordered: NDArray[np.float32], cuts: NDArray[np.float32], params: Sequence[SamplingParams]
) -> NDArray[np.float32]:
    """Thresholds [B] from whole rows in descending order [B, W] and the min-p thresholds [B]."""
    width = ordered.shape[1]
    last = np.array([p.top_k if 0 < p.top_k < width else width for p in params]) - 1
    cuts = np.maximum(cuts, np.take_along_axis(ordered, last[:, None], axis=1)[:, 0])
    mass = np.exp(ordered, dtype=np.float64) * (ordered >= cuts[:, None])
    cumulative = np.cumsum(mass, axis=1)
    goal = np.array([p.top_p for p in params]) * cumulative[:, -1]
    reached = np.argmax(cumulative >= goal[:, None], axis=1)
    nucleus = np.take_along_axis(ordered, reached[:, None], axis=1)[:, 0]
    limited = np.array([p.top_p < 1.0 for p in params])
    return np.where(limited, np.maximum(cuts, nucleus), cuts)


def _cut_long(z: NDArray[np.float32], cut: np.float32, params: SamplingParams) -> np.float32:
    """The same for one long row [W], without sorting it."""
    if 0 < params.top_k < len(z):
        cut = max(cut, _kth_largest(z, params.top_k))
    if params.top_p == 1.0:
        return cut
    kept = z[z >= cut] if cut > UNDERFLOW else np.maximum(z, UNDERFLOW)
    return max(cut, _nucleus_cut(kept, params.top_p))


def _floor_of_largest(z: NDArray[np.float32], count: int) -> np.float32:
    """A lower bound of the count-th largest value of z [W], for count <= W / GROUP, close to it when count is small.

    The count-th largest of the maxima of disjoint groups; as many values, one per group, are at or above it.
    """
    groups = len(z) // GROUP
    maxima = z[: GROUP * groups].reshape(GROUP, groups).max(axis=0)
    floor: np.float32 = np.partition(maxima, groups - count)[groups - count]
    return floor


def _kth_largest(z: NDArray[np.float32], k: int) -> np.float32:
    few = z[z >= _floor_of_largest(z, k)] if k <= len(z) // GROUP else z
    value: np.float32 = np.partition(few, len(few) - k)[len(few) - k]
    return value


def _nucleus_cut(kept: NDArray[np.float32], top_p: float) -> np.float32:
    """The largest value of kept [n] such that it and all above it hold top_p of the mass (Holtzman et al. 2019).

    A quickselect by mass: halve the range that the threshold is in until few values are left, then sort those.
    """
    goal, above = top_p * float(np.sum(np.exp(kept))), 0.0
    pivot = _floor_of_largest(kept, SHORTLIST) if len(kept) > SHORTLIST * GROUP else None
    while len(kept) > SHORTLIST:
        if pivot is None:
            low, high = kept.min(), kept.max()
            if low == high:
                return low
            pivot = max((low + high) / 2, np.nextafter(low, high))
        upper = kept[kept >= pivot]
        upper_mass = float(np.sum(np.exp(upper)))
        if above + upper_mass >= goal:
            kept = upper
        else:
            above += upper_mass
            kept = kept[kept < pivot]
        pivot = None
    ordered = -np.sort(-kept)
    cumulative = above + np.cumsum(np.exp(ordered, dtype=np.float64))
    cut: np.float32 = ordered[min(int(np.searchsorted(cumulative, goal)), len(ordered) - 1)]
    return cut
