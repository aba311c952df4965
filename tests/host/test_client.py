from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import psutil
import pytest

from engine import client as client_module
from engine.client import EngineClient, shared_client
from engine.config import EngineConfig
from engine.errors import (
    ContextOverflow,
    DeadlineExceeded,
    DeviceLost,
    EngineError,
    EngineStopped,
    InvalidRequest,
    QueueFull,
    StorageError,
    UnknownModel,
)
from engine.request import Chunk, Event, Finished, Image, Message, Request, SamplingParams, Text
from tests.host.fake_engine import COMMAND
from tests.host.waiting import eventually


def request(model: str, tokens: int = 5, image: bytes = b"12345", timeout_s: float | None = None) -> Request:
    return Request(
        model, (Message("user", (Image(image), Text("what?"))),), SamplingParams(max_tokens=tokens), timeout_s
    )


def text(events: list[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, Chunk))


def words(count: int) -> str:
    return "".join(f"{index} " for index in range(count))


def error_of(work: Callable[[], object]) -> EngineError | None:
    try:
        work()
    except EngineError as error:
        return error
    return None


def status_of(client: EngineClient, name: str) -> object:
    status = client.status()
    assert status is not None
    return status[name]


def pid_of(client: EngineClient) -> int:
    assert client.pid is not None
    return client.pid


def test_a_request_gets_its_events_and_its_image_arrives_whole(client: EngineClient) -> None:
    image = os.urandom(3 << 20)
    *chunks, finished = client.stream(request("words", 50, image))
    assert text(chunks) == words(50)
    assert sum(chunk.tokens for chunk in chunks if isinstance(chunk, Chunk)) == 50
    assert isinstance(finished, Finished)
    assert (finished.reason, finished.usage.image_tokens) == ("length", len(image))


def test_nothing_is_started_before_the_first_request(client: EngineClient) -> None:
    assert (client.pid, client.status()) == (None, None)
    client.close()


def test_a_request_that_nobody_iterates_starts_nothing(client: EngineClient) -> None:
    client.stream(request("words"))
    assert client.pid is None


def test_many_requests_at_once_start_one_process_and_do_not_mix(client: EngineClient) -> None:
    before = len(psutil.Process().children())
    with ThreadPoolExecutor(64) as pool:
        lengths = range(1, 65)
        streams = list(pool.map(lambda length: list(client.stream(request("words", length))), lengths))
    assert [text(events) for events in streams] == [words(length) for length in lengths]
    assert len(psutil.Process().children()) == before + 1
    assert status_of(client, "submitted") == 64


def test_tokens_are_counted_by_the_engine(client: EngineClient) -> None:
    assert client.count_tokens("demo", request("words").messages) == len(b"12345") + len("what?")


def test_a_download_is_started_by_name(client: EngineClient) -> None:
    assert client.pull("a/b") == {"state": "downloading", "note": "a/b"}
    with pytest.raises(UnknownModel, match="nonsense"):
        client.pull("nonsense")


def test_counting_and_status_do_not_wait_for_each_other(client: EngineClient) -> None:
    with ThreadPoolExecutor(8) as pool:
        counts = [pool.submit(client.count_tokens, "slow", request("words").messages) for _ in range(8)]
        eventually(lambda: client.status() is not None, "no status while tokens are being counted")
        assert text(list(client.stream(request("words", 3)))) == words(3)
        client.close()
        assert all(isinstance(count.exception(), EngineStopped) for count in counts)


@pytest.mark.parametrize(("model", "error"), [("refused", QueueFull), ("fails", ContextOverflow)])
def test_an_engine_error_keeps_its_class(client: EngineClient, model: str, error: type[EngineError]) -> None:
    with pytest.raises(error):
        list(client.stream(request(model)))
    assert text(list(client.stream(request("words")))) == words(5)


def test_a_stream_that_fails_half_way_gives_its_chunks_first(client: EngineClient) -> None:
    events: list[Event] = []
    with pytest.raises(ContextOverflow, match="too long"):
        events.extend(client.stream(request("fails")))
    stream = client.stream(request("fails"))
    assert next(stream) in (Chunk("0 ", 1), Chunk("0 1 ", 2))


