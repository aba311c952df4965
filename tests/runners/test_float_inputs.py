"""Choosing the layers whose activations stay in 16 bits, on costs that are known."""

from __future__ import annotations

import math

import numpy as np
import torch

from engine.runners.float_inputs import choose_float_inputs, mean_divergence

SIZES = {"qkv": 100, "out": 100, "gate_up": 200, "down": 200, "head": 1000}


class Costs:
    """Layers that cost what they cost alone, and `together` times the sum of it."""

    def __init__(self, together: float = 1.0, floor: float = 0.0, **costs: float) -> None:
        self.together, self.floor = together, floor
        self.costs = dict.fromkeys(SIZES, 0.0) | costs
        self.asked: list[frozenset[str]] = []

    def __call__(self, rounded: frozenset[str]) -> float:
        self.asked.append(rounded)
        total = sum(self.costs[name] for name in rounded)
        return self.floor + total * (self.together if len(rounded) > 1 else 1.0)

    def choose(self) -> frozenset[str]:
        return choose_float_inputs(SIZES, self, budget=10.0)


def test_a_model_without_outliers_is_measured_once_and_rounded_everywhere() -> None:
    costs = Costs(qkv=2, out=2, gate_up=2, down=2, head=2)
    assert costs.choose() == frozenset()
    assert len(costs.asked) == 1


def test_the_layer_that_breaks_the_budget_is_left_and_no_other() -> None:
    assert Costs(qkv=1, out=1, gate_up=1, down=500, head=1).choose() == {"down"}


def test_what_is_rounded_costs_the_budget_at_most() -> None:
    costs = Costs(qkv=6, out=5, gate_up=4, down=3, head=2)
    chosen = costs.choose()
    assert sum(costs.costs[name] for name in SIZES if name not in chosen) <= 10
    assert costs.asked[-1] == frozenset(SIZES) - chosen


def test_layers_that_save_more_work_for_the_same_cost_are_rounded_first() -> None:
    assert Costs(qkv=6, gate_up=6, down=6, head=6).choose() == {"qkv", "gate_up", "down"}


def test_layers_that_cost_more_together_are_left_one_by_one() -> None:
    costs = Costs(together=3.0, qkv=2, out=2.1, gate_up=2, down=2.1, head=1)
    assert costs.choose() == {"qkv", "out", "down"}


def test_what_any_change_costs_in_16_bits_does_not_count() -> None:
    costs = Costs(floor=4.0, qkv=20, out=1, gate_up=1, down=1, head=0)
    assert costs.choose() == {"qkv"}


def test_a_layer_whose_rounding_gives_no_number_is_left() -> None:
    assert Costs(qkv=math.nan).choose() == {"qkv"}


def test_a_model_that_gives_no_numbers_at_all_is_not_rounded() -> None:
    assert choose_float_inputs(SIZES, lambda _: math.nan) == frozenset(SIZES)


def test_the_divergence_is_that_of_the_distributions() -> None:
    random = np.random.default_rng(0)
    exact, found = random.normal(0, 3, (2, 150, 40))
    p, q = (np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in (exact, found))
    wanted = (p * np.log(p / q)).sum(-1).mean()
    tensors = [torch.from_numpy(x.astype(np.float32)) for x in (exact, found)]
    assert abs(mean_divergence(*tensors) - wanted) < 1e-5
    assert mean_divergence(tensors[0], tensors[0] + 7) < 1e-6
