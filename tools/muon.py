"""The Muon optimiser for the weight matrices: momentum, made orthogonal by five Newton-Schulz steps.

Source: Keller Jordan, https://kellerjordan.github.io/posts/muon/; the scale that lets it share AdamW's learning rates
is from Moonlight (https://arxiv.org/abs/2502.16982). Matrices of one shape are stepped together in one batched product.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn


class Muon:
    """Steps 2-D parameters; `momenta` is its whole state, one tensor [matrices, rows, columns] per shape."""

    def __init__(self, parameters: Iterable[nn.Parameter], momentum: float = 0.95, weight_decay: float = 0.05) -> None:
        self.momentum = momentum
        self.weight_decay = weight_decay
        self.groups: dict[tuple[int, ...], list[nn.Parameter]] = {}
        for parameter in parameters:
            self.groups.setdefault(tuple(parameter.shape), []).append(parameter)
        self.momenta = {shape: torch.zeros(len(g), *shape, device=g[0].device) for shape, g in self.groups.items()}

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """One step with this learning rate; gradients are kept."""
        for shape, parameters in self.groups.items():
            gradient = torch.stack([p.grad for p in parameters if p.grad is not None]).float()
            momentum = self.momenta[shape].lerp_(gradient, 1 - self.momentum)
            update = orthogonal(gradient.lerp(momentum, self.momentum))
            update *= -rate * 0.2 * max(shape) ** 0.5
            weights: list[Tensor] = [*parameters]
            torch._foreach_mul_(weights, 1 - rate * self.weight_decay)
            torch._foreach_add_(weights, [*torch.unbind(update, 0)])


def orthogonal(matrices: Tensor) -> Tensor:
    """The nearest orthogonal matrices, roughly: singular values end up between 0.7 and 1.2."""
    x: Tensor = matrices.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return (x.mT if tall else x).float()
