"""What the step loop asks of a device."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Ordered
from concurrent.futures import Future
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from engine.preprocess import ImageInput
from engine.scheduling.scheduler import StepPlan
from engine.scheduling.sequence import Sequence
from engine.stats import ModelMemory


class StepResult(Protocol):
    """A step that was launched."""

    @property
    def sequences(self) -> Ordered[Sequence]:
        """Those that get a token."""
        ...

    def tokens(self) -> list[int]:
        """One for each of `sequences`, NO_TOKEN for one whose logits are not numbers. Waits for the device."""
        ...

    @property
    def waited_s(self) -> float:
        """How long `tokens` did, whoever asked first: a later step's launch may need to know them."""
        ...


class Runner(Protocol):
    """Used by the step loop's thread only.

    `launch` advances `computed` of every sequence it is given. Features, [tokens, hidden] of an image, may stay on the
    device: only the runner looks into them, and `host_features` gives what can be kept on disk.
    """

    @property
    def lag(self) -> int:
        """Steps that may be under way beyond the one whose tokens are being read."""
        ...

    def launch(self, plan: StepPlan) -> StepResult: ...

    def encode(self, images: list[ImageInput]) -> Future[list[Any]]:
        """Start the vision tower on a batch: features of each image."""
        ...

    def host_features(self, features: Any) -> Callable[[], NDArray[np.floating]]:
        """Begin to copy features to the host's memory; the result waits for the copy, on any thread."""
        ...

    def memory(self) -> ModelMemory: ...

    def close(self) -> None:
        """Give the device's memory back."""
        ...
