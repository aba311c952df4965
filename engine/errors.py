"""Everything the engine refuses or fails with.

    EngineError
    ├── InvalidRequest            the caller must change the request
    │   ├── InvalidImage
    │   ├── InvalidParameter
    │   └── ContextOverflow
    ├── InvalidConfig             the operator must change a setting
    ├── Overloaded                try again later
    │   ├── QueueFull
    │   ├── DeadlineExceeded
    │   ├── ModelDownloading      the message tells how far it is
    │   └── DeviceOutOfMemory
    ├── ModelUnavailable          this model cannot run here
    │   ├── UnknownModel
    │   ├── DownloadFailed        the hub refused or broke off; the message says what to change
    │   ├── CheckpointError
    │   └── ArtifactError
    ├── DeviceUnavailable         CUDA was asked for and cannot be used; the message names what is missing
    │   └── KernelsUnavailable    the fused kernels cannot be used here; ONNX Runtime's own operators can
    ├── StorageError              disk full, read-only or missing storage folder
    ├── Cancelled                 the caller closed its stream
    └── EngineStopped             the engine's process ended or is shutting down
        └── DeviceLost            a GPU failed so that only a new process can use it again

A message says what is wrong and what to change. `code` (the class name) crosses process borders; `error_from_code`
turns it back into the class.
"""

from __future__ import annotations

MAX_CHARACTERS = 4000


class EngineError(Exception):
    """Base of all errors the engine reports to a caller.

    A message may quote what the caller sent, of any length, and Dify ends a plugin for one line over 5 MiB: the middle
    of a very long message is left out.
    """

    def __str__(self) -> str:
        text = super().__str__()
        return text if len(text) <= MAX_CHARACTERS else f"{text[: MAX_CHARACTERS // 2]} ... {text[-1000:]}"

    @property
    def code(self) -> str:
        return type(self).__name__


class InvalidRequest(EngineError):
    """The request cannot be served as it is."""


class InvalidImage(InvalidRequest):
    """An image is not decodable, is truncated, or is over a limit."""


class InvalidParameter(InvalidRequest):
    """A sampling parameter has a wrong type or is out of range."""


class InvalidVideo(InvalidRequest):
    """A video file cannot be read, or is larger or longer than allowed."""


class ContextOverflow(InvalidRequest):
    """Prompt and requested output do not fit the model's context."""


class InvalidConfig(EngineError):
    """A setting of the engine has a wrong type or is out of range."""


class Overloaded(EngineError):
    """The engine cannot take the request now."""


class QueueFull(Overloaded):
    """As many requests as allowed are waiting already."""


class DeadlineExceeded(Overloaded):
    """The request did not finish within its time limit."""


class ModelDownloading(Overloaded):
    """The model is on its way to the disk; the request can be sent again later."""


class DeviceOutOfMemory(Overloaded):
    """A GPU has not enough memory left for this."""


class ModelUnavailable(EngineError):
    """The model cannot be run."""


class UnknownModel(ModelUnavailable):
    """No model of that name is known or present."""


class DownloadFailed(ModelUnavailable):
    """A model could not be fetched from the hub."""


class CheckpointError(ModelUnavailable):
    """A checkpoint folder lacks a file, or a file in it is malformed."""


class ArtifactError(ModelUnavailable):
    """A converted artifact is missing, incomplete or fails verification."""


class DeviceUnavailable(EngineError):
    """The GPU that was asked for cannot be used on this machine."""


class KernelsUnavailable(DeviceUnavailable):
    """The fused kernels cannot be used on this machine; the stock operators can."""


class StorageError(EngineError):
    """The storage folder cannot be written or has no space left."""


class Cancelled(EngineError):
    """The caller closed the stream before it ended."""


class EngineStopped(EngineError):
    """The engine ended while the request was open."""


class DeviceLost(EngineStopped):
    """A GPU failed so that this process cannot use it any more; the process ends, and the next request starts anew."""


def _tree(root: type[EngineError]) -> dict[str, type[EngineError]]:
    found = {root.__name__: root}
    for child in root.__subclasses__():
        found |= _tree(child)
    return found


_BY_CODE = _tree(EngineError)


def error_from_code(code: str, message: str) -> EngineError:
    """Rebuild an error that crossed a process border; an unknown code becomes a plain EngineError."""
    return _BY_CODE.get(code, EngineError)(message)
