"""Operators that move values and compute none, and reductions."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest

import torch
from torch import Tensor

from tests.cuda.operators import operator, torch_dtype, wide


@operator("Reshape")
def _reshape(x: Tensor, shape: Tensor, allowzero: int = 0) -> Tensor:
    wanted = shape.tolist()
    return x.reshape([x.shape[i] if size == 0 and not allowzero else size for i, size in enumerate(wanted)])


@operator("Transpose")
def _transpose(x: Tensor, perm: Sequence[int] | None = None) -> Tensor:
    return x.permute(*(perm or range(x.dim() - 1, -1, -1))).contiguous()


@operator("Unsqueeze")
def _unsqueeze(x: Tensor, axes: Tensor) -> Tensor:
    rank = x.dim() + axes.numel()
    for axis in sorted(place % rank for place in axes.tolist()):
        x = x.unsqueeze(axis)
    return x


@operator("Squeeze")
def _squeeze(x: Tensor, axes: Tensor | None = None) -> Tensor:
    return x.squeeze() if axes is None else x.squeeze(tuple(axes.tolist()))


@operator("Concat")
def _concat(*parts: Tensor, axis: int) -> Tensor:
    return torch.cat(parts, axis)


@operator("Split")
def _split(x: Tensor, sizes: Tensor | None = None, axis: int = 0, num_outputs: int = 0) -> Sequence[Tensor]:
    if sizes is None:
        sizes_each = -(-x.shape[axis] // num_outputs)
        return [part.contiguous() for part in torch.split(x, sizes_each, axis)]
    return [part.contiguous() for part in torch.split(x, sizes.tolist(), axis)]


@operator("Slice")
def _slice(x: Tensor, starts: Tensor, ends: Tensor, axes: Tensor | None = None, steps: Tensor | None = None) -> Tensor:
    places = list(range(starts.numel())) if axes is None else axes.tolist()
    strides = [1] * len(places) if steps is None else steps.tolist()
    cut = [slice(None)] * x.dim()
    for axis, start, end, stride in zip(places, starts.tolist(), ends.tolist(), strides, strict=True):
        cut[axis] = slice(start, end, stride)
    return x[tuple(cut)].contiguous()


@operator("Gather")
def _gather(x: Tensor, indices: Tensor, axis: int = 0) -> Tensor:
    size = x.shape[axis]
    assert bool(((indices >= -size) & (indices < size)).all()), "Gather reads outside its table"
    flat = x.index_select(axis, (indices.reshape(-1) % size).long())
    axis %= x.dim()
    return flat.reshape(*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :])


@operator("GatherND")
def _gather_nd(x: Tensor, indices: Tensor, batch_dims: int = 0) -> Tensor:
    assert batch_dims == 0
    return x[tuple(indices.unbind(-1))]


@operator("ScatterND")
def _scatter_nd(x: Tensor, indices: Tensor, updates: Tensor, reduction: str = "none") -> Tensor:
    assert reduction == "none"
    assert x.dtype == updates.dtype
    result = x.clone()
    result[tuple(indices.unbind(-1))] = updates
    return result


@operator("Expand")
def _expand(x: Tensor, shape: Tensor) -> Tensor:
    return x.expand(
        [max(sizes) for sizes in zip_longest(x.shape[::-1], shape.tolist()[::-1], fillvalue=1)][::-1]
    ).contiguous()


@operator("Tile")
def _tile(x: Tensor, repeats: Tensor) -> Tensor:
    return x.repeat(*repeats.tolist())


@operator("Shape")
def _shape(x: Tensor, start: int = 0, end: int | None = None) -> Tensor:
    return torch.tensor(list(x.shape)[start:end], dtype=torch.int64)


@operator("Range")
def _range(start: Tensor, limit: Tensor, delta: Tensor) -> Tensor:
    return torch.arange(start.item(), limit.item(), delta.item(), dtype=start.dtype)


@operator("ConstantOfShape")
def _constant_of_shape(shape: Tensor, value: Tensor | None = None) -> Tensor:
    fill = torch.zeros(1) if value is None else value
    return fill.expand(shape.tolist()).contiguous()


@operator("Constant")
def _constant(value: Tensor) -> Tensor:
    return value


@operator("CumSum")
def _cumsum(x: Tensor, axis: Tensor, exclusive: int = 0, reverse: int = 0) -> Tensor:
    assert not exclusive
    assert not reverse
    return torch.cumsum(x, int(axis)).to(x.dtype)


@operator("ReduceMax")
def _reduce_max(x: Tensor, axes: Tensor | None = None, keepdims: int = 1, noop_with_empty_axes: int = 0) -> Tensor:
    return torch.amax(x, tuple(axes.tolist()) if axes is not None else (), keepdim=bool(keepdims))


@operator("ReduceSum")
def _reduce_sum(x: Tensor, axes: Tensor | None = None, keepdims: int = 1, noop_with_empty_axes: int = 0) -> Tensor:
    assert axes is not None
    return torch.sum(wide(x), tuple(axes.tolist()), keepdim=bool(keepdims)).to(x.dtype)


@operator("ReduceMean")
def _reduce_mean(x: Tensor, axes: Tensor | None = None, keepdims: int = 1, noop_with_empty_axes: int = 0) -> Tensor:
    assert axes is not None
    return torch.mean(wide(x), tuple(axes.tolist()), keepdim=bool(keepdims)).to(x.dtype)


@operator("EyeLike")
def _eye_like(x: Tensor, dtype: int = 1, k: int = 0) -> Tensor:
    assert k == 0
    return torch.eye(*x.shape, dtype=torch_dtype(dtype))
