"""Logits to tokens: penalties, temperature, truncation and the draw, for a whole batch in one go."""

from engine.sampling.grammar import Grammars, constrain, masks
from engine.sampling.sampler import NO_TOKEN, sample
from engine.sampling.state import SamplerState

__all__ = ["NO_TOKEN", "Grammars", "SamplerState", "constrain", "masks", "sample"]
