"""Decode attention against float64 and the stock operators; run by test_decode_attention.py, interpreted or on a GPU.

Without a GPU Triton must interpret the kernels, which is decided when triton is imported.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from engine.errors import DeviceOutOfMemory
from engine.kernels.attention import AttentionParameters, AttentionTile, PagedDecodeAttention
from engine.kernels.workspace import Workspace
from tests.cuda.attention import _mrotary
from tests.cuda.paged_attention import _norm, _paged_attention

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON_GPU = DEVICE.type == "cuda"
UNIT = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8 if ON_GPU else 2.0**-7}  # which the interpreter cuts off
SMALL = AttentionTile(tokens=16, least=16, merged=2)  # many splits of few tokens
SECTIONED, INTERLEAVED = ((8, 12, 12), False), ((14, 8, 10), True)


@dataclass
class Step:
    """One token for each sequence. Memory that no sequence holds is NaN, or -128 in an int8 cache."""

    parameters: AttentionParameters
    past: list[int]
    page: int = 16
    dtype: torch.dtype = torch.float16
    int8: bool = False
    seed: int = 0
    tile: AttentionTile | None = SMALL
    multiprocessors: int = 8
    tensors: dict[str, Tensor | None] = field(init=False)

    def __post_init__(self) -> None:
        torch.manual_seed(self.seed)
        size, batch, dim = self.parameters, len(self.past), self.parameters.head_dim
        columns = max(self.past) // self.page + 1
        blocks = 1 + batch * columns
        table = (torch.randperm(batch * columns) + 1).reshape(batch, columns).int()
        angles = torch.rand(max(self.past) + 40, dim // 2) * 2 * math.pi
        norm = size.qk_norm_epsilon is not None
        self.tensors = {
            "qkv": torch.randn(batch, size.width).to(self.dtype),
            "key_cache": self._cache(blocks, table),
            "value_cache": self._cache(blocks, table),
            "past": torch.tensor(self.past, dtype=torch.int32),
            "block_table": table,
            "cosine": angles.cos().to(self.dtype),
            "sine": angles.sin().to(self.dtype),
            "positions": torch.randint(0, len(angles), (3, batch), dtype=torch.int32) if size.mrope_section else None,
            "query_norm": (torch.rand(dim) + 0.5).to(self.dtype) if norm else None,
            "key_norm": (torch.rand(dim) + 0.5).to(self.dtype) if norm else None,
            "key_scale": torch.rand(size.kv_heads, 1, dim) * 0.03 + 1e-4 if self.int8 else None,
            "value_scale": torch.rand(size.kv_heads, 1, dim) * 0.03 + 1e-4 if self.int8 else None,
        }

    def _cache(self, blocks: int, table: Tensor) -> Tensor:
        shape = (self.page, self.parameters.kv_heads, self.parameters.head_dim)
        held = torch.randint(-127, 128, (blocks, *shape)).to(torch.int8) if self.int8 else torch.randn(blocks, *shape)
        cache = torch.full((blocks, *shape), -128 if self.int8 else math.nan, dtype=held.dtype)
        for row, past in enumerate(self.past):
            place = torch.arange(past)
            at = table[row].long()[place // self.page], place % self.page
            cache[at] = held[at]
        return cache if self.int8 else cache.to(self.dtype)

    def get(self, name: str) -> Tensor:
        tensor = self.tensors[name]
        assert tensor is not None
        return tensor

    def attention(self, nbytes: int = 1 << 22) -> PagedDecodeAttention:
        workspace = Workspace(nbytes, DEVICE)
        with workspace.scope():
            workspace.take((workspace.nbytes,), torch.uint8).fill_(0xFF)  # NaN
        return PagedDecodeAttention(self.parameters, workspace, self.multiprocessors, self.tile)

    def run(self, attention: PagedDecodeAttention | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Output and caches."""
        copies = {name: None if x is None else x.to(DEVICE, copy=True) for name, x in self.tensors.items()}
        out = torch.full((len(self.past), self.parameters.heads * self.parameters.head_dim), math.nan, device=DEVICE)
        out = out.to(self.dtype)
        attention = attention or self.attention()
        attention(**copies, out=out)  # type: ignore[arg-type]
        assert not attention._workspace.tickets.any(), "tickets are not set back"
        caches = (copies["key_cache"], copies["value_cache"])
        assert caches[0] is not None
        assert caches[1] is not None
        return out.cpu(), caches[0].cpu(), caches[1].cpu()

    def new_heads(self) -> tuple[Tensor, Tensor, Tensor]:
        """The new tokens' queries, keys and values [B, heads, D] after norm and rotation, rounded to A after each."""
        size = self.parameters
        heads = self.get("qkv").reshape(len(self.past), -1, size.head_dim).double()
        query, key, value = torch.split(heads, [size.heads, size.kv_heads, size.kv_heads], 1)
        axes = self.get("positions").long() if size.mrope_section else self.get("past").long().expand(3, -1)
        axis = torch.tensor([_axis(size, pair) for pair in range(size.head_dim // 2)])
        places = axes[axis].T  # [B, D / 2]
        pairs = torch.arange(size.head_dim // 2)
        cos, sin = (self.get(name).double()[places, pairs][:, None] for name in ("cosine", "sine"))
        turned = []
        for x, name in ((query, "query_norm"), (key, "key_norm")):
            y = x
            if size.qk_norm_epsilon is not None:
                y = x / torch.sqrt(x.square().mean(-1, keepdim=True) + size.qk_norm_epsilon) * self.get(name).double()
                y = y.to(self.dtype).double()
            first, second = y.chunk(2, -1)
            y = torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
            turned.append(y.to(self.dtype).double())
        return turned[0], turned[1], value

    def expected(self) -> tuple[Tensor, Tensor, Tensor]:
        """Output, and what is written of keys and values [B, kv_heads, D], in float64."""
        size, (query, key, value) = self.parameters, self.new_heads()
        scales = [torch.ones(size.kv_heads, size.head_dim).double()] * 2
        if self.int8:
            scales = [self.get(name)[:, 0].double() for name in ("key_scale", "value_scale")]
            key, value = (torch.clamp(torch.round(x / s), -128, 127) for x, s in zip((key, value), scales, strict=True))
        outputs = []
        for row, past in enumerate(self.past):
            blocks = self.get("block_table")[row].long()
            tokens = [
                torch.cat([self.get(name)[blocks].flatten(0, 1)[:past].double(), new[row][None]]) * scale
                for name, new, scale in zip(("key_cache", "value_cache"), (key, value), scales, strict=True)
            ]
            k, v = (x.repeat_interleave(size.group, 1) for x in tokens)
            weights = torch.softmax(torch.einsum("hd,nhd->hn", query[row], k) / math.sqrt(size.head_dim), -1)
            outputs.append(torch.einsum("hn,nhd->hd", weights, v).flatten())
        return torch.stack(outputs), key, value

    def written(self, caches: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """What the caches hold at the new tokens' places; asserts that nothing else in them has changed."""
        found = []
        for name, cache in zip(("key_cache", "value_cache"), caches, strict=True):
            before = self.get(name).clone()
            at = [(int(self.get("block_table")[row, p // self.page]), p % self.page) for row, p in enumerate(self.past)]
            found.append(torch.stack([cache[place] for place in at]))
            for place in at:
                before[place] = cache[place]
            assert torch.equal(before.view(torch.uint8), cache.view(torch.uint8)), f"{name} changed elsewhere"
        return found[0], found[1]

    def check(self) -> None:
        out, *caches = self.run()
        expected, key, value = self.expected()
        unit = UNIT[self.dtype]
        near(out, expected, 4 * unit)
        found = self.written((caches[0], caches[1]))
        for cached, new in zip(found, (key, value), strict=True):
            if self.int8:
                assert (cached.double() - new).abs().max() <= (0 if self.dtype == torch.float16 else 1)
            else:
                near(cached, new, 2 * unit)


def _axis(size: AttentionParameters, pair: int) -> int:
    if not size.mrope_section:
        return 0
    _, height, width = size.mrope_section
    if size.mrope_interleaved:
        return pair % 3 if (pair % 3 == 1 and pair < 3 * height) or (pair % 3 == 2 and pair < 3 * width) else 0
    return int(np.searchsorted(np.cumsum(size.mrope_section), pair, side="right"))


def near(found: Tensor, expected: Tensor, tolerance: float) -> None:
    error = (found.double() - expected.double()).abs().max()
    assert error <= tolerance * expected.double().abs().max(), f"{error} of {expected.abs().max()}"


@pytest.mark.parametrize("group", [1, 2, 3, 6, 7, 8, 12, 16, 20])
def test_query_heads_share_key_heads_in_any_ratio(group: int) -> None:
    kv_heads = 2 if group < 8 else 1
    Step(AttentionParameters(group * kv_heads, kv_heads, 32), [17]).check()


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
def test_heads_of_every_size(head_dim: int, int8: bool) -> None:
    Step(AttentionParameters(6, 2, head_dim), [33], int8=int8).check()


@pytest.mark.parametrize(("dtype", "int8"), [(torch.float16, False), (torch.bfloat16, False), (torch.float16, True)])
def test_every_place_of_a_block_and_a_split(dtype: torch.dtype, int8: bool) -> None:
    past = [0, 1, 15, 16, 17, 31, 32, 47, 48]
    Step(AttentionParameters(3, 1, 64), past, dtype=dtype, int8=int8).check()


@pytest.mark.parametrize(("head_dim", "page"), [(128, 256), (256, 64)])
def test_blocks_and_tiles_as_they_are_served(head_dim: int, page: int) -> None:
    past = [page - 1, page, page + 1]
    Step(AttentionParameters(2, 1, head_dim), past, page, tile=None).check()


def test_a_context_of_32k_tokens_is_split_and_merged() -> None:
    tile = AttentionTile(tokens=256, least=512)
    Step(AttentionParameters(2, 1, 64), [32766], 256, tile=tile).check()


@pytest.mark.parametrize(("section", "interleaved"), [SECTIONED, INTERLEAVED])
@pytest.mark.parametrize("epsilon", [None, 1e-6])
def test_three_axes_and_norms(section: tuple[int, ...], interleaved: bool, epsilon: float | None) -> None:
    Step(AttentionParameters(2, 1, 64, section, interleaved, epsilon), [0, 20]).check()
    Step(AttentionParameters(2, 1, 64, section, interleaved, epsilon), [20], int8=True, dtype=torch.bfloat16).check()


def test_a_head_of_40_pairs_turns_by_three_axes() -> None:
    Step(AttentionParameters(2, 1, 80, (15, 14, 11), True), [5, 20]).check()


def stock(step: Step) -> tuple[Tensor, Tensor, Tensor]:
    """The stock graph's operators on the same step: PagedAttention, and MRotaryEmbedding and norms before it."""
    size, batch = step.parameters, len(step.past)
    widths = [size.heads * size.head_dim] + [size.kv_heads * size.head_dim] * 2
    tensors, options = dict(step.tensors), dict[str, Any]()
    quantised = "PER_CHANNEL" if step.int8 else "NONE"
    parts: tuple[Tensor | None, ...] = (step.get("qkv"), None, None)
    tables: tuple[Tensor | None, ...] = (step.get("cosine"), step.get("sine"))
    norms: tuple[Tensor | None, ...] = (tensors["query_norm"], tensors["key_norm"])
    if size.mrope_section:
        *turned, value = torch.split(step.get("qkv"), widths, -1)
        positions = step.get("positions").long()[:, None]
        for index, heads in enumerate((size.heads, size.kv_heads)):
            x, norm = turned[index].reshape(batch, heads, -1), norms[index]
            x = x if norm is None else _norm(x, norm, size.qk_norm_epsilon or 0.0)
            rotary = _mrotary(
                *(x.reshape(1, batch, -1), positions, step.get("cosine"), step.get("sine")),
                mrope_section=size.mrope_section, mrope_layout=int(size.mrope_interleaved), num_heads=heads,
            )  # fmt: skip
            assert isinstance(rotary, Tensor)
            turned[index] = rotary.reshape(batch, -1)
        parts, tables, norms = (*turned, value), (None, None), (None, None)
    else:
        options = {"do_rotary": 1, "qk_norm_epsilon": size.qk_norm_epsilon or 0.0}
    caches = step.get("key_cache").clone(), step.get("value_cache").clone()
    out, key_cache, value_cache = _paged_attention(
        *(*parts, *caches, torch.arange(batch + 1, dtype=torch.int32), step.get("past"), step.get("block_table")),
        *(*tables, None, None, *norms, tensors["key_scale"], tensors["value_scale"]),
        num_heads=size.heads, kv_num_heads=size.kv_heads, k_quant_type=quantised, v_quant_type=quantised, **options,
    )  # fmt: skip
    assert out is not None
    assert key_cache is not None
    assert value_cache is not None
    return out, key_cache, value_cache


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize(("section", "interleaved"), [((), False), SECTIONED, INTERLEAVED])
@pytest.mark.parametrize("epsilon", [None, 1e-6])
def test_it_agrees_with_the_stock_operators(
    int8: bool, section: tuple[int, ...], interleaved: bool, epsilon: float | None
) -> None:
    step = Step(AttentionParameters(4, 2, 64, section, interleaved, epsilon), [18], int8=int8)
    out, *caches = step.run()
    expected, *stock_caches = stock(step)
    near(out, expected, 4 * UNIT[step.dtype])
    for found, other in zip(
        step.written((caches[0], caches[1])), step.written((stock_caches[0], stock_caches[1])), strict=True
    ):
        near(found, other, 1 / 127 if int8 else UNIT[step.dtype] * 2)


def test_an_int8_cache_is_rounded_to_even_and_cut_off() -> None:
    step = Step(AttentionParameters(1, 1, 32), [0], int8=True)
    values = torch.tensor([0.5, 1.5, -2.5, 126.5, 200.0, -127.5, -128.0, -1e4] * 4)
    step.get("qkv")[0, 64:] = values.half()
    step.get("value_scale")[:] = 1.0
    _, *caches = step.run()
    found = step.written((caches[0], caches[1]))[1].flatten()[:8]
    assert found.tolist() == [0, 2, -2, 126, 127, -128, -128, -128]


@pytest.mark.parametrize("size", [1e-4, 100.0])
def test_queries_tiny_and_huge_keep_their_precision_over_an_int8_cache(size: float) -> None:
    step = Step(AttentionParameters(2, 1, 64), [20], int8=True)
    step.get("qkv")[:, :128] *= size
    step.check()


def test_a_score_far_above_all_others_takes_everything() -> None:
    step = Step(AttentionParameters(2, 1, 64), [40])
    step.get("qkv")[:, :128] *= 200
    step.check()


def test_the_same_step_gives_the_same_bits_and_reads_nothing_left_in_scratch_memory() -> None:
    step = Step(AttentionParameters(2, 1, 64), [30, 3, 50], dtype=torch.float16)
    attention = step.attention()
    first, again, anew = step.run(attention), step.run(attention), step.run()
    for other in (again, anew):
        for a, b in zip(first, other, strict=True):
            assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def test_whole_and_split_sequences_agree() -> None:
    step = Step(AttentionParameters(2, 1, 64), [30, 3, 50])
    split, _, _ = step.run()
    step.multiprocessors = 1
    step.tile = AttentionTile(tokens=16, least=512)
    whole, _, _ = step.run()
    near(split, whole, 4 * UNIT[step.dtype])


def test_a_sequence_of_nan_leaves_the_others_as_they_are() -> None:
    step = Step(AttentionParameters(3, 1, 64), [20, 33, 5])
    clean, _, _ = step.run()
    step.get("qkv")[1] = math.nan
    out, *caches = step.run()
    assert torch.equal(out[[0, 2]], clean[[0, 2]])
    assert bool(out[1].isnan().all())
    step.written((caches[0], caches[1]))


def test_a_head_of_nan_leaves_the_other_heads_as_they_are() -> None:
    step = Step(AttentionParameters(3, 1, 64), [20])
    clean, _, _ = step.run()
    step.get("qkv")[0, 64:128] = math.nan
    out, _, _ = step.run()
    assert torch.equal(out[0, :64], clean[0, :64])
    assert torch.equal(out[0, 128:], clean[0, 128:])


def test_padding_rows_write_to_block_0_alone_and_are_finite() -> None:
    step = Step(AttentionParameters(3, 1, 64), [20, 0, 0])
    step.get("block_table")[1:] = 0
    out, *caches = step.run()
    assert bool(out.isfinite().all())
    alone = Step(AttentionParameters(3, 1, 64), [20, 0, 0])
    for name in ("key_cache", "value_cache"):
        assert torch.equal(alone.get(name)[1:].view(torch.uint8), step.get(name)[1:].view(torch.uint8))
    near(out[:1], step.expected()[0][:1], 4 * UNIT[step.dtype])
    for cache in caches:
        assert bool(cache[0, 0].isfinite().all())
        assert bool(cache[0, 1:].isnan().all())


def test_a_workspace_of_the_bytes_it_asks_for_is_enough_and_none_less() -> None:
    step = Step(AttentionParameters(3, 1, 64), [50, 90])
    columns = step.get("block_table").shape[1]
    needed = step.attention().scratch_bytes(2, columns * step.page, step.page, int8=False)
    step.run(step.attention(needed))
    with pytest.raises(DeviceOutOfMemory, match="workspace"):
        step.run(step.attention(needed - 256))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("qkv", lambda x: x[:, :-32]),
        ("qkv", lambda x: x.float()),
        ("value_cache", lambda x: x[:-1]),
        ("key_cache", lambda x: x.to(torch.int8)),
        ("positions", lambda x: torch.zeros(3, 2, dtype=torch.int32)),
        ("query_norm", lambda x: torch.ones(32, dtype=torch.float16)),
        ("value_scale", lambda x: torch.ones(1, 1, 32)),
        ("block_table", lambda x: x[:1]),
    ],
)
def test_arguments_that_do_not_fit_together_are_refused(name: str, change: Any) -> None:
    step = Step(AttentionParameters(3, 1, 32), [20, 4])
    step.tensors[name] = change(step.tensors[name])
    with pytest.raises(ValueError, match=r"queries|caches|rotary|norms|scales"):
        step.run()


def test_no_sequence_is_no_launch() -> None:
    step = Step(AttentionParameters(3, 1, 32), [0])
    for name in ("qkv", "past", "block_table"):
        step.tensors[name] = step.get(name)[:0]
    step.past = []
    assert step.run()[0].shape == (0, 96)
