"""A model on a CUDA device: one packed call per step, tokens chosen there, the next step launched before they are read.

The decoder takes a sequence's newest token from where the sampler wrote it, so that the host learns of it a step later
and works while the device does (as vLLM's asynchronous scheduling does, vllm/v1/core/sched/async_scheduler.py).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from collections.abc import Sequence as Ordered
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from engine.errors import DeviceOutOfMemory
from engine.preprocess import ImageInput
from engine.runtime.cuda.capture import allow_beside_capture
from engine.runtime.cuda.decoder import PagedDecoder, Result
from engine.runtime.cuda.failures import DeviceFailures
from engine.runtime.cuda.step import Int32, PackedStep
from engine.sampling import NO_TOKEN, masks
from engine.sampling.device import DeviceSampler
from engine.sampling.grammar import Matcher
from engine.scheduling.paged import PagedKVCache
from engine.scheduling.scheduler import PrefillChunk, StepPlan
from engine.scheduling.sequence import Sequence
from engine.spec import ModelSpec
from engine.stats import ModelMemory

_RESULTS = 4  # steps whose tokens may be on their way to the host
_TORCH_FLOATS = {2: torch.float16, 4: torch.float32}  # by their bytes: what features are kept in


class VisionTower(Protocol):
    def encode(self, images: Ordered[ImageInput]) -> list[torch.Tensor]:
        """[tokens, hidden] per image, on the device, perhaps not computed yet."""
        ...


class CudaRunner:
    """Implements `Runner`. Raises DeviceOutOfMemory and DeviceLost for what the device's libraries raise."""

    lag = 1

    def __init__(
        self,
        spec: ModelSpec,
        decoder: PagedDecoder,
        sampler: DeviceSampler,
        tower: VisionTower | None,
        kv: PagedKVCache,
        *,
        memory: ModelMemory,
    ) -> None:
        self._spec = spec
        self.decoder = decoder
        self._sampler = sampler
        self.tower = tower
        self._kv = kv
        self._memory = memory
        self._device = sampler.slot_tokens.device
        self._on_cuda = self._device.type == "cuda"
        self._failures = DeviceFailures(self._device)
        self._ring = [_TokenCopy(len(sampler.slot_tokens), self._device) for _ in range(_RESULTS)]
        self._turn = 0
        self._last: PendingStep | None = None
        self._plan: StepPlan | None = None  # of the last step, its inputs, and who got a token by it, by row of logits
        self._inputs: PackedStep
        self._further = 0  # tokens that the sequences have beyond these
        self._sampled: list[Sequence] = []
        self._constrained: list[int] = []  # places of those of them that have a grammar
        self._matchers: list[Matcher] = []
        self._masked: torch.Tensor  # their rows of logits, on the device

    def launch(self, plan: StepPlan) -> PendingStep:
        with self._failures:
            return self._launch(plan)

    def _launch(self, plan: StepPlan) -> PendingStep:
        logits, slots = self._go_on() if plan is self._plan else self._begin(plan)
        if self._constrained:
            self._constrain(logits)
        copy = self._ring[self._turn]
        self._turn = (self._turn + 1) % _RESULTS
        copy.start(self._sampler.sample(logits, slots) if self._sampled else None)
        plan.advance(self._sampled)
        self._release_states(plan)
        self._last = PendingStep(self._sampled, copy, self._failures, self._constrained)
        return self._last

    def _begin(self, plan: StepPlan) -> Result:
        """A step that is not the last one again."""
        arranged = self._arranged(plan)
        self._plan, self._inputs, self._further, self._sampled = plan, self._step(arranged), 0, arranged.sampled
        self._find_constrained()
        result = self.decoder.run(self._inputs)
        for chunk in plan.prefill:  # while the device computes
            if chunk.gives_token:
                self._assign(chunk.sequence)
        return result

    def _go_on(self) -> Result:
        """The last step again, each sequence a token further."""
        self._further += 1
        if (result := self.decoder.go_on()) is not None:
            return result
        self._inputs.go_on(self._further)
        self._further = 0
        return self.decoder.run(self._inputs)

    def _arranged(self, plan: StepPlan) -> StepPlan:
        """The plan with its sequences where linear attention's states are, in the device's memory, and these in front.

        Whatever is enqueued here happens before the step and after those before it.
        """
        states = self.decoder.states
        if states is None:
            return plan
        decoding = {_row(one): one for one in plan.decode}
        chunks = {_row(chunk.sequence): chunk for chunk in plan.prefill}
        begun = (_row(one) for one in plan.sequences if one.computed)
        assert all(map(states.holds, begun)), "This is a bug: a sequence goes on without its state."
        decode_order, prefill_order = states.arrange(list(decoding), list(chunks))
        return StepPlan([decoding[row] for row in decode_order], [chunks[row] for row in prefill_order], plan.images)

    def _release_states(self, plan: StepPlan) -> None:
        """Those of sequences that have all their tokens once the steps under way are done."""
        if self.decoder.states is None:
            return
        for sequence in plan.sequences:
            if not (sequence.is_prefilling or sequence.is_decoding):
                self.decoder.states.release(_row(sequence))

    def _find_constrained(self) -> None:
        grammars = [sequence.sampler.grammar for sequence in self._sampled]
        self._matchers = [one for one in grammars if one is not None]
        self._constrained = [place for place, one in enumerate(grammars) if one is not None]
        if self._constrained:
            self._masked = self._sampler.rows(self._constrained)

    def _constrain(self, logits: torch.Tensor) -> None:
        """Mask rows of logits by grammars, which must first know the tokens of the step before.

        While the host waits for those and makes the masks, the device computes the logits.
        """
        if self._last is not None:
            self._last.tokens()
        memory = self._sampler.mask_memory(len(self._matchers), self._matchers[0].vocabulary.words)
        masks(self._matchers, memory.numpy())
        self._sampler.constrain(logits, self._masked, memory)

    def _step(self, plan: StepPlan) -> PackedStep:
        axes = self._spec.decoder.rope.axes
        if plan.prefill:
            return _packed_step(plan, self._kv, self._features(plan), axes)
        return _decode_step(plan.decode, self._kv, axes)

    def encode(self, images: list[ImageInput]) -> Future[list[Any]]:
        """The work is only enqueued: what reads the features is enqueued behind it."""
        future: Future[list[Any]] = Future()
        try:
            future.set_result(self._encode(images))
        except Exception as error:  # noqa: BLE001  whatever it is belongs to whoever reads the future
            future.set_exception(error)
        return future

    def host_features(self, features: torch.Tensor) -> Callable[[], NDArray[np.floating]]:
        """numpy has no bfloat16: those become fp32."""
        with self._failures:
            return self._host_features(features)

    def _host_features(self, features: torch.Tensor) -> Callable[[], NDArray[np.floating]]:
        features = features.float() if features.dtype == torch.bfloat16 else features
        host = torch.empty(features.shape, dtype=features.dtype, pin_memory=self._on_cuda)
        host.copy_(features, non_blocking=True)
        done = _recorded_event() if self._on_cuda else None

        def wait() -> NDArray[np.floating]:
            if done is not None:
                allow_beside_capture()
                done.synchronize()
            array: NDArray[np.floating] = host.numpy()
            return array

        return wait

    def memory(self) -> ModelMemory:
        return self._memory

    def close(self) -> None:
        if self._on_cuda:
            with suppress(RuntimeError):  # of a device that is lost
                torch.cuda.current_stream(self._device).synchronize()  # nothing may run in memory that is given back
        self.decoder.close()
        self.tower = None
        if self._on_cuda:
            torch.cuda.empty_cache()  # other processes cannot use what torch keeps

    def _encode(self, images: list[ImageInput]) -> list[torch.Tensor]:
        """All at once, or one by one where the device cannot hold that."""
        assert self.tower is not None, "This is a bug: images were accepted for a text-only model."
        try:
            with self._failures:
                return self.tower.encode(images)
        except DeviceOutOfMemory:
            if len(images) == 1:
                raise
        with self._failures:
            return [features for image in images for features in self.tower.encode([image])]

    def _assign(self, sequence: Sequence) -> None:
        """The slot draws for this sequence from now on, going on where its output ends."""
        assert sequence.row is not None
        state = sequence.sampler
        forbidden = [token for token in self._spec.tokens.eos if token < self._spec.decoder.vocab]
        self._sampler.assign(
            sequence.row,
            state.params,
            state.seed,
            sequence.prompt.token_ids,
            sequence.output,
            forbidden if state.params.ignore_eos else (),
        )

    def _features(self, plan: StepPlan) -> dict[PrefillChunk, torch.Tensor]:
        """Features [n, hidden] of the images that each chunk touches."""
        dtype = self.decoder.dtype
        result = {}
        for chunk in plan.prefill:
            if not (touched := chunk.images):
                continue
            features = chunk.sequence.features
            for number in touched:
                if not isinstance(features[number], torch.Tensor):
                    features[number] = self._uploaded(features[number]).to(dtype)
            parts = [features[number] for number in touched]
            result[chunk] = parts[0] if len(parts) == 1 else torch.cat(parts)
        return result

    def _uploaded(self, features: NDArray[np.floating]) -> torch.Tensor:
        """Through page-locked memory, which torch keeps until the copy is done."""
        host = torch.empty(features.shape, dtype=_TORCH_FLOATS[features.dtype.itemsize], pin_memory=self._on_cuda)
        host.numpy()[...] = features
        return host.to(self._device, non_blocking=True)


