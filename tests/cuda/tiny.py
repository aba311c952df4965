"""The tiny models as pytest's fixtures, and what differs among them on a GPU."""

from __future__ import annotations

import pytest

from tests.runtime.conftest import MODELS, Tiny, make_tiny

FUSABLE = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"]  # of those with three axes
LINEAR = ["qwen3_5", "qwen3_5_text"]  # with linear attention


@pytest.fixture(scope="session", params=list(MODELS))
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return make_tiny(request.param, tmp_path_factory)


@pytest.fixture(scope="session", params=FUSABLE)
def tiny_mrope(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """Three rotary positions per token, and layers that operators of our own compute."""
    return make_tiny(request.param, tmp_path_factory)


@pytest.fixture(scope="session", params=[*FUSABLE, *LINEAR])
def any_mrope(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """Three rotary positions per token."""
    return make_tiny(request.param, tmp_path_factory)
