"""Model specs of which only the vision part matters."""

from __future__ import annotations

from dataclasses import replace

from engine.spec import DecoderSpec, ModelSpec, QwenVisionSpec, RopeSpec, SiglipSpec, TokenIds

TEXT_ROPE = RopeSpec(inv_freq=(1.0,) * 4)
MROPE = RopeSpec(inv_freq=(1.0,) * 4, mrope_section=(2, 1, 1))


def decoder_spec(rope: RopeSpec = TEXT_ROPE) -> DecoderSpec:
    return DecoderSpec(
        layers=1, hidden=16, heads=2, kv_heads=1, head_dim=8, intermediate=16, vocab=1000, norm_eps=1e-5, rope=rope,
        context_length=4096, qkv_bias=False, attention_out_bias=False, mlp_bias=False, tied_head=True,
    )  # fmt: skip


def siglip_spec(tile: int, *, patch: int, shuffle: int, image: int | None = None) -> ModelSpec:
    vision = SiglipSpec(
        layers=1, hidden=16, heads=2, intermediate=16, norm_eps=1e-5, activation="gelu", tile=tile, patch=patch,
        shuffle=shuffle,
    )  # fmt: skip
    return ModelSpec("smolvlm", decoder_spec(), TokenIds(eos=(2,), pad=0, image=image), vision)


def gemma3_spec(
    tile: int, *, patch: int, shuffle: int, start: int | None = None, end: int | None = None, image: int | None = None
) -> ModelSpec:
    spec = siglip_spec(tile, patch=patch, shuffle=shuffle)
    assert isinstance(spec.vision, SiglipSpec)
    return replace(
        spec,
        family="gemma3",
        decoder=replace(spec.decoder, mutual_images=True),
        tokens=TokenIds(eos=(1,), pad=0, image=image, image_start=start, image_end=end),
        vision=replace(spec.vision, connector="mean"),
    )


def qwen_spec(
    patch: int = 14, merge: int = 2, temporal: int = 2, image: int | None = None, video: int | None = None
) -> ModelSpec:
    vision = QwenVisionSpec(
        layers=1, hidden=16, heads=2, intermediate=16, norm_eps=1e-5, activation="quick_gelu", patch=patch,
        temporal_patch=temporal, merge=merge,
    )  # fmt: skip
    return ModelSpec("qwen2_vl", decoder_spec(MROPE), TokenIds(eos=(2,), pad=0, image=image, video=video), vision)


def text_spec(family: str = "llama") -> ModelSpec:
    return ModelSpec(family, decoder_spec(), TokenIds(eos=(2,), pad=0))
