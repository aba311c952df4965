"""In fp32, logits and features are transformers' to 1e-4."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from engine.checkpoints import Checkpoint, open_artifact
from engine.runtime import Decoder
from tests.runtime import models
from tests.runtime.cases import decode, make_case, prefill, relative_error
from tests.runtime.conftest import PROMPT, STEPS, Tiny

TOLERANCE = 1e-4


def test_image_features_are_the_references(tiny_vlm: Tiny) -> None:
    case = tiny_vlm.case
    features = tiny_vlm.encoder("fp32").encode(case.pictures)
    assert [len(part) for part in features] == [picture.tokens for picture in case.pictures]
    assert relative_error(np.concatenate(features), case.features) < TOLERANCE


def test_prefill_with_images_and_32_decode_steps_give_the_references_logits(tiny: Tiny) -> None:
    case, decoder, features = tiny.case, tiny.decoder("fp32"), tiny.features("fp32")
    prompt = prefill(decoder, 2, case, 0, PROMPT, features=features)
    assert relative_error(prompt, case.logits[:PROMPT]) < TOLERANCE
    steps = [decode(decoder, [(2, case, PROMPT + step)])[0] for step in range(STEPS)]
    assert relative_error(np.stack(steps), case.logits[PROMPT:]) < TOLERANCE


def test_embeddings_are_scaled_by_a_root_rounded_to_the_checkpoints_type(tmp_path: Path) -> None:
    stored = models.randomise(models.gemma3_text(hidden_size=96)).to(torch.bfloat16)  # type: ignore[arg-type]
    rounded = stored.model.embed_tokens.embed_scale.float()
    folder = models.save(stored, tmp_path / "gemma3_text")
    model = type(stored).from_pretrained(folder, dtype=torch.float32)
    assert model.model.embed_tokens.embed_scale != rounded, "the root of 96 has digits to lose"
    model.model.embed_tokens.embed_scale.copy_(rounded)
    checkpoint = Checkpoint.open(folder)
    case = make_case(model, checkpoint.spec, [], 20, seed=3)
    decoder = Decoder(open_artifact(checkpoint, "fp32", tmp_path), rows=1, context_length=32, threads=2)
    assert relative_error(prefill(decoder, 0, case, 0, 20), case.logits) < TOLERANCE


def test_a_cap_on_logits_is_applied(tmp_path: Path) -> None:
    model = models.randomise(models.gemma3_text(final_logit_softcapping=2.0))
    checkpoint = Checkpoint.open(models.save(model, tmp_path / "gemma3_text"))
    case = make_case(model, checkpoint.spec, [], 20, seed=3)
    decoder = Decoder(open_artifact(checkpoint, "fp32", tmp_path), rows=1, context_length=32, threads=2)
    assert 1.5 < np.abs(case.logits).max() < 2
    assert relative_error(prefill(decoder, 0, case, 0, 20), case.logits) < TOLERANCE


def test_a_prompt_in_chunks_gives_the_references_logits(tiny: Tiny) -> None:
    case, decoder, features = tiny.case, tiny.decoder("fp32"), tiny.features("fp32")
    for row, chunk in enumerate((1, 7, 64)):
        logits = prefill(decoder, row, case, 0, len(case), chunk, features)
        assert relative_error(logits, case.logits) < TOLERANCE, chunk


def test_rows_of_different_lengths_decode_together_while_others_wait_or_prefill(tiny: Tiny) -> None:
    case, decoder = tiny.case, tiny.decoder("fp32")
    others = [tiny.text_case(length, seed) for length, seed in ((40, 3), (70, 4), (33, 5))]
    # Rows 1 and 3 lie between the decoding ones: one half prefilled, one empty.
    for row, sequence, held in ((0, others[0], 5), (2, case, PROMPT), (4, others[1], 30), (5, others[2], 1)):
        prefill(decoder, row, sequence, 0, held)
    prefill(decoder, 1, case, 0, 50)
    found: dict[int, list[np.ndarray]] = {row: [] for row in (0, 2, 4, 5)}
    for step in range(STEPS):
        rows = [(4, others[1], 30 + step), (0, others[0], 5 + step), (2, case, PROMPT + step), (5, others[2], 1 + step)]
        for (row, _, _), logits in zip(rows, decode(decoder, rows), strict=True):
            found[row].append(logits)
    assert relative_error(np.stack(found[2]), case.logits[PROMPT:]) < TOLERANCE
    for row, sequence, held in ((0, others[0], 5), (4, others[1], 30), (5, others[2], 1)):
        assert relative_error(np.stack(found[row]), sequence.logits[held : held + STEPS]) < TOLERANCE
    # The waiting row was not touched: its prefill goes on.
    assert relative_error(prefill(decoder, 1, case, 50, PROMPT), case.logits[50:PROMPT]) < TOLERANCE


def test_a_prefix_put_back_from_another_row_continues_as_the_reference(tiny: Tiny) -> None:
    case, decoder = tiny.case, tiny.decoder("fp32")
    prefill(decoder, 0, case, 0, 64)
    decoder.write_kv(3, 0, decoder.read_kv(0, 0, 32))
    decoder.write_kv(3, 32, decoder.read_kv(0, 32, 64))
    decoder.write_state(3, decoder.read_state(0))
    assert relative_error(prefill(decoder, 3, case, 64, PROMPT), case.logits[64:PROMPT]) < TOLERANCE
    assert relative_error(decode(decoder, [(3, case, PROMPT)]), case.logits[PROMPT : PROMPT + 1]) < TOLERANCE


def test_three_positions_that_differ_turn_as_in_the_reference(tiny_mrope: Tiny) -> None:
    case = tiny_mrope.case_anywhere(40, seed=6)
    found = prefill(tiny_mrope.decoder("fp32"), 0, case, 0, len(case))
    assert relative_error(found, case.logits) < TOLERANCE
