"""The decoder that all families share: RMS norm, rotary embedding, grouped-query attention, gated SiLU MLP."""

from __future__ import annotations

from dataclasses import dataclass

from engine.families.family import CheckpointConfig, Source, Weight, linear, plain
from engine.families.rope import MRope, read_rope
from engine.families.section import Section
from engine.spec import DecoderSpec, TokenIds


@dataclass(frozen=True, slots=True)
class DecoderDefaults:
    """What a family means by a field that config.json leaves out."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int | None  # None: as many as heads
    intermediate: int
    vocab: int
    norm_eps: float
    theta: float
    context_length: int
    head_dim: int = 0  # 0: hidden / heads
    qkv_bias: bool = False
    qk_norm: bool = False
    mrope: MRope | None = None
    partial_rotary: float = 1.0  # share of a head that turns


def read_decoder(text: Section, defaults: DecoderDefaults, *, tied: bool) -> DecoderSpec:
    """Raises CheckpointError for values that the graphs do not cover."""
    hidden = text.integer("hidden_size", defaults.hidden)
    heads = text.integer("num_attention_heads", defaults.heads)
    kv_heads = text.integer("num_key_value_heads", defaults.kv_heads or heads)
    text.divided("num_attention_heads", heads, kv_heads)
    head_dim = text.integer("head_dim", defaults.head_dim) or text.divided("hidden_size", hidden, heads)
    if head_dim % 16:
        # GroupQueryAttention's rotary embedding works on groups of sixteen floats.
        raise text.fail("head_dim", f"a multiple of 16, not {head_dim} (left out, it is hidden_size / heads)")
    text.choice("hidden_act", "silu", ("silu",))
    if text.boolean("use_sliding_window", False):
        raise text.fail("use_sliding_window", "false (sliding window attention is not supported)")
    context_length = text.integer("max_position_embeddings", defaults.context_length)
    attention_bias = text.boolean("attention_bias", False)
    return DecoderSpec(
        layers=text.integer("num_hidden_layers", defaults.layers),
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate=text.integer("intermediate_size", defaults.intermediate),
        vocab=text.integer("vocab_size", defaults.vocab),
        norm_eps=text.number("rms_norm_eps", defaults.norm_eps),
        rope=read_rope(
            *(text, head_dim),
            theta=defaults.theta,
            context_length=context_length,
            mrope=defaults.mrope,
            partial=defaults.partial_rotary,
        ),
        context_length=context_length,
        qkv_bias=defaults.qkv_bias or attention_bias,
        attention_out_bias=attention_bias,
        mlp_bias=text.boolean("mlp_bias", False),
        tied_head=tied,
        qk_norm=defaults.qk_norm,
    )


def read_tokens(
    config: CheckpointConfig, *sections: Section, image: int | None = None, video: int | None = None
) -> TokenIds:
    """generation_config.json wins over config.json, whose first section that names a token wins over the next."""
    places = (Section(config.generation), *sections)
    eos = next((place.get("eos_token_id") for place in places if "eos_token_id" in place), ())
    eos = tuple(eos) if isinstance(eos, list | tuple) else (eos,)
    if not all(isinstance(token, int) for token in eos):
        raise places[0].fail("eos_token_id", "an integer or a list of them")
    pad = next((place.get("pad_token_id") for place in places if "pad_token_id" in place), eos[0] if eos else 0)
    return TokenIds(eos=eos, pad=int(pad), image=image, video=video)


def decoder_weights(spec: DecoderSpec, *, norm_offset: float = 0.0) -> tuple[Weight, ...]:
    """Sources are spelled `text.*` and `head.weight`. `norm_offset` is added to the norms' weights."""
    weights = [
        Weight("embedding.weight", "embedding", (Source("text.embed_tokens.weight", (spec.vocab, spec.hidden)),))
    ]
    for layer in range(spec.layers):
        weights += _layer_weights(spec, f"layers.{layer}", f"text.layers.{layer}", norm_offset)
    weights.append(plain("norm.weight", "text.norm.weight", spec.hidden, offset=norm_offset))
    if not spec.tied_head:
        weights += linear("head", (("head", spec.vocab),), spec.hidden, bias=False)
    return tuple(weights)


def _layer_weights(spec: DecoderSpec, name: str, source: str, offset: float) -> list[Weight]:
    queries, keys = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    attention, mlp = f"{source}.self_attn", f"{source}.mlp"
    qkv = ((f"{attention}.q_proj", queries), (f"{attention}.k_proj", keys), (f"{attention}.v_proj", keys))
    gate_up = ((f"{mlp}.gate_proj", spec.intermediate), (f"{mlp}.up_proj", spec.intermediate))
    norms = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
    if spec.output_norms:
        norms |= {
            "attention_output_norm": "post_attention_layernorm",
            "mlp_norm": "pre_feedforward_layernorm",
            "mlp_output_norm": "post_feedforward_layernorm",
        }
    return [
        *(plain(f"{name}.{n}.weight", f"{source}.{s}.weight", spec.hidden, offset=offset) for n, s in norms.items()),
        *linear(f"{name}.qkv", qkv, spec.hidden, spec.qkv_bias),
        *_head_norms(spec, name, attention, offset),
        *linear(f"{name}.out", ((f"{attention}.o_proj", spec.hidden),), queries, spec.attention_out_bias),
        *linear(f"{name}.gate_up", gate_up, spec.hidden, spec.mlp_bias),
        *linear(f"{name}.down", ((f"{mlp}.down_proj", spec.hidden),), spec.intermediate, spec.mlp_bias),
    ]


def _head_norms(spec: DecoderSpec, name: str, attention: str, offset: float) -> tuple[Weight, ...]:
    if not spec.qk_norm:
        return ()
    return (
        plain(f"{name}.query_norm.weight", f"{attention}.q_norm.weight", spec.head_dim, offset=offset),
        plain(f"{name}.key_norm.weight", f"{attention}.k_norm.weight", spec.head_dim, offset=offset),
    )
