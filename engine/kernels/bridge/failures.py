"""A computation's exception on its way through ONNX Runtime, which passes on nothing but a message.

The exception is kept under a number, the message carries the number, and `operator_errors` finds it again. The message
also says what happened, for whoever does not ask.
"""

from __future__ import annotations

import contextlib
import itertools
import re
import threading
import traceback
from collections import OrderedDict
from collections.abc import Iterator

_KEPT = 16  # exceptions that nobody has asked for
_LONGEST = 2000  # characters of a message
_MARK = re.compile(r"\[operator error (\d+)\]")

_numbers = itertools.count(1)
_lock = threading.Lock()
_kept: OrderedDict[int, BaseException] = OrderedDict()


def keep(error: BaseException, where: str) -> str:
    """Keep `error` for `operator_errors`; the message to give to ONNX Runtime. `where` names operator and node."""
    # The frames' tensors are over memory that ONNX Runtime takes back. The first frame is the caller's and still runs.
    traceback.clear_frames(error.__traceback__)
    error.__traceback__ = error.__traceback__.tb_next if error.__traceback__ else None
    number = next(_numbers)
    with _lock:
        _kept[number] = error
        while len(_kept) > _KEPT:
            _kept.popitem(last=False)
    what = "".join(traceback.format_exception_only(error)).strip()  # also of one whose str() raises
    text = f"{where}: {what}".replace("\0", " ")
    return f"{text[:_LONGEST]} [operator error {number}]"


@contextlib.contextmanager
def operator_errors() -> Iterator[None]:
    """A context around a session's construction or run: raises what an operator raised, as the operator raised it.

    Its own type, message and traceback, with ONNX Runtime's exception as context. Other exceptions pass unchanged.
    Belongs around every one of them, because an exception that is not fetched stays for some time, with what it holds.
    """
    try:
        yield
    except Exception as error:
        original = _take(str(error))
        if original is None:
            raise
        raise original  # noqa: B904 - a cause of its own stays its cause


def _take(message: str) -> BaseException | None:
    marks = _MARK.findall(message)
    if not marks:
        return None
    with _lock:
        return _kept.pop(int(marks[-1]), None)
