"""The decoder's inputs and outputs bound to neighbouring rows of KV memory."""

from __future__ import annotations

import numpy as np
import onnxruntime as ort  # type: ignore[import-untyped]
from numpy.typing import NDArray

from engine.graphs.cpu import DecoderInputs, DeltaNetInputs
from engine.runtime.kv_memory import KVMemory
from engine.runtime.session import Binding
from engine.runtime.state_memory import PARTS, StateMemory
from engine.spec import DecoderSpec


class RowBinding(Binding):
    """`count` rows from `first`; past and present are the same memory, so attention appends in place.

    What a decode step needs is kept in arrays that stay bound, because binding costs more than filling them.
    """

    def __init__(
        self,
        session: ort.InferenceSession,
        spec: DecoderSpec,
        memory: KVMemory,
        states: StateMemory | None,
        first: int,
        count: int,
    ):
        """`states` are there if the decoder has linear attention."""
        super().__init__(session)
        self._three_axis = spec.rope.axes == 3
        for place, layer in enumerate(spec.attention_layers):
            for part, name in enumerate(("key", "value")):
                slab = memory.view(place, part, first, count)
                self.input(DecoderInputs.past(name, layer), slab)
                self.output(DecoderInputs.present(name, layer), slab)
        self._kept = np.zeros(0, np.int64)
        if spec.delta_net is not None and states is not None:
            self._kept = np.arange(spec.delta_net.kernel - 1)
            for place, layer in enumerate(spec.delta_net.layers):
                for part, name in enumerate(PARTS):
                    slab = states.view(place, part, first, count)
                    self.input(DeltaNetInputs.past(name, layer), slab)
                    self.output(DeltaNetInputs.present(name, layer), slab)
        self._real = np.zeros((count, 1, 1), np.float32)
        self._window_rows = np.zeros((count, len(self._kept), 1), np.int64)
        self._ids = np.zeros(count, np.int64)
        self._last = np.zeros(count, np.int32)
        self._longest = np.zeros((), np.int32)
        self._positions = np.zeros((3, count, 1), np.int64)
        self._shape = np.array([count, 1, -1])
        self._logits_rows: dict[int, NDArray[np.int64]] = {}  # by their number
        self._no_rows = np.zeros((0, 1), np.int64)
        self._no_features = np.zeros((0, spec.feature_width), np.float32)
        self._mutual_images = spec.mutual_images
        self._sliding_window = spec.sliding.window if spec.sliding else 0
        if spec.mutual_images:  # what stays bound but while an image is computed
            self._text, self._image = np.zeros((), np.bool_), np.ones((), np.bool_)
            self._no_window = np.zeros((1, 1, 1, 1), np.float32)
            self._bind_text()

    def prefill(
        self,
        token_ids: NDArray[np.int64],
        feature_rows: NDArray[np.int64],
        feature_values: NDArray[np.float32],
        positions: NDArray[np.int64],
        last: int,
        real: int,
        *,
        is_image: bool = False,
    ) -> None:
        """Neighbouring tokens [T] of the one row; `last` is the place of the last of them.

        Those from `real` on are there to make the call longer, and go into no state. `is_image`: they are an image's,
        of a model whose images attend both ways.
        """
        self.input(DecoderInputs.IDS, token_ids)
        self.input(DecoderInputs.FEATURE_ROWS, feature_rows[:, None])
        self.input(DecoderInputs.FEATURE_VALUES, feature_values)
        self.input(DecoderInputs.SHAPE, np.array([1, len(token_ids), -1]))
        if self._three_axis:
            self.input(DecoderInputs.POSITIONS, positions[:, None, :])
        if is_image:
            self._bind_image(last + 1 - len(token_ids), last + 1)
        elif self._mutual_images:
            self._bind_text()
        if len(self._kept):
            self.input(DeltaNetInputs.REAL, (np.arange(len(token_ids)) < real).astype(np.float32)[None, :, None])
            self.input(DeltaNetInputs.WINDOW_ROWS, (self._kept + real)[None, :, None])
        self._place(np.array([last], np.int32))

    def _bind_text(self) -> None:
        self.input(DecoderInputs.IS_IMAGE, self._text)
        self.input(DecoderInputs.IMAGE_WINDOW, self._no_window)

    def _bind_image(self, start: int, stop: int) -> None:
        """Tokens [start, stop) see all of each other, and before them what the window of sliding layers holds."""
        queries, keys = np.arange(start, stop)[:, None], np.arange(stop)
        window = np.where(keys > queries - self._sliding_window, np.float32(0), np.float32(-np.inf))
        self.input(DecoderInputs.IS_IMAGE, self._image)
        self.input(DecoderInputs.IMAGE_WINDOW, window[None, None])

    def decode(
        self,
        places: NDArray[np.int64],
        token_ids: NDArray[np.int64],
        positions: NDArray[np.int64],
        lengths: NDArray[np.int32],
    ) -> None:
        """One token for each of `places` (counted from `first`); `lengths` [count] are those of all rows."""
        self._ids[places] = token_ids
        self.input(DecoderInputs.IDS, self._ids)
        self.input(DecoderInputs.FEATURE_ROWS, self._no_rows)
        self.input(DecoderInputs.FEATURE_VALUES, self._no_features)
        self.input(DecoderInputs.SHAPE, self._shape)
        if self._three_axis:
            self._positions[:, places, 0] = positions
            self.input(DecoderInputs.POSITIONS, self._positions)
        if len(self._kept):  # rows between those that decode keep their states
            self._real[:] = 0
            self._real[places] = 1
            self._window_rows[:, :, 0] = self._kept
            self._window_rows[places] += 1
            self.input(DeltaNetInputs.REAL, self._real)
            self.input(DeltaNetInputs.WINDOW_ROWS, self._window_rows)
        self._place(lengths)

    def _place(self, last: NDArray[np.int32]) -> None:
        self._last[:] = last
        self._longest[()] = last.max() + 1
        self.input(DecoderInputs.LAST, self._last)
        self.input(DecoderInputs.LONGEST, self._longest)

    def logits(self, rows: NDArray[np.int64], logits: NDArray[np.float32]) -> NDArray[np.float32]:
        """Run, and give `logits` [R, vocab] filled for `rows` [R] of the tokens."""
        given = self._logits_rows.get(len(rows))
        if given is None:
            given = self._logits_rows[len(rows)] = np.empty_like(rows)
        given[:] = rows
        self.input(DecoderInputs.LOGITS_ROWS, given)
        self.output(DecoderInputs.LOGITS, logits)
        self.run()
        return logits
