"""The tiny models that have graphs on a GPU: linear attention runs on the CPU only so far."""

from __future__ import annotations

import pytest

from tests.runtime.conftest import MODELS, Tiny, make_tiny

LINEAR = {"qwen3_5", "qwen3_5_text"}
ON_GPU = [name for name in MODELS if name not in LINEAR]


@pytest.fixture(scope="session", params=ON_GPU)
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return make_tiny(request.param, tmp_path_factory)


@pytest.fixture(scope="session", params=["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def tiny_mrope(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """Three rotary positions per token."""
    return make_tiny(request.param, tmp_path_factory)
