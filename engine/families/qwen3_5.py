"""Qwen3.5: three Gated DeltaNet layers to one layer of gated attention, of whose heads a quarter turns.

Its tower is Qwen3-VL's without DeepStack. The layers that predict several tokens at once (`mtp.*`) are left out.
"""

from __future__ import annotations

import dataclasses

from engine.families.decoder import DecoderDefaults, read_decoder, read_tokens
from engine.families.family import CheckpointConfig, Family, Source, Weight, linear, plain
from engine.families.qwen3_vl import read_tower, tower_weights
from engine.families.rope import MRope
from engine.families.section import Section
from engine.spec import DecoderSpec, DeltaNetSpec, ModelSpec, QwenVisionSpec

_DECODER = DecoderDefaults(
    layers=32,
    hidden=4096,
    heads=16,
    kv_heads=4,
    intermediate=12288,
    vocab=248320,
    norm_eps=1e-6,
    theta=10000.0,
    context_length=32768,
    head_dim=256,
    qk_norm=True,
    mrope=MRope((11, 11, 10), interleaved=True),
    partial_rotary=0.25,
)
_LINEAR, _FULL = "linear_attention", "full_attention"


def _spec(config: CheckpointConfig) -> ModelSpec:
    model = Section(config.model)
    text = model.section("text_config")
    tied = model.boolean("tie_word_embeddings", False) or text.boolean("tie_word_embeddings", False)
    decoder = _decoder(text, tied=tied)
    return ModelSpec(
        family="qwen3_5",
        decoder=decoder,
        tokens=read_tokens(
            config,
            model,
            text,
            image=model.integer("image_token_id", 248056),
            video=model.integer("video_token_id", 248057),
        ),
        vision=read_tower(model.section("vision_config"), config, decoder, deepstack=()),
    )


def _text_spec(config: CheckpointConfig) -> ModelSpec:
    text = Section(config.model)
    decoder = _decoder(text, tied=text.boolean("tie_word_embeddings", False))
    return ModelSpec(family="qwen3_5_text", decoder=decoder, tokens=read_tokens(config, text))


def _decoder(text: Section, *, tied: bool) -> DecoderSpec:
    decoder = read_decoder(text, _DECODER, tied=tied)
    return dataclasses.replace(decoder, attention_gate=True, delta_net=_delta_net(text, decoder.layers))


def _delta_net(text: Section, layers: int) -> DeltaNetSpec:
    heads = text.integer("linear_num_value_heads", 32)
    spec = DeltaNetSpec(
        layers=_linear_layers(text, layers),
        key_heads=text.integer("linear_num_key_heads", 16),
        value_heads=heads,
        key_dim=text.integer("linear_key_head_dim", 128),
        value_dim=text.integer("linear_value_head_dim", 128),
        kernel=text.integer("linear_conv_kernel_dim", 4),
    )
    text.divided("linear_num_value_heads", heads, spec.key_heads)
    if spec.kernel < 2:
        raise text.fail("linear_conv_kernel_dim", "2 or more")
    return spec


def _linear_layers(text: Section, layers: int) -> tuple[int, ...]:
    kinds = text.get("layer_types")
    if kinds is None:
        interval = text.integer("full_attention_interval", 4)
        kinds = [_FULL if (layer + 1) % interval == 0 else _LINEAR for layer in range(layers)]
    valid = isinstance(kinds, list) and len(kinds) == layers and set(kinds) == {_LINEAR, _FULL}
    if not valid:
        raise text.fail("layer_types", f"a list of {layers}, with both {_LINEAR} and {_FULL} in it and nothing else")
    return tuple(layer for layer, kind in enumerate(kinds) if kind == _LINEAR)


