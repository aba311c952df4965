"""The reference's operators are those of ONNX Runtime, wherever its CPU provider has them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort  # type: ignore[import-untyped]
import pytest
import torch
from numpy.typing import NDArray
from onnx import helper

from tests.cuda.operators import MICROSOFT, OPERATORS, from_numpy
from tests.cuda.paged_attention import PAGED_ATTENTION
from tests.cuda.reference import ReferenceBinding, ReferenceSession

Arrays = dict[str, NDArray[Any]]
HEADS, KV_HEADS, DIM, BLOCK, POSITIONS = 4, 2, 16, 16, 96
WIDTH = HEADS * DIM
F32, F16, I32, I64 = np.float32, np.float16, np.int32, np.int64


def random(seed: int, *shape: int) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def model(
    kind: str,
    inputs: Mapping[str, NDArray[Any] | None],
    outputs: Sequence[str],
    domain: str = "",
    dtypes: Mapping[str, type] | None = None,
    **attributes: Any,
) -> bytes:
    """One node; an input that is None and an output named "" are absent; outputs are float32 unless `dtypes` says."""
    names = [name if array is not None else "" for name, array in inputs.items()]
    node = helper.make_node(kind, names, outputs, domain=domain, **attributes)
    takes = [_value(name, array.dtype, array.ndim) for name, array in inputs.items() if array is not None]
    gives = [_value(name, np.dtype((dtypes or {}).get(name, F32)), None) for name in outputs if name]
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid(MICROSOFT, 1)]
    graph = helper.make_graph([node], "one", takes, gives)
    made: bytes = helper.make_model(graph, opset_imports=opsets, ir_version=11).SerializeToString()
    return made


def _value(name: str, dtype: np.dtype[Any], rank: int | None) -> onnx.ValueInfoProto:
    shape = None if rank is None else [f"{name}.{axis}" for axis in range(rank)]
    return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(dtype), shape)


def provider(source: bytes, inputs: Mapping[str, NDArray[Any] | None]) -> Arrays:
    """What the CPU provider computes."""
    session = ort.InferenceSession(source, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    given = {name: array for name, array in inputs.items() if array is not None}
    return dict(zip(names, session.run(names, given), strict=True))


def reference(source: bytes, inputs: Mapping[str, NDArray[Any] | None], like: Arrays) -> Arrays:
    """What ours computes, into memory like the arrays of `like`."""
    outputs = {name: torch.zeros_like(from_numpy(array)) for name, array in like.items()}
    session = ReferenceSession(source, {})
    given = {name: from_numpy(array) for name, array in inputs.items() if array is not None}
    session.run(ReferenceBinding(given, outputs))
    return {name: tensor.numpy() for name, tensor in outputs.items()}


def rotary_tables(half: int, dtype: type = F32) -> tuple[NDArray[Any], NDArray[Any]]:
    angles = np.arange(POSITIONS)[:, None] * 0.7 ** np.arange(half)
    return np.cos(angles).astype(dtype), np.sin(angles).astype(dtype)


COSINE, SINE = rotary_tables(DIM // 2)
POSITIONS_3 = np.random.default_rng(9).integers(0, POSITIONS, (3, 2, 5))
BYTES = np.random.default_rng(8).integers(0, 256, (24, 2, 32), np.uint8)
X, NORM = random(1, 5, 64), random(3, 64)
ROPE = {"x": random(1, 2, 5, WIDTH), "p": np.array([7]), "cos": COSINE, "sin": SINE}
SKIP = {"x": random(1, 2, 5, 64), "skip": random(2, 2, 5, 64), "weight": NORM}
ATTENTION = {name: random(seed, 2, 9, WIDTH) for seed, name in enumerate("qkv")}

Case = tuple[str, str, Mapping[str, NDArray[Any] | None], dict[str, Any]]
CASES: list[Case] = [
    ("RotaryEmbedding", MICROSOFT, ROPE, {}),
    ("RotaryEmbedding", MICROSOFT, ROPE | {"p": POSITIONS_3[0]}, {"interleaved": 1}),
    ("RotaryEmbedding", MICROSOFT, ROPE | {"cos": COSINE[:, :4], "sin": SINE[:, :4]},
     {"num_heads": HEADS, "rotary_embedding_dim": 8}),
    ("RotaryEmbedding", MICROSOFT, ROPE | {"x": random(1, 2, HEADS, 5, DIM)}, {}),
    ("MRotaryEmbedding", MICROSOFT, ROPE | {"p": POSITIONS_3}, {"mrope_section": [2, 3, 3], "num_heads": HEADS}),
    ("MRotaryEmbedding", MICROSOFT, ROPE | {"p": POSITIONS_3},
     {"mrope_section": [4, 2, 2], "mrope_layout": 1, "num_heads": HEADS}),
    ("SimplifiedLayerNormalization", "", {"x": X, "weight": NORM}, {"epsilon": 1e-3}),
    ("LayerNormalization", "", {"x": X, "weight": NORM, "bias": random(4, 64)}, {"epsilon": 1e-3}),
    ("QuickGelu", MICROSOFT, {"x": X}, {"alpha": 1.0}),
    ("FastGelu", MICROSOFT, {"x": X, "bias": NORM}, {}),
    ("BiasGelu", MICROSOFT, {"x": X, "bias": NORM}, {}),
    ("Gelu", "", {"x": X}, {"approximate": "tanh"}),
    ("Gemm", "", {"x": X, "w": random(2, 24, 64), "b": random(3, 24)}, {"transB": 1}),
    ("MatMulNBits", MICROSOFT, {"x": X, "w": BYTES, "s": random(5, 24, 2), "z": None},
     {"K": 64, "N": 24, "bits": 8, "block_size": 32, "accuracy_level": 1}),
    ("MultiHeadAttention", MICROSOFT, ATTENTION, {"num_heads": HEADS}),
    ("Attention", "", ATTENTION, {"q_num_heads": HEADS, "kv_num_heads": HEADS, "is_causal": 1}),
    ("Attention", "", ATTENTION | {"mask": np.tril(np.ones((9, 9), bool))},
     {"q_num_heads": HEADS, "kv_num_heads": HEADS}),
    ("Expand", "", {"x": random(1, 3, 1), "to": np.array([2, 1, 5])}, {}),
    ("Split", "", {"x": X, "sizes": np.array([2, 3])}, {}),
    ("Slice", "", {"x": X, "from": np.array([1]), "to": np.array([-1]), "axes": np.array([1])}, {}),
    ("Gather", "", {"x": X, "i": np.array([[0, -1], [4, 2]])}, {}),
    ("ScatterND", "", {"x": X, "i": np.array([[3], [1]]), "u": random(2, 2, 64)}, {}),
    ("Reshape", "", {"x": X, "shape": np.array([0, 8, -1])}, {}),
    ("Transpose", "", {"x": random(1, 2, 3, 4)}, {"perm": [2, 0, 1]}),
]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "domain", "inputs", "attributes"), CASES, ids=[f"{i}{c[0]}" for i, c in enumerate(CASES)]
)
def test_an_operator_is_the_cpu_providers(
    kind: str, domain: str, inputs: Mapping[str, NDArray[Any] | None], attributes: dict[str, Any]
) -> None:
    source = model(kind, inputs, ["a", "b"] if kind == "Split" else ["y"], domain, **attributes)
    wanted = provider(source, inputs)
    for name, found in reference(source, inputs, wanted).items():
        np.testing.assert_allclose(found, wanted[name], rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("kind", ["SkipSimplifiedLayerNormalization", "SkipLayerNormalization"])
def test_a_norm_of_a_sum_gives_both(kind: str) -> None:
    inputs: dict[str, NDArray[Any] | None] = dict(SKIP)
    if kind == "SkipLayerNormalization":
        inputs["beta"] = random(4, 64)
    inputs["bias"] = random(5, 64)
    source = model(kind, inputs, ["y", "", "", "sum"], MICROSOFT, epsilon=1e-3)
    wanted = provider(source, inputs)
    assert wanted.keys() == {"y", "sum"}
    for name, found in reference(source, inputs, wanted).items():
        np.testing.assert_allclose(found, wanted[name], atol=1e-5)


def test_16_bit_operands_are_rounded_once_at_the_end() -> None:
    inputs = {"x": random(1, 3, 512).astype(F16), "w": random(2, 5, 512).astype(F16), "b": random(3, 5).astype(F16)}
    source = model("Gemm", inputs, ["y"], dtypes={"y": F16}, transB=1)
    wanted = (inputs["x"].astype(F32) @ inputs["w"].astype(F32).T + inputs["b"].astype(F32)).astype(F16)
    np.testing.assert_allclose(reference(source, inputs, {"y": wanted})["y"], wanted, rtol=2**-10)


def test_packed_sequences_attend_each_to_itself() -> None:
    lengths = [4, 9, 1]
    rows = {name: random(seed, sum(lengths), WIDTH) for seed, name in enumerate("qkv")}
    offset = [0, 1, 2, 3, *range(9, 18), 18, *range(4, 9), *range(19, 27)]
    inputs = rows | {
        "bias": None,
        "offset": np.array(offset, I32).reshape(3, 9),
        "cu": np.cumsum([0, *lengths], dtype=I32),
    }
    source = model("PackedMultiHeadAttention", inputs, ["y"], MICROSOFT, num_heads=HEADS)
    found = reference(source, inputs, {"y": np.zeros((14, WIDTH), F32)})["y"]
    alone = model("MultiHeadAttention", ATTENTION, ["y"], MICROSOFT, num_heads=HEADS)
    for start, end in zip([0, 4, 13], [4, 13, 14], strict=True):
        one = {name: array[None, start:end] for name, array in rows.items()}
        np.testing.assert_allclose(found[start:end], provider(alone, one)["y"][0], atol=1e-5)


class PagedSequences:
    """Sequences whose blocks lie scattered in one cache, one PagedAttention node, fp32."""

    def __init__(self, count: int, *, rotary: bool, metadata: Sequence[int] | None = None, packed: bool = True) -> None:
        self.blocks = POSITIONS // BLOCK
        self.caches = {
            name: torch.full((count * self.blocks, BLOCK, KV_HEADS, DIM), torch.nan) for name in ("kc", "vc")
        }
        scattered = np.random.default_rng(7).permutation(count * self.blocks)
        self.table = torch.tensor(scattered.reshape(count, self.blocks), dtype=torch.int32)
        self.packed = packed
        self.metadata = torch.tensor(metadata, dtype=torch.int32) if metadata else None
        kv = None if packed else np.zeros((1, 1), F32)
        table = np.zeros((1, 1), F32) if rotary else None
        inputs = {
            "q": np.zeros((1, 1), F32), "k": kv, "v": kv, "kc": np.zeros((1, 1, 1, 1), F32),
            "vc": np.zeros((1, 1, 1, 1), F32), "cu": np.zeros(1, I32), "past": np.zeros(1, I32),
            "table": np.zeros((1, 1), I32), "cos": table, "sin": table, "slots": None, "sink": None, "qn": None,
            "kn": None, "ks": None, "vs": None, "metadata": np.zeros(1, I32) if metadata else None,
        }  # fmt: skip
        outputs = ["y", "kco", "vco"]
        source = model(
            "PagedAttention", inputs, outputs, MICROSOFT, num_heads=HEADS, kv_num_heads=KV_HEADS, do_rotary=int(rotary)
        )
        self.session = ReferenceSession(source, {})
        self._given = {name for name, array in inputs.items() if array is not None}

    def bind(self, qkv: Sequence[NDArray[np.float32]], past: Sequence[int]) -> ReferenceBinding:
        """New tokens of each sequence, after `past` of them."""
        rows = torch.from_numpy(np.concatenate(qkv))
        q, k, v = torch.split(rows, [WIDTH, KV_HEADS * DIM, KV_HEADS * DIM], 1)
        inputs = {
            "q": rows if self.packed else q.contiguous(), "k": k.contiguous(), "v": v.contiguous(), **self.caches,
            "cu": torch.tensor(np.cumsum([0, *map(len, qkv)]), dtype=torch.int32),
            "past": torch.tensor(past, dtype=torch.int32), "table": self.table,
            "cos": torch.from_numpy(COSINE), "sin": torch.from_numpy(SINE), "metadata": self.metadata,
        }  # fmt: skip
        outputs = {"y": torch.zeros(len(rows), WIDTH), "kco": self.caches["kc"], "vco": self.caches["vc"]}
        given = {name: tensor for name, tensor in inputs.items() if name in self._given and tensor is not None}
        return self.session.bind(given, outputs)

    def step(self, qkv: Sequence[NDArray[np.float32]], past: Sequence[int]) -> list[NDArray[np.float32]]:
        binding = self.bind(qkv, past)
        self.session.run(binding)
        return np.split(binding.outputs["y"].numpy(), np.cumsum([len(rows) for rows in qkv])[:-1])


def grouped_query_attention(
    qkv: NDArray[np.float32], rotary: bool, cache: type = F32, further: Arrays | None = None, **attributes: Any
) -> NDArray[np.float32]:
    """The CPU provider's, one sequence from its beginning."""
    inputs: dict[str, NDArray[Any] | None] = {
        "qkv": qkv[None], "k": None, "v": None,
        "pk": np.zeros((1, KV_HEADS, POSITIONS, DIM), cache), "pv": np.zeros((1, KV_HEADS, POSITIONS, DIM), cache),
        "last": np.array([len(qkv) - 1], I32), "longest": np.array(len(qkv), I32),
        "cos": COSINE if rotary else None, "sin": SINE if rotary else None, "position": None, "bias": None,
        "sink": None, "ks": None, "vs": None,
    }  # fmt: skip
    inputs.update(further or {})
    attributes |= {"num_heads": HEADS, "kv_num_heads": KV_HEADS, "do_rotary": int(rotary)}
    source = model(
        "GroupQueryAttention", inputs, ["y", "pko", "pvo"], MICROSOFT, {"pko": cache, "pvo": cache}, **attributes
    )
    result: NDArray[np.float32] = provider(source, inputs)["y"][0]
    return result


