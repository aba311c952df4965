from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from engine.cache.record import HEADER_BYTES, Kind, decode_array, decode_bytes, encode_array, encode_bytes

KEY = b"key"


@pytest.mark.parametrize("payload", [b"", b"x", bytes(range(256)) * 300])
def test_bytes_come_back(payload: bytes) -> None:
    assert decode_bytes(Kind.ANSWER, KEY, encode_bytes(Kind.ANSWER, KEY, payload)) == payload


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("shape", [(0, 4), (1, 1), (7, 33)])
def test_arrays_come_back_bit_for_bit(dtype: type, shape: tuple[int, int]) -> None:
    array: NDArray[np.floating] = np.random.default_rng(0).standard_normal(shape).astype(dtype)
    array.reshape(-1)[:3] = np.array([np.nan, -0.0, np.inf], dtype)[: array.size]
    found = decode_array(Kind.FEATURES, KEY, encode_array(Kind.FEATURES, KEY, array))
    assert found is not None
    assert (found.dtype, found.shape, found.tobytes()) == (array.dtype, array.shape, array.tobytes())
    assert not found.flags.writeable


def test_an_array_that_is_not_contiguous_comes_back() -> None:
    array = np.arange(24, dtype=np.float32).reshape(4, 6).T
    found = decode_array(Kind.FEATURES, KEY, encode_array(Kind.FEATURES, KEY, array))
    assert found is not None
    assert np.array_equal(found, array)


@pytest.mark.parametrize("array", [np.zeros(3, np.float32), np.zeros((2, 2)), np.zeros((2, 2), np.int32)])
def test_other_arrays_are_refused(array: NDArray[np.floating]) -> None:
    with pytest.raises(ValueError, match="cannot keep"):
        encode_array(Kind.FEATURES, KEY, array)


def test_every_flipped_bit_and_every_truncation_is_a_miss() -> None:
    blob = encode_array(Kind.FEATURES, KEY, np.ones((2, 2), np.float32))
    for position in range(len(blob)):
        assert decode_array(Kind.FEATURES, KEY, blob[:position]) is None
        for bit in range(8):
            flipped = bytearray(blob)
            flipped[position] ^= 1 << bit
            assert decode_array(Kind.FEATURES, KEY, bytes(flipped)) is None
    assert decode_array(Kind.FEATURES, KEY, blob + b"\0") is None


def test_a_record_of_another_key_kind_or_form_is_a_miss() -> None:
    blob = encode_bytes(Kind.ANSWER, KEY, b"text")
    assert decode_bytes(Kind.ANSWER, b"other", blob) is None
    assert decode_bytes(Kind.FEATURES, KEY, blob) is None
    assert decode_array(Kind.ANSWER, KEY, blob) is None
    assert decode_bytes(Kind.FEATURES, KEY, encode_array(Kind.FEATURES, KEY, np.ones((1, 1), np.float32))) is None


@pytest.mark.parametrize("foreign", [None, 5, 1.5, "text", b"", b"\x80\x04N.", b"\0" * HEADER_BYTES, b"x" * 1000])
def test_anything_foreign_is_a_miss(foreign: object) -> None:
    assert decode_bytes(Kind.ANSWER, KEY, foreign) is None
    assert decode_array(Kind.FEATURES, KEY, foreign) is None
