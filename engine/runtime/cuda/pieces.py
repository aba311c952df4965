"""Short pieces of one prompt from captured graphs: operator by operator the host takes longer than the device."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch

from engine.graphs.cuda import StepInputs
from engine.runtime.cuda.buckets import contexts
from engine.runtime.cuda.session import Binding, GraphSession
from engine.runtime.cuda.step import Int32, PackedStep, Placement, StepBuffer

SIZES = (64, 128, 256)  # tokens of a piece, less one; a device is as long about fewer, and about more as the host
OUR_SIZES = (*SIZES, 528, 1040, 2056)  # of operators of ours, which take the host longer, and the device less time
LONGEST = 4096  # tokens of a prompt; longer ones are rarely the only work

Bind = Callable[[dict[str, torch.Tensor], torch.Tensor], Binding]
"""Inputs that differ from graph to graph, and image features, to a binding for one row of logits."""


class _Graph(NamedTuple):
    number: int
    size: int
    context: int
    place: Placement
    binding: Binding


class CapturedPieces:
    """A graph for each size of piece and of context. Behind the piece comes a sequence of its own that fills it up: it
    has one token at least, and writes to block 0, which is nobody's.
    """

    def __init__(
        self,
        session: GraphSession,
        bind: Bind,
        buffer: StepBuffer,
        *,
        sizes: Sequence[int],
        axes: int,
        block_size: int,
        step_tokens: int,
        context_length: int,
        feature_width: int,
        dtype: torch.dtype,
    ) -> None:
        """`sizes` in tokens of a piece, less one, ascending; `step_tokens` is the most that `buffer` has room for."""
        self._session = session
        self._bind = bind
        self._buffer = buffer
        self._axes = axes
        self._block_size = block_size
        self._sizes = [size for size in sizes if size <= step_tokens]
        self._contexts = list(contexts(min(context_length, LONGEST)))
        most = max(self._sizes, default=1)
        self._features = torch.zeros((most, feature_width), dtype=dtype, device=buffer.device.device)
        self._graphs: dict[tuple[int, int], _Graph] = {}

    def takes(self, step: PackedStep) -> bool:
        """Whether it is a piece of one prompt, and short enough."""
        is_one = len(step.counts) == 1 and len(step.logits_rows) <= 1 and not step.mutual
        return is_one and len(step.ids) < max(self._sizes, default=0) and step.longest <= self._contexts[-1]

    def run(self, step: PackedStep) -> torch.Tensor:
        """Enqueue the piece; its slots on the device."""
        graph = self._graph(len(step.ids), step.longest)
        count, index = len(step.ids), np.full(graph.size, -1, np.int32)
        if step.features is not None and step.feature_index is not None:
            index[:count] = self._placed(step.features, step.feature_index)
        columns = -(-graph.context // self._block_size)
        parts = {
            StepInputs.IDS: step.ids,
            StepInputs.FEATURE_INDEX: index,
            StepInputs.STARTS: np.array([0, count, graph.size], np.int32),
            StepInputs.PAST: step.past,
            StepInputs.BLOCK_TABLE: step.tables[:, :columns],
            StepInputs.LOGITS_ROWS: np.full(1, count - 1, np.int32),
            StepInputs.SLOTS: step.slots,
        }
        if self._axes == 3:
            parts[StepInputs.POSITIONS] = step.positions
        graph.place.upload(parts)
        self._session.run(graph.binding, graph.number)
        return graph.place.view(StepInputs.SLOTS)[: len(step.slots)]

    def capture(self) -> None:
        """Record all graphs, with pieces that write to block 0."""
        for context, size in self._all():
            zero, table = np.zeros(1, np.int32), np.zeros((1, -(-context // self._block_size)), np.int32)
            count = min(size, context) - 1
            positions = np.zeros((self._axes, count), np.int32)
            counts, past = np.full(1, count, np.int32), np.full(1, context - count, np.int32)
            self.run(PackedStep(np.zeros(count, np.int32), positions, counts, past, table, zero, zero))

    def close(self) -> None:
        self._graphs.clear()
        del self._session, self._bind

    def _all(self) -> Iterator[tuple[int, int]]:
        """The largest first, as with decode steps; none of which every piece has more tokens than the context."""
        shorter = (0, *self._sizes)
        for context in reversed(self._contexts):
            for least, size in reversed([*zip(shorter, self._sizes, strict=False)]):
                if least <= context:
                    yield context, size

    def _graph(self, tokens: int, longest: int) -> _Graph:
        size = self._sizes[bisect.bisect_right(self._sizes, tokens)]
        place = bisect.bisect_left(self._contexts, longest)
        key = size, self._contexts[place]
        if key not in self._graphs:
            self._graphs[key] = self._opened(size, self._contexts[place], self._contexts[place - 1] if place else 0)
        return self._graphs[key]

    def _opened(self, size: int, context: int, shorter: int) -> _Graph:
        shapes: dict[str, tuple[int, ...]] = {
            StepInputs.IDS: (size,),
            StepInputs.FEATURE_INDEX: (size,),
            StepInputs.STARTS: (3,),
            StepInputs.PAST: (2,),
            StepInputs.BLOCK_TABLE: (2, -(-context // self._block_size)),
            StepInputs.LOGITS_ROWS: (1,),
            StepInputs.SLOTS: (1,),
        }
        if self._axes == 3:
            shapes[StepInputs.POSITIONS] = (3, size)
        place = self._buffer.place(shapes)
        inputs = {name: place.view(name) for name in shapes if name != StepInputs.SLOTS}
        inputs[StepInputs.BOUNDS] = torch.tensor([size, context, shorter + 1], dtype=torch.int32)
        return _Graph(len(self._graphs) + 1, size, context, place, self._bind(inputs, self._features))

    def _placed(self, features: torch.Tensor, index: Int32) -> Int32:
        """Copy the rows that the piece shows to where its graph reads them; the index of their places there."""
        shown = index[index >= 0]
        if not len(shown):
            return index
        first, stop = int(shown.min()), int(shown.max()) + 1
        self._features[: stop - first].copy_(features[first:stop])
        return np.where(index >= 0, index - first, -1).astype(np.int32)
