"""The Triton kernels on the CPU: test_device_sampler.py in a process whose Triton interprets instead of compiling."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.kernels.triton_tests import run_cases

pytest.importorskip("triton")


def test_interpreted_kernels_pass_the_tests_of_the_device_sampler() -> None:
    run_cases(Path(__file__).with_name("test_device_sampler.py"), interpreted=True)
