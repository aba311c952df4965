"""A smaller vision tower starts from the layers and positions of a larger one."""

import pytest
import torch
from torch import Tensor

from tools import demo_model
from tools.demo_shrink import POSITIONS, shrunk


def without_head(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """As a checkpoint holds them: the head is tied to the embedding."""
    return {name: tensor for name, tensor in tensors.items() if name != "lm_head.weight"}


@pytest.fixture
def larger(monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """The tensors of a model with 8 layers over 12 x 12 patches."""
    with monkeypatch.context() as patch:
        patch.setattr(demo_model, "VISION_LAYERS", 8)
        patch.setattr(demo_model, "TILE", 192)
        return without_head(demo_model.new_model().state_dict())


def test_a_shrunk_state_is_the_whole_state_of_the_smaller_model(larger: dict[str, Tensor]) -> None:
    model = demo_model.new_model()
    model.load_state_dict(shrunk(larger, model))
    assert torch.equal(model.lm_head.weight, larger["model.text_model.embed_tokens.weight"])


def test_layers_are_taken_at_even_distances_with_the_first_and_the_last(larger: dict[str, Tensor]) -> None:
    state = shrunk(larger, demo_model.new_model())
    name = "model.vision_model.encoder.layers.{}.mlp.fc1.weight"
    for layer, source in enumerate((0, 4, 7)):
        assert torch.equal(state[name.format(layer)], larger[name.format(source)]), layer


def test_positions_keep_their_place_in_the_image(larger: dict[str, Tensor]) -> None:
    """A ramp over 12 rows and columns becomes the same ramp over 8, except for the border's rounding."""
    ramp = (torch.arange(12) + 0.5) / 12
    larger[POSITIONS] = torch.stack([ramp.repeat_interleave(12), ramp.repeat(12)], dim=1).repeat(1, 96)
    state = shrunk(larger, demo_model.new_model())
    wanted = (torch.arange(8) + 0.5) / 8
    rows, columns = state[POSITIONS][:, 0].view(8, 8), state[POSITIONS][:, 1].view(8, 8)
    assert torch.allclose(rows, wanted[:, None].expand(8, 8), atol=0.02)
    assert torch.allclose(columns, wanted.expand(8, 8), atol=0.02)


def test_a_model_of_the_same_size_is_copied() -> None:
    source = without_head(demo_model.new_model().state_dict())
    state = without_head(shrunk(source, demo_model.new_model()))
    assert state.keys() == source.keys()
    assert all(torch.equal(state[name], source[name]) for name in source)
