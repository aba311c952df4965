"""Timing tiles of linear layers on the device, as a decode step runs them: replayed from a captured graph.

A graph holds one call after another with weights of their own, so many that the L2 cache holds none of them when its
turn comes again: in a step 1.5 GB of other weights come between. A call is all that the layer launches: where rows are
quantised, that too.

Compiling takes 0.3 to 0.8 s of a core, of which Python's part, under the interpreter's lock, is 0.1 s: so threads
compile, eight candidates a second at most, and nothing is measured meanwhile, since capturing needs the same lock.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial

import torch
from triton.errors import TritonError

from engine.kernels.linear import Int8Linear, LinearParameters
from engine.kernels.norm import normalise_rows, quantise_rows
from engine.kernels.search import Sample
from engine.kernels.tiles import Product, Tile, Tiles, rows_bucket
from engine.kernels.workspace import Workspace, aligned

ROTATED = 128 << 20  # bytes of weights; the largest L2 caches hold 50 MB (H100), 126 MB (B200)
MOST_CALLS = 128  # in a graph
LEAST_CALLS = 3
TOLERANCE = 0.02  # of the largest result; in the same arithmetic tiles differ in the order of sums alone

Measure = Callable[[Sequence[Callable[[], None]]], Sample]
"""How to time one of these calls, which follow one another."""


@dataclass(frozen=True, slots=True)
class Layer:
    """A linear layer: its weight [n, k], whether it has a bias and adds a residual."""

    n: int
    k: int
    parameters: LinearParameters
    bias: bool
    residual: bool

    @property
    def width(self) -> int:
        return self.n // 2 if self.parameters.gate else self.n


@dataclass(frozen=True, slots=True)
class Setting:
    """What a product is measured for: a layer, and rows, of which its bucket has no more."""

    layer: Layer
    rows: int


class LinearBench:
    """Implements `Bench` (engine/kernels/search.py) for products of linear layers, on the device's current stream.

    Takes ROTATED bytes of device memory, or the largest weight, and the activations of the largest setting; raises
    torch.OutOfMemoryError. `enter_thread` is called on each thread that compiles. Use it as a context manager.
    """

    def __init__(
        self,
        settings: Mapping[Product, Setting],
        device: torch.device,
        dtype: torch.dtype,
        *,
        threads: int,
        rotated: int = ROTATED,
        enter_thread: Callable[[], None] = lambda: None,
        measure: Measure | None = None,
    ) -> None:
        self._settings, self._device = settings, device
        self._measure = measure or replayed
        self._numbers = _Numbers(settings.values(), rotated, device, dtype)
        self._compiled: dict[tuple[object, ...], bool] = {}  # and whether it ran
        self._first: dict[Product, Tile] = {}  # that ran, which others must agree with
        stream = torch.cuda.current_stream(device) if device.type == "cuda" else None

        def enter() -> None:
            enter_thread()
            if stream is not None:
                torch.cuda.set_device(device)
                torch.cuda.set_stream(stream)

        self._threads = ThreadPoolExecutor(threads, "tuning", initializer=enter)
        for layer in {setting.layer for setting in settings.values()}:
            self._numbers.make_ready(layer)

    def __enter__(self) -> LinearBench:
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown(cancel_futures=True)

    def compile(self, jobs: Sequence[tuple[Product, Tile]]) -> None:
        """By a first launch of each, all on one stream, so that they need no memory of their own for long."""
        new = {_kernel_key(*job): job for job in jobs if _kernel_key(*job) not in self._compiled}
        self._compiled |= dict(zip(new, self._threads.map(self._runs, new.values()), strict=True))
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def open(self, product: Product, tile: Tile) -> Sample | None:
        if not self._compiled.get(_kernel_key(product, tile), True):
            return None
        setting = self._settings[product]
        try:
            call = self._call(product, tile, setting.rows)
            if not self._agrees(product, tile, call):
                return None
            copies = min(self._numbers.copies(setting.layer), MOST_CALLS)
            calls = [partial(call, index % copies) for index in range(max(copies, LEAST_CALLS))]
            return self._measure(calls)
        except _REFUSED as error:
            _raise_if_fatal(error)
            return None

    def _runs(self, job: tuple[Product, Tile]) -> bool:
        """Rows are a constant of the gemv alone, so that others compile for one row what they need for many."""
        product, tile = job
        try:
            self._call(product, tile, self._settings[product].rows if product.kernel == "gemv" else 1)(0)
        except _REFUSED as error:
            _raise_if_fatal(error)
            return False
        return True

    def _call(self, product: Product, tile: Tile, rows: int) -> Callable[[int], None]:
        """With the weight's copy of that number."""
        layer, kernel = self._settings[product].layer, product.kernel
        parameters = replace(layer.parameters, path="auto" if kernel == "gemv" else kernel)
        tiles = Tiles({replace(product, rows=rows_bucket(rows)): tile}, gemv_rows=rows if kernel == "gemv" else 0)
        nbytes = Int8Linear.workspace_bytes(parameters, tiles, rows, layer.n, layer.k)
        linear, numbers = Int8Linear(parameters, Workspace(nbytes, self._device), tiles), self._numbers
        return lambda copy: linear(*numbers.call(layer, rows, copy))  # type: ignore[arg-type]

    def _agrees(self, product: Product, tile: Tile, call: Callable[[int], None]) -> bool:
        """With the first tile that ran. Costs two calls, and no wrong kernel is ever the fastest."""
        setting = self._settings[product]
        y = self._numbers.y(setting.layer, setting.rows)
        first = self._first.setdefault(product, tile)
        expected = None
        if first != tile:
            self._call(product, first, setting.rows)(0)
            expected = y.float()
        y.fill_(torch.nan)
        call(0)
        result = y.float()
        if expected is None:
            return bool(result.isfinite().all())
        return bool((result - expected).abs().max() <= TOLERANCE * expected.abs().max())


