"""Linear layers over int8 weights, fused with the norm before and the activation and sum after."""

from engine.kernels.linear.layer import Int8Linear, LinearParameters

__all__ = ["Int8Linear", "LinearParameters"]
