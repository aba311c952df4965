"""The engine's errors in Dify's words, in one place for all model types."""

from __future__ import annotations

from dify_plugin.errors.model import (
    InvokeBadRequestError,
    InvokeError,
    InvokeRateLimitError,
    InvokeServerUnavailableError,
)

from engine.errors import EngineError, InvalidConfig, InvalidRequest, Overloaded

# The first match counts. InvokeAuthorizationError would suit a wrong setting, but Dify replaces its message by one
# about credentials, and the message is what tells the user which setting to change.
ERROR_MAPPING: dict[type[InvokeError], list[type[Exception]]] = {
    InvokeBadRequestError: [InvalidRequest, InvalidConfig],
    InvokeRateLimitError: [Overloaded],
    InvokeServerUnavailableError: [EngineError],
}


def as_invoke_error(error: Exception) -> InvokeError:
    """The error that Dify shows, with the engine's sentence unchanged."""
    if isinstance(error, InvokeError):
        return error
    for invoke_error, causes in ERROR_MAPPING.items():
        if isinstance(error, tuple(causes)):
            return invoke_error(str(error) or type(error).__name__)
    return InvokeError(f"{type(error).__name__}: {error}")
