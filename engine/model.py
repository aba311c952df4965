"""One model, ready to run: everything that is loaded once and shared by all its requests."""

from __future__ import annotations

import threading
from collections.abc import Callable
from collections.abc import Sequence as Ordered
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from engine.catalog import find_checkpoint
from engine.checkpoints import Artifact, Checkpoint, open_artifact
from engine.config import EngineConfig
from engine.device import Devices, precision_for
from engine.errors import InvalidRequest
from engine.loop import StepLoop
from engine.preprocess import (
    DetailedProcessor,
    ImageInput,
    IsWanted,
    QwenVideoProcessor,
    always_wanted,
    decode_image,
    image_processor,
    image_size,
    require_wanted,
    video_processor,
)
from engine.prompts import PromptBuilder
from engine.replica import Replica
from engine.request import Image, Video
from engine.runners.open_cpu import open_cpu
from engine.sampling import Grammars
from engine.scheduling.sequence import Sequence

if TYPE_CHECKING:
    from engine.preprocess.video_file import VideoFile

OpenCuda = Callable[[str, Artifact, EngineConfig, int], Replica]
"""A model, its weights, the settings and a GPU's number to a replica: `open_cuda`, or what stands in for it."""

_NO_PIXELS = np.empty((0,), np.uint8)


@dataclass(eq=False, frozen=True, slots=True)
class Model:
    """`context_length` is what prompt and output may have together, in tokens."""

    name: str
    folder: Path
    artifact: Artifact
    prompts: PromptBuilder
    grammars: Grammars
    images: DetailedProcessor | None
    videos: QwenVideoProcessor | None
    replicas: tuple[tuple[Replica, StepLoop], ...]
    context_length: int
    _choosing: threading.Lock = field(default_factory=threading.Lock, repr=False)

    @property
    def numerics(self) -> str:
        """Names weights and arithmetic, which are the same for all replicas."""
        return self.replicas[0][0].numerics

    def add(self, sequence: Sequence) -> None:
        """Hand a sequence to the replica that has the least to do."""
        with self._choosing:  # two at once would see the same loads
            replica, loop = min(self.replicas, key=lambda pair: pair[0].load)
            loop.add(replica, sequence)

    def close(self) -> None:
        """Give up all replicas; nobody may use the model any more."""
        for replica, loop in self.replicas:
            loop.remove(replica)

    def layouts(
        self, shown: Ordered[Image | Video], max_megapixels: float, is_wanted: IsWanted = always_wanted
    ) -> list[ImageInput]:
        """What images and videos will be to the prompt: tokens, grid and key, from the headers alone; no pixels yet.

        Raises InvalidImage or InvalidVideo, for one over the limit too: whether it is refused must not depend on what
        is cached. Raises Cancelled once it is not wanted.
        """
        return [self._layout(one, max_megapixels, is_wanted) for one in shown]

    def image_inputs(
        self,
        shown: Ordered[Image | Video],
        known: Ordered[ImageInput | None],
        max_megapixels: float,
        is_wanted: IsWanted,
    ) -> tuple[ImageInput, ...]:
        """As the tower takes them; those that are `known`, because their features are, stay as they are.

        Raises InvalidImage or InvalidVideo, and Cancelled soon after nothing is wanted any more.
        """
        return tuple(
            layout or self.image_input(one, max_megapixels, is_wanted) for one, layout in zip(shown, known, strict=True)
        )

    def image_input(
        self, shown: Image | Video, max_megapixels: float, is_wanted: IsWanted = always_wanted
    ) -> ImageInput:
        """Decode an image or a video for the tower. Raises as `image_inputs` does."""
        require_wanted(is_wanted)
        if isinstance(shown, Video):
            return self._video_processor.process(_read_video(shown, max_megapixels, is_wanted), is_wanted)
        pixels = decode_image(shown.data, max_megapixels=max_megapixels)
        return self._processor.process(pixels, shown.data, shown.detail)

    def _layout(self, shown: Image | Video, max_megapixels: float, is_wanted: IsWanted) -> ImageInput:
        require_wanted(is_wanted)
        if isinstance(shown, Video):
            return self._video_processor.layout(_read_video(shown, max_megapixels, is_wanted))
        size = image_size(shown.data, max_megapixels=max_megapixels)
        tokens, grid = self._processor.count(*size, shown.detail)
        return ImageInput(_NO_PIXELS, grid, tokens, self._processor.key(shown.data, shown.detail))

    @property
    def _processor(self) -> DetailedProcessor:
        if self.images is None:
            raise InvalidRequest(f"{self.name} reads text only; choose a model with vision, or leave the image out")
        return self.images

    @property
    def _video_processor(self) -> QwenVideoProcessor:
        if self.videos is None:
            reads = "text" if self.images is None else "text and images"
            raise InvalidRequest(f"{self.name} reads {reads} only; choose a model with video, or leave the video out")
        return self.videos


def _read_video(video: Video, max_megapixels: float, is_wanted: IsWanted) -> VideoFile:
    from engine.preprocess.video_file import read_video  # FFmpeg, which an engine without videos has no need of

    return read_video(video.data, max_megapixels=max_megapixels, is_wanted=is_wanted)


def load_model(
    name: str,
    config: EngineConfig,
    devices: Devices,
    loops: Ordered[StepLoop],
    open_cuda: OpenCuda | None = None,
) -> Model:
    """Convert if need be, open one replica on each loop's device, warm up; takes seconds.

    Raises ModelUnavailable's children, StorageError, InvalidConfig or DeviceOutOfMemory.
    """
    checkpoint = Checkpoint.open(find_checkpoint(name, config.storage))
    artifact = open_artifact(checkpoint, precision_for(config, devices, checkpoint.spec), config.storage)
    spec = artifact.spec
    prompts = PromptBuilder(checkpoint.folder, spec)
    images = image_processor(checkpoint.folder, spec) if spec.vision else None
    videos = video_processor(checkpoint.folder, spec, max_tokens=config.max_video_tokens)
    # last: what fails before it leaves nothing on a device
    replicas = _open_replicas(name, artifact, config, loops, open_cuda)
    return Model(
        name=name,
        folder=checkpoint.folder,
        artifact=artifact,
        prompts=prompts,
        grammars=Grammars(prompts.tokenizer, spec.decoder.vocab, spec.tokens.eos),
        images=images,
        videos=videos,
        replicas=tuple(zip(replicas, loops, strict=True)),
        context_length=min(replica.context_length for replica in replicas),
    )


def _open_replicas(
    name: str, artifact: Artifact, config: EngineConfig, loops: Ordered[StepLoop], open_cuda: OpenCuda | None
) -> list[Replica]:
    """One by one, because a graph that is captured bears no allocation beside it, not even on another device.

    When a device fails, the others give up what they have.
    """
    opened: list[Replica] = []
    try:
        for loop in loops:
            opened.append(loop.call(partial(_open_replica, name, artifact, config, loop, open_cuda)).result())
    except Exception:
        for replica, loop in zip(opened, loops, strict=False):
            loop.remove(replica)
        raise
    return opened


def _open_replica(
    name: str, artifact: Artifact, config: EngineConfig, loop: StepLoop, open_cuda: OpenCuda | None
) -> Replica:
    if loop.device == "cpu":
        return open_cpu(name, artifact, config)
    if open_cuda is None:
        from engine.runners import open_cuda as module  # imports torch, which an engine on the CPU has no need of

        open_cuda = module.open_cuda
    return open_cuda(name, artifact, config, int(loop.device.removeprefix("cuda:")))
