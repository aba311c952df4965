"""Where Triton keeps what it compiles."""

from __future__ import annotations

import os
from pathlib import Path

from triton import knobs


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
