"""The stand-in enforces the daemon's rules: shown with plugins of a few lines that break them."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cli.daemon import Daemon, PluginCrashed, PluginError, RequestTimeout, Rules

PRELUDE = """
import json, os, sys, time

def send(event, session=None, data=None):
    print(json.dumps({"event": event, "session_id": session, "data": data}) + "\\n", flush=True)

def stream(session, value):
    send("session", session, {"type": "stream", "data": {"value": value}})

def end(session):
    send("session", session, {"type": "end", "data": {}})

def requests():
    for line in sys.stdin:
        request = json.loads(line)
        yield request["session_id"], request["data"]

print(json.dumps({"name": "tiny", "cwd": os.getcwd(), "install": os.environ["INSTALL_METHOD"]}) + "\\n", flush=True)
send("heartbeat", data={})
"""
Start = Callable[..., Daemon]


@pytest.fixture
def start(tmp_path: Path) -> Start:
    def starting(body: str, rules: Rules | None = None) -> Daemon:
        (tmp_path / "main.py").write_text(PRELUDE + body)
        return Daemon(tmp_path, rules=rules)

    return starting


def values(daemon: Daemon, word: str = "") -> list[object]:
    return [answer["value"] for answer in daemon.send({"word": word}, buffer=512)]


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_plugin_runs_in_its_folder_and_its_manifest_is_read(start: Start, tmp_path: Path) -> None:
    with start("sys.stdin.read()") as daemon:
        assert daemon.manifest == {"name": "tiny", "cwd": str(tmp_path), "install": "local"}


def test_answers_arrive_in_order_with_their_times(start: Start) -> None:
    with start("for s, d in requests():\n  [stream(s, n) for n in range(3)]\n  end(s)") as daemon:
        session = daemon.send({}, buffer=512)
        assert [answer["value"] for answer in session] == [0, 1, 2]
        assert session.sent_at <= session.arrivals[0] <= session.arrivals[1] <= session.arrivals[2]


def test_an_error_message_is_raised_with_difys_name(start: Start) -> None:
    error = '{"error_type": "InvokeRateLimitError", "message": "full", "args": {"description": "full"}}'
    body = f'for s, d in requests():\n  send("session", s, {{"type": "error", "data": {error}}})\n  end(s)'
    with start(body) as daemon, pytest.raises(PluginError, match=r"^full$") as raised:
        values(daemon)
    assert raised.value.kind == "InvokeRateLimitError"


def test_an_error_event_ends_its_session(start: Start) -> None:
    body = 'for s, d in requests():\n  send("error", s, {"error": "no such route"})'
    with start(body) as daemon, pytest.raises(PluginError, match="no such route"):
        values(daemon)


def test_lines_that_are_no_messages_are_counted_as_noise(start: Start) -> None:
    body = 'for s, d in requests():\n  print("hello")\n  print("[1]")\n  stream(s, 1)\n  end(s)'
    with start(body) as daemon:
        assert values(daemon) == [1]
        assert daemon.noise == ["hello\n", "[1]\n"]


def test_a_line_at_the_limit_passes_and_one_over_it_kills(start: Start) -> None:
    body = (
        "for s, d in requests():\n"
        '  empty = {"event": "session", "session_id": s, "data": {"type": "stream", "data": {"value": ""}}}\n'
        '  stream(s, "x" * (int(d["word"]) - len(json.dumps(empty)) - 1))\n'
        "  end(s)"
    )
    with start(body, Rules(max_line_bytes=5000)) as daemon:
        assert len(str(values(daemon, "5000")[0])) > 4000
        assert daemon.longest_line == 5000
        with pytest.raises(PluginCrashed, match="longer than 5000 bytes"):
            values(daemon, "5001")
        assert daemon.killed_for


def test_silence_kills(start: Start) -> None:
    with start("time.sleep(60)", Rules(silence_s=0.2)) as daemon:
        with pytest.raises(PluginCrashed, match=r"silent for 0\.2 s"):
            values(daemon)
        assert daemon.process.returncode == -9


def test_a_line_on_stderr_counts_as_a_sign_of_life(start: Start) -> None:
    body = "for _ in range(30):\n  print('busy', file=sys.stderr, flush=True); time.sleep(0.05)\nsys.stdin.read()"
    with start(body, Rules(silence_s=1.0)) as daemon:
        time.sleep(1.5)
        assert daemon.killed_for is None
        assert daemon.stderr_tail.startswith("busy\n")


def test_requests_that_were_open_at_a_crash_fail_and_are_named(start: Start) -> None:
    with start("s, d = next(requests())\nstream(s, 1)\nsys.exit('out of luck')") as daemon:
        session = daemon.send({}, buffer=512)
        answers = iter(session)
        assert next(answers) == {"value": 1}
        with pytest.raises(PluginCrashed, match="exit code 1, its last words: out of luck"):
            next(answers)
        assert daemon.open_at_crash == [session.number]
        with pytest.raises(PluginCrashed, match="not running"):
            values(daemon)


def test_a_plugin_that_never_beats_is_not_ready(tmp_path: Path) -> None:
    (tmp_path / "main.py").write_text("import time; time.sleep(60)")
    with pytest.raises(PluginCrashed, match="no heartbeat within"), Daemon(tmp_path, rules=Rules(ready_s=0.2)):
        pass


def test_a_plugin_that_cannot_start_says_why(tmp_path: Path) -> None:
    (tmp_path / "main.py").write_text("import nothing_of_that_name")
    with pytest.raises(PluginCrashed, match="nothing_of_that_name"), Daemon(tmp_path):
        pass


def test_a_request_ends_at_the_daemons_time_limit_and_the_plugin_lives_on(start: Start) -> None:
    body = "for s, d in requests():\n  if d['word'] == 'quick': stream(s, 1); end(s)"
    with start(body, Rules(request_s=0.2)) as daemon:
        with pytest.raises(RequestTimeout, match="killed by timeout"):
            values(daemon, "slow")
        assert values(daemon, "quick") == [1]


def test_a_full_buffer_of_one_session_holds_up_the_others(start: Start) -> None:
    body = (
        "s1, d = next(requests())\ns2, d = next(requests())\n"
        "[stream(s1, n) for n in range(5)]\nstream(s2, 9)\nend(s2)\nend(s1)\nsys.stdin.read()"
    )
    with start(body) as daemon:
        slow, quick = daemon.send({}, buffer=2), daemon.send({}, buffer=2)
        wait_for(lambda: len(slow.arrivals) == 3)
        time.sleep(0.1)
        assert quick.arrivals == []
        assert [answer["value"] for answer in slow] == [0, 1, 2, 3, 4]
        assert [answer["value"] for answer in quick] == [9]


def test_a_plugin_killed_behind_a_full_buffer_fails_its_requests(start: Start) -> None:
    """A caller who does not read holds up every line, the heartbeat's too: to the daemon that is silence."""
    body = "s, d = next(requests())\nfor n in range(9):\n  stream(s, n)\nsys.stdin.read()"
    with start(body, Rules(silence_s=0.2)) as daemon:
        unread, other = daemon.send({}, buffer=2), daemon.send({}, buffer=2)
        with pytest.raises(PluginCrashed, match=r"silent for 0\.2 s"):
            list(other)
        with pytest.raises(PluginCrashed, match=r"silent for 0\.2 s"):
            list(unread)


def test_leaving_a_session_is_not_told_to_the_plugin_and_its_answers_are_dropped(start: Start) -> None:
    body = "for s, d in requests():\n  for n in range(20):\n    stream(s, n); time.sleep(0.01)\n  end(s)"
    with start(body) as daemon:
        for _ in daemon.send({}, buffer=512):
            break
        assert values(daemon) == list(range(20))
        assert daemon.dropped >= 18


def test_heartbeats_and_logs_are_kept(start: Start) -> None:
    body = "send('heartbeat', data={}); send('log', data={'message': 'hi'}); sys.stdin.read()"
    with start(body) as daemon:
        wait_for(lambda: daemon.logs)
        assert len(daemon.heartbeats) == 2
        assert daemon.longest_heartbeat_gap < 5


def test_stopping_is_a_kill(start: Start) -> None:
    with start("import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); sys.stdin.read()") as daemon:
        pass
    assert daemon.process.returncode == -9
    assert daemon.open_at_crash == []
