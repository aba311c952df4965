"""The CUDA dialect: 16-bit activations, paged attention, one packed call per step; the wheel's own operators."""

from engine.graphs.cuda.decoder import cuda_decoder
from engine.graphs.cuda.inputs import PARTS, STATE_PARTS, StepInputs, UnfusedInputs
from engine.graphs.cuda.weights import CudaGraph, DeviceWeight

__all__ = ["PARTS", "STATE_PARTS", "CudaGraph", "DeviceWeight", "StepInputs", "UnfusedInputs", "cuda_decoder"]