class _Numbers:
    """Memory for every setting, filled once so that results are about 1; every tensor is a view of one of a few."""

    def __init__(self, settings: Collection[Setting], rotated: int, device: torch.device, dtype: torch.dtype) -> None:
        layers = [setting.layer for setting in settings]
        n, k = max(layer.n for layer in layers), max(layer.k for layer in layers)
        values = max(setting.rows * setting.layer.k for setting in settings)
        results = max(setting.rows * setting.layer.width for setting in settings)
        random = torch.Generator(device).manual_seed(0)
        nbytes = max(rotated, *(layer.n * layer.k for layer in layers))
        self._weights = torch.randint(-127, 128, (nbytes,), dtype=torch.int8, device=device, generator=random)
        self._scale = torch.full((n,), 1 / (73 * k**0.5), device=device)
        sizes = values, results, n, k
        self._x, self._residual, self._bias, self._norm_weight = (
            torch.randn(size, dtype=dtype, device=device, generator=random) for size in sizes
        )
        self._y = torch.empty(results, dtype=dtype, device=device)

    def copies(self, layer: Layer) -> int:
        return max(1, self._weights.numel() // aligned(layer.n * layer.k))

    def call(self, layer: Layer, rows: int, copy: int) -> tuple[torch.Tensor | None, ...]:
        """What Int8Linear is called with."""
        start, size = copy * aligned(layer.n * layer.k), layer.n * layer.k
        normed = layer.parameters.norm != "none"
        return (
            self._x[: rows * layer.k].view(rows, layer.k),
            self._weights[start : start + size].view(layer.n, layer.k),
            self._scale[: layer.n],
            self._bias[: layer.n] if layer.bias else None,
            self._norm_weight[: layer.k] if normed else None,
            None,
            self._result(self._residual, layer, rows) if layer.residual else None,
            self.y(layer, rows),
        )

    def make_ready(self, layer: Layer) -> None:
        """Launch what comes before products. Layers share these kernels, and while one thread launches a kernel for the
        first time, another could find it half loaded.
        """
        x, *_, norm_weight, _, _, _ = self.call(layer, 1, 0)
        assert x is not None
        norm, epsilon = layer.parameters.norm, layer.parameters.epsilon
        rows, scales = torch.empty_like(x, dtype=torch.int8), torch.empty(1, device=x.device)
        quantise_rows(x, rows, scales, norm=norm, norm_weight=norm_weight, epsilon=epsilon)
        if norm != "none":
            normalise_rows(x, torch.empty_like(x), norm=norm, norm_weight=norm_weight, epsilon=epsilon)

    def y(self, layer: Layer, rows: int) -> torch.Tensor:
        return self._result(self._y, layer, rows)

    def _result(self, memory: torch.Tensor, layer: Layer, rows: int) -> torch.Tensor:
        return memory[: rows * layer.width].view(rows, layer.width)


_REFUSED = (TritonError, RuntimeError, ValueError)  # too much shared memory, too many registers, a compiler's own bug


def _raise_if_fatal(error: Exception) -> None:
    """Nothing more can be measured."""
    if isinstance(error, torch.OutOfMemoryError | torch.AcceleratorError):
        raise error


def _kernel_key(product: Product, tile: Tile) -> tuple[object, ...]:
    """What is compiled once: other numbers of rows are the same kernel but for the gemv."""
    rows = product.rows if product.kernel == "gemv" else 0
    return product.kernel, rows, product.n, product.k, product.gate, tile


def replayed(calls: Sequence[Callable[[], None]]) -> Sample:
    """Captured in a CUDA graph on the current stream, which must not be the default one."""
    graph = torch.cuda.CUDAGraph()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    graph.capture_begin(capture_error_mode="thread_local")  # other threads may do as they like meanwhile
    try:
        for call in calls:
            call()
    finally:
        graph.capture_end()
    graph.replay()

    def seconds() -> float:
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1000 / len(calls)

    return lambda repeats: statistics.median(seconds() for _ in range(repeats))