class _TokenCopy:
    """Tokens on their way to the host."""

    def __init__(self, size: int, device: torch.device) -> None:
        self._on_cuda = device.type == "cuda"
        self._host = torch.zeros(size, dtype=torch.int32, pin_memory=self._on_cuda)
        self._part = self._host[:0]
        self._done = torch.cuda.Event() if self._on_cuda else None  # type: ignore[no-untyped-call]

    def start(self, tokens: torch.Tensor | None) -> None:
        if tokens is None or len(tokens) != len(self._part):
            self._part = self._host[: 0 if tokens is None else len(tokens)]
        if tokens is not None:
            self._part.copy_(tokens, non_blocking=True)
        if self._done is not None:
            self._done.record()

    def wait(self) -> list[int]:
        if self._done is not None:
            self._done.synchronize()
        tokens: list[int] = self._part.tolist()
        return tokens


class PendingStep:
    """Implements `StepResult`."""

    def __init__(
        self, sequences: list[Sequence], copy: _TokenCopy, failures: DeviceFailures, constrained: list[int]
    ) -> None:
        self.sequences = sequences
        self._copy = copy
        self._failures = failures
        self._constrained = constrained
        self._tokens: list[int] | None = None
        self.waited_s = 0.0

    def tokens(self) -> list[int]:
        """The first call also moves the grammars of the `constrained` places on."""
        if self._tokens is None:
            waiting_s = time.perf_counter()
            with self._failures:
                self._tokens = self._copy.wait()
            self.waited_s = time.perf_counter() - waiting_s
            for place in self._constrained:
                grammar, token = self.sequences[place].sampler.grammar, self._tokens[place]
                assert grammar is not None
                if token != NO_TOKEN:
                    grammar.commit(token)
                else:
                    grammar.find_problem()
        return self._tokens


