"""Training and evaluation data never mix."""

import random
from pathlib import Path

import pytest

from evaluation import easy_vqa, printed_words
from evaluation.samples import DataMissing, package_folder
from evaluation.words import LONGEST, SHORTEST, TEST_SHARE, split_of, words
from tools import demo_data
from tools.make_samples import WORDS


def test_easy_vqa_has_the_sizes_its_author_states() -> None:
    assert len(easy_vqa.questions("train")) == 38575
    assert len(easy_vqa.questions("test")) == 9673
    assert len({image_id for _, _, image_id in easy_vqa.questions("train")}) == 4000
    assert len({image_id for _, _, image_id in easy_vqa.questions("test")}) == 1000


def test_no_file_of_easy_vqa_is_in_both_splits() -> None:
    train = {easy_vqa.image_file("train", image_id) for image_id in range(4000)}
    test = {easy_vqa.image_file("test", image_id) for image_id in range(1000)}
    assert not train & test


def test_test_samples_are_all_of_the_test_split_and_nothing_else() -> None:
    samples = list(easy_vqa.test_samples())
    assert len(samples) == 9673
    test = {easy_vqa.image_file("test", image_id) for image_id in range(1000)}
    assert {sample.image for sample in samples} <= test


def test_a_word_has_one_side_whatever_its_case() -> None:
    train, test = set(words("train")), set(words("test"))
    assert not train & test
    assert len(test) > 10_000
    assert 0.9 < len(test) * TEST_SHARE / (len(train) + len(test)) < 1.1
    for word in random.Random(0).sample(sorted(test), 200):
        assert split_of(word.upper()) == split_of(word.title()) == split_of(word) == "test"


def test_printed_words_for_evaluation_are_words_of_the_test_side() -> None:
    answers = [sample.answer.lower() for sample in printed_words.test_samples(1000, seed=0)]
    assert len(set(answers)) == 1000
    assert set(answers) <= set(words("test"))
    assert all(SHORTEST <= len(answer) <= LONGEST for answer in answers)


def test_training_draws_words_of_the_train_side_only() -> None:
    """Random letters too: without their check about one in twenty would be on the other side."""
    rng = random.Random(1)
    drawn = {demo_data.training_word(rng) for _ in range(4000)}
    assert len(drawn) > 3000
    assert not drawn & set(words("test"))
    assert {split_of(word) for word in drawn} == {"train"}


def test_training_never_opens_a_test_file_of_easy_vqa(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: set[str] = set()
    real_folder = easy_vqa._folder

    def folder(split: easy_vqa.Split) -> Path:
        opened.add(split)
        return real_folder(split)

    monkeypatch.setattr(easy_vqa, "_folder", folder)
    easy_vqa.image_file.cache_clear()
    easy_vqa.questions.cache_clear()
    demo_data._easy_vqa_by_image.cache_clear()
    demo_data._easy_vqa_facts.cache_clear()
    rng = random.Random(2)
    for _ in range(60):
        demo_data.conversation(rng, 2)
    assert opened == {"train"}


def test_the_words_of_the_sample_images_are_unseen_too() -> None:
    assert {split_of(text) for _, text, *_ in WORDS} == {"test"}


def test_a_missing_package_is_named_with_its_fix() -> None:
    with pytest.raises(DataMissing, match="pip install nothing-of-the-kind==1"):
        package_folder("nothing_of_the_kind", "nothing-of-the-kind==1")
