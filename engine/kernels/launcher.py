"""Launching a compiled kernel with little Python: an eager prefill is a few hundred launches of microseconds each."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

from triton.tools.tensor_descriptor import TensorDescriptor

from engine.kernels.overlap import early, launch_options
from engine.kernels.pointer import Tensor, Tiled

ALIGNED = 16  # bytes; where all pointers are, one compiled kernel serves every call


class Launcher:
    """Launches one Triton kernel whose parameters are pointers, then integers, then constants, the last of them EARLY
    (engine/kernels/overlap.py), which is added here.

    The first launch of a kind (constants, options and the pointers' types alike) goes through Triton, which compiles.
    It looks at every argument of every launch, some 20 us; so later ones go to the kernel that it found, with addresses
    alone. A call with a pointer that is not aligned is Triton's again. Integers must be `do_not_specialize` parameters.
    For one device, the current one of the first launch.
    """

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel
        self._compiled: dict[Hashable, Any] = {}
        self._early = False

    def __call__(
        self,
        grid: tuple[int, int, int],
        pointers: tuple[Tensor | Tiled | None, ...],
        integers: tuple[int, ...],
        constants: tuple[Hashable, ...],
        options: tuple[tuple[str, int], ...],
    ) -> None:
        """options: num_warps, num_stages and the like. Whatever the arguments, the launch is on the current stream."""
        addresses = [one if one is None or isinstance(one, Tiled) else one.data_ptr() for one in pointers]
        key = (constants, options, tuple([None if one is None else one.dtype for one in pointers]))
        aligned = not any(address % ALIGNED for address in addresses if isinstance(address, int))
        compiled = self._compiled.get(key) if aligned else None
        if compiled is not None:
            compiled[grid](*addresses, *integers, *constants, self._early)
            return
        overlaps = early()
        chosen = dict(options) | launch_options(early=overlaps)
        described = [TensorDescriptor(*one) if isinstance(one, Tiled) else one for one in pointers]
        compiled = self._kernel[grid](*described, *integers, *constants, overlaps, **chosen)
        if aligned:
            self._compiled[key], self._early = compiled, overlaps  # None from Triton's interpreter
