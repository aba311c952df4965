"""`bench vision`: the tower alone, and image files to pixels at several numbers of workers."""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Sequence
from functools import partial

from cli.benches import limits, options, pixels
from cli.benches.in_process import Bench, open_all_int8, open_bench, storage_folder
from cli.benches.report import Report, Row, attempt
from cli.measured import distribution
from engine.preprocess import ImageInput
from engine.spec import SiglipSpec

WARM_UP = 2
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
    parser.add_argument("--no-tuning", action="store_true", help="tiles that were measured before, or the default ones")
    parser.add_argument("--pixels-only", action="store_true", help="only image files to pixels, which needs no weights")
    parser.add_argument("--images", type=int, default=48, help="image files per preprocessing row (default: 48)")


def measure(arguments: argparse.Namespace) -> Report:
    convert = pixels.converter(arguments.shape)
    files = pixels.image_files(
        max(arguments.images, *arguments.batch), arguments.image_size, arguments.image_format, arguments.seed
    )
    report = Report([])
    if not arguments.pixels_only:
        report = _measure_tower(arguments, [convert(file) for file in files[: max(arguments.batch)]])
    for workers in pixels.WORKERS:
        name = f"{arguments.image_format} to pixels, {workers} workers"
        report.rows.append(attempt(name, partial(pixels.measure_workers, convert, files, workers)))
    return report


def _measure_tower(arguments: argparse.Namespace, images: Sequence[ImageInput]) -> Report:
    untuned = partial(open_all_int8, tuning=False)
    with (
        storage_folder(arguments) as storage,
        open_bench(arguments, storage, "tower", {}, 64, 1, untuned if arguments.no_tuning else None) as bench,
    ):
        rates = limits.measure_rates(bench.device, bench.model.artifact.precision)
        rows = [
            attempt(f"tower, {batch} at once", partial(_tower, arguments, bench, rates, images[:batch]))
            for batch in arguments.batch
        ]
        return Report(rows, bench.card() | rates.card())


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
    assert vision is not None, "there is an image processor for it"
    if isinstance(vision, SiglipSpec):
        tiles = sum(len(image.pixels) for image in images)
        return limits.tower_cost(bench.model.artifact, tiles, (vision.tile // vision.patch) ** 2)
    return limits.tower_cost(bench.model.artifact, len(images), math.prod(images[0].grid))
