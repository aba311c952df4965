"""An artifact's tensors on a device, in the forms that graphs ask for, each once."""

from __future__ import annotations

import warnings
from collections.abc import Iterable

import numpy as np
import torch

from engine.checkpoints.artifact import Artifact
from engine.graphs.cuda import DeviceWeight

_TORCH_TYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "int8": torch.int8,
    "uint8": torch.uint8,
}


def torch_type(name: str) -> torch.dtype:
    """Of a numpy type's name."""
    return _TORCH_TYPES[name]


class DeviceWeights:
    """Uploads what is asked for and shares it: rows of a tensor that is there already are a view of it."""

    def __init__(self, artifact: Artifact, device: torch.device) -> None:
        self._artifact = artifact
        self._device = device
        self._whole: dict[tuple[str, str, str], torch.Tensor] = {}
        self._scales: dict[str, torch.Tensor] = {}

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self._whole.values())

    def upload(self, wanted: Iterable[DeviceWeight]) -> dict[str, torch.Tensor]:
        """The tensors of a graph by name. Raises torch.OutOfMemoryError."""
        return {weight.name: self._tensor(weight) for weight in wanted}

    def _tensor(self, weight: DeviceWeight) -> torch.Tensor:
        key = (weight.source, weight.form, weight.dtype.name)
        if key not in self._whole:
            self._whole[key] = self._uploaded(weight)
        first, stop = weight.rows
        whole = self._whole[key]
        if weight.form == "block_scales":  # a repeated column: a sixteenth of the weights' bytes
            if weight.name not in self._scales:
                self._scales[weight.name] = whole[first:stop, None].expand(weight.shape).contiguous()
            return self._scales[weight.name]
        return whole[first:stop].view(weight.shape)

    def _uploaded(self, weight: DeviceWeight) -> torch.Tensor:
        tensor = _from_file(self._artifact.tensor(weight.source)).to(self._device)
        if weight.form == "blocks":
            return tensor.view(torch.uint8) ^ 0x80  # int8 + 128
        if tensor.dtype == torch.int8 and weight.form == "plain":
            scale = self._artifact.tensor(f"{weight.source.removesuffix('.weight')}.scale")
            tensor = tensor.float() * _from_file(scale).to(self._device)[:, None]
        return tensor.to(torch_type(weight.dtype.name))


def _from_file(array: np.ndarray[tuple[int, ...], np.dtype[np.generic]]) -> torch.Tensor:
    """A tensor over mapped bytes, which torch cannot know to be read-only and which nobody writes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        if array.dtype.name == "bfloat16":
            return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(array)
