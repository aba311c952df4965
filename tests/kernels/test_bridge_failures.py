"""What an operator raises, on its way through ONNX Runtime to whoever runs the session."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from threading import Thread
from typing import Any

import onnxruntime as ort  # type: ignore[import-untyped]
import pytest
import torch
from onnx import helper

from engine.errors import DeviceOutOfMemory
from engine.kernels.bridge import Call, Compute, Input, Operator, failures, operator_errors
from tests.kernels.bridge_sessions import DOMAIN, model, node, open_session, run

F32 = torch.float32


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("storage")


def operator(compute: Compute, opened: Callable[[Mapping[str, Any]], None] = lambda _: None) -> Operator:
    def open_node(parameters: Mapping[str, Any]) -> Compute:
        opened(parameters)
        return compute

    return Operator("Work", (Input(F32),), (F32,), open_node)


def work_model(*nodes: Any) -> bytes:
    return model(nodes or [node("Work", ["x"], ["y"], name="the node")], {"x": F32}, {"y": F32})


def refuse_negative(call: Call) -> None:
    x = call.input(0)
    assert isinstance(x, torch.Tensor)
    if float(x.min()) < 0:
        raise DeviceOutOfMemory(f"{float(x.min())} is too little")
    call.output(0, x.shape)


GOOD, BAD = torch.ones(2), torch.full((2,), -3.0)


def test_an_exception_arrives_as_it_was_raised_and_the_session_stays_usable(folder: Path) -> None:
    session = open_session(work_model(), [operator(refuse_negative)], folder)
    for _ in range(3):
        run(session, x=GOOD)
        with pytest.raises(DeviceOutOfMemory, match=r"^-3\.0 is too little$") as caught, operator_errors():
            run(session, x=BAD)
        assert "refuse_negative" in [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)]
        assert "the node" in str(caught.value.__context__)  # ONNX Runtime's own exception
    run(session, x=GOOD)


def test_an_exception_keeps_its_own_cause(folder: Path) -> None:
    def compute(_: Call) -> None:
        try:
            raise KeyError("tile")
        except KeyError as error:
            raise ValueError("no such tile") from error

    session = open_session(work_model(), [operator(compute)], folder)
    with pytest.raises(ValueError, match="no such tile") as caught, operator_errors():
        run(session, x=GOOD)
    assert isinstance(caught.value.__cause__, KeyError)


def test_onnx_runtimes_message_says_what_happened_to_whoever_does_not_ask(folder: Path) -> None:
    session = open_session(work_model(), [operator(refuse_negative)], folder)
    with pytest.raises(
        Exception, match=rf"{DOMAIN}\.Work 'the node': engine\.errors\.DeviceOutOfMemory: -3\.0 is too little"
    ):
        run(session, x=BAD)


def test_an_exception_that_is_not_an_error_arrives_too(folder: Path) -> None:
    def compute(_: Call) -> None:
        raise KeyboardInterrupt

    session = open_session(work_model(), [operator(compute)], folder)
    with pytest.raises(KeyboardInterrupt), operator_errors():
        run(session, x=GOOD)


def test_nodes_after_a_failed_one_do_not_run(folder: Path) -> None:
    ran: list[str] = []

    def open_node(parameters: Mapping[str, Any]) -> Compute:
        def compute(call: Call) -> None:
            ran.append(parameters["step"])
            refuse_negative(call)

        return compute

    nodes = [node("Work", ["x"], ["between"], step="first"), node("Work", ["between"], ["y"], step="second")]
    session = open_session(work_model(*nodes), [Operator("Work", (Input(F32),), (F32,), open_node)], folder)
    with pytest.raises(DeviceOutOfMemory), operator_errors():
        run(session, x=BAD)
    assert ran == ["first"]


def test_exceptions_of_other_origin_pass_unchanged(folder: Path) -> None:
    session = open_session(work_model(), [operator(refuse_negative)], folder)
    with pytest.raises(ValueError, match="Required inputs"), operator_errors():
        session.run(None, {})
    with pytest.raises(ZeroDivisionError), operator_errors():
        _ = 1 / 0


@pytest.mark.parametrize("message", ["", "nul \0 byte", "x" * 10**6, "ünïcödé \ud800", "[operator error 1]"])
def test_any_message_finds_its_exception(message: str, folder: Path) -> None:
    raised = RuntimeError(message)

    def compute(_: Call) -> None:
        raise raised

    session = open_session(work_model(), [operator(compute)], folder)
    with pytest.raises(RuntimeError) as caught, operator_errors():
        run(session, x=GOOD)
    assert caught.value is raised


def test_an_exception_that_cannot_say_what_it_is_stops_the_run_all_the_same(folder: Path) -> None:
    class MuteError(Exception):
        def __str__(self) -> str:
            raise RuntimeError

    def compute(_: Call) -> None:
        raise MuteError

    session = open_session(work_model(), [operator(compute)], folder)
    with pytest.raises(MuteError), operator_errors():
        run(session, x=GOOD)


@pytest.mark.parametrize("shape", [(-1,), (1,) * 40, (2**62, 2**62), ("two",)], ids=str)
def test_an_output_of_an_impossible_shape_is_an_exception(shape: tuple[Any, ...], folder: Path) -> None:
    def compute(call: Call) -> None:
        call.output(0, shape)

    session = open_session(work_model(), [operator(compute)], folder)
    with pytest.raises(Exception, match=r"Work 'the node': [\w.]+Error: "):
        run(session, x=GOOD)


def test_threads_get_their_own_exceptions(folder: Path) -> None:
    wrong: list[Any] = []

    def serve(number: int) -> None:
        session = open_session(work_model(), [operator(refuse_negative)], folder)
        for _ in range(50):
            try:
                with operator_errors():
                    run(session, x=torch.full((2,), -float(number)))
            except DeviceOutOfMemory as error:
                if str(error) != f"{-float(number)} is too little":
                    wrong.append(error)
            else:
                wrong.append(number)

    threads = [Thread(target=serve, args=(number,)) for number in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_few_exceptions_are_kept_for_nobody(folder: Path) -> None:
    session = open_session(work_model(), [operator(refuse_negative)], folder)
    for _ in range(100):
        with pytest.raises(Exception, match="DeviceOutOfMemory"):
            run(session, x=BAD)
    assert len(failures._kept) <= 16


def refuse_parameters(parameters: Mapping[str, Any]) -> None:
    if parameters.get("rows", 0) < 1:
        raise ValueError(f"{parameters} lacks rows")


def test_an_exception_while_a_node_is_created_arrives_from_the_sessions_construction(folder: Path) -> None:
    refusing = operator(refuse_negative, refuse_parameters)
    content = work_model(node("Work", ["x"], ["t"], rows=1), node("Work", ["t"], ["y"], name="bad", rows=0))
    with pytest.raises(ValueError, match=r"^{'rows': 0} lacks rows$"), operator_errors():
        open_session(content, [refusing], folder)
    with pytest.raises(Exception, match=rf"{DOMAIN}\.Work 'bad': ValueError: {{'rows': 0}} lacks rows"):
        open_session(content, [refusing], folder)
    run(open_session(work_model(node("Work", ["x"], ["y"], rows=1)), [refusing], folder), x=GOOD)


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({}, "no string attribute 'parameters'"),
        ({"parameters": 3}, "no string attribute 'parameters'"),
        ({"parameters": "{rows: 3}"}, "JSONDecodeError"),
        ({"parameters": "[3]"}, "'\\[3\\]'; it must be a JSON object"),
        ({"parameters": ""}, "JSONDecodeError"),
    ],
    ids=str,
)
def test_parameters_that_are_not_a_json_object_are_refused(
    attributes: dict[str, Any], message: str, folder: Path
) -> None:
    content = work_model(helper.make_node("Work", ["x"], ["y"], "the node", domain=DOMAIN, **attributes))
    with pytest.raises(Exception, match=f"{DOMAIN}.Work 'the node': .*{message}"):
        open_session(content, [operator(refuse_negative)], folder)


def test_a_node_whose_operator_nobody_registered_is_refused_by_name(folder: Path) -> None:
    content = work_model(node("Play", ["x"], ["y"]))
    with pytest.raises(Exception, match="Play"):
        open_session(content, [operator(refuse_negative)], folder)
    with pytest.raises(Exception, match=DOMAIN):
        ort.InferenceSession(content, providers=["CPUExecutionProvider"])
