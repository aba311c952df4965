"""Weights of every type are declared where they lie in the artifact's file, and a session reads them from there."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort  # type: ignore[import-untyped]
import pytest

from engine.checkpoints import Artifact, Checkpoint, open_artifact
from engine.graphs.builder import GraphBuilder
from engine.spec import Precision
from tests.runtime import models

NAME = "layers.1.down.weight"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint.open(models.save(models.randomise(models.qwen2()), tmp_path_factory.mktemp("saved") / "tiny"))


def widened(artifact: Artifact) -> np.ndarray:
    """What a session on the CPU sees in the file, as fp32."""
    builder = GraphBuilder(artifact)
    builder.output(builder.op("Cast", builder.weight(NAME), to=int(ir.DataType.FLOAT)), "weight", np.float32)
    options = ort.SessionOptions()
    folder = str(artifact.folder)
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", folder)
    session = ort.InferenceSession(builder.serialise(), options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {})[0])


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", "int8"])
def test_a_session_reads_what_the_artifact_holds(checkpoint: Checkpoint, tmp_path: Path, precision: Precision) -> None:
    artifact = open_artifact(checkpoint, precision, tmp_path)
    assert np.array_equal(widened(artifact), artifact.tensor(NAME).astype(np.float32))
