"""What preparing a request must not cost."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = """
import os, pathlib, sys
from engine.prompts import PromptBuilder
from engine.request import Message, Text
from tests.preprocess.specs import siglip_spec
builder = PromptBuilder(pathlib.Path("demo"), siglip_spec(128, patch=16, shuffle=2, image=259))
assert builder.count([Message("user", (Text("Hi"),))], []) > 5
child = os.fork()
if child == 0:
    builder.count([Message("user", (Text("Hi"),))], [])
    os._exit(0)
os.waitpid(child, 0)
assert not {"torch", "transformers", "onnxruntime"} & set(sys.modules)
"""


def test_prompts_are_built_without_torch_or_transformers_and_without_noise() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
