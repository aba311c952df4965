"""What callers of the decoder rely on besides numbers."""

from __future__ import annotations

import numpy as np
import psutil
import pytest

from engine.errors import InvalidConfig
from engine.runtime import Decoder, Encoder
from engine.runtime.kv_memory import KVMemory
from tests.runtime.cases import decode, decode_again, pieces, prefill
from tests.runtime.conftest import CONTEXT, Tiny, make_tiny


def test_a_middle_chunk_gives_no_logits_and_a_last_one_those_of_its_last_token(tiny_vlm: Tiny) -> None:
    case, decoder = tiny_vlm.case, tiny_vlm.decoder("int8")
    for start, stop in pieces(tiny_vlm.spec.decoder, case, 0, 40):  # one piece, if images are not apart
        every, part = prefill(decoder, 0, case, start, stop), slice(start, stop)
        inputs = (case.token_ids[part], case.positions[:, part], case.features, case.feature_index[part])
        assert decoder.prefill(1, start, *inputs, logits=False).shape == (0, tiny_vlm.spec.decoder.vocab)
        assert np.array_equal(decoder.prefill(1, start, *inputs, logits=True), every[-1:])


def test_images_that_see_themselves_are_not_mixed_with_text(tmp_path_factory: pytest.TempPathFactory) -> None:
    tiny = make_tiny("gemma3", tmp_path_factory)
    case, decoder = tiny.case, tiny.decoder("fp32")
    inputs = (case.token_ids[:40], case.positions[:, :40], case.features, case.feature_index[:40])
    with pytest.raises(ValueError, match="32 tokens of an image in one call with 8 of text"):
        decoder.prefill(0, 0, *inputs, logits=True)


def test_a_row_can_be_filled_to_the_last_place_and_others_go_on(tiny_vlm: Tiny) -> None:
    decoder = tiny_vlm.decoder("fp32")
    long, short = tiny_vlm.text_case(CONTEXT + 1, 11), tiny_vlm.text_case(30, 12)
    prefill(decoder, 1, long, 0, CONTEXT - 1)
    for row in (0, 2):
        prefill(decoder, row, short, 0, 10)
    decode(decoder, [(1, long, CONTEXT - 1)])
    full = decoder.read_kv(1, 0, CONTEXT)
    alone = decode_again(decoder, [(0, short, 10)])
    # Row 1 is full and lies between the decoding rows.
    together = decode(decoder, [(0, short, 10), (2, short, 10)])
    assert np.array_equal(together, np.concatenate([alone, alone]))
    assert np.array_equal(decoder.read_kv(1, 0, CONTEXT), full)
    with pytest.raises(ValueError, match="full"):
        decode(decoder, [(1, long, CONTEXT)])


def test_tokens_outside_a_row_are_refused(tiny_vlm: Tiny) -> None:
    case, decoder = tiny_vlm.case, tiny_vlm.decoder("fp32")
    with pytest.raises(ValueError, match=f"row of {CONTEXT}"):
        decoder.prefill(
            0,
            CONTEXT - 5,
            case.token_ids[:6],
            case.positions[:, :6],
            case.features,
            case.feature_index[:6],
            logits=True,
        )
    nothing = (case.token_ids[:0], case.positions[:, :0], case.features, case.feature_index[:0])
    with pytest.raises(ValueError, match="places 0 to 0"):
        decoder.prefill(0, 0, *nothing, logits=True)
    with pytest.raises(ValueError, match="places"):
        decoder.write_kv(0, CONTEXT - 1, np.zeros((2, 2, 2, 2, 16), np.float32))


def test_a_shorter_restart_forgets_what_was_behind_it(tiny_vlm: Tiny) -> None:
    case, decoder = tiny_vlm.case, tiny_vlm.decoder("fp32")
    fresh = prefill(decoder, 0, case, 0, 40)
    prefill(decoder, 1, tiny_vlm.text_case(100, 13), 0, 100)
    assert np.array_equal(prefill(decoder, 1, case, 0, 40), fresh)


def test_memory_is_committed_as_written_and_given_back_on_release(tiny_vlm: Tiny) -> None:
    spec = tiny_vlm.spec.decoder
    process = psutil.Process()
    before = process.memory_info().rss
    memory = KVMemory(spec, rows=64, tokens=100_000)
    assert 64 * 100_000 * spec.kv_bytes_per_token > 2**31, "large enough to be missed if it were committed"
    assert process.memory_info().rss - before < 16 * 2**20
    kv = np.ones((len(spec.attention_layers), 2, spec.kv_heads, 50_000, spec.head_dim), np.float32)
    used = process.memory_info().rss
    memory.write(7, 0, kv)
    assert process.memory_info().rss - used > kv.nbytes // 2
    assert np.array_equal(memory.read(7, 0, 50_000), kv)
    written = process.memory_info().rss
    memory.release(7)
    assert written - process.memory_info().rss > kv.nbytes // 2
    assert not memory.read(7, 0, 50_000).any()


def test_release_leaves_the_neighbouring_rows(tiny_vlm: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.runtime.decoder._KEPT_BYTES", 0)
    case, decoder = tiny_vlm.case, tiny_vlm.decoder("fp32")
    for row in range(3):
        prefill(decoder, row, case, 0, 60)
    kept = decoder.read_kv(0, 0, 60)
    decoder.release(1)
    assert not decoder.read_kv(1, 0, 60).any()
    assert np.array_equal(decoder.read_kv(0, 0, 60), kept)
    assert np.array_equal(decoder.read_kv(2, 0, 60), kept)


def test_a_short_row_keeps_its_pages_and_is_empty_all_the_same(tiny_vlm: Tiny) -> None:
    case, decoder = tiny_vlm.case, tiny_vlm.decoder("fp32")
    prefill(decoder, 0, case, 0, 60)
    decoder.release(0)
    assert decoder.read_kv(0, 0, 60).any()
    fresh = prefill(tiny_vlm.decoder("fp32"), 0, case, 0, 40)
    assert np.array_equal(prefill(decoder, 0, case, 0, 40), fresh)


def test_more_rows_than_there_are_addresses_are_a_clear_error(tiny_vlm: Tiny) -> None:
    with pytest.raises(InvalidConfig, match="lower max_batch_size"):
        KVMemory(tiny_vlm.spec.decoder, rows=1 << 20, tokens=1 << 30)


def test_weights_stay_in_the_artifacts_file(tiny_vlm: Tiny) -> None:
    """The fp32 embedding table is looked up, not multiplied, in an untied model: it is never copied."""
    artifact = tiny_vlm.artifact("fp32")
    before = psutil.Process().memory_maps(grouped=False)
    decoder = Decoder(artifact, rows=1, context_length=16, threads=1)
    mapped = [m for m in psutil.Process().memory_maps(grouped=False) if m.path == str(artifact.weights_path)]
    assert len(mapped) > len([m for m in before if m.path == str(artifact.weights_path)])
    del decoder


def test_no_images_are_no_work(tiny_vlm: Tiny) -> None:
    assert Encoder(tiny_vlm.artifact("fp32"), threads=1).encode([]) == []
