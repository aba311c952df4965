"""What a model is, in numbers: read from a checkpoint's configuration, used by graphs, prompts and runtime."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Precision = Literal["int8", "fp16", "bf16", "fp32"]
FloatType = Literal["float16", "bfloat16", "float32"]


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """Rotary embedding. `mrope_section` holds pairs per axis (temporal, height, width); empty for plain rotary.

    The axes' pairs lie behind each other, or one by one in turn if `mrope_interleaved`, the temporal axis at the end.
    `inv_freq` (a value for each pair that turns: half of head_dim, or fewer for heads of which only the first part
    turns) already includes the checkpoint's scaling rule (llama3, linear, ...), and `attention_scale` multiplies cosine
    and sine.
    """

    inv_freq: tuple[float, ...]
    attention_scale: float = 1.0
    mrope_section: tuple[int, ...] = ()
    mrope_interleaved: bool = False

    @property
    def axes(self) -> int:
        return len(self.mrope_section) or 1

    @property
    def width(self) -> int:
        """Values of a head that turn."""
        return 2 * len(self.inv_freq)


@dataclass(frozen=True, slots=True)
class DeltaNetSpec:
    """Gated DeltaNet (Yang et al. 2025) in place of attention in `layers` of a decoder.

    What such a layer keeps of a sequence, however long that is: a matrix [key_dim, value_dim] for each value head, and
    the last kernel - 1 inputs of the causal convolution that queries, keys and values pass.
    """

    layers: tuple[int, ...]
    key_heads: int  # of queries as well
    value_heads: int  # a multiple of key_heads
    key_dim: int
    value_dim: int
    kernel: int  # tokens

    @property
    def key_width(self) -> int:
        return self.key_heads * self.key_dim

    @property
    def value_width(self) -> int:
        return self.value_heads * self.value_dim

    @property
    def conv_width(self) -> int:
        """Queries, keys and values side by side."""
        return 2 * self.key_width + self.value_width

    @property
    def state_bytes(self) -> int:
        """What all layers keep of a sequence, in fp32."""
        layer = self.value_heads * self.key_dim * self.value_dim + (self.kernel - 1) * self.conv_width
        return 4 * len(self.layers) * layer


@dataclass(frozen=True, slots=True)
class SlidingSpec:
    """Layers in which a token sees the last `window` tokens only, itself among them, with a rotary embedding apart."""

    layers: tuple[bool, ...]  # for each of the decoder's, whether it is one
    window: int  # tokens
    rope: RopeSpec


@dataclass(frozen=True, slots=True)
class DecoderSpec:
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    norm_eps: float
    rope: RopeSpec
    context_length: int  # tokens, prompt and output together
    qkv_bias: bool
    attention_out_bias: bool
    mlp_bias: bool
    tied_head: bool
    qk_norm: bool = False  # RMS norm over each head of queries and keys, before rotary embedding
    deepstack: int = 0  # layers, from the first, whose output image features are added to (Meng et al. 2024)
    activation: Literal["silu", "gelu_pytorch_tanh"] = "silu"  # of the MLP's gate
    output_norms: bool = False  # RMS norms also of what attention and MLP give, before it is added
    scaled_embedding: bool = False  # embeddings are multiplied by the root of `hidden`; image features are not
    query_scalar: float = 0.0  # scores are divided by its root; 0: head_dim
    sliding: SlidingSpec | None = None
    mutual_images: bool = False  # an image's tokens attend to each other in both directions
    logit_softcap: float = 0.0  # logits become softcap * tanh(logits / softcap); 0: they stay
    attention_gate: bool = False  # a head's queries bring a gate along: its output is multiplied by the gate's sigmoid
    delta_net: DeltaNetSpec | None = None

    @property
    def feature_width(self) -> int:
        """Values of a row of image features: what replaces a token's embedding, then what each deepstack layer adds."""
        return self.hidden * (1 + self.deepstack)

    @property
    def score_scale(self) -> float:
        """What attention multiplies the products of queries and keys by."""
        return float((self.query_scalar or self.head_dim) ** -0.5)

    def window(self, layer: int) -> int:
        """Tokens that one sees in the layer, itself among them; 0: all."""
        return self.sliding.window if self.sliding and self.sliding.layers[layer] else 0

    @property
    def attention_layers(self) -> tuple[int, ...]:
        """Those that have a KV cache."""
        linear = self.delta_net.layers if self.delta_net else ()
        return tuple(layer for layer in range(self.layers) if layer not in linear)

    @property
    def kv_values_per_token(self) -> int:
        """Keys and values of all layers that have them."""
        return 2 * len(self.attention_layers) * self.kv_heads * self.head_dim

    @property
    def kv_bytes_per_token(self) -> int:
        """fp32 keys and values of all layers."""
        return 4 * self.kv_values_per_token


