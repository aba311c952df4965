"""One piece of work and everybody who waits for it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from engine.errors import EngineError
from engine.prompts import Detokenizer, Prompt, StopMatcher
from engine.request import Chunk, Finished, FinishReason, SamplingParams, Timings, Usage
from engine.stream import Stream


class Job:
    """Identical deterministic requests share one job: each stream gets all its events, from the first.

    The job is abandoned once all its streams have ended. `on_finish` gets the whole text and the last event.
    """

    def __init__(
        self,
        sampling: SamplingParams,
        prompt: Prompt,
        stream: Stream,
        *,
        detokenizer: Detokenizer,
        eos: frozenset[int],
        accepted: float,
        on_finish: Callable[[str, Finished], None],
        on_end: Callable[[], None],
    ) -> None:
        self.sampling = sampling
        self.eos = frozenset() if self.sampling.ignore_eos else eos
        self.prompt = prompt
        self._detokenizer = detokenizer
        self._stop = StopMatcher(self.sampling.stop)
        self._accepted = accepted
        self._prepared = self._admitted = time.monotonic()
        self._first_token: float | None = None
        self._on_finish = on_finish
        self._on_end = on_end
        self._lock = threading.Lock()
        self._streams = [stream]
        self._texts: list[str] = []
        self._tokens = 0  # of them in events
        self._count = 0  # of all that came
        self._pending = 0  # tokens whose text is not out yet
        self._ended = False

    @property
    def is_abandoned(self) -> bool:
        """Without the lock: nobody joins a job whose streams have all ended."""
        return all(stream.has_ended for stream in self._streams)

    def subscribe(self, stream: Stream) -> bool:
        """Let another stream follow from the first token on; False when the job is over."""
        with self._lock:
            if self._ended or all(other.has_ended for other in self._streams):
                return False
            if self._tokens:
                stream.push(Chunk("".join(self._texts), self._tokens))
            self._streams.append(stream)
            return True

    def on_prepared(self) -> None:
        """The sequence is ready for the step loop; what comes now is the queue."""
        self._prepared = self._admitted = time.monotonic()

    def on_admitted(self, admitted_at: float) -> None:
        """When the sequence first ran; known before its first token is taken in."""
        self._admitted = admitted_at

    def take(self, tokens: list[int], *, reused: int) -> None:
        """Take in the next output tokens; emit text, or the last event. A job that is over takes none."""
        if self._first_token is None:
            self._first_token = time.monotonic()
        # Where a stop word ends the text, the tokens behind it must not count: those go one by one.
        for piece in [[token] for token in tokens] if self.sampling.stop else [tokens]:
            if not self._ended:
                self._take(piece, reused)

    def _take(self, tokens: list[int], reused: int) -> None:
        end = next((place for place, token in enumerate(tokens) if token in self.eos), None)
        text, stopped = self._stop.push(self._detokenizer.push(tokens[:end]))
        self._count += len(tokens[:end])
        self._pending += len(tokens[:end])
        if text:
            self._emit(text)
        if end is not None:
            self._count += 1
            self._pending += 1
            self._finish("stop", reused, flush=True)
        elif stopped:
            self._finish("stop", reused, flush=False)
        elif self._count >= self.sampling.max_tokens:
            self._finish("length", reused, flush=True)

    def fail(self, error: EngineError) -> None:
        """End every stream that is still open; a job that is over stays as it is."""
        with self._lock:
            if self._ended:
                return
            self._ended = True
            for stream in self._streams:
                stream.push(error)
        self._on_end()

    def _emit(self, text: str) -> None:
        with self._lock:
            self._texts.append(text)
            self._tokens += self._pending
            event = Chunk(text, self._pending)
            self._pending = 0
            for stream in self._streams:
                stream.push(event)

    def _finish(self, reason: FinishReason, reused: int, *, flush: bool) -> None:
        if flush:  # text held back as the possible start of a stop word, or an incomplete character
            text, stopped = self._stop.push(self._detokenizer.flush())
            if not stopped:
                text += self._stop.flush()
            if text:
                self._emit(text)
        now = time.monotonic()
        first = self._first_token or now
        event = Finished(
            reason,
            Usage(len(self.prompt.token_ids), self._count, self.prompt.image_tokens, reused),
            Timings(
                self._prepared - self._accepted,
                first - self._accepted,
                now - self._accepted,
                queued_s=self._admitted - self._prepared,
                prefill_s=first - self._admitted,
            ),
        )
        self._on_finish("".join(self._texts), event)
        with self._lock:
            self._ended = True
            for stream in self._streams:
                stream.push(event)
        self._on_end()
