"""The CPU dialect: fp32, or int8 quantised per row, on ONNX Runtime's CPU provider."""

from engine.graphs.cpu.decoder import DecoderInputs, cpu_decoder
from engine.graphs.cpu.delta_net import DeltaNetInputs
from engine.graphs.cpu.tower import TowerInputs, cpu_tower

__all__ = ["DecoderInputs", "DeltaNetInputs", "TowerInputs", "cpu_decoder", "cpu_tower"]