@dataclass(frozen=True, slots=True)
class PixelNorm:
    """uint8 pixels become (pixel * rescale - mean) / std, one mean and deviation per colour channel."""

    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    rescale: float = 1 / 255


@dataclass(frozen=True, slots=True)
class SiglipSpec:
    """A tower and a connector: square tiles, learned positions, neighbouring patches joined, one projection.

    Idefics3 puts the patches of a square side by side (pixel shuffle); Gemma 3 takes their mean and norms it.
    """

    layers: int
    hidden: int
    heads: int
    intermediate: int
    norm_eps: float
    activation: str
    tile: int  # pixels, side of a tile
    patch: int  # pixels
    shuffle: int  # patches, side of the square that becomes one token
    norm: PixelNorm = PixelNorm()
    connector: Literal["shuffle", "mean"] = "shuffle"

    @property
    def tokens_per_tile(self) -> int:
        return (self.tile // self.patch) ** 2 // self.shuffle**2


@dataclass(frozen=True, slots=True)
class QwenVisionSpec:
    """Qwen2-VL's tower and merger: any resolution, two-dimensional rotary positions, 2x2 patches merged.

    Qwen2.5-VL's attends in windows, but for some layers. Qwen3-VL's adds learned positions, of a square that is
    stretched to the image, and gives the outputs of some layers to the decoder's first ones, each through a merger.
    """

    layers: int
    hidden: int
    heads: int
    intermediate: int
    norm_eps: float
    activation: str
    patch: int  # pixels
    temporal_patch: int  # frames
    merge: int  # patches per side that become one token
    norm: PixelNorm = PixelNorm()
    window: int = 0  # patches, side of the square that attends to itself; 0: the whole image does
    full_attention: tuple[int, ...] = ()  # layers in which the whole image attends to itself in spite of `window`
    position_side: int = 0  # side of the square of learned positions; 0: none
    deepstack: tuple[int, ...] = ()  # layers whose outputs go to the decoder's layers 0, 1, ...
    timestamps: bool = False  # in a prompt each temporal patch of a video stands apart, behind the second it is from
    positions_per_second: int = 0  # of a video on the temporal axis; 0: one for each temporal patch

    def is_windowed(self, layer: int) -> bool:
        return self.window > 0 and layer not in self.full_attention


@dataclass(frozen=True, slots=True)
class TokenIds:
    """Special tokens. `eos` ends a sequence (any of them); image tokens are None for text-only models, `video` for
    models that read no videos.

    `image_start` and `image_end` are there where they stand around an image's tokens and the chat template writes
    the former for an image, instead of `image`.
    """

    eos: tuple[int, ...]
    pad: int
    image: int | None = None
    image_start: int | None = None
    image_end: int | None = None
    video: int | None = None


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """One checkpoint. `family` names the file in engine/families that knows its layout, `dtype` the type it stores."""

    family: str
    decoder: DecoderSpec
    tokens: TokenIds
    vision: SiglipSpec | QwenVisionSpec | None = None
    dtype: FloatType = "float32"
    wide_activations: bool = False  # larger than float16 holds

    @property
    def half(self) -> FloatType:
        """The 16-bit type of its activations."""
        return "bfloat16" if self.wide_activations or self.dtype == "bfloat16" else "float16"