SEQUENCES = [random(seed, length, WIDTH + 2 * KV_HEADS * DIM) for seed, length in enumerate([40, 23, 70])]


@pytest.mark.parametrize("rotary", [True, False])
@pytest.mark.parametrize("packed", [True, False])
def test_paged_attention_is_grouped_query_attention_however_sequences_are_cut(rotary: bool, packed: bool) -> None:
    wanted = [grouped_query_attention(sequence, rotary) for sequence in SEQUENCES]
    paged = PagedSequences(3, rotary=rotary, packed=packed)
    cuts = [[0, 17, 18, 40], [0, 1, 16, 23], [0, 33, 33, 70]]  # the second call gives the last sequence no token
    for call in range(3):
        chunks = [(cut[call], cut[call + 1]) for cut in cuts]
        qkv = [sequence[start:end] for sequence, (start, end) in zip(SEQUENCES, chunks, strict=True)]
        found = paged.step(qkv, [start for start, _ in chunks])
        for rows, whole, (start, end) in zip(found, wanted, chunks, strict=True):
            np.testing.assert_allclose(rows, whole[start:end], atol=1e-5)


def paged(qkv: NDArray[np.float32], cache: torch.dtype, further: Mapping[str, Any]) -> NDArray[np.float32]:
    """One whole sequence through a cache of any type."""
    blocks = POSITIONS // BLOCK
    caches = [torch.zeros(blocks, BLOCK, KV_HEADS, DIM, dtype=cache) for _ in range(2)]
    lengths = (torch.tensor([0, len(qkv)], dtype=torch.int32), torch.tensor([0], dtype=torch.int32))
    table = torch.arange(blocks, dtype=torch.int32)[None]
    rotary = {"cosine": torch.from_numpy(COSINE), "sine": torch.from_numpy(SINE), "do_rotary": 1}
    heads = {"num_heads": HEADS, "kv_num_heads": KV_HEADS}
    operator = OPERATORS[PAGED_ATTENTION]
    output, *_ = operator(torch.from_numpy(qkv), None, None, *caches, *lengths, table, **rotary, **heads, **further)
    assert output is not None
    result: NDArray[np.float32] = output.numpy()
    return result


