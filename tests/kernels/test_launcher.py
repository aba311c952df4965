"""Launches past Triton's own, with a kernel that only notes how it was launched."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from triton.tools.tensor_descriptor import TensorDescriptor

from engine.kernels.launcher import Launcher
from engine.kernels.pointer import Tiled

OPTIONS = (("num_warps", 4),)


@dataclass
class Record:
    """An address with a type, as ONNX Runtime's memory comes."""

    address: int
    dtype: torch.dtype = torch.float16
    shape: tuple[int, ...] = (4,)

    def data_ptr(self) -> int:
        return self.address


class Kernel:
    """Compiles to a kernel that notes its launches."""

    def __init__(self) -> None:
        self.compiled: list[tuple[Any, ...]] = []
        self.straight: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, int, int]) -> Any:
        def launch(*arguments: Any, **options: int) -> Any:
            self.compiled.append((grid, arguments, options))
            return Straight(self)

        return launch


class Straight:
    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel

    def __getitem__(self, grid: tuple[int, int, int]) -> Any:
        return lambda *arguments: self._kernel.straight.append((grid, arguments))


def test_the_first_launch_is_tritons_and_later_ones_have_addresses_alone() -> None:
    kernel, pointer, other = Kernel(), Record(256), Record(512)
    launch = Launcher(kernel)
    launch((3, 1, 1), (pointer, None), (7,), (64, "none"), OPTIONS)
    launch((5, 2, 1), (other, None), (9,), (64, "none"), OPTIONS)
    assert kernel.compiled == [((3, 1, 1), (pointer, None, 7, 64, "none", False), {"num_warps": 4})]
    assert kernel.straight == [((5, 2, 1), (512, None, 9, 64, "none", False))]


@pytest.mark.parametrize(
    ("pointers", "constants", "options"),
    [
        ((Record(256, torch.bfloat16), None), (64, "none"), OPTIONS),
        ((Record(256), Record(256)), (64, "none"), OPTIONS),
        ((Record(256), None), (128, "none"), OPTIONS),
        ((Record(256), None), (64, "none"), (("num_warps", 8),)),
    ],
    ids=["type", "optional", "constant", "option"],
)
def test_another_kind_is_compiled_too(pointers: Any, constants: Any, options: Any) -> None:
    kernel = Kernel()
    launch = Launcher(kernel)
    launch((1, 1, 1), (Record(256), None), (1,), (64, "none"), OPTIONS)
    launch((1, 1, 1), pointers, (1,), constants, options)
    assert len(kernel.compiled) == 2
    assert not kernel.straight


def test_a_pointer_that_is_not_aligned_is_left_to_triton() -> None:
    kernel = Kernel()
    launch = Launcher(kernel)
    for address in (256, 258, 258, 256):
        launch((1, 1, 1), (Record(address),), (), (), OPTIONS)
    assert [arguments[0].address for _, arguments, _ in kernel.compiled] == [256, 258, 258]
    assert len(kernel.straight) == 1


def test_triton_takes_a_record_of_an_address_for_a_tensor() -> None:
    from triton.runtime.jit import mangle_type

    tensor = torch.zeros(64, dtype=torch.bfloat16)
    assert mangle_type(Record(tensor.data_ptr(), torch.bfloat16), True) == mangle_type(tensor, True) == "*bf16"


def test_tiles_of_a_matrix_are_described_for_tritons_launch_alone() -> None:
    kernel, block = Kernel(), [16, 32]
    launch = Launcher(kernel)
    matrices = [Tiled(Record(address, torch.int8), (8, 64), (64, 1), block) for address in (256, 512)]
    for matrix in matrices:
        launch((3, 1, 1), (matrix, None), (8,), (64,), OPTIONS)
    ((_, (described, *_), _),) = kernel.compiled
    assert isinstance(described, TensorDescriptor)
    assert (described.base, described.shape, described.block_shape) == (matrices[0].base, (8, 64), block)
    assert kernel.straight == [((3, 1, 1), (matrices[1], None, 8, 64, False))]
