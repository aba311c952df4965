"""Threads beside one that captures a CUDA graph."""

from __future__ import annotations

import ctypes
import logging
import threading

logger = logging.getLogger(__name__)
_RUNTIME = "libcudart.so.13"  # torch has loaded it
_RELAXED = 2  # cudaStreamCaptureModeRelaxed
_thread = threading.local()


def allow_beside_capture() -> None:
    """Let this thread allocate and wait for events while another one captures; once for each thread is enough.

    ONNX Runtime captures in CUDA's global mode: whatever a thread does that a capture cannot hold, an allocation or a
    look at an event, breaks it, even on another device. A thread in relaxed mode is exempt (CUDA Runtime API,
    cudaThreadExchangeStreamCaptureMode).
    """
    if getattr(_thread, "relaxed", False):
        return
    _thread.relaxed = True
    mode = ctypes.c_int(_RELAXED)
    try:
        code = ctypes.CDLL(_RUNTIME).cudaThreadExchangeStreamCaptureMode(ctypes.byref(mode))
    except (OSError, AttributeError) as error:
        logger.warning("a model that loads may disturb one that runs: %s", error)
        return
    if code:
        logger.warning("a model that loads may disturb one that runs: CUDA error %d", code)