@pytest.mark.parametrize("mode", ["PER_TENSOR", "PER_CHANNEL"])
def test_a_cache_of_bytes_is_grouped_query_attentions(mode: str) -> None:
    scale = np.array([0.03], F32) if mode == "PER_TENSOR" else np.linspace(0.02, 0.05, KV_HEADS * DIM, dtype=F32)
    scale = scale if mode == "PER_TENSOR" else scale.reshape(KV_HEADS, 1, DIM)
    scales = {"ks": scale, "vs": scale * F32(1.1)}
    modes = {"k_quant_type": mode, "v_quant_type": mode}
    wanted = grouped_query_attention(SEQUENCES[0], True, np.int8, scales, kv_cache_bit_width=8, **modes)
    found = paged(SEQUENCES[0], torch.int8, modes | {
        "k_scale": torch.from_numpy(scales["ks"]), "v_scale": torch.from_numpy(scales["vs"]),
    })  # fmt: skip
    np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_queries_and_keys_are_normed_before_they_are_turned() -> None:
    query_weight, key_weight = random(5, DIM), random(6, DIM)
    heads = SEQUENCES[0].reshape(-1, HEADS + 2 * KV_HEADS, DIM)
    normed = (heads / np.sqrt((heads * heads).mean(-1, keepdims=True) + 1e-3)).astype(F32)
    normed[:, :HEADS] *= query_weight
    normed[:, HEADS:-KV_HEADS] *= key_weight
    normed[:, -KV_HEADS:] = heads[:, -KV_HEADS:]
    wanted = grouped_query_attention(normed.reshape(SEQUENCES[0].shape), True)
    norms = {"q_norm": torch.from_numpy(query_weight), "k_norm": torch.from_numpy(key_weight), "qk_norm_epsilon": 1e-3}
    np.testing.assert_allclose(paged(SEQUENCES[0], torch.float32, norms), wanted, atol=1e-5)


