"""Constrained output on a device, where a step is launched before the tokens of the last are read."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch

from engine.request import Request
from engine.sampling.device import DeviceSampler
from tests.cuda.conftest import StartOnGpu
from tests.cuda.fake_device import FakeGpu
from tests.engine.asking import Answer, ask, picture, replica, request
from tests.engine.conftest import Start
from tests.engine.schemas import random_schema


def asked(count: int, *, greedy: bool = False) -> list[tuple[Request, Any]]:
    """Every third is free text."""
    found = []
    for seed in range(count):
        schema = random_schema(seed) if seed % 3 else None
        drawn = {} if greedy or seed % 2 else {"temperature": 1.0, "seed": seed}
        text = None if schema is None else json.dumps(schema)
        limit = 500 if schema else 30
        one = request(f"form {seed}", model="tiny-qwen2-vl", json_schema=text, max_tokens=limit, **drawn)
        found.append((one, schema))
    return found


def fits(answer: Answer, schema: Any) -> None:
    assert answer.finished is not None, answer.error
    if schema is not None:
        assert answer.finished.reason == "stop", answer.text
        jsonschema.Draft202012Validator(schema).validate(json.loads(answer.text))


def test_constrained_and_free_requests_share_steps(on_gpu: StartOnGpu) -> None:
    engine = on_gpu(FakeGpu(blocks=256))
    cases = asked(12)
    for answer, (_, schema) in zip([ask(engine, one) for one, _ in cases], cases, strict=True):
        fits(answer.wait(), schema)


def test_greedy_answers_are_those_of_the_cpu(start: Start, on_gpu: StartOnGpu) -> None:
    requests = [one for one, _ in asked(9, greedy=True)] + [
        request(picture(1), "what?", model="tiny-qwen2-vl", json_object=True, max_tokens=40)
    ]
    expected = [ask(start(device="cpu", precision="fp32"), one) for one in requests]
    found = [ask(on_gpu(), one) for one in requests]
    assert [one.wait().result for one in found] == [one.wait().result for one in expected]


def test_constrained_sequences_that_are_set_back_go_on_where_they_were(on_gpu: StartOnGpu) -> None:
    engine = on_gpu(FakeGpu(blocks=24))
    scheduler: Any = replica(engine, "tiny-qwen2-vl").scheduler
    set_back, outputs = scheduler._set_back, []

    def counted(sequence: Any) -> None:
        if sequence.sampler.grammar is not None:
            outputs.append(len(sequence.output) + sequence.pending)
        set_back(sequence)

    scheduler._set_back = counted
    schema = {"type": "array", "items": {"enum": ["red", "green"]}, "minItems": 12, "maxItems": 14}
    drawn: dict[str, Any] = {"json_schema": json.dumps(schema), "max_tokens": 300, "temperature": 1.0}
    requests = [request("list", model="tiny-qwen2-vl", seed=seed, **drawn) for seed in range(8)]
    for answer in [ask(engine, one) for one in requests]:
        fits(answer.wait(), schema)
    assert any(outputs), "no constrained sequence with output was set back"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rows", [[3, 1], [0, 1], [2]])
def test_a_mask_forbids_in_its_rows_alone(dtype: torch.dtype, rows: list[int]) -> None:
    vocab, random = 101, np.random.default_rng(0)
    sampler = DeviceSampler(4, vocab, torch.device("cpu"))
    logits = torch.randn(4, vocab).to(dtype)
    masked = logits.clone()
    words = random.integers(-(2**31), 2**31, (len(rows), 4), dtype=np.int64).astype(np.int32)
    sampler.constrain(masked, rows, torch.from_numpy(words))
    allowed = np.unpackbits(words.view(np.uint8), axis=1, bitorder="little")[:, :vocab].astype(bool)
    for row, bits in zip(rows, allowed, strict=True):
        assert torch.equal(masked[row].isfinite(), torch.from_numpy(bits))
        assert torch.equal(masked[row][torch.from_numpy(bits)], logits[row][torch.from_numpy(bits)])
    others = [row for row in range(4) if row not in rows]
    assert torch.equal(masked[others], logits[others])
