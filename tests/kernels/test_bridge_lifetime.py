"""What lives for how long: sessions closed in any order, threads, many runs, the end of the process."""

from __future__ import annotations

import gc
import subprocess
import sys
import textwrap
import weakref
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
import torch

from engine.kernels.bridge import Call, Compute, Input, Operator, callbacks, operator_errors
from tests.kernels.bridge_sessions import model, node, open_session, open_with, options_with, run

F32 = torch.float32
REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("storage")


class Buffer:
    """Stands for device memory that an operator holds."""


def scale(held: Buffer | None = None) -> Operator:
    def open_node(parameters: Mapping[str, Any]) -> Compute:
        factor = float(parameters["factor"])

        def compute(call: Call) -> None:
            x = call.input(0)
            assert isinstance(x, torch.Tensor)
            if not len(x):
                raise ValueError(f"{held} has nothing to scale")
            y = call.output(0, x.shape)
            assert isinstance(y, torch.Tensor)
            torch.mul(x, factor, out=y)

        return compute

    return Operator("Scale", (Input(F32),), (F32,), open_node)


def scale_model(*factors: float) -> bytes:
    names = ["x", *(f"t{i}" for i in range(len(factors) - 1)), "y"]
    nodes = [node("Scale", [names[i]], [names[i + 1]], factor=factor) for i, factor in enumerate(factors)]
    return model(nodes, {"x": F32}, {"y": F32})


def known() -> tuple[int, int]:
    """Operators and nodes that ONNX Runtime may still ask for."""
    gc.collect()
    return len(callbacks.entries), len(callbacks.nodes)


@pytest.mark.parametrize("last", ["options", "session"])
def test_what_an_operator_holds_goes_with_the_last_of_options_and_session(last: str, folder: Path) -> None:
    before, held = known(), Buffer()
    gone = weakref.ref(held)
    options = options_with([scale(held)], folder)
    alive = {"options": options, "session": open_with(scale_model(2.0, 3.0), options)}
    del options, held
    run(alive["session"], x=torch.ones(2))
    alive = {last: alive[last]}
    gc.collect()
    assert gone() is not None
    if last == "session":
        assert torch.equal(run(alive["session"], x=torch.ones(2))[0], torch.full((2,), 6.0))
    else:
        run(open_with(scale_model(2.0), alive["options"]), x=torch.ones(2))
    alive.clear()
    assert known() == before
    assert gone() is None


def test_options_that_no_session_used_leave_nothing(folder: Path) -> None:
    before = known()
    for _ in range(20):
        options_with([scale(), Operator("Other", (Input(F32),), (F32,), lambda _: lambda _call: None)], folder)
    assert known() == before


def test_a_session_that_could_not_be_opened_leaves_nothing(folder: Path) -> None:
    before, held = known(), Buffer()
    gone = weakref.ref(held)
    broken = model([node("Scale", ["x"], ["t"], factor=2.0), node("Scale", ["t"], ["y"])], {"x": F32}, {"y": F32})
    with pytest.raises(KeyError, match="factor"), operator_errors():
        open_session(broken, [scale(held)], folder)
    del held
    assert known() == before
    assert gone() is None


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 2, 1, 0), (1, 3, 0, 2)])
def test_sessions_close_in_any_order(order: tuple[int, ...], folder: Path) -> None:
    before = known()
    shared = options_with([scale()], folder)
    sessions = {i: open_with(scale_model(i + 1.0), shared) for i in range(2)}
    sessions |= {i: open_session(scale_model(i + 1.0), [scale()], folder) for i in range(2, 4)}
    del shared
    for closing in order:
        for i, session in sessions.items():
            assert torch.equal(run(session, x=torch.ones(3))[0], torch.full((3,), i + 1.0))
        del sessions[closing], session
    assert known() == before


def test_runs_leave_nothing_behind(folder: Path) -> None:
    session = open_session(scale_model(2.0, 0.5, 2.0), [scale()], folder)

    def work() -> int:
        for rows in range(1, 40):  # a new shape in every run
            run(session, x=torch.ones(rows, 3))
            with pytest.raises(ValueError, match="nothing to scale"), operator_errors():
                run(session, x=torch.empty(0, 3))
        gc.collect()
        return sys.getallocatedblocks()

    work()
    first = work()
    for _ in range(5):
        last = work()
    assert last - first < 100  # of 390 runs and 585 nodes


def test_threads_open_run_and_close_sessions_of_their_own(folder: Path) -> None:
    before, start = known(), Barrier(4)

    def serve(number: int) -> bool:
        start.wait()
        right = True
        for _ in range(5):
            session = open_session(scale_model(number, 10.0), [scale()], folder)
            for rows in range(1, 20):
                y = run(session, x=torch.ones(rows))[0]
                right = right and torch.equal(y, torch.full((rows,), number * 10.0))
        return right

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(serve, range(1, 5)))
    assert known() == before


def test_threads_may_share_a_session(folder: Path) -> None:
    session, start = open_session(scale_model(2.0, 3.0), [scale()], folder), Barrier(4)

    def serve(number: int) -> bool:
        start.wait()
        inputs = (torch.full((rows, number), float(number)) for rows in range(1, 150))
        return all(torch.equal(run(session, x=x)[0], x * 6) for x in inputs)

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(serve, range(1, 5)))


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[tuple[int, str]]]:
    """A folder and what two processes said that started on it at once and ended with their sessions open."""
    storage = tmp_path_factory.mktemp("shared") / "storage"
    script = f"""
        from pathlib import Path
        import torch
        from tests.kernels.bridge_sessions import open_session, run
        from tests.kernels.test_bridge_lifetime import scale, scale_model
        session = open_session(scale_model(2.0), [scale()], Path({str(storage)!r}))
        hidden = type("Cycle", (), {{"session": open_session(scale_model(2.0), [scale()], Path({str(storage)!r}))}})
        print(run(session, x=torch.ones(1))[0].item())
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    both = [
        subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for _ in range(2)
    ]
    said = [process.communicate(timeout=120)[0] for process in both]
    return storage, [(process.returncode, text) for process, text in zip(both, said, strict=True)]


def test_a_process_may_end_with_its_sessions_open(processes: tuple[Path, list[tuple[int, str]]]) -> None:
    _, ended = processes
    assert ended == [(0, "2.0\n")] * 2


def test_processes_that_start_at_once_share_the_library(processes: tuple[Path, list[tuple[int, str]]]) -> None:
    storage, _ = processes
    assert [path.suffix for path in storage.rglob("*")] == [".so"]