def test_bounds_that_do_not_hold_are_seen() -> None:
    for bounds, fits in (
        ([40, 40, 1], True),
        ([39, 40], False),
        ([40, 39], False),
        ([40, 64, 41], False),
        ([0, 0], True),
    ):
        paged = PagedSequences(1, rotary=True, metadata=bounds)
        if fits:
            paged.step(SEQUENCES[:1], [0])
            continue
        with pytest.raises(AssertionError, match="bound"):
            paged.step(SEQUENCES[:1], [0])


def test_a_captured_graph_keeps_the_bounds_and_the_memory_of_its_first_run() -> None:
    paged = PagedSequences(1, rotary=True, metadata=[1, 17])
    paged.step([SEQUENCES[0][:1]], [0])
    paged.caches["kc"].zero_()
    paged.caches["vc"].zero_()
    binding = paged.bind([SEQUENCES[0][16:17]], [16])
    paged.session.run(binding, graph=4)
    assert paged.metadata is not None
    paged.metadata[1] = 40  # the host's memory is not read again
    paged.session.run(binding, graph=4)
    binding.inputs["past"].fill_(17)
    with pytest.raises(AssertionError, match="18 tokens, bound 17"):
        paged.session.run(binding, graph=4)
    paged.session.run(binding)
    with pytest.raises(AssertionError, match="captured on other memory"):
        paged.session.run(paged.bind([SEQUENCES[0][16:17]], [16]), graph=4)
    assert paged.session.runs == [None, 4, 4, 4, None, 4]