def _row(sequence: Sequence) -> int:
    assert sequence.row is not None, "This is a bug: a step of a sequence that has no place."
    return sequence.row


def _recorded_event() -> torch.cuda.Event:
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record()
    return event


def _decode_step(sequences: list[Sequence], kv: PagedKVCache, axes: int) -> PackedStep:
    """One token for each, the one that was chosen last for its slot."""
    count = len(sequences)
    rows = np.array([sequence.row for sequence in sequences], np.int32)
    past = np.array([sequence.computed for sequence in sequences], np.int32)
    deltas = np.array([sequence.prompt.position_delta for sequence in sequences], np.int32)
    return PackedStep(
        ids=-1 - rows,
        positions=np.tile(past + deltas, (axes, 1)),
        counts=np.ones(count, np.int32),
        past=past,
        tables=kv.tables[rows, : (int(past.max()) + 1) // kv.block_size + 1],  # the next token's block too
        logits_rows=np.arange(count, dtype=np.int32),
        slots=rows,
    )


def _packed_step(plan: StepPlan, kv: PagedKVCache, features: dict[PrefillChunk, torch.Tensor], axes: int) -> PackedStep:
    """Decoding rows first, then the chunks, in one call."""
    sequences = plan.sequences
    rows = np.array([sequence.row for sequence in sequences], np.int32)
    past = np.array([sequence.computed for sequence in sequences], np.int32)
    counts = np.ones(len(sequences), np.int32)
    decoding = len(plan.decode)
    counts[decoding:] = [chunk.stop - chunk.start for chunk in plan.prefill]
    deltas = np.array([sequence.prompt.position_delta for sequence in plan.decode], np.int32)
    ends = np.cumsum(counts, dtype=np.int32) - 1
    wanted = np.ones(len(sequences), bool)
    wanted[decoding:] = [chunk.gives_token for chunk in plan.prefill]
    columns = -(-int((past + counts).max()) // kv.block_size)
    ids, positions = [-1 - rows[:decoding]], [np.broadcast_to(past[:decoding] + deltas, (axes, decoding))]
    for chunk in plan.prefill:
        ids.append(chunk.sequence.tokens(chunk.start, chunk.stop).astype(np.int32))
        positions.append(chunk.sequence.positions(chunk.start, chunk.stop).astype(np.int32))
    return PackedStep(
        ids=np.concatenate(ids),
        positions=np.concatenate(positions, axis=1),
        counts=counts,
        past=past,
        tables=kv.tables[rows, :columns],
        logits_rows=ends[wanted],
        slots=rows[wanted],
        features=_joined(list(features.values())),
        feature_index=_feature_index(plan, features, decoding) if features else None,
        mutual=any(chunk.is_whole_image for chunk in plan.prefill),
    )


def _joined(parts: list[torch.Tensor]) -> torch.Tensor | None:
    if len(parts) > 1:
        return torch.cat(parts)
    return parts[0] if parts else None


def _feature_index(plan: StepPlan, features: dict[PrefillChunk, torch.Tensor], decoding: int) -> Int32:
    """[T]: the row of each token in the features of all chunks, -1 for text."""
    parts, before = [np.full(decoding, -1, np.int32)], 0
    for chunk in plan.prefill:
        parts.append(chunk.feature_index(before).astype(np.int32))
        before += len(features[chunk]) if chunk in features else 0
    return np.concatenate(parts)
