"""Calls of tools and reasoning through the engine, from a model that is made to say them."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from engine.catalog import ROOT
from engine.engine import Engine
from engine.errors import InvalidRequest
from engine.request import Chunk, Message, Request, SamplingParams, Text, Tool, ToolCall
from tests.engine.asking import ask, replica, request
from tests.engine.conftest import Start
from tests.prompts.tool_templates import ALWAYS_THINKS, JSON_TOOLS, XML_TOOLS
from tests.runtime.models import randomise

CLOCK = Tool("clock", "what time it is", '{"type": "object", "properties": {"zone": {"type": "string"}}}')
MODEL = "tools"
CALL = '<tool_call>\n{"name": "clock", "arguments": {"zone": "UTC"}}\n</tool_call>'
XML = "<tool_call>\n<function=clock>\n<parameter=zone>\nUTC\n</parameter>\n</function>\n</tool_call>"


@pytest.fixture
def model(storage: Path) -> Iterator[Path]:
    """A text-only model with room for a template; its tokenizer is the demo's."""
    folder = storage / "models" / MODEL
    shape: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    config = LlamaConfig(vocab_size=262, eos_token_id=258, bos_token_id=257, max_position_embeddings=2048, **shape)
    randomise(LlamaForCausalLM(config)).save_pretrained(folder)  # type: ignore[no-untyped-call]
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ROOT / "demo" / name, folder)
    yield folder
    shutil.rmtree(folder)


def says(engine: Engine, text: str) -> None:
    """From now on the model says this, whatever it is asked, unless a grammar forbids it."""
    runner: Any = replica(engine, MODEL).runner
    script = [*text.encode(), 258]
    said: Counter[Any] = Counter()  # by sequence: the newest tokens are not in its output yet
    original = runner._sample

    def scripted(logits: list[Any], sequences: list[Any]) -> list[int]:
        stacked = np.concatenate(logits)
        for row, sequence in enumerate(sequences):
            stacked[row, script[min(said[sequence], len(script) - 1)]] = 1e6
            said[sequence] += 1
        tokens: list[int] = original([stacked], sequences)
        return tokens

    runner._sample = scripted


def asked(engine: Engine, **fields: Any) -> tuple[str, list[ToolCall]]:
    tools, thinking = fields.pop("tools", ()), fields.pop("enable_thinking", None)
    question = (Message("user", (Text("what time is it?"),)),)
    sampling = SamplingParams(max_tokens=300, **fields)
    events = list(engine.submit(Request(MODEL, question, sampling, tools=tools, enable_thinking=thinking)))
    chunks = [event for event in events if isinstance(event, Chunk)]
    return "".join(chunk.text for chunk in chunks), [call for chunk in chunks for call in chunk.tool_calls]


@pytest.mark.parametrize(("template", "output"), [(JSON_TOOLS, CALL), (XML_TOOLS, f"hm</think>\n\n{XML}")])
def test_calls_come_apart_from_the_text(start: Start, model: Path, template: str, output: str) -> None:
    (model / "chat_template.jinja").write_text(template)
    engine = start(cache_enabled=True)
    says(engine, f"{output}\n{output.removeprefix('hm</think>')}")
    text = "" if template == JSON_TOOLS else "<think>\nhm</think>"
    for _ in range(2):  # the second time from the cache
        found, calls = asked(engine, tools=(CLOCK,))
        assert found == text
        assert [(call.name, json.loads(call.arguments)) for call in calls] == [("clock", {"zone": "UTC"})] * 2
    found, calls = asked(engine)  # nobody offered tools: it is text
    assert "<tool_call>" in found
    assert not calls


def test_reasoning_is_shown_between_its_tags(start: Start, model: Path) -> None:
    (model / "chat_template.jinja").write_text(XML_TOOLS)
    engine = start()
    says(engine, "so it is\n</think>\n\nnoon")
    assert asked(engine)[0] == "<think>\nso it is\n</think>\n\nnoon"
    assert not asked(engine, enable_thinking=False)[0].startswith("<think>")


def test_a_constrained_answer_comes_without_reasoning(start: Start, model: Path) -> None:
    (model / "chat_template.jinja").write_text(ALWAYS_THINKS)
    engine = start()
    says(engine, "so it is\n</think>\n\nnoon")
    schema = {"type": "object", "properties": {"at": {"enum": ["noon"]}}, "required": ["at"]}
    text, _ = asked(engine, json_schema=json.dumps(schema), enable_thinking=True)
    assert json.loads(text) == {"at": "noon"}


def test_a_model_without_tools_refuses_them(start: Start) -> None:
    one = request("hi")
    answer = ask(start(), Request(one.model, one.messages, tools=(CLOCK,))).wait()
    assert isinstance(answer.error, InvalidRequest)
    assert "calls no tools" in str(answer.error)


def test_tools_count_as_tokens(start: Start, model: Path) -> None:
    (model / "chat_template.jinja").write_text(JSON_TOOLS)
    engine = start()
    messages = (Message("user", (Text("hi"),)),)
    assert engine.count_tokens(MODEL, messages, (CLOCK,)) > engine.count_tokens(MODEL, messages) + 20
