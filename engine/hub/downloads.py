"""Downloads in the background of one process: one for each model, however many ask."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

from engine.catalog import find_checkpoint, folder_name
from engine.config import EngineConfig
from engine.errors import EngineError, EngineStopped, ModelDownloading, UnknownModel
from engine.hub.download import download
from engine.hub.origin import require_repository
from engine.hub.progress import Progress, label, model_state

CLOSE_S = 2.0  # for the threads to see that they are to stop; what they have fetched is on the disk anyway

logger = logging.getLogger(__name__)


class Downloads:
    """Safe for any number of threads."""

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._running: dict[str, tuple[Future[Path], threading.Thread]] = {}  # by folder
        self._failures: dict[str, EngineError] = {}  # of the last try

    def start(self, name: str) -> Future[Path]:
        """The download of a model, started unless it is under way; its result is the folder.

        Raises UnknownModel for a name that cannot be downloaded.
        """
        require_repository(name, self._config)
        folder = folder_name(name)
        with self._lock:
            if folder in self._running:
                return self._running[folder][0]
            future: Future[Path] = Future()
            thread = threading.Thread(target=self._run, args=(name, future), name=f"download-{folder}", daemon=True)
            self._running[folder] = future, thread
        thread.start()
        return future

    def require(self, name: str) -> bool:
        """Whether the model is here. Raises UnknownModel when it is not and cannot be downloaded either. Cheap."""
        with contextlib.suppress(UnknownModel):
            return find_checkpoint(name, self._config.storage).is_dir()
        require_repository(name, self._config)
        return False

    def after[T](self, name: str, load: Callable[[], Future[T]]) -> Future[T]:
        """What `load` starts, now or when the model has been downloaded; its failure says why it will not come."""
        try:
            return load() if self.require(name) else _then(self.start(name), load)
        except UnknownModel as error:  # taken away since somebody looked
            failed: Future[T] = Future()
            failed.set_exception(error)
            return failed

    def wait(self, name: str) -> None:
        """Until the model is here, `download_wait_s` at most. Raises ModelDownloading, or why it will not come."""
        if not self.require(name):
            try:
                self.start(name).result(self._config.download_wait_s)
            except TimeoutError:
                raise self.note(name) from None

    def is_running(self, name: str) -> bool:
        return folder_name(name) in self._running

    def names(self) -> list[str]:
        """The folders that are being filled."""
        with self._lock:
            return sorted(self._running)

    def progress(self, name: str) -> Progress:
        return model_state(name, self._config.storage).progress or Progress(0, 0)

    def note(self, name: str) -> ModelDownloading:
        """What to tell somebody who waits no longer."""
        progress = self.progress(name)
        then = "then" if progress.seconds_left is not None else "in a moment"
        # Trying may take longer than anybody waits: why it did not work must still reach somebody.
        failure = self._failures.get(folder_name(name)) if not progress.rate else None
        before = f" (the last try failed: {failure})" if failure else ""
        return ModelDownloading(f"downloading {label(name)}: {progress}{before}; try again {then}")

    def close(self) -> None:
        """Stop all; what has come so far stays on the disk for the next time."""
        self._stop.set()
        with self._lock:
            threads = [thread for _, thread in self._running.values()]
        for thread in threads:
            thread.join(CLOSE_S)

    def _run(self, name: str, future: Future[Path]) -> None:
        problem: BaseException | None = None
        try:
            logger.info("downloading %s from %s", name, self._config.hub_endpoint)
            path = download(name, self._config, self._stop)
        except EngineError as error:
            logger.warning("downloading %s failed: %s", name, error)
            problem = error
        except Exception as error:  # a thread that dies would leave everybody who waits for it hanging
            logger.exception("downloading %s failed", name)
            problem = EngineError(f"downloading {name} failed: {type(error).__name__}: {error}")
        with self._lock:  # before anybody hears of the end: who asks again then starts anew
            del self._running[folder_name(name)]
            self._failures.pop(folder_name(name), None)
            if isinstance(problem, EngineError):
                self._failures[folder_name(name)] = problem
        if problem is None:
            future.set_result(path)
        else:
            future.set_exception(problem)


def _then[T](first: Future[Path], second: Callable[[], Future[T]]) -> Future[T]:
    """What `second` starts when `first` has succeeded; `first`'s failure when it has not."""
    result: Future[T] = Future()

    def pass_on(done: Future[T]) -> None:
        problem = done.exception()
        if problem is None:
            result.set_result(done.result())
        else:
            result.set_exception(problem)

    def go_on(done: Future[Path]) -> None:
        problem = done.exception()
        try:
            if problem is None:
                second().add_done_callback(pass_on)
        except RuntimeError:  # an executor that takes no more work
            problem = EngineStopped("the engine is shutting down")
        if problem is not None:
            result.set_exception(problem)

    first.add_done_callback(go_on)
    return result
