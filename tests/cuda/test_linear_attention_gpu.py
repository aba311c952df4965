"""Linear attention on a real device: each operator against the torch that stands in for it elsewhere, then models.

    pytest -m gpu -s tests/cuda/test_linear_attention_gpu.py

Every test prints how far apart the two are, whether it passes or not.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.checkpoints import Checkpoint
from engine.runtime.cuda.decoder import PagedDecoder
from engine.spec import FloatType, Precision
from tests.cuda.device_steps import errors_of_steps
from tests.cuda.one_operator import DEVICE, node, random, run, starts_of
from tests.cuda.operators import MICROSOFT, OPERATORS
from tests.cuda.paged import Paged, Part
from tests.cuda.told import shared_text, told
from tests.engine.asking import picture, request
from tests.engine.test_linear_attention import MODEL, with_model
from tests.runtime import models
from tests.runtime.cases import relative_error
from tests.runtime.conftest import Tiny
from tests.runtime.models import randomise

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
TYPES = [torch.float16, torch.bfloat16, torch.float32]
LIMITS = {torch.float16: 5e-3, torch.bfloat16: 4e-2, torch.float32: 2e-4}  # of the largest error, to the largest value
RAGGED = [[1] * 7, [1, 3, 64, 65, 200], [300], [40, 1, 1, 2]]
HEADS = [(16, 32, 128, 128), (2, 6, 16, 24)]  # of keys, of values; key_dim, value_dim


def compare(kind: str, what: str, inputs: Mapping[str, Any], same: Mapping[str, str], **attributes: Any) -> None:
    """The device's operator with ours, outputs apart from its inputs and in place."""
    results = OPERATORS[MICROSOFT, kind](*inputs.values(), **attributes)
    wanted = [results] if isinstance(results, torch.Tensor) else results
    blank = {f"y{place}": torch.zeros_like(tensor) for place, tensor in enumerate(wanted) if tensor is not None}
    source = node(kind, inputs, blank, **attributes)
    apart, in_place = run(source, inputs, blank, {}, same)
    errors = []
    for place, tensor in enumerate(wanted):
        assert tensor is not None
        scale = float(tensor.float().abs().max())
        errors.append(float((apart[f"y{place}"].float() - tensor.float()).abs().max()) / scale)
    written = all(torch.equal(apart[name], in_place[name]) for name in blank)
    print(
        f"\n{kind} {what}: largest error {', '.join(f'{error:.1e}' for error in errors)}, in place the same: {written}"
    )
    limit = LIMITS[next(tensor.dtype for tensor in wanted if tensor is not None)]
    assert all(error <= limit for error in errors), f"more than {limit}"
    assert written


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("counts", RAGGED, ids=lambda counts: "+".join(map(str, counts[:5])))
def test_gated_delta_net_is_the_recurrence(dtype: torch.dtype, heads: tuple[int, ...], counts: list[int]) -> None:
    keys, values, dk, dv = heads
    tokens = sum(counts)
    inputs = {
        "qkv": random(1, tokens, 2 * keys * dk + values * dv, dtype=dtype),
        "key": None,
        "value": None,
        "starts": starts_of(counts),
        "decay": random(2, tokens, values),
        "beta": random(3, tokens, values),
        "state": 0.3 * random(4, len(counts), values, dv, dk),
        "a_log": random(5, values).abs(),
        "dt_bias": random(6, values),
    }
    attributes = {"update_rule": "gated_delta", "gate_activation": "qwen", "beta_activation": "sigmoid"}
    what = f"{dtype} {keys}/{values} heads of {dk}/{dv}, tokens {counts}"
    compare("GatedDeltaNet", what, inputs, {"y1": "state"}, **attributes, qk_l2_norm=1)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("channels", [96, 2048])
@pytest.mark.parametrize("counts", RAGGED, ids=lambda counts: "+".join(map(str, counts[:5])))
def test_the_convolution_stays_within_its_sequence(dtype: torch.dtype, channels: int, counts: list[int]) -> None:
    inputs = {
        "x": random(1, sum(counts), channels, dtype=dtype),
        "weight": random(2, channels, 1, 4, dtype=dtype),
        "starts": starts_of(counts),
        "bias": None,
        "state": random(3, len(counts), channels, 3, dtype=dtype),
    }
    what = f"{dtype} {channels} channels, tokens {counts}"
    compare("VarlenCausalConvWithState", what, inputs, {"y1": "state"}, activation="silu")


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("heads", "width"), [(6, 24), (32, 128)])
def test_the_gated_norm_is_one_for_each_head(dtype: torch.dtype, heads: int, width: int) -> None:
    inputs = {
        "x": random(1, 37, heads * width, dtype=dtype),
        "weight": 1 + 0.2 * random(2, width, dtype=dtype),
        "gate": random(3, 37, heads * width, dtype=dtype),
    }
    compare("GatedRMSNorm", f"{dtype} {heads} heads of {width}", inputs, {}, epsilon=1e-6, activation="silu")


