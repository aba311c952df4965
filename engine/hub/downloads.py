"""Downloads in the background of one process: one for each model, however many ask."""

from __future__ import annotations

import logging
import threading
from concurrent.futures import Future
from pathlib import Path

from engine.catalog import folder_name
from engine.config import EngineConfig
from engine.errors import EngineError, ModelDownloading
from engine.hub.download import download, require_repository
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
        return ModelDownloading(f"downloading {label(name)}: {progress}; try again {then}")

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
        if problem is None:
            future.set_result(path)
        else:
            future.set_exception(problem)
