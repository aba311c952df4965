"""`bench vision`: the tower alone, and image files to pixels at several numbers of workers."""

from __future__ import annotations

import argparse
import math
import os
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from cli.benches import limits, options
from cli.benches.in_process import Bench, open_bench, storage_folder
from cli.benches.report import BenchError, Report, Row, attempt
from cli.measured import distribution
from cli.traffic import Size, traffic
from engine.preprocess import ImageInput
from engine.spec import SiglipSpec

WARM_UP = 2
WORKERS = (1, 2, 4)
_MEGAPIXELS = math.inf
COLUMNS = (
    ("images", "images"),
    ("tokens/image", "tokens_per_image"),
    ("p50 ms", "call_ms.median"),
    ("p99", "call_ms.p99"),
    ("ms/image", "ms_per_image"),
    ("images/s", "images_per_s"),
    ("limit ms", "limit_ms"),
    ("share", "share"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_engine(parser)
    parser.add_argument("--batch", type=options.integers, default="1,8", help="images per call (default: 1,8)")
    parser.add_argument("--image-size", type=options.size, default="640x480", help="pixels (default: 640x480)")
    parser.add_argument("--image-format", choices=["jpeg", "png"], default="jpeg")
    parser.add_argument("--rounds", type=int, default=8, help="measurements per row (default: 8)")
    parser.add_argument("--images", type=int, default=48, help="image files per preprocessing row (default: 48)")


def measure(arguments: argparse.Namespace) -> Report:
    with (
        storage_folder(arguments) as storage,
        open_bench(arguments, storage, "whole", {}, context=64, batch=1) as bench,
    ):
        if bench.model.images is None:
            raise BenchError(f"{arguments.shape} reads text only; choose a shape with a tower")
        files = image_files(max(arguments.images, *arguments.batch), arguments.image_size, arguments.image_format)
        rates = limits.measure_rates(bench.device, bench.model.artifact.precision)
        inputs = [bench.model.image_input(file, _MEGAPIXELS) for file in files[: max(arguments.batch)]]
        rows = [
            attempt(f"tower, {batch} at once", partial(_tower, arguments, bench, rates, inputs[:batch]))
            for batch in arguments.batch
        ]
        rows += [
            attempt(f"{arguments.image_format} to pixels, {workers} workers", partial(_pixels, bench, files, workers))
            for workers in WORKERS
        ]
        return Report(rows, bench.card() | rates.card() | {"cores": len(os.sched_getaffinity(0))})


def image_files(count: int, size: Size, form: str, seed: int = 0) -> list[bytes]:
    return [request.image for request in traffic(count, size=size, seed=seed, form=form, detailed=True)]


def _tower(arguments: argparse.Namespace, bench: Bench, rates: limits.Rates, images: Sequence[ImageInput]) -> Row:
    times = [_encode(bench, images) for _ in range(WARM_UP + arguments.rounds)][WARM_UP:]
    median = statistics.median(times)
    return {
        "images": len(images),
        "tokens_per_image": images[0].tokens,
        "call_ms": distribution(times),
        "ms_per_image": round(1e3 * median / len(images), 3),
        "images_per_s": round(len(images) / median, 1),
        **_cost(bench, images).against(rates, median),
    }


def _encode(bench: Bench, images: Sequence[ImageInput]) -> float:
    """Seconds until all features are there, and those of the last image on the host."""
    replica, loop = bench.model.replicas[0]
    runner = replica.runner

    def work() -> float:
        started = time.perf_counter()
        features = runner.encode(list(images)).result()
        runner.host_features(features[-1])()
        return time.perf_counter() - started

    return loop.call(work).result()


def _cost(bench: Bench, images: Sequence[ImageInput]) -> limits.Cost:
    """Patches attend within their image, or within their tile."""
    vision = bench.model.artifact.spec.vision
    assert vision is not None, "there is an encoder"
    if isinstance(vision, SiglipSpec):
        tiles = sum(len(image.pixels) for image in images)
        return limits.tower_cost(bench.model.artifact, tiles, (vision.tile // vision.patch) ** 2)
    return limits.tower_cost(bench.model.artifact, len(images), math.prod(images[0].grid))


def _pixels(bench: Bench, files: Sequence[bytes], workers: int) -> Row:
    """Decode, resize and cut every file, as the engine's preparing threads do."""
    with ThreadPoolExecutor(workers) as pool:
        convert = partial(bench.model.image_input, max_megapixels=_MEGAPIXELS)
        list(pool.map(convert, files[:workers]))
        started = time.perf_counter()
        list(pool.map(convert, files))
        seconds = time.perf_counter() - started
    return {
        "workers": workers,
        "images": len(files),
        "ms_per_image": round(1e3 * seconds * workers / len(files), 3),
        "images_per_s": round(len(files) / seconds, 1),
    }
