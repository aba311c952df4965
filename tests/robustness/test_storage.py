"""Storage that is full, read-only, or gone: a sentence that names the fix, and the next request works."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from cli.daemon import Daemon, PluginError
from tests.end_to_end.asking import about, children_of, is_gone, picture, text_of
from tests.robustness.conftest import QUESTION, ROOT, Works
from tests.robustness.disks import Unavailable, fill, largest_file, read_only, small_disk

Form = dict[str, str]


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """A folder on a disk of its own, of so many MiB; the test is skipped where nothing may be mounted."""
    with ExitStack() as mounts:

        def mount(mib: int) -> Path:
            folder = tmp_path / "disk"
            folder.mkdir()
            try:
                mounts.enter_context(small_disk(folder, mib))
            except Unavailable as reason:
                pytest.skip(str(reason))
            return folder

        yield mount


def _chunks(plugin: Daemon, form: Form, color: str = "red", question: str = QUESTION, **options: Any) -> list[Any]:
    return list(plugin.invoke_llm(about(picture(color=color), question), credentials=form, **options))


def _assert_refused(plugin: Daemon, form: Form, *fragments: str) -> None:
    with pytest.raises(PluginError) as raised:
        _chunks(plugin, form)
    assert raised.value.kind == "InvokeServerUnavailableError"
    assert [fragment for fragment in fragments if fragment not in str(raised.value)] == [], str(raised.value)


def test_a_disk_too_small_for_the_model_is_named_and_room_is_enough(
    plugin: Daemon, works: Works, mounted: Callable[[int], Path]
) -> None:
    storage = mounted(9)
    form = {"storage": str(storage), "threads": "1"}
    ballast = fill(storage, leave=1 << 20)
    _assert_refused(plugin, form, f"no space left for {storage}", "free some, or name another storage folder")
    assert list((storage / "artifacts").glob("*.partial")) == []
    with pytest.raises(PluginError, match=r"MiB free; at least .* are needed: free some"):
        plugin.validate_provider(form)
    works()
    ballast.unlink()
    assert text_of(_chunks(plugin, form)).strip() == "circle"


def test_a_disk_without_a_single_byte_is_named(plugin: Daemon, works: Works, mounted: Callable[[int], Path]) -> None:
    storage = mounted(1)
    fill(storage)
    _assert_refused(plugin, {"storage": str(storage)}, "no space left", "free some")
    works()


def test_a_limit_on_file_sizes_is_an_error_and_not_a_crash(tmp_path: Path) -> None:
    with Daemon(ROOT, credentials={"storage": str(tmp_path / "storage")}) as plugin:
        with largest_file(plugin.pid, 1 << 20):
            _assert_refused(plugin, plugin.credentials, "no space left for", "free some")
        (engine,) = children_of(plugin.pid)
        assert not is_gone(engine)


def test_requests_go_on_when_the_caches_find_no_room(
    plugin: Daemon, works: Works, mounted: Callable[[int], Path]
) -> None:
    storage = mounted(16)
    form = {"storage": str(storage), "threads": "1"}
    _chunks(plugin, form)  # converts the model and makes the caches
    ballast = fill(storage)
    _assert_answers_without_cache(plugin, form)
    works()
    ballast.unlink()
    _becomes_cached(plugin, form, "blue")


def test_requests_go_on_when_the_caches_may_not_grow(plugin: Daemon, works: Works, tmp_path: Path) -> None:
    form = {"storage": str(tmp_path), "threads": "1"}
    others = children_of(plugin.pid)
    _chunks(plugin, form)
    (engine,) = set(children_of(plugin.pid)) - set(others)
    with largest_file(engine, 1000):
        _assert_answers_without_cache(plugin, form)
    works()
    _becomes_cached(plugin, form, "blue")


def _assert_answers_without_cache(plugin: Daemon, form: Form) -> None:
    for number in range(40):
        assert text_of(_chunks(plugin, form, f"#{number:02x}2020")).strip() == "circle"
    assert f"{form['storage']}/cache/features-v1 could not be" in plugin.stderr_tail  # said once


def test_a_read_only_storage_folder_is_named_by_the_form_and_by_requests(
    plugin: Daemon, works: Works, tmp_path: Path
) -> None:
    form = {"storage": str(tmp_path)}
    with _read_only_or_skip(tmp_path):
        _assert_refused(plugin, form, f"{tmp_path} cannot be", "storage folder in the form")
        with pytest.raises(PluginError, match=f"{tmp_path} cannot be .* storage folder in the form"):
            plugin.validate_provider(form)
        works()
    assert text_of(_chunks(plugin, form)).strip() == "circle"


def test_requests_go_on_when_the_storage_folder_becomes_read_only(
    plugin: Daemon, works: Works, tmp_path: Path, brought: Callable[[str], Path], storage: Path
) -> None:
    form = {"storage": str(tmp_path), "threads": "1"}
    assert text_of(_chunks(plugin, form, "red")).strip() == "circle"
    shutil.copytree(brought("later"), tmp_path / "models" / "later")
    with _read_only_or_skip(tmp_path):
        assert text_of(_chunks(plugin, form, "red")).strip() == "circle"
        assert text_of(_chunks(plugin, form, "green")).strip() == "circle"
        works()
        later = _chunks(plugin, form, model="later")  # the same weights, so the same artifact, which is there
        assert text_of(later).strip() == "circle"


def test_a_storage_folder_removed_under_a_running_plugin_is_made_again(
    plugin: Daemon, works: Works, tmp_path: Path
) -> None:
    storage = tmp_path / "storage"
    form = {"storage": str(storage), "threads": "1"}
    _chunks(plugin, form, "red")
    shutil.rmtree(storage)
    for color in ("red", "green"):  # the model is in memory, the caches are gone
        assert text_of(_chunks(plugin, form, color)).strip() == "circle"
    _becomes_cached(plugin, form, "blue")
    shutil.copytree(ROOT / "demo", storage / "models" / "new")
    assert text_of(_chunks(plugin, form, model="new")).strip() == "circle"
    works()


def test_a_missing_storage_folder_is_created_for_this_user_alone(plugin: Daemon, tmp_path: Path) -> None:
    storage = tmp_path / "not" / "there"
    assert text_of(_chunks(plugin, {"storage": str(storage), "threads": "1"})).strip() == "circle"
    assert storage.stat().st_mode & 0o777 == 0o700
    assert (storage / "artifacts").is_dir()


def _becomes_cached(plugin: Daemon, form: Form, color: str) -> None:
    """Asked again and again, a request is answered from the cache before long: the cache has recovered."""
    deadline = time.monotonic() + 60
    while _chunks(plugin, form, color)[-1]["system_fingerprint"] != "tessera/answer-cache":
        assert time.monotonic() < deadline
        time.sleep(0.2)


def _read_only_or_skip(folder: Path) -> ExitStack:
    stack = ExitStack()
    try:
        stack.enter_context(read_only(folder))
    except Unavailable as reason:
        pytest.skip(str(reason))
    return stack
