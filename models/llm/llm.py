"""Dify's LLM calls to the engine's. Stateless: Dify makes a new instance for every request."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import closing
from typing import Any

from dify_plugin import LargeLanguageModel
from dify_plugin.entities.model import AIModelEntity
from dify_plugin.entities.model.llm import LLMResult, LLMResultChunk, LLMResultChunkDelta
from dify_plugin.entities.model.message import AssistantPromptMessage, PromptMessage, PromptMessageTool
from dify_plugin.errors.model import CredentialsValidateFailedError, InvokeBadRequestError, InvokeError

from engine.check import check
from engine.client import shared_client
from engine.errors import EngineError, EngineStopped
from engine.request import Chunk, Event, Finished
from models._errors import ERROR_MAPPING, as_invoke_error
from models._request_log import RequestLog
from models._settings import engine_config
from models.llm.own import own_model_schema, require_own_model
from models.llm.prompt import engine_messages, engine_request
from models.llm.tools import dify_calls, engine_tools

# `system_fingerprint` of the last chunk: where the answer came from.
FROM_ENGINE = "tessera/engine"
FROM_CACHE = "tessera/answer-cache"


class TesseraLargeLanguageModel(LargeLanguageModel):
    _log: RequestLog

    def invoke(self, model: str, *arguments: Any, **named: Any) -> Generator[LLMResultChunk, None, None]:
        """The SDK's, which calls `_invoke`; here because whatever keeps a request from an answer is to be logged."""
        with RequestLog(model) as self._log:
            yield from super().invoke(model, *arguments, **named)

    def _invoke(
        self,
        model: str,
        credentials: dict[str, Any],
        prompt_messages: list[PromptMessage],
        model_parameters: dict[str, Any],
        tools: list[PromptMessageTool] | None = None,
        stop: list[str] | None = None,
        stream: bool = True,
        user: str | None = None,  # noqa: ARG002 - the SDK's signature
    ) -> LLMResult | Generator[LLMResultChunk, None, None]:
        request = engine_request(model, prompt_messages, model_parameters, stop, tools)
        events = shared_client(engine_config(credentials)).stream(request)
        chunks = self._chunks(model, credentials, events)
        return chunks if stream else _joined(model, chunks)

    def _chunks(
        self, model: str, credentials: dict[str, Any], events: Generator[Event, None, None]
    ) -> Generator[LLMResultChunk, None, None]:
        """Closing this generator closes the engine's stream, which cancels the request."""
        index, has_called = 0, False
        with closing(events):
            try:
                for event in events:
                    if isinstance(event, Finished):
                        self._log.finished = event
                        yield self._last_chunk(model, credentials, index, event, has_called=has_called)
                        return
                    if event.text or event.tool_calls:
                        yield _chunk(model, index, event)
                        index += 1
                        has_called |= bool(event.tool_calls)
            except EngineError as error:
                raise as_invoke_error(error) from error
        raise as_invoke_error(EngineStopped("the engine ended the answer without finishing it; try again"))

    def _last_chunk(
        self, model: str, credentials: dict[str, Any], index: int, event: Finished, *, has_called: bool
    ) -> LLMResultChunk:
        reason = "tool_calls" if has_called and event.reason == "stop" else event.reason
        usage = self._calc_response_usage(model, credentials, event.usage.prompt_tokens, event.usage.completion_tokens)
        delta = LLMResultChunkDelta(
            index=index, message=AssistantPromptMessage(content=""), usage=usage, finish_reason=reason
        )
        fingerprint = FROM_CACHE if event.from_cache else FROM_ENGINE
        return LLMResultChunk(model=model, system_fingerprint=fingerprint, delta=delta)

    def get_num_tokens(
        self,
        model: str,
        credentials: dict[str, Any],
        prompt_messages: list[PromptMessage],
        tools: list[PromptMessageTool] | None = None,
    ) -> int:
        """Tokens of the prompt as the model sees it, images and tools included."""
        try:
            messages = engine_messages(prompt_messages)
            client = shared_client(engine_config(credentials))
            return client.count_tokens(model, messages, engine_tools(tools)) if messages else 0
        except EngineError as error:
            raise as_invoke_error(error) from error

    def validate_credentials(self, model: str, credentials: Mapping[str, Any]) -> None:
        """Within seconds, whatever has to be downloaded later. Raises CredentialsValidateFailedError."""
        try:
            config = engine_config(credentials)
            check(config)
            if model not in {predefined.model for predefined in self.predefined_models()}:
                require_own_model(model, config)
        except EngineError as error:
            raise CredentialsValidateFailedError(str(error)) from error

    def get_model_schema(self, model: str, credentials: Mapping[str, Any] | None = None) -> AIModelEntity | None:
        """The SDK's, which looks at no model of one's own whose form is empty, as all of it may be."""
        return super().get_model_schema(model, credentials) or (
            None if credentials else self.get_customizable_model_schema(model, {})
        )

    def get_customizable_model_schema(self, model: str, credentials: Mapping[str, Any]) -> AIModelEntity | None:
        """None for a model that is neither here nor on its way; the engine says so when it is asked for it."""
        try:
            return own_model_schema(model, engine_config(credentials), self.predefined_models())
        except EngineError:
            return None

    def _validate_and_filter_model_parameters(
        self, model: str, model_parameters: dict[str, Any], credentials: dict[str, Any]
    ) -> dict[str, Any]:
        """The SDK's check: declared names only, with their ranges.

        Its ValueError would reach the user as a crash of the plugin. A model that people brought declares nothing;
        SamplingParams checks its parameters.
        """
        if self.get_model_schema(model, credentials) is None:
            return model_parameters
        try:
            checked: dict[str, Any] = super()._validate_and_filter_model_parameters(
                model, model_parameters, credentials
            )
        except ValueError as error:
            raise InvokeBadRequestError(str(error)) from error
        return checked

    @property
    def _invoke_error_mapping(self) -> dict[type[InvokeError], list[type[Exception]]]:
        return ERROR_MAPPING

    def _transform_invoke_error(self, error: Exception) -> InvokeError:
        return as_invoke_error(error)


def _chunk(model: str, index: int, chunk: Chunk) -> LLMResultChunk:
    message = AssistantPromptMessage(content=chunk.text, tool_calls=dify_calls(chunk.tool_calls))
    delta = LLMResultChunkDelta(index=index, message=message)
    return LLMResultChunk(model=model, delta=delta)


def _joined(model: str, chunks: Generator[LLMResultChunk, None, None]) -> LLMResult:
    """All chunks as one result."""
    *parts, last = chunks
    answer = "".join(str(chunk.delta.message.content) for chunk in parts)
    calls = [call for chunk in parts for call in chunk.delta.message.tool_calls]
    assert last.delta.usage is not None
    return LLMResult(
        model=model,
        message=AssistantPromptMessage(content=answer, tool_calls=calls),
        usage=last.delta.usage,
        system_fingerprint=last.system_fingerprint,
    )