@pytest.mark.parametrize("dtype", TYPES)
def test_a_quarter_of_a_head_turns_by_three_positions(dtype: torch.dtype) -> None:
    angles = torch.arange(64)[:, None] * 0.8 ** torch.arange(32)
    inputs = {
        "x": random(1, 1, 37, 4 * 256, dtype=dtype),
        "positions": torch.randint(0, 64, (3, 1, 37), generator=torch.Generator().manual_seed(2)),
        "cosine": torch.cos(angles).to(dtype),
        "sine": torch.sin(angles).to(dtype),
    }
    attributes = {"mrope_section": [11, 11, 10], "mrope_layout": 1, "num_heads": 4, "rotary_embedding_dim": 64}
    compare("MRotaryEmbedding", f"{dtype}", inputs, {}, **attributes)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """Small, with heads of the size that checkpoints have."""
    rope = {"mrope_section": [11, 11, 10], "mrope_interleaved": True, "partial_rotary_factor": 0.25}
    reference = randomise(
        models.qwen3_5(
            head_dim=256,
            num_key_value_heads=1,
            linear_key_head_dim=128,
            linear_value_head_dim=128,
            linear_num_value_heads=4,
            rope_parameters=rope | {"rope_type": "default", "rope_theta": 10000.0},
        )
    )
    folder = models.save(reference, tmp_path_factory.mktemp("heads-of-256"))
    return Tiny(reference, Checkpoint.open(folder), tmp_path_factory.mktemp("storage"), [(6, 10), (2, 2), (4, 6)])


PRECISIONS: list[tuple[Precision, FloatType, float]] = [
    ("fp32", "float32", 1e-3),
    ("fp16", "float16", 5e-2),
    ("bf16", "bfloat16", 3e-1),
    ("int8", "float16", 5e-2),
]


@pytest.mark.usefixtures("own_stream")
@pytest.mark.parametrize(("precision", "activations", "limit"), PRECISIONS)
def test_steps_compute_what_the_reference_does(
    tiny: Tiny, precision: Precision, activations: FloatType, limit: float
) -> None:
    """In 16 bits random weights leave much to rounding, so that what the stand-in computes counts; fp32 is exact."""
    to_stand_in, to_transformers, _ = errors_of_steps(tiny, precision, activations)
    assert all(error < limit for error in to_stand_in)  # which none is that is no number
    if precision == "fp32":
        assert all(error < limit for error in to_transformers)


@pytest.mark.usefixtures("own_stream")
@pytest.mark.parametrize(("precision", "activations"), [("fp16", "float16"), ("bf16", "bfloat16"), ("int8", "float16")])
def test_a_replayed_step_computes_what_an_eager_one_does_and_only_its_own_states(
    tiny: Tiny, precision: Precision, activations: FloatType
) -> None:
    case = tiny.text_case(60, 3)
    paged = Paged(tiny, precision, activations, device=DEVICE, block=64)
    decoder, states = paged.decoder, paged.decoder.states
    assert states is not None
    states.make_places(4)
    slots = [3, 0, 2]  # of a bucket of four
    for slot in slots:
        paged.step(Part(slot, case, 0, 20 + slot))
    for place, slot in enumerate(slots):
        states.keep(slot, place)
    parts = [Part(slot, case, 20 + slot, 21 + slot) for slot in slots]
    assert replays(decoder, len(slots))
    replayed = paged.step(*parts)
    after = [rows.clone() for rows in states._rows]
    for place, slot in enumerate(slots):
        states.restore(slot, place)
    captured, decoder._captured = decoder._captured, {}
    eager = paged.step(*parts)
    decoder._captured = captured
    error = relative_error(replayed, eager)
    apart = [
        float((one[:, :3].float() - rows[:, :3].float()).abs().max())
        for one, rows in zip(after, states._rows, strict=True)
    ]
    print(
        f"\n{precision}: replayed to eager logits {error:.2e}, states apart by {apart[0]:.2e}, windows {apart[1]:.2e}"
    )
    assert error < (6e-2 if precision == "bf16" else 2e-2)
    assert apart[0] < 5e-2


def replays(decoder: PagedDecoder, rows: int) -> bool:
    bucket = decoder.buckets.find(rows, 30)
    assert decoder.states is not None
    return bucket in decoder._captured and decoder.states.free_from(rows, bucket.batch)


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_model(tmp_path_factory.mktemp("engine-storage"))


@pytest.mark.parametrize(("precision", "shown"), [("fp32", True), ("fp16", False), ("int8", True)])
def test_an_engine_answers_as_on_the_cpu(storage: Path, precision: str, shown: bool) -> None:
    words = "what is in this image? " * 40
    requests = []
    for seed in range(6):
        parts: list[str | bytes] = [picture(seed % 2, (64, 64))] if shown else []
        requests.append(request(*parts, words + "so " * seed, model=MODEL, max_tokens=16, ignore_eos=True))
    on_cpu = told(storage, requests, device="cpu", precision="int8" if precision == "int8" else "fp32")
    on_gpu = told(storage, requests, device="cuda", precision=precision, gpu_memory=4096)
    share, reused = shared_text(on_gpu, on_cpu), [one[3] for one in on_gpu]
    print(f"\n{precision} {'images' if shown else 'text'}: {share:.3f} of the text is the CPU's, reused {reused}")
    assert [one[1:3] for one in on_gpu] == [one[1:3] for one in on_cpu]
    assert max(reused[-6:]) > 0, "no state was kept"
    if precision == "fp32":
        assert share > 0.9
