"""Every error of the engine has a place in Dify's list, with its sentence unchanged."""

from __future__ import annotations

import pytest
from dify_plugin.errors.model import (
    InvokeBadRequestError,
    InvokeError,
    InvokeRateLimitError,
    InvokeServerUnavailableError,
)

from engine import errors
from models._errors import as_invoke_error


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (errors.InvalidRequest, InvokeBadRequestError),
        (errors.InvalidImage, InvokeBadRequestError),
        (errors.InvalidParameter, InvokeBadRequestError),
        (errors.ContextOverflow, InvokeBadRequestError),
        (errors.InvalidConfig, InvokeBadRequestError),
        (errors.QueueFull, InvokeRateLimitError),
        (errors.DeadlineExceeded, InvokeRateLimitError),
        (errors.DeviceOutOfMemory, InvokeRateLimitError),
        (errors.ModelDownloading, InvokeRateLimitError),
        (errors.UnknownModel, InvokeServerUnavailableError),
        (errors.DownloadFailed, InvokeServerUnavailableError),
        (errors.CheckpointError, InvokeServerUnavailableError),
        (errors.ArtifactError, InvokeServerUnavailableError),
        (errors.DeviceUnavailable, InvokeServerUnavailableError),
        (errors.StorageError, InvokeServerUnavailableError),
        (errors.EngineStopped, InvokeServerUnavailableError),
        (errors.DeviceLost, InvokeServerUnavailableError),
        (errors.Cancelled, InvokeServerUnavailableError),
        (errors.EngineError, InvokeServerUnavailableError),
    ],
)
def test_an_engine_error_keeps_its_sentence(error: type[errors.EngineError], expected: type[InvokeError]) -> None:
    mapped = as_invoke_error(error("this is why"))
    assert type(mapped) is expected
    assert str(mapped) == mapped.description == "this is why"


def test_an_error_without_a_sentence_is_at_least_named() -> None:
    assert str(as_invoke_error(errors.EngineStopped())) == "EngineStopped"


def test_a_mistake_of_ours_is_named_with_its_type() -> None:
    assert str(as_invoke_error(KeyError("x"))) == "KeyError: 'x'"


def test_dify_s_own_errors_pass_unchanged() -> None:
    error = InvokeRateLimitError("slower")
    assert as_invoke_error(error) is error