def test_a_bug_in_the_engine_fails_its_request_only_and_is_logged_on_one_line(
    client: EngineClient, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(EngineError, match="ZeroDivisionError"):
        list(client.stream(request("bug")))
    assert text(list(client.stream(request("words")))) == words(5)
    client.close()
    (line,) = [line for line in capfd.readouterr().err.splitlines() if "ERROR" in line]
    assert "Traceback" in line
    assert "a bug | on two lines" in line


def test_a_closed_generator_stops_the_work(client: EngineClient) -> None:
    stream = client.stream(request("endless"))
    next(stream)
    stream.close()
    eventually(lambda: status_of(client, "cancelled") == 1, "the engine was not told")
    assert status_of(client, "open") == 0


def test_a_forgotten_generator_stops_the_work(client: EngineClient) -> None:
    next(client.stream(request("endless")))
    eventually(lambda: status_of(client, "cancelled") == 1, "the engine was not told")


def test_a_thousand_cancellations_leave_nothing_open(client: EngineClient) -> None:
    def start_and_leave(index: int) -> None:
        stream = client.stream(request("endless" if index % 2 else "paced", 1000))
        for _ in islice(stream, index % 3 + 1):
            pass
        stream.close()

    with ThreadPoolExecutor(32) as pool:
        list(pool.map(start_and_leave, range(1000)))
    eventually(lambda: status_of(client, "open") == 0, "cancelled requests are still open")
    assert status_of(client, "cancelled") == 1000
    assert client.idle_s > 0
    assert text(list(client.stream(request("words")))) == words(5)


def test_a_request_that_cannot_be_sent_fails_alone(client: EngineClient) -> None:
    with pytest.raises(InvalidRequest, match="cannot be sent"):
        list(client.stream(Request("words", (Message("user", (Image(object()),)),))))  # type: ignore[arg-type]
    assert text(list(client.stream(request("words")))) == words(5)


def test_chunks_are_joined_for_a_caller_that_is_slow(client: EngineClient) -> None:
    stream = client.stream(request("paced", 40))
    events = [next(stream)]
    eventually(lambda: status_of(client, "open") == 0, "the stream did not end")
    events.extend(stream)
    assert text(events) == words(40)
    assert len(events) < 10


def test_a_killed_process_ends_every_stream_and_the_next_request_works(client: EngineClient) -> None:
    started = threading.Barrier(33)

    def consume() -> None:
        stream = client.stream(request("endless"))
        next(stream)
        started.wait()
        for _ in stream:
            pass

    with ThreadPoolExecutor(32) as pool:
        streams = [pool.submit(error_of, consume) for _ in range(32)]
        started.wait()
        first = pid_of(client)
        os.kill(first, signal.SIGKILL)
        errors = [stream.result(timeout=10) for stream in streams]
    assert all(type(error) is EngineStopped for error in errors)
    assert "signal 9" in str(errors[0])
    assert "try again" in str(errors[0])
    assert text(list(client.stream(request("words")))) == words(5)
    assert pid_of(client) != first


def test_a_crash_is_reported_with_its_signal(client: EngineClient) -> None:
    with pytest.raises(EngineStopped, match="signal 11, SIGSEGV"):
        list(client.stream(request("crash")))
    assert text(list(client.stream(request("words")))) == words(5)


def test_a_thread_that_dies_ends_the_process_and_no_request_waits_for_it(client: EngineClient) -> None:
    with pytest.raises(EngineStopped, match="exit status 1"):
        list(client.stream(request("loses-a-thread")))
    assert text(list(client.stream(request("words")))) == words(5)


def test_a_lost_gpu_ends_the_process_for_everybody_and_the_next_request_starts_another(client: EngineClient) -> None:
    endless = client.stream(request("endless"))
    next(endless)
    first = pid_of(client)
    for stream in (client.stream(request("loses-the-gpu")), endless):
        with pytest.raises(DeviceLost, match="cuda:0 failed"):
            list(stream)
    assert text(list(client.stream(request("words")))) == words(5)
    assert pid_of(client) != first


def test_a_process_that_was_killed_while_idle_is_replaced(client: EngineClient) -> None:
    list(client.stream(request("words")))
    os.kill(pid_of(client), signal.SIGKILL)
    eventually(lambda: client.pid is None, "the end was not noticed")
    assert text(list(client.stream(request("words")))) == words(5)


def test_a_process_killed_during_its_start_fails_the_request(
    client: EngineClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_START", "slow")
    with ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(error_of, lambda: list(client.stream(request("words")))) for _ in range(2)]
        eventually(lambda: client.pid is not None, "nothing was started")
        os.kill(pid_of(client), signal.SIGKILL)
        errors = [future.result(timeout=10) for future in waiting]
    assert all("could not start (signal 9" in str(error) for error in errors)
    monkeypatch.delenv("FAKE_START")
    assert text(list(client.stream(request("words")))) == words(5)


def test_closing_during_the_start_ends_it(client: EngineClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_START", "slow")
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(error_of, lambda: list(client.stream(request("words"))))
        eventually(lambda: client.pid is not None, "nothing was started")
        assert client.status() is None
        client.close()
        assert isinstance(waiting.result(timeout=10), EngineStopped)


@pytest.mark.parametrize(
    ("how", "error", "said"),
    [
        ("import", EngineStopped, "No module named 'a_library_that_is_missing'"),
        ("exit", EngineStopped, "exit status 3.*my last words"),
        ("storage", StorageError, "the storage folder is read-only"),
    ],
)
def test_a_start_that_fails_says_why_and_is_tried_again(
    client: EngineClient, monkeypatch: pytest.MonkeyPatch, how: str, error: type[EngineError], said: str
) -> None:
    monkeypatch.setenv("FAKE_START", how)
    with pytest.raises(error, match=f"(?s){said}"):
        list(client.stream(request("words")))
    monkeypatch.delenv("FAKE_START")
    assert text(list(client.stream(request("words")))) == words(5)


def test_three_failed_starts_in_a_row_are_followed_by_a_pause(
    client: EngineClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_START", "storage")
    for _ in range(3):
        with pytest.raises(StorageError, match=r"read-only$"):
            list(client.stream(request("words")))
    monkeypatch.delenv("FAKE_START")
    with pytest.raises(StorageError, match=r"read-only .tried 3 times; the next try is in"):
        list(client.stream(request("words")))
    monkeypatch.setattr(client_module, "PAUSE_S", 0.0)
    assert text(list(client.stream(request("words")))) == words(5)


def test_a_command_that_does_not_exist_is_an_error(config: EngineConfig) -> None:
    with pytest.raises(EngineStopped, match=r"could not be started: .*no-such-program"):
        list(EngineClient(config, command=("/no-such-program",)).stream(request("words")))


def test_a_host_of_another_version_is_refused(config: EngineConfig, tmp_path: Path) -> None:
    script = tmp_path / "host.py"
    script.write_text(
        "import sys, socket, msgpack\n"
        "payload = msgpack.packb([6, 99, 1])\n"
        "socket.socket(fileno=int(sys.argv[1])).sendall(len(payload).to_bytes(4, 'little') + payload)\n"
        "sys.stdin.read()\n"
        "import time; time.sleep(60)\n"
    )
    with pytest.raises(EngineStopped, match=r"protocol error: .*version 99"):
        list(EngineClient(config, command=(sys.executable, str(script))).stream(request("words")))


def test_a_request_without_an_answer_ends_at_its_limit(client: EngineClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "GRACE_S", 0.2)
    list(client.stream(request("words")))
    first = client.pid
    with pytest.raises(DeadlineExceeded):
        list(client.stream(request("silent", timeout_s=0.1)))
    assert client.pid == first
    monkeypatch.setattr(client_module, "SILENCE_S", 0.0)
    with pytest.raises(DeadlineExceeded):
        list(client.stream(request("silent", timeout_s=0.1)))
    eventually(lambda: client.pid is None, "a process that hangs was not ended")


def test_closing_fails_open_streams_and_a_later_request_starts_again(client: EngineClient) -> None:
    stream = client.stream(request("endless"))
    next(stream)
    client.close()
    with pytest.raises(EngineStopped, match="closed"):
        list(stream)
    assert client.pid is None
    assert text(list(client.stream(request("words")))) == words(5)


def test_an_engine_that_does_not_end_is_killed(client: EngineClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_CLOSE", "hangs")
    monkeypatch.setattr("engine.process.CLOSE_TIMEOUT_S", 0.2)
    list(client.stream(request("words")))
    client.close()


def test_nothing_the_engine_prints_reaches_our_stdout(client: EngineClient, capfd: pytest.CaptureFixture[str]) -> None:
    list(client.stream(request("noise")))
    client.close()
    out, err = capfd.readouterr()
    assert out == ""
    assert [err.count(f"noise by {what}\n") for what in ("print", "write", "puts")] == [100, 100, 100]


def test_the_engine_gets_our_environment_a_quiet_one_and_no_stdin(
    client: EngineClient, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    monkeypatch.setenv("PYTHONSAFEPATH", "1")
    monkeypatch.chdir(tmp_path)
    list(client.stream(request("words")))
    environment = status_of(client, "environment")
    assert isinstance(environment, dict)
    assert environment["TOKENIZERS_PARALLELISM"] == "true"
    assert environment["ORT_DISABLE_TELEMETRY"] == "1"
    assert environment["HOME"] == os.environ["HOME"]
    assert status_of(client, "stdin") == "/dev/null"
    assert status_of(client, "storage") == str(tmp_path)


def test_the_line_itself_imports_nothing_heavy(client: EngineClient) -> None:
    list(client.stream(request("words")))
    imported = status_of(client, "imported")
    assert isinstance(imported, list)
    assert not {"gevent", "dify_plugin", "numpy", "torch", "transformers", "onnxruntime"} & set(imported)


def test_one_client_is_shared_per_configuration_and_an_idle_one_gives_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module, "_HOST_COMMAND", COMMAND)
    monkeypatch.setattr(client_module, "_shared", {})
    first_config, second_config = EngineConfig(storage=tmp_path), EngineConfig(storage=tmp_path, max_batch_size=2)
    first, second = shared_client(first_config), shared_client(second_config)
    assert shared_client(EngineConfig(storage=tmp_path)) is first is not second
    list(first.stream(request("words")))
    open_stream = second.stream(request("endless"))
    next(open_stream)
    monkeypatch.setattr(client_module, "IDLE_S", -1.0)
    shared_client(second_config)
    eventually(lambda: first.pid is None, "the idle client kept its engine")
    monkeypatch.setattr(client_module, "IDLE_S", 0.0)
    shared_client(first_config)
    time.sleep(0.05)
    next(open_stream)  # a client with an open request keeps its engine
    for client in (first, second):
        client.close()
