"""The demo model's shape, tokenizer, processor settings and chat template, written from scratch.

An Idefics3 model (the architecture of SmolVLM): a SigLIP tower over one square tile, a pixel shuffle, a Llama decoder.
The tokenizer is byte-level without merges: id = byte, so that spelling a word is naming its bytes.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import Idefics3Config, Idefics3ForConditionalGeneration

TILE = 128
PATCH = 16
SHUFFLE = 2
VISION_LAYERS = 3
IMAGE_TOKENS = (TILE // PATCH // SHUFFLE) ** 2

PAD, START, END, IMAGE, AROUND_IMAGE, WHOLE_IMAGE = range(256, 262)
SPECIAL_TOKENS = {
    PAD: "<pad>",
    START: "<|im_start|>",
    END: "<end_of_utterance>",
    IMAGE: "<image>",
    AROUND_IMAGE: "<fake_token_around_image>",
    WHOLE_IMAGE: "<global-img>",
}
VOCABULARY = 288
"""Rows of the embedding: 256 bytes and the special tokens, padded to a multiple of 32 for the int8 kernels."""

CHAT_TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}:"
    "{% if message['content'] is string %}{{ ' ' + message['content'] }}{% else %}"
    "{% if message['content'] and message['content'][0]['type'] == 'text' %}{{ ' ' }}{% endif %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}{% elif part['type'] == 'image' %}{{ '<image>' }}{% endif %}"
    "{% endfor %}{% endif %}{{ '<end_of_utterance>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant: ' }}{% endif %}"
)
"""SmolVLM's template, except that the generation prompt ends in the space that it leaves to the model."""


def model_config() -> Idefics3Config:
    """About 3.3 million parameters."""
    vision = {
        "hidden_size": 192,
        "intermediate_size": 768,
        "num_hidden_layers": VISION_LAYERS,
        "num_attention_heads": 6,
        "image_size": TILE,
        "patch_size": PATCH,
        "hidden_act": "gelu_pytorch_tanh",
    }
    text = {
        "model_type": "llama",
        "vocab_size": VOCABULARY,
        "hidden_size": 192,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "bos_token_id": START,
        "eos_token_id": END,
        "pad_token_id": PAD,
    }
    return Idefics3Config(
        vision_config=vision,
        text_config=text,
        scale_factor=SHUFFLE,
        image_token_id=IMAGE,
        tie_word_embeddings=True,
        pad_token_id=PAD,
    )


def new_model() -> Idefics3ForConditionalGeneration:
    """The model with random weights, in fp32."""
    return Idefics3ForConditionalGeneration(model_config())  # type: ignore[no-untyped-call]


def write_checkpoint(model: Idefics3ForConditionalGeneration, folder: Path) -> None:
    """The folder that transformers and the engine load: fp16 weights, config, tokenizer, processor, template."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        name: tensor.detach().to("cpu", torch.float16).contiguous()
        for name, tensor in model.state_dict().items()
        if name != "lm_head.weight"  # tied to the embedding
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = model.config.to_dict()
    config.pop("_name_or_path", None)
    config |= {"bos_token_id": START, "eos_token_id": END}
    config["architectures"] = ["Idefics3ForConditionalGeneration"]
    config["dtype"] = config["text_config"]["dtype"] = config["vision_config"]["dtype"] = "float16"
    _write(folder / "config.json", config)
    _write(
        folder / "generation_config.json",
        {"bos_token_id": START, "eos_token_id": END, "pad_token_id": PAD, "do_sample": False},
    )
    _write(folder / "tokenizer.json", _tokenizer())
    _write(folder / "tokenizer_config.json", _tokenizer_config())
    _write(folder / "preprocessor_config.json", _image_processor())
    _write(folder / "processor_config.json", {"processor_class": "Idefics3Processor", "image_seq_len": IMAGE_TOKENS})
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")


def _image_processor() -> dict[str, Any]:
    return {
        "image_processor_type": "Idefics3ImageProcessor",
        "processor_class": "Idefics3Processor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"longest_edge": TILE},
        "max_image_size": {"longest_edge": TILE},
        "resample": 1,
        "do_image_splitting": False,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "do_pad": True,
    }


def _tokenizer() -> dict[str, Any]:
    """The file of the `tokenizers` library: a byte-level BPE with 256 entries and no merges."""
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": token_id, "content": text, "special": True}
            | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
            for token_id, text in SPECIAL_TOKENS.items()
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {character: byte for byte, character in enumerate(_byte_characters())},
            "merges": [],
        },
    }


def _byte_characters() -> list[str]:
    """GPT-2's printable stand-in for every byte: itself where it prints, else the next free character from U+0100."""
    prints = {*range(33, 127), *range(161, 173), *range(174, 256)}
    stand_ins = iter(range(256, 512))
    return [chr(byte) if byte in prints else chr(next(stand_ins)) for byte in range(256)]


def _tokenizer_config() -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "processor_class": "Idefics3Processor",
        "bos_token": SPECIAL_TOKENS[START],
        "eos_token": SPECIAL_TOKENS[END],
        "pad_token": SPECIAL_TOKENS[PAD],
        "additional_special_tokens": [SPECIAL_TOKENS[token] for token in (AROUND_IMAGE, IMAGE, WHOLE_IMAGE)],
        "clean_up_tokenization_spaces": False,
        "model_max_length": 4096,
    }


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
