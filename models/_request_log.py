"""One line for each request on the log that Dify shows: where its time went, what it counted, how it ended.

What was asked, what was answered, and an error's message, which may quote either, are never written.
"""

from __future__ import annotations

import logging
import re
import time
from types import TracebackType

from dify_plugin.config.logger_format import plugin_logger_handler

from engine.errors import Cancelled, EngineError
from engine.request import Finished

MODEL_CHARACTERS = 100

# To the protocol alone: on stderr every line would be one of the daemon's warnings.
logger = logging.getLogger("tessera.requests")
logger.addHandler(plugin_logger_handler)
logger.setLevel(logging.INFO)
logger.propagate = False

_UNUSUAL = re.compile(r"[^\w./:@+-]", re.ASCII)  # in the name of a model, which a caller may have made up


class RequestLog:
    """Around one request; the line is written when it is left. `finished` is the engine's last event, if one came."""

    def __init__(self, model: str) -> None:
        self.finished: Finished | None = None
        self._model = model
        self._began = time.monotonic()

    def __enter__(self) -> RequestLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        total_s = time.monotonic() - self._began
        if self.finished is not None:
            logger.info("%s", finished_line(self._model, self.finished, total_s))
        else:
            logger.warning("%s", failed_line(self._model, error, total_s))


def finished_line(model: str, finished: Finished, total_s: float) -> str:
    """`total_s` is the plugin's: what it adds to the parts is the way to the engine and the wait for a reader."""
    timings, usage = finished.timings, finished.usage
    return (
        f"request model={_name(model)} outcome={finished.reason}"
        f" prepare_ms={_ms(timings.prepared_s)} queue_ms={_ms(timings.queued_s)} prefill_ms={_ms(timings.prefill_s)}"
        f" decode_ms={_ms(timings.total_s - timings.first_token_s)} total_ms={_ms(total_s)}"
        f" prompt_tokens={usage.prompt_tokens} image_tokens={usage.image_tokens} reused_tokens={usage.reused_tokens}"
        f" output_tokens={usage.completion_tokens} cache={'hit' if finished.from_cache else 'miss'}"
    )


def failed_line(model: str, error: BaseException | None, total_s: float) -> str:
    """The error's class in the engine's words (engine/errors.py) where it has one."""
    return f"request model={_name(model)} outcome=error error={_error_class(error)} total_ms={_ms(total_s)}"


def _error_class(error: BaseException | None) -> str:
    if error is None or isinstance(error, GeneratorExit):  # whoever read the answer stopped before its end
        return Cancelled.__name__
    # What Dify is told was raised while the engine's error was handled; `__cause__` the SDK may have overwritten.
    engines = error.__context__
    return type(engines if isinstance(engines, EngineError) else error).__name__


def _name(model: str) -> str:
    return _UNUSUAL.sub("?", model[:MODEL_CHARACTERS])


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.1f}"
