"""What no other test runs on a real device: Gemma 3, videos of the Qwen families, and output held to a schema.

    pytest -m gpu -s tests/cuda/test_families_gpu.py

Every test prints how far apart the two are, whether it passes or not.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine.checkpoints import Checkpoint
from engine.request import Image, Request, Video
from engine.runtime.cuda.encoder import open_encoder
from engine.spec import FloatType, Precision
from tests.cuda.device_steps import errors_of_steps
from tests.cuda.one_operator import DEVICE, node, random, run, starts_of
from tests.cuda.operators import MICROSOFT, OPERATORS
from tests.cuda.told import shared_text, told
from tests.engine.asking import about, picture, request
from tests.engine.conftest import tiny_gemma3
from tests.engine.schemas import random_schema
from tests.engine.test_vision_families import MODELS
from tests.preprocess.films import film
from tests.prompts import checkpoints
from tests.runtime import models
from tests.runtime.cases import pictures, relative_error
from tests.runtime.conftest import Tiny

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
PRECISIONS: list[tuple[Precision, FloatType, float]] = [
    ("fp32", "float32", 1e-3),
    ("bf16", "bfloat16", 3e-2),
    ("int8", "bfloat16", 6e-2),
]
WITH_VIDEO = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [128, 256])
@pytest.mark.parametrize(("causal", "window"), [(1, -1), (1, 24), (0, -1), (0, 24)])
def test_attention_sees_its_window_in_one_direction_or_both(
    dtype: torch.dtype, head_dim: int, causal: int, window: int
) -> None:
    """Sequences that begin, that go on and that decode; every block lies somewhere else."""
    counts, past, heads, kv_heads, block = [40, 1, 16, 65], [30, 70, 0, 100], 8, 4, 64 if head_dim > 128 else 256
    columns = 3 if block == 64 else 1
    cache = (len(counts) * columns + 1, block, kv_heads, head_dim)
    order = torch.randperm(cache[0] - 1, generator=torch.Generator().manual_seed(1)) + 1
    angles = torch.arange(256)[:, None] * 0.9 ** torch.arange(head_dim // 2)
    keys, values = (random(seed, *cache, dtype=dtype) for seed in (2, 3))
    inputs = {
        "query": random(1, sum(counts), (heads + 2 * kv_heads) * head_dim, dtype=dtype),
        "key": None,
        "value": None,
        "keys": keys,
        "values": values,
        "starts": starts_of(counts),
        "past": torch.tensor(past, dtype=torch.int32),
        "blocks": order.reshape(len(counts), columns).int(),
        "cosine": torch.cos(angles).to(dtype),
        "sine": torch.sin(angles).to(dtype),
        "slots": None,
        "sink": None,
        "query_norm": 1 + 0.2 * random(4, head_dim, dtype=dtype),
        "key_norm": 1 + 0.2 * random(5, head_dim, dtype=dtype),
    }
    attributes: dict[str, Any] = {"num_heads": heads, "kv_num_heads": kv_heads, "do_rotary": 1, "scale": 0.11}
    attributes |= {"is_causal": causal} | ({"local_window_size": window} if window > 0 else {})
    output = torch.zeros(sum(counts), heads * head_dim, dtype=dtype)
    blank = {"y0": output, "y1": torch.zeros_like(keys), "y2": torch.zeros_like(values)}
    source = node("PagedAttention", inputs, blank, **attributes)
    (found,) = run(source, inputs, blank, {"y1": "keys", "y2": "values"})
    copies = {name: None if value is None else value.clone() for name, value in inputs.items()}
    wanted = OPERATORS[MICROSOFT, "PagedAttention"](*copies.values(), **attributes)
    errors = [
        float((found[f"y{place}"].float() - tensor.float()).abs().max()) / float(tensor.float().abs().max())
        for place, tensor in enumerate(wanted)
    ]
    kind = f"{dtype}, heads of {head_dim}, causal {causal}, window {window}"
    print(f"\n{kind}: largest errors {', '.join(f'{error:.1e}' for error in errors)}")
    limit = 1e-2 if dtype == torch.float16 else 6e-2
    assert all(error < limit for error in errors)  # what is not a number is below nothing


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """Small, with heads of the size that checkpoints have, and windows that an image is larger than."""
    reference = models.randomise(models.gemma3(head_dim=256, query_pre_attn_scalar=256))
    folder = models.save(reference, tmp_path_factory.mktemp("heads-of-256"))
    return Tiny(reference, Checkpoint.open(folder), tmp_path_factory.mktemp("storage"), [(0, 0), (0, 0)])


@pytest.mark.usefixtures("own_stream")
@pytest.mark.parametrize(("precision", "activations", "limit"), PRECISIONS)
def test_gemma3s_steps_compute_what_the_reference_does(
    tiny: Tiny, precision: Precision, activations: FloatType, limit: float
) -> None:
    _, to_transformers, _ = errors_of_steps(tiny, precision, activations)
    assert all(error < limit for error in to_transformers)


@pytest.mark.usefixtures("own_stream")
@pytest.mark.parametrize(("precision", "activations", "limit"), PRECISIONS)
def test_gemma3s_tower_gives_the_cpus_features(
    tiny: Tiny, precision: Precision, activations: FloatType, limit: float
) -> None:
    images = pictures(tiny.spec, [(0, 0)] * 3, seed=5)
    artifact = tiny.artifact(precision)
    found = [one.float().cpu().numpy() for one in open_encoder(artifact, activations, DEVICE)[0].encode(images)]
    error = relative_error(np.concatenate(found), np.concatenate(tiny.encoder("fp32").encode(images)))
    print(f"\n{precision}: features {error:.1e} from the CPU's in fp32")
    assert error < limit


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a tiny model of each family here; all have a tokenizer and a template of their own."""
    folder = tmp_path_factory.mktemp("storage")
    gemma3 = checkpoints.gemma3(folder / "models" / "gemma3")
    models.randomise(tiny_gemma3(gemma3)).save_pretrained(gemma3.folder)
    for name in WITH_VIDEO:
        made = MODELS[name](folder / "models" / name)
        models.randomise(made.model).save_pretrained(made.reference.folder)
    return folder


