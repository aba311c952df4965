"""What Triton compiles: where it is kept, and by which key it is found again."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from triton import knobs
from triton.runtime import JITFunction


def keep_compiled(folder: Path) -> None:
    """Have Triton keep it in `folder`, for the next start, unless TRITON_CACHE_DIR names a place.

    For the whole process. Without line numbers and the steps between source and binary: 90 KB a kernel instead of 550.
    Where nothing can be written it stays at Triton's own folder.
    """
    if os.environ.get("TRITON_CACHE_DIR"):
        return
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError:
        return
    if os.access(folder, os.W_OK | os.X_OK):
        knobs.cache.dir = str(folder)
        knobs.compilation.store_binary_only = True
        knobs.compilation.disable_line_info = True


def keyed[Kernel](kernel: Kernel) -> Kernel:
    """Decorates a kernel that is launched: makes its key in Triton's cache, after those of all functions that it calls.

    Triton puts a callee's global constants into a key only where the callee has one already (triton/runtime/jit.py,
    DependenciesFinder._update_hash). Made at launches, keys would depend on which kernel came first: the start that
    tunes left 50 kernels under keys for which no later one looks.
    """
    if isinstance(kernel, JITFunction):  # Triton's interpreter has none
        _make_key(kernel)
    return kernel


def _make_key(function: JITFunction[Any]) -> str:
    for other in function.fn.__globals__.values():
        if other is function:
            break  # what is defined behind it calls it
        if isinstance(other, JITFunction) and other.hash is None:
            _make_key(other)
    return str(function.cache_key)
