"""What a row gets does not depend, to the bit, on how and with whom it was computed."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from engine.checkpoints import Checkpoint, open_artifact
from engine.runtime import Decoder
from engine.spec import Precision
from tests.runtime import models
from tests.runtime.cases import decode, decode_again, make_case, pictures, pieces, prefill, relative_error
from tests.runtime.conftest import CONTEXT, PROMPT, ROWS, Tiny

both_precisions = pytest.mark.parametrize("precision", ["fp32", "int8"])


@both_precisions
def test_any_chunking_gives_the_same_logits_and_kv(tiny: Tiny, precision: Precision) -> None:
    case, decoder = tiny.case, tiny.decoder(precision)
    whole = prefill(decoder, 0, case, 0, PROMPT)
    kv, state = decoder.read_kv(0, 0, PROMPT), decoder.read_state(0)
    for chunk in (1, 2, 5, 16, 33, 64, 97, 112):
        assert np.array_equal(prefill(decoder, 1, case, 0, PROMPT, chunk), whole), chunk
        assert np.array_equal(decoder.read_kv(1, 0, PROMPT), kv), chunk
        assert np.array_equal(decoder.read_state(1), state), chunk


@both_precisions
def test_a_prompt_longer_than_any_block_of_attention_gives_the_same_logits(
    tmp_path: Path, precision: Precision
) -> None:
    rope = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
    model = models.randomise(models.llama(head_dim=64, max_position_embeddings=1024, rope_parameters=rope))
    checkpoint = Checkpoint.open(models.save(model, tmp_path / "llama"))
    artifact = open_artifact(checkpoint, precision, tmp_path)
    case = make_case(model, checkpoint.spec, [], 701, seed=3)
    decoder = Decoder(artifact, rows=2, context_length=1024, threads=2)
    whole = prefill(decoder, 0, case, 0, 700)
    for chunk in (100, 256, 257):
        assert np.array_equal(prefill(decoder, 1, case, 0, 700, chunk), whole), chunk
    assert np.array_equal(*decode(decoder, [(0, case, 700), (1, case, 700)]))
    if precision == "fp32":
        assert relative_error(whole, case.logits[:700]) < 1e-4


@both_precisions
def test_a_row_decodes_alone_as_in_a_batch_of_any_size_and_order(tiny: Tiny, precision: Precision) -> None:
    case, decoder = tiny.case, tiny.decoder(precision)
    lengths = (3, 20, 64, 65, 90, PROMPT)
    for row, length in enumerate(lengths):
        prefill(decoder, row, case, 0, length)
    alone = [decode_again(decoder, [(row, case, length)])[0] for row, length in enumerate(lengths)]
    for members in ((0, 1), (5, 3), (1, 2, 4), (4, 0, 2, 5), (5, 4, 3, 2, 1, 0)):
        together = decode_again(decoder, [(row, case, lengths[row]) for row in members])
        for row, logits in zip(members, together, strict=True):
            assert np.array_equal(logits, alone[row]), (members, row)


@both_precisions
def test_prompts_computed_beside_decode_steps_change_nothing(tiny: Tiny, precision: Precision) -> None:
    """Rows 1 and 3 are filled by other threads while each decode call writes to all of rows 0 to 4."""
    case, decoder = tiny.case, tiny.decoder(precision)
    whole = prefill(decoder, 5, case, 0, PROMPT)
    steady = [(row, case, PROMPT - 1) for row in (0, 2, 4)]
    for row, _, length in steady:
        prefill(decoder, row, case, 0, length)
    alone = decode_again(decoder, steady)
    with ThreadPoolExecutor(2) as pool:
        for chunk in (7, 32, 1) * 2:
            parts: dict[int, list[NDArray[np.float32]]] = {1: [], 3: []}
            for start, stop in pieces(tiny.spec.decoder, case, 0, PROMPT, chunk):
                for row in parts:
                    decoder.announce(row, stop)
                beside = {row: pool.submit(prefill, decoder, row, case, start, stop) for row in parts}
                assert np.array_equal(decode_again(decoder, steady), alone), (chunk, start)
                for row, part in beside.items():
                    parts[row].append(part.result())
            for row, chunks in parts.items():
                assert np.array_equal(np.concatenate(chunks), whole), (chunk, row)
                assert np.array_equal(decoder.read_kv(row, 0, PROMPT), decoder.read_kv(5, 0, PROMPT)), (chunk, row)
                assert np.array_equal(decoder.read_state(row), decoder.read_state(5)), (chunk, row)


@both_precisions
def test_a_restored_prefix_continues_as_a_computed_one(tiny: Tiny, precision: Precision) -> None:
    case, decoder = tiny.case, tiny.decoder(precision)
    whole = prefill(decoder, 0, case, 0, PROMPT)
    for length in (1, 16, 64, PROMPT - 1):
        decoder.release(4)
        prefill(decoder, 5, case, 0, length)
        decoder.write_kv(4, 0, decoder.read_kv(0, 0, length))
        decoder.write_state(4, decoder.read_state(5))
        assert np.array_equal(prefill(decoder, 4, case, length, PROMPT), whole[length:]), length
    assert np.array_equal(decode(decoder, [(4, case, PROMPT)]), decode(decoder, [(0, case, PROMPT)]))


@both_precisions
def test_the_number_of_threads_does_not_show(tiny: Tiny, precision: Precision) -> None:
    case = tiny.case
    results = []
    for threads in (1, 2, 3):
        decoder = Decoder(tiny.artifact(precision), rows=ROWS, context_length=CONTEXT, threads=threads)
        prompt = prefill(decoder, 0, case, 0, PROMPT)
        results.append(np.concatenate([prompt, decode(decoder, [(0, case, PROMPT)])]))
    assert np.array_equal(results[0], results[1])
    assert np.array_equal(results[0], results[2])


@both_precisions
def test_an_image_gets_the_same_features_alone_as_with_others(
    tiny_vlm: Tiny, precision: Precision, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = tiny_vlm.encoder(precision)
    images = pictures(tiny_vlm.spec, [(2, 2), (4, 2), (2, 2), (2, 4), (4, 2), (2, 2)], seed=7)
    together = encoder.encode(images)
    for image, features in zip(images, together, strict=True):
        assert np.array_equal(encoder.encode([image])[0], features)
    monkeypatch.setattr("engine.runtime.encoder.PATCHES_PER_CALL", 1)
    for features, split in zip(together, encoder.encode(images), strict=True):
        assert np.array_equal(features, split)
