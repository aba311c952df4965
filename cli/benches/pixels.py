"""Image files to the pixels that a tower takes: how many a second, by how many workers."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from cli.benches.report import BenchError, Row
from cli.benches.shapes import BUNDLED, FOLDER, shape_config
from cli.measured import distribution
from cli.traffic import Size, traffic
from engine.catalog import BUNDLED as FOLDERS
from engine.checkpoints.checkpoint import read_config
from engine.families import family_for
from engine.preprocess import ImageInput, ImageProcessor, decode_image, image_processor

WORKERS = (1, 2, 4)
Convert = Callable[[bytes], ImageInput]


def image_files(count: int, size: Size, form: str, seed: int = 0) -> list[bytes]:
    return [request.image for request in traffic(count, size=size, seed=seed, form=form, detailed=True)]


def converter(shape: str) -> Convert:
    """Decode, resize and lay out a file, as the engine's preparing threads do. Needs no weights.

    Raises BenchError for a shape that reads text only.
    """
    processor = _processor(shape)
    return lambda data: processor.process(decode_image(data, max_megapixels=math.inf), data)


def _processor(shape: str) -> ImageProcessor:
    if shape != BUNDLED:
        shape_config(shape, "whole")  # refuses an unknown one
    folder = FOLDERS[BUNDLED] if shape == BUNDLED else FOLDER / shape
    config = read_config(folder)
    spec = family_for(config.model).spec(config)
    if spec.vision is None:
        raise BenchError(f"{shape} reads text only; choose a shape with a tower")
    return image_processor(folder, spec)


def measure_workers(convert: Convert, files: Sequence[bytes], workers: int) -> Row:
    """`call_ms` is what one image takes while the other workers do theirs."""
    times: list[float] = []

    def timed(data: bytes) -> None:
        started = time.perf_counter()
        convert(data)
        times.append(time.perf_counter() - started)

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(convert, files[:workers]))
        started = time.perf_counter()
        list(pool.map(timed, files))
        seconds = time.perf_counter() - started
    return {
        "workers": workers,
        "images": len(files),
        "tokens_per_image": convert(files[0]).tokens,
        "call_ms": distribution(times),
        "ms_per_image": round(1e3 * seconds / len(files), 3),
        "images_per_s": round(len(files) / seconds, 1),
    }
