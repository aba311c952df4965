"""A smaller vision tower from a trained larger one, as a start for more training."""

import re

import torch
from torch import Tensor, nn

LAYER = re.compile(r"(model\.vision_model\.encoder\.layers\.)(\d+)(\..*)")
POSITIONS = "model.vision_model.embeddings.position_embedding.weight"


def shrunk(source: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """`model`'s state from `source`, a checkpoint of the same widths with more vision layers or a larger tile.

    Layers are taken at even distances, the first and the last among them; learned positions [side * side, hidden] are
    interpolated; everything else is copied.
    """
    wanted = model.state_dict()
    kept = _evenly(_layers(source), _layers(wanted))
    state = {}
    for name, tensor in wanted.items():
        original = LAYER.sub(lambda match: f"{match[1]}{kept[int(match[2])]}{match[3]}", name)
        if name == "lm_head.weight":
            original = "model.text_model.embed_tokens.weight"  # tied
        value = source[original].float()
        state[name] = _resized(value, len(tensor)) if name == POSITIONS else value
    return state


def _layers(tensors: dict[str, Tensor]) -> int:
    return 1 + max(int(match[2]) for name in tensors if (match := LAYER.fullmatch(name)))


def _evenly(source: int, wanted: int) -> list[int]:
    return [round(index * (source - 1) / (wanted - 1)) for index in range(wanted)]


def _resized(positions: Tensor, count: int) -> Tensor:
    before, after = round(len(positions) ** 0.5), round(count**0.5)
    image = positions.reshape(1, before, before, -1).movedim(-1, 1)
    smaller = nn.functional.interpolate(image, (after, after), mode="bilinear", antialias=True, align_corners=False)
    return torch.flatten(smaller.movedim(1, -1)[0], end_dim=1)
