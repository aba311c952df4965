"""What Dify's daemon runs: `python -m main`, its protocol on stdin and stdout.

Before anything else is imported, fd 1 becomes the log: a library that prints, from Python or from C, would otherwise
break a line of the protocol and lose tokens. Only the SDK's writer keeps the real stdout.
"""

from __future__ import annotations

import functools
import gc
import os
import sys
from typing import TextIO


def take_stdout() -> TextIO:
    """Keep the real stdout for the protocol; whatever is printed from now on goes to stderr, Dify's log."""
    protocol = os.fdopen(os.dup(1), "w", encoding="utf-8", newline="")
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    return protocol


# A serverless runtime speaks HTTP instead, and reads "Serving Flask app" from stdout.
PROTOCOL = None if os.environ.get("INSTALL_METHOD") == "serverless" else take_stdout()

from dify_plugin import DifyPluginEnv, Plugin  # noqa: E402  it patches the standard library, so it comes first
from dify_plugin.config.logger_format import plugin_logger_handler  # noqa: E402
from dify_plugin.core.server.stdio import request_reader  # noqa: E402
from dify_plugin.core.server.stdio.request_reader import StdioRequestReader  # noqa: E402
from dify_plugin.core.server.stdio.response_writer import StdioResponseWriter  # noqa: E402
from gevent.socket import wait_read  # type: ignore[import-untyped]  # noqa: E402

PIPE_BYTES = 1 << 16  # what a pipe holds


def give_to_sdk(protocol: TextIO) -> None:
    """Make the SDK write to `protocol`, a whole message per system call, and end when the daemon has gone.

    It also builds a validator for every line it reads, always the same one: from now on once.
    """

    def write(self: StdioResponseWriter, data: str) -> None:  # noqa: ARG001 - a method
        protocol.write(data)
        if data.endswith("\n"):  # the SDK writes a message and its blank line separately
            protocol.flush()

    def read(self: StdioRequestReader) -> bytes:  # noqa: ARG001 - a method
        wait_read(0)  # the SDK's own way, a thread that blocks, costs two hand-overs a request
        data = os.read(0, PIPE_BYTES)
        if not data:  # end of file: the SDK would ask again for ever
            os._exit(0)
        return data

    StdioResponseWriter.write = write  # type: ignore[method-assign]
    StdioRequestReader._read_async = read  # type: ignore[method-assign]
    request_reader.TypeAdapter = functools.cache(request_reader.TypeAdapter)  # type: ignore[assignment,attr-defined]
    plugin_logger_handler.setStream(protocol)


def main() -> None:
    """Serve until the daemon kills the process."""
    if PROTOCOL is not None:
        give_to_sdk(PROTOCOL)
    plugin = Plugin(DifyPluginEnv())
    gc.freeze()  # the SDK's many classes: looking through them for garbage would delay every stream
    plugin.run()


if __name__ == "__main__":
    main()
