"""The towers of the CUDA dialect against those of the CPU, in torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import pytest
import torch

from engine.checkpoints import Artifact
from engine.graphs.cuda.tower import TowerInputs, cuda_tower
from engine.runtime.cuda.encoder import CudaEncoder, packing
from engine.runtime.cuda.session import Binding
from engine.runtime.cuda.weights import DeviceWeights
from engine.spec import FloatType, Precision, SiglipSpec
from tests.cuda.reference import ReferenceSession
from tests.runtime.cases import Picture, films, pictures, relative_error
from tests.runtime.conftest import Tiny, tiny_vlm

__all__ = ["tiny_vlm"]

CPU = torch.device("cpu")


def encoder(tiny: Tiny, precision: Precision, activations: FloatType, **limits: int) -> CudaEncoder:
    artifact: Artifact = tiny.artifact(precision)
    graph = cuda_tower(artifact, activations)
    session = ReferenceSession(graph.model, DeviceWeights(artifact, CPU).upload(graph.weights))
    return CudaEncoder(session, tiny.spec, activations, CPU, **limits)


def mixed(tiny: Tiny) -> list[Picture]:
    """Images of several sizes; with tiles, split and unsplit ones."""
    shapes = (
        [(0, 0), (1, 2), (2, 1), (0, 0)]
        if isinstance(tiny.spec.vision, SiglipSpec)
        else [(4, 6), (2, 2), (8, 2), (4, 6)]  # windows of four patches on a side are full, cut, and alone
    )
    return pictures(tiny.spec, shapes, seed=3)


def as_array(features: list[torch.Tensor]) -> np.ndarray:
    return np.concatenate([part.float().numpy() for part in features])


def error(found: list[torch.Tensor], tiny: Tiny, precision: Precision, images: list[Picture]) -> float:
    wanted = tiny.encoder(precision).encode(images)
    assert [part.shape for part in found] == [part.shape for part in wanted]
    return relative_error(as_array(found), np.concatenate(wanted))


def test_images_of_many_sizes_in_one_call_give_the_cpus_features(tiny_vlm: Tiny) -> None:
    images = mixed(tiny_vlm)
    assert error(encoder(tiny_vlm, "fp32", "float32").encode(images), tiny_vlm, "fp32", images) < 1e-4


@pytest.mark.parametrize(("precision", "activations", "limit"), [("fp16", "float16", 5e-3), ("bf16", "bfloat16", 4e-2)])
def test_16_bit_towers_round_and_no_more(
    tiny_vlm: Tiny, precision: Precision, activations: FloatType, limit: float
) -> None:
    images = mixed(tiny_vlm)
    found = encoder(tiny_vlm, precision, activations).encode(images)
    assert {part.dtype for part in found} == {torch.float16 if precision == "fp16" else torch.bfloat16}
    assert error(found, tiny_vlm, "fp32", images) < limit


def test_an_int8_tower_computes_with_the_weights_that_its_bytes_stand_for(tiny_vlm: Tiny) -> None:
    images = mixed(tiny_vlm)
    found = encoder(tiny_vlm, "int8", "float32").encode(images)
    assert 1e-3 < error(found, tiny_vlm, "fp32", images) < 5e-2
    assert error(found, tiny_vlm, "int8", images) < 5e-2  # whose activations are 8 bits too


def test_an_image_alone_has_the_features_that_it_has_among_others(tiny_vlm: Tiny) -> None:
    images = mixed(tiny_vlm)
    tower = encoder(tiny_vlm, "fp32", "float32")
    together = tower.encode(images)
    for image, among in zip(images, together, strict=True):
        assert relative_error(as_array(tower.encode([image])), as_array([among])) < 1e-5


def test_a_call_takes_as_many_images_as_it_may_and_never_none(tiny_vlm: Tiny) -> None:
    images = mixed(tiny_vlm)
    tower = encoder(tiny_vlm, "fp32", "float32")
    calls = {1: 4, 10**6: 1}
    if not isinstance(tiny_vlm.spec.vision, SiglipSpec):
        calls |= {24 + 4 + 16: 2, 24 + 4: 3}  # of 24, 4, 16 and 24 patches
    for limit, expected in calls.items():
        limited = encoder(tiny_vlm, "fp32", "float32", patches_per_call=limit)
        found = limited.encode(images)
        assert len(limited._session.runs) == expected, limit  # type: ignore[attr-defined]
        assert relative_error(as_array(found), as_array(tower.encode(images))) < 1e-5
    assert tower.encode([]) == []


def test_videos_have_the_features_that_they_have_on_a_cpu(tiny_vlm: Tiny) -> None:
    """Among images, in several calls, one of which ends within a video, and alone."""
    if isinstance(tiny_vlm.spec.vision, SiglipSpec):
        pytest.skip("a family without videos")
    images = mixed(tiny_vlm)
    first, second = films(tiny_vlm.spec, [(3, 4, 6), (2, 2, 2)], seed=5)
    shown = [images[0], first, images[1], images[2], second, images[3]]
    wanted = tiny_vlm.encoder("fp32").encode(shown)
    tower = encoder(tiny_vlm, "fp32", "float32")
    assert error(tower.encode(shown), tiny_vlm, "fp32", shown) < 1e-4
    limited = encoder(tiny_vlm, "fp32", "float32", patches_per_call=50)
    assert error(limited.encode(shown), tiny_vlm, "fp32", shown) < 1e-4
    assert len(limited._session.runs) == 6  # type: ignore[attr-defined]
    assert relative_error(as_array(tower.encode([first])), wanted[1]) < 1e-4


def test_a_rehearsal_encodes_as_many_tokens_as_it_is_told(tiny_vlm: Tiny) -> None:
    tower = encoder(tiny_vlm, "fp32", "float32")
    rows: list[int] = []
    tower._session.bind = _counting(tower._session.bind, rows)  # type: ignore[method-assign]
    for tokens in (1, 30):
        tower.rehearse(tokens)
    assert rows[0] >= 1
    assert 30 <= rows[1] <= 48  # whole tiles, or a square image


def _counting(bind: Callable[..., Binding], rows: list[int]) -> Callable[..., Binding]:
    def counted(inputs: Mapping[str, torch.Tensor], outputs: Mapping[str, torch.Tensor]) -> Binding:
        rows.append(len(outputs[TowerInputs.FEATURES]))
        return bind(inputs, outputs)

    return counted


def test_packing_counts_real_places_before_padding() -> None:
    starts, offset = packing([2, 4, 1])
    assert starts.tolist() == [0, 2, 6, 7]
    assert offset.flatten().tolist() == [0, 1, 4, 5, 6, 7, 8, 2, 3, 9, 10, 11]
    assert starts.dtype == offset.dtype == np.int32
