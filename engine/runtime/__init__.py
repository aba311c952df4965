"""ONNX Runtime sessions and KV memory; the only room that imports onnxruntime."""

import os

# Before the first import of onnxruntime, which may otherwise report usage.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

from engine.runtime.decoder import Decoder
from engine.runtime.encoder import Encoder

__all__ = ["Decoder", "Encoder"]
