"""The one int8 format: symmetric, one scale per row, no calibration."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def quantise_rows(rows: NDArray[np.float32]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """[n, k] to int8 [n, k] and scale [n], so that int8 * scale is nearest to the row.

    scale = max|row| / 127, values rounded half to even; a row of zeros has scale 0.
    """
    scale = np.abs(rows).max(axis=1, initial=0.0) / np.float32(127)
    divisor = np.where(scale > 0, scale, np.float32(1))
    values = np.clip(np.rint(rows / divisor[:, None]), -127, 127)
    return values.astype(np.int8), scale.astype(np.float32)