def alike(storage: Path, requests: Sequence[Request], what: str, precision: str, **settings: Any) -> float:
    """The share of the text that a device's answers have in common with the CPU's; nothing but text may differ."""
    settings |= {"device": "cuda", "precision": precision, "gpu_memory": 4096}
    on_gpu = told(storage, requests, times=2, **settings)
    on_cpu = told(storage, requests, times=2, device="cpu", precision="int8" if precision == "int8" else "fp32")
    share = shared_text(on_gpu, on_cpu)
    print(f"\n{what}, {precision}: {share:.3f} of the text is the CPU's")
    assert [one[1:3] for one in on_gpu] == [one[1:3] for one in on_cpu]
    return share


@pytest.mark.parametrize(("precision", "share"), [("fp32", 0.9), ("bf16", 0.7), ("int8", 0.5)])
def test_gemma3_answers_as_on_the_cpu(
    storage: Path, precision: str, share: float, caplog: pytest.LogCaptureFixture
) -> None:
    """With images and without. Our own operators do not know its layers: asked for, they say so, and it runs on ONNX
    Runtime's."""
    requests = []
    for seed in range(8):
        images = [picture(seed % 4, (90, 41)), picture(seed, (20, 20))] if seed % 2 else []
        words = "what is in this image? " * 4 + "so " * seed
        requests.append(request(*images, words, model="gemma3", max_tokens=16, ignore_eos=True))
    with caplog.at_level(logging.WARNING):
        assert alike(storage, requests, "gemma3", precision, kernel_fusion="on") > share
    assert ("kernel_fusion does not know the layers of gemma3" in caplog.text) == (precision != "fp32")


@pytest.mark.parametrize(
    ("name", "share"), [("qwen2_vl", 0.6), ("qwen2_5_vl", 0.6), ("qwen3_vl", 0.6), ("qwen3_5", 0.4)]
)
def test_answers_about_videos_are_those_of_the_cpu(storage: Path, name: str, share: float) -> None:
    """Beside images, and of several frames."""
    requests = []
    for seed in range(6):
        video, image = Video(film(12 + 7 * seed, (90, 64), seed=seed).file), Image(picture(seed, (64, 90)))
        shown = (video, image) if seed % 2 else (video,)
        requests.append(about(*shown, text="what?", model=name, max_tokens=16, ignore_eos=True))
    assert alike(storage, requests, f"videos of {name}", "fp16", kernel_fusion="off") > share


def test_answers_held_to_a_schema_fit_it(storage: Path) -> None:
    """Beside free ones, drawn and greedy."""
    jsonschema = pytest.importorskip("jsonschema")
    schemas = [random_schema(seed) if seed % 3 else None for seed in range(9)]
    requests = []
    for seed, schema in enumerate(schemas):
        drawn = {"temperature": 1.0, "seed": seed} if seed % 2 else {}
        limit = {"max_tokens": 500, "json_schema": json.dumps(schema)} if schema else {"max_tokens": 30}
        requests.append(request(f"form {seed}", model="gemma3", **drawn, **limit))
    answers = told(storage, requests, times=1, device="cuda", precision="bf16", gpu_memory=4096)
    for (text, reason, _, _), schema in zip(answers, schemas, strict=True):
        if schema is not None:
            assert reason == "stop", text
            jsonschema.Draft202012Validator(schema).validate(json.loads(text))
