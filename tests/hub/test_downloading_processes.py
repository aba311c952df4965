"""One download for all processes; one that is killed leaves what it has to the next."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from engine.catalog import known_models
from engine.hub.progress import model_state
from tests.hub.conftest import NAME, SHARDS
from tests.hub.stand_in import HubStandIn
from tests.hub.test_download import assert_is_whole

DOWNLOAD = """
import sys, threading
from pathlib import Path
from engine.config import EngineConfig
from engine.hub.download import download
print(download(sys.argv[1], EngineConfig(storage=Path(sys.argv[2]), hub_endpoint=sys.argv[3]), threading.Event()))
"""


def downloading(hub: HubStandIn, storage: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", DOWNLOAD, NAME, str(storage), hub.address]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def wait_for(condition: Callable[[], object]) -> None:
    limit = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.01)


def test_two_processes_fetch_every_file_once(hub: HubStandIn, tmp_path: Path) -> None:
    hub.faults.pause_s = 0.002
    processes = [downloading(hub, tmp_path) for _ in range(2)]
    answers = [process.communicate()[0].strip() for process in processes]
    assert answers == [str(tmp_path / "models" / "someone--tiny")] * 2
    assert set(hub.asked().values()) == {1}
    assert_is_whole(Path(answers[0]), hub)


def test_a_killed_download_is_no_model_and_the_waiting_process_goes_on_with_it(hub: HubStandIn, tmp_path: Path) -> None:
    hub.faults.pause_s = 0.02
    first = downloading(hub, tmp_path)
    wait_for(lambda: hub.asked()[SHARDS[0]])
    second = downloading(hub, tmp_path)
    time.sleep(0.3)
    assert model_state(NAME, tmp_path).state == "downloading"
    assert set(known_models(tmp_path)) == {"demo"}
    first.send_signal(signal.SIGKILL)
    first.communicate()
    hub.faults.pause_s = 0.0
    assert_is_whole(Path(second.communicate()[0].strip()), hub)
    continued = [headers.get("Range") for path, headers in hub.requests if path.endswith(SHARDS[0])]
    assert len(continued) == 2
    assert continued[1] is not None
    assert model_state(NAME, tmp_path).state == "here"


def test_a_killed_download_is_absent_until_somebody_asks_again(hub: HubStandIn, tmp_path: Path) -> None:
    hub.faults.pause_s = 0.02
    process = downloading(hub, tmp_path)
    wait_for(lambda: hub.asked()[SHARDS[0]])
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert model_state(NAME, tmp_path).state == "absent"
    assert set(known_models(tmp_path)) == {"demo"}
