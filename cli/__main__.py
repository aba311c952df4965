"""./tessera: one launcher for people. Each command is a module of this folder with `add_arguments` and `run`."""

from __future__ import annotations

import argparse
import importlib
import os
import sys

# command -> (module, one line of help); modules are imported only when their command runs, so that each starts fast.
COMMANDS = {
    "ask": ("cli.ask", "ask a question about an image, through the plugin"),
    "test": ("cli.test", "lint, types and tests"),
    "eval": ("cli.evaluate", "accuracy on data with known answers"),
    "bench": ("cli.bench", "throughput and latency through the plugin"),
    "pull": ("cli.pull", "download a model ahead of its first use"),
    "list": ("cli.list_models", "the models that are here, on their way, or could be"),
    "convert": ("cli.convert", "convert a model's checkpoint into an artifact ahead of its first use"),
    "remove": ("cli.remove", "take a model off the disk"),
    "package": ("cli.package", "make the .difypkg"),
    "top": ("cli.top", "a running engine, live: load, KV memory, throughput, latencies, caches"),
    "doctor": ("cli.doctor", "what this machine has and whether the engine runs on it"),
}


def main(arguments: list[str]) -> int:
    """Parse the command line, run the command, return its exit code."""
    parser = argparse.ArgumentParser(prog="tessera", description="Tessera: multimodal models that run inside Dify.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    chosen = next((word for word in arguments if word in COMMANDS), None)
    for name, (module, text) in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        if name == chosen:
            importlib.import_module(module).add_arguments(command)
    parsed = parser.parse_args(arguments)
    try:
        code = int(importlib.import_module(COMMANDS[parsed.command][0]).run(parsed))
        sys.stdout.flush()
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # who reads has seen enough, as in `| head`; what is left has nowhere to go
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
