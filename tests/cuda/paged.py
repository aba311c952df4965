"""Packed steps of cases that have a reference: who computes what, in blocks that lie anywhere."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from engine.graphs.cuda import CudaGraph, cuda_decoder
from engine.graphs.cuda.fused import STOCK, Fusion
from engine.runtime.cuda.decoder import PagedDecoder
from engine.runtime.cuda.session import CudaSession, GraphSession
from engine.runtime.cuda.step import PackedStep
from engine.runtime.cuda.weights import DeviceWeights, torch_type
from engine.spec import FloatType, Precision
from tests.cuda.cpu_provider import CpuProviderSession
from tests.cuda.reference import ReferenceSession
from tests.runtime.cases import Case, pieces
from tests.runtime.conftest import Tiny

CPU = torch.device("cpu")
SLOTS, BLOCK, CONTEXT, STEP_TOKENS = 4, 16, 160, 160


class Part(NamedTuple):
    """Tokens [start, stop) of a case, in the blocks of a slot."""

    slot: int
    case: Case
    start: int
    stop: int


def _open_decoding(
    device: torch.device, graph: CudaGraph, weights: dict[str, torch.Tensor], folder: Path
) -> GraphSession:
    if device.type == "cuda":
        return CudaSession(graph, weights, folder, device, captures=True, few_shapes=True)
    return ReferenceSession(graph.model, weights)


class Paged:
    """A decoder on the reference session, on ONNX Runtime's CPU provider where that has all operators, or on a device.

    Every step gives the logits of each part's last token.
    """

    def __init__(
        self,
        tiny: Tiny,
        precision: Precision,
        activations: FloatType,
        *,
        cpu_provider: bool = False,
        scales: dict[str, torch.Tensor] | None = None,
        fusion: Fusion = STOCK,
        open_decoding: Callable[[CudaGraph, dict[str, torch.Tensor], Path], GraphSession] | None = None,
        device: torch.device = CPU,
        block: int = BLOCK,
        in_parts: bool = False,
    ) -> None:
        """`scales` are those of an int8 cache; `open_decoding` opens the session of a graph for decode steps alone."""
        artifact = tiny.artifact(precision)
        paged = activations != "float32"
        make_graph = partial(
            cuda_decoder,
            *(artifact, activations, CONTEXT),
            paged=paged,
            int8_cache=scales is not None,
            fusion=fusion,
        )
        graph = make_graph()
        on_device = DeviceWeights(artifact, device)
        decoding = None
        if paged:
            decode_graph = make_graph(decode=True)
            decoding = (open_decoding or partial(_open_decoding, device))(
                decode_graph, on_device.upload(decode_graph.weights), artifact.folder
            )
        self._cpu_provider, self._folder, self._device, self._block = cpu_provider, artifact.folder, device, block
        self._waits = not paged
        self.session = self._open(graph, on_device)
        self.dtype = torch_type(activations)
        self.slot_tokens = torch.zeros(SLOTS + 1, dtype=torch.int32, device=device)
        columns = -(-CONTEXT // block)
        self.decoder = PagedDecoder(
            self.session,
            tiny.spec.decoder,
            self.slot_tokens,
            dtype=self.dtype,
            blocks=SLOTS * columns + 1,
            block_size=block,
            slots=SLOTS,
            context_length=CONTEXT,
            step_tokens=STEP_TOKENS,
            paged=paged,
            in_parts=in_parts,
            cache_scales=scales,
            decoding=decoding,
            mutual=self._open(make_graph(mutual=True), on_device) if tiny.spec.decoder.mutual_images else None,
        )
        for cache in self.decoder._caches.values():
            cache.fill_(-128 if scales else torch.nan)  # what nobody wrote is not read
        if self.decoder.states is not None:
            self.decoder.capture()  # elsewhere the first step of a size does that by the way
            for rows in self.decoder.states._rows:
                rows.fill_(torch.nan)
        order = np.random.default_rng(0).permutation(SLOTS * columns) + 1
        self._tables = order.reshape(SLOTS, columns).astype(np.int32)

    def _open(self, graph: CudaGraph, on_device: DeviceWeights) -> GraphSession:
        weights = on_device.upload(graph.weights)
        if self._device.type == "cuda":
            return CudaSession(graph, weights, self._folder, self._device, waits=self._waits)
        if self._cpu_provider:
            return CpuProviderSession(graph, weights, self._folder)
        return ReferenceSession(graph.model, weights)

    def step(self, *parts: Part) -> NDArray[np.float32]:
        """One packed call, or as many as it takes to keep whole images apart from other prefill."""
        spec = self.decoder.spec
        if not spec.mutual_images:
            return self._call(parts)
        left = [list(pieces(spec, part.case, part.start, part.stop)) for part in parts]
        logits: dict[int, NDArray[np.float32]] = {}
        while any(left):
            ready = [number for number, rest in enumerate(left) if rest]
            chosen = {number: Part(parts[number].slot, parts[number].case, *left[number][0]) for number in ready}
            kind = _is_image(chosen[ready[0]])
            together = [n for n, part in chosen.items() if _is_image(part) == kind or part.stop - part.start == 1]
            for number, row in zip(together, self._call([chosen[n] for n in together], mutual=kind), strict=True):
                del left[number][0]
                logits[number] = row
        return np.stack([logits[number] for number in range(len(parts))])

    def _call(self, parts: Sequence[Part], *, mutual: bool = False) -> NDArray[np.float32]:
        if self.decoder.states is None:
            return self._packed(parts, mutual=mutual)
        (order,) = self.decoder.states.arrange([part.slot for part in parts])
        places = [[part.slot for part in parts].index(slot) for slot in order]
        logits = self._packed([parts[place] for place in places])
        return logits[np.argsort(places)]

    def _packed(self, parts: Sequence[Part], *, mutual: bool = False) -> NDArray[np.float32]:
        slots = np.array([part.slot for part in parts], np.int32)
        counts = np.array([part.stop - part.start for part in parts], np.int32)
        past = np.array([part.start for part in parts], np.int32)
        features, index = _features(parts, self.dtype, self._device)
        step = PackedStep(
            ids=_joined([part.case.token_ids[part.start : part.stop] for part in parts]),
            positions=np.concatenate([part.case.positions[:, part.start : part.stop] for part in parts], 1).astype(
                np.int32
            ),
            counts=counts,
            past=past,
            tables=self._tables[slots, : -(-int((past + counts).max()) // self._block)],
            logits_rows=np.cumsum(counts, dtype=np.int32) - 1,
            slots=slots,
            features=features,
            feature_index=index,
            mutual=mutual,
        )
        logits, given = self.decoder.run(step)
        assert given.tolist() == slots.tolist()
        return logits.float().cpu().numpy().copy()


def _is_image(part: Part) -> bool:
    return bool(part.case.feature_index[part.start] >= 0)


def _joined(parts: Sequence[NDArray[np.int64]]) -> NDArray[np.int32]:
    return np.concatenate(parts).astype(np.int32)


def _features(
    parts: Sequence[Part], dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, NDArray[np.int32]] | tuple[None, None]:
    """All cases' features behind each other, none if no token of the parts is of an image."""
    index, before = [], 0
    for part in parts:
        rows = part.case.feature_index[part.start : part.stop]
        index.append(np.where(rows < 0, -1, rows + before))
        before += len(part.case.features)
    joined = _joined(index)
    if (joined < 0).all():
        return None, None
    return torch.from_numpy(np.concatenate([part.case.features for part in parts])).to(device, dtype), joined


def prefix_step(case: Case, count: int) -> PackedStep:
    """A case's first tokens, text only, in blocks that lie in order."""
    zero = np.zeros(1, np.int32)
    return PackedStep(
        ids=case.token_ids[:count].astype(np.int32),
        positions=case.positions[:, :count].astype(np.int32),
        counts=zero + count,
        past=zero,
        tables=np.arange(1, 1 - (-count // BLOCK), dtype=np.int32)[None],
        logits_rows=zero + count - 1,
        slots=zero,
    )
