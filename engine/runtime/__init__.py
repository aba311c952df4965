"""ONNX Runtime sessions and KV memory; the only room that imports onnxruntime."""

from engine.runtime.decoder import Decoder
from engine.runtime.encoder import Encoder

__all__ = ["Decoder", "Encoder"]
