"""Towers in operators of our own on a real device: beside their torch stand-in, the stock tower, and the CPU's.

    pytest -m gpu -s tests/cuda/test_fused_tower_gpu.py

Every test prints how far apart they are, whether it passes or not.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.catalog import find_checkpoint
from engine.checkpoints import Artifact, Checkpoint, open_artifact
from engine.config import EngineConfig
from engine.graphs.cuda.fused import STOCK, Fusion
from engine.graphs.cuda.tower import tower_linears
from engine.kernels.operators import ROWS_AT_ONCE
from engine.runners.calibration import calibration_image
from engine.runners.fusion import Parts, open_fusion
from engine.runners.open_cuda import activation_type
from engine.runners.tower_inputs import tower_float_inputs
from engine.runtime import Encoder
from engine.runtime.cuda.encoder import ChooseInputs, CudaEncoder, open_encoder
from engine.runtime.cuda.weights import torch_type
from engine.spec import FloatType
from tests.cuda.one_operator import DEVICE
from tests.cuda.test_fused_tower import FUSION
from tests.cuda.test_fused_tower import encoder as stand_in
from tests.cuda.test_tower import as_array, mixed
from tests.cuda.wide_towers import TOWERS, make_wide
from tests.runtime.cases import Picture, pictures, relative_error

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.usefixtures("own_stream"),
]
CASES: list[tuple[str, FloatType]] = [
    ("smolvlm", "float16"),
    ("gemma3", "bfloat16"),
    ("qwen2_vl", "float16"),
    ("qwen2_5_vl-60", "float16"),
    ("qwen3_vl", "bfloat16"),
]
NOISE = {"float16": 1e-2, "bfloat16": 2.5e-2}  # where a rounding of 16 bits differs, int8 differs by a whole step


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("storage")


def on_device(
    artifact: Artifact, activations: FloatType, storage: Path, choose: ChooseInputs | None = None
) -> tuple[CudaEncoder, Fusion]:
    """With the tiles of the default."""
    config, dtype = EngineConfig(storage=storage), torch_type(activations)
    parts = Parts(FUSION, tuning=False)
    fusion, register = open_fusion(FUSION, artifact, config, dtype, DEVICE, 64, block_size=256, parts=parts)
    return open_encoder(artifact, activations, DEVICE, fusion, register, choose)


def features(tower: CudaEncoder, images: list[Picture]) -> np.ndarray:
    return as_array([one.cpu() for one in tower.encode(images)])


@pytest.mark.parametrize(("name", "activations"), CASES)
def test_features_are_those_of_the_stand_in_and_near_the_cpus(
    tmp_path_factory: pytest.TempPathFactory, storage: Path, name: str, activations: FloatType
) -> None:
    tiny = make_wide(name, tmp_path_factory)
    images = mixed(tiny)
    tower, _ = on_device(tiny.artifact("int8"), activations, storage)
    found, twin = features(tower, images), as_array(stand_in(tiny, activations).encode(images))
    exact, on_cpu = (np.concatenate(tiny.encoder(precision).encode(images)) for precision in ("fp32", "int8"))
    error, allowed = relative_error(found, exact), relative_error(on_cpu, exact)
    to_twin = relative_error(found, twin)
    print(
        f"\n{name} {activations}: {to_twin:.1e} from the stand-in, {error:.1e} from fp32; the CPU's int8 {allowed:.1e}"
    )
    assert to_twin < NOISE[activations] + allowed
    assert error < allowed * 1.2


def test_a_tower_of_a_real_width_is_as_close_as_the_cpus(
    tmp_path_factory: pytest.TempPathFactory, storage: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One block as Qwen2-VL-2B has 32 of; six images of 640 x 480 have more patches than a launch takes."""
    sizes = {"depth": 1, "embed_dim": 1280, "num_heads": 16, "mlp_ratio": 4, "patch_size": 14}
    monkeypatch.setitem(TOWERS, "qwen2_vl", (TOWERS["qwen2_vl"][0], sizes))
    tiny = make_wide("qwen2_vl", tmp_path_factory)
    images = pictures(tiny.spec, [(34, 46)] * 6, seed=3)
    artifact = tiny.artifact("int8")
    tower, _ = on_device(artifact, "float16", storage)
    together, alone = features(tower, images), features(tower, images[:1])
    assert ROWS_AT_ONCE < 6 * 34 * 46
    stock = features(open_encoder(artifact, "float16", DEVICE, STOCK)[0], images[:1])
    exact, on_cpu = (np.concatenate(tiny.encoder(one).encode(images[:1])) for one in ("fp32", "int8"))
    errors = {name: relative_error(x, exact) for name, x in (("ours", alone), ("stock", stock), ("the CPU's", on_cpu))}
    print(f"\n1280 wide: {', '.join(f'{name} {error:.1e}' for name, error in errors.items())} from fp32")
    assert errors["ours"] < 1.1 * errors["the CPU's"]
    beside = relative_error(together[: len(alone)], alone)
    print(f"beside others: {beside:.1e} from alone")
    assert beside < 1e-2


def test_layers_with_outliers_are_looked_for_on_the_device(storage: Path) -> None:
    """Of the demo model, which has none that its features suffer from."""
    folder = find_checkpoint("demo", storage)
    checkpoint = Checkpoint.open(folder)
    artifact = open_artifact(checkpoint, "int8", storage)
    activations = activation_type("int8", checkpoint.spec.half)
    choose = partial(tower_float_inputs, folder, artifact, activations, DEVICE)
    tower, fusion = on_device(artifact, activations, storage, choose)
    image = calibration_image(folder, checkpoint.spec)
    found = as_array([one.cpu() for one in tower.encode([image])])
    exact, on_cpu = (
        np.concatenate(Encoder(open_artifact(checkpoint, one, storage), threads=2).encode([image]))
        for one in ("fp32", "int8")
    )
    error, allowed = relative_error(found, exact), relative_error(on_cpu, exact)
    print(f"\ndemo: {len(fusion.float_inputs)} of {len(tower_linears(artifact))} layers keep 16-bit rows;"
          f" {error:.1e} from fp32, the CPU's int8 tower {allowed:.1e}")  # fmt: skip
    assert error < 1.1 * allowed
