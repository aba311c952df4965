"""A process that compiles a kernel for a GPU that need not be there, and says whether it was compiled already."""

# mypy: disallow-untyped-decorators=False

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import triton
import triton.language as tl
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from engine.kernels.compiled import keep_compiled


@triton.jit
def double(x: tl.tensor) -> None:
    tl.store(x, tl.load(x) * 2)


def main(folder: Path) -> None:
    keep_compiled(folder)
    hits: list[bool] = []

    def listen(*, cache_hit: bool, **_: Any) -> None:
        hits.append(cache_hit)

    knobs.compilation.listener = listen
    triton.compile(ASTSource(double, {"x": "*fp32"}, {}), target=GPUTarget("cuda", 90, 32))
    print(hits[0])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