def test_tokens_behind_the_last_sequence_are_not_numbers() -> None:
    paged = PagedSequences(1, rotary=True)
    binding = paged.bind([SEQUENCES[0]], [0])
    binding.inputs["cu"][1] = 30
    paged.session.run(binding)
    assert torch.isfinite(binding.outputs["y"][:30]).all()
    assert torch.isnan(binding.outputs["y"][30:]).all()


def test_what_is_missing_or_unlike_what_the_graph_declares_is_refused() -> None:
    paged = PagedSequences(1, rotary=True)
    binding = paged.bind([SEQUENCES[0]], [0])
    past = binding.inputs["past"]
    for wrong in ({"past": past.long()}, {"past": past[None]}):
        with pytest.raises(ValueError, match="past"):
            paged.session.bind(binding.inputs | wrong, binding.outputs)
    missing = {name: tensor for name, tensor in binding.inputs.items() if name != "past"}
    with pytest.raises(ValueError, match=r"nothing is bound to \['past'\]"):
        paged.session.bind(missing, binding.outputs)
    short = paged.session.bind(binding.inputs, binding.outputs | {"y": torch.zeros(3, WIDTH)})
    with pytest.raises(ValueError, match=r"y is torch\.float32"):
        paged.session.run(short)
    elsewhere = paged.session.bind(binding.inputs, binding.outputs | {"kco": paged.caches["kc"].clone()})
    with pytest.raises(AssertionError, match="kco must be bound"):
        paged.session.run(elsewhere)
