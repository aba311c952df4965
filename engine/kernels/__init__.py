"""Triton kernels. Imported only where torch.device is CUDA, or where Triton interprets them."""