def _weights(model: ModelSpec) -> tuple[Weight, ...]:
    spec = model.decoder
    weights = list(tower_weights(model.vision, spec.hidden)) if isinstance(model.vision, QwenVisionSpec) else []
    weights += [
        Weight("embedding.weight", "embedding", (Source("text.embed_tokens.weight", (spec.vocab, spec.hidden)),))
    ]
    for layer in range(spec.layers):
        weights += _layer_weights(spec, layer)
    weights.append(_norm("norm", "text.norm", spec.hidden))
    if not spec.tied_head:
        weights += linear("head", (("head", spec.vocab),), spec.hidden, bias=False)
    return tuple(weights)


def _layer_weights(spec: DecoderSpec, layer: int) -> list[Weight]:
    name, source = f"layers.{layer}", f"text.layers.{layer}"
    mlp = f"{source}.mlp"
    gate_up = ((f"{mlp}.gate_proj", spec.intermediate), (f"{mlp}.up_proj", spec.intermediate))
    assert spec.delta_net is not None
    is_linear = layer in spec.delta_net.layers
    return [
        _norm(f"{name}.attention_norm", f"{source}.input_layernorm", spec.hidden),
        *(_delta_net_weights(spec, spec.delta_net, name, source) if is_linear else _attention(spec, name, source)),
        _norm(f"{name}.mlp_norm", f"{source}.post_attention_layernorm", spec.hidden),
        *linear(f"{name}.gate_up", gate_up, spec.hidden, bias=False),
        *linear(f"{name}.down", ((f"{mlp}.down_proj", spec.hidden),), spec.intermediate, bias=False),
    ]


def _attention(spec: DecoderSpec, name: str, source: str) -> list[Weight]:
    attention = f"{source}.self_attn"
    queries, keys = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    qkv = ((f"{attention}.q_proj", 2 * queries), (f"{attention}.k_proj", keys), (f"{attention}.v_proj", keys))
    return [
        *linear(f"{name}.qkv", qkv, spec.hidden, spec.qkv_bias),
        _norm(f"{name}.query_norm", f"{attention}.q_norm", spec.head_dim),
        _norm(f"{name}.key_norm", f"{attention}.k_norm", spec.head_dim),
        *linear(f"{name}.out", ((f"{attention}.o_proj", spec.hidden),), queries, spec.attention_out_bias),
    ]


def _delta_net_weights(spec: DecoderSpec, delta: DeltaNetSpec, name: str, source: str) -> list[Weight]:
    module = f"{source}.linear_attn"
    qkvz = ((f"{module}.in_proj_qkv", delta.conv_width), (f"{module}.in_proj_z", delta.value_width))
    # Not `linear`: they are small, and an error of the decay grows with every token. No precision rounds them to int8.
    gates = tuple(Source(f"{module}.in_proj_{part}.weight", (delta.value_heads, spec.hidden)) for part in "ab")
    return [
        *linear(f"{name}.qkvz", qkvz, spec.hidden, bias=False),
        Weight(f"{name}.gates.weight", "plain", gates),
        plain(f"{name}.conv.weight", f"{module}.conv1d.weight", delta.conv_width, 1, delta.kernel),
        plain(f"{name}.a_log.weight", f"{module}.A_log", delta.value_heads),
        plain(f"{name}.dt_bias.weight", f"{module}.dt_bias", delta.value_heads),
        plain(f"{name}.delta_norm.weight", f"{module}.norm.weight", delta.value_dim),
        *linear(f"{name}.out", ((f"{module}.out_proj", spec.hidden),), delta.value_width, bias=False),
    ]


def _norm(name: str, module: str, size: int) -> Weight:
    """Checkpoints store the weight less one."""
    return plain(f"{name}.weight", f"{module}.weight", size, offset=1.0)


FAMILY = Family(
    name="qwen3_5",
    model_types=("qwen3_5",),
    prefixes=(("model.language_model.", "text."), ("model.visual.", "vision."), ("lm_head.", "head.")),
    spec=_spec,
    weights=_weights,
)

TEXT_FAMILY = Family(
    name="qwen3_5_text",
    model_types=("qwen3_5_text",),
    prefixes=(("model.", "text."), ("lm_head.", "head.")),
    spec=_text_spec,
    weights=_weights,
)
