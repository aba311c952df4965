"""Folders with tokenizers, templates and processors as transformers saves them, and what transformers makes of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
from PIL import Image as Picture
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.gemma3.processing_gemma3 import Gemma3Processor
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.idefics3.processing_idefics3 import Idefics3Processor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen2_vl.processing_qwen2_vl import Qwen2VLProcessor
from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor
from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor

from engine.families.qwen2_vl import NORM
from engine.preprocess import ImageInput
from engine.request import Image, Message, Text
from engine.spec import ModelSpec, QwenVisionSpec
from tests.preprocess.films import Film
from tests.preprocess.specs import gemma3_spec, qwen_spec, siglip_spec

SENTENCES = [
    "What shape is in the image? Is it a circle, a square or a triangle?",
    "The quick brown fox jumps over the lazy dog, again and again; what then?",
    "User: Assistant: System: You are a helpful assistant.\n\nAnswer in one word.\n",
    "Größe, naïve café, 你好 世界, привет мир, 👩‍👩‍👧 and 12345 numbers",
]
SMOLVLM_TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{message['role'] | capitalize}}"
    "{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
QWEN_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system\n"
    "You are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n{% else %}"
    "{% for content in message['content'] %}{% if content['type'] == 'image' or 'image' in content %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% elif content['type'] == 'video' or 'video' in content %}"
    "<|vision_start|><|video_pad|><|vision_end|>{% elif 'text' in content %}{{ content['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
GEMMA3_TEMPLATE = (
    "{{ bos_token }}{%- if messages[0]['role'] == 'system' -%}{%- if messages[0]['content'] is string -%}"
    "{%- set first_user_prefix = messages[0]['content'] + '\n\n' -%}{%- else -%}"
    "{%- set first_user_prefix = messages[0]['content'][0]['text'] + '\n\n' -%}{%- endif -%}"
    "{%- set loop_messages = messages[1:] -%}{%- else -%}{%- set first_user_prefix = '' -%}"
    "{%- set loop_messages = messages -%}{%- endif -%}{%- for message in loop_messages -%}"
    "{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{%- endif -%}"
    "{%- if (message['role'] == 'assistant') -%}{%- set role = 'model' -%}{%- else -%}"
    "{%- set role = message['role'] -%}{%- endif -%}"
    "{{ '<start_of_turn>' + role + '\n' + (first_user_prefix if loop.first else '') }}"
    "{%- if message['content'] is string -%}{{ message['content'] | trim }}"
    "{%- elif message['content'] is iterable -%}{%- for item in message['content'] -%}"
    "{%- if item['type'] == 'image' -%}{{ '<start_of_image>' }}{%- elif item['type'] == 'text' -%}"
    "{{ item['text'] | trim }}{%- endif -%}{%- endfor -%}{%- endif -%}{{ '<end_of_turn>\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<start_of_turn>model\n' }}{%- endif -%}"
)
LLAMA_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] | trim + ' [/INST]' }}{% elif message['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% else %}"
    "{% generation %}{{ ' ' + message['content'] + eos_token }}{% endgeneration %}{% endif %}{% endfor %}"
)


# What our processors always do; transformers 5.17 wants to be told.
SAMPLED: dict[str, Any] = {"do_sample_frames": True, "cap_pixels_per_frame": True}


def byte_level(special: list[str]) -> tokenizers.Tokenizer:
    """Byte-level BPE as GPT-2, SmolVLM, Llama 3 and Qwen2 use it."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=520,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*SENTENCES * 3, "\n\n"], trainer)
    return tokenizer


def sentencepiece(special: list[str]) -> tokenizers.Tokenizer:
    """BPE with byte fallback and a prefix space, as Llama 2 uses it."""
    tokenizer = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(SENTENCES[:3] * 3, trainer)
    saved = json.loads(tokenizer.to_str())
    vocabulary = saved["model"]["vocab"]
    vocabulary |= {f"<0x{byte:02X}>": len(vocabulary) + byte for byte in range(256)}
    return tokenizers.Tokenizer.from_str(json.dumps(saved))


def wrapped(backend: tokenizers.Tokenizer, **special: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)  # type: ignore[no-untyped-call]


@dataclass(frozen=True)
class Reference:
    """A checkpoint's folder, its spec, and the processor of transformers that was saved there."""

    folder: Path
    spec: ModelSpec
    processor: Any

    def inputs(self, messages: list[Message], pictures: Sequence[Picture.Image], films: Sequence[Film] = ()) -> Any:
        """With `films`, in tensors, as these processors want it."""
        text = self.processor.apply_chat_template(as_dicts(messages), add_generation_prompt=True)
        # As `apply_chat_template` does it where it makes tokens, too.
        bos = self.processor.tokenizer.bos_token
        options: dict[str, Any] = {"add_special_tokens": False} if bos and text.startswith(bos) else {}
        if films:
            options["videos"] = [torch.from_numpy(film.frames) for film in films]
            options["video_metadata"] = [
                {"total_num_frames": len(film.frames), "fps": film.fps, "duration": len(film.frames) / film.fps}
                for film in films
            ]
        kind = "pt" if films else "np"
        return self.processor(text=[text], images=list(pictures) or None, return_tensors=kind, **options)


def as_dicts(messages: list[Message]) -> list[dict[str, Any]]:
    return [
        {
            "role": message.role,
            "content": [
                {"type": "text", "text": part.text} if isinstance(part, Text) else {"type": type(part).__name__.lower()}
                for part in message.parts
            ],
        }
        for message in messages
    ]


def smolvlm(folder: Path, *, template: str = SMOLVLM_TEMPLATE, bos: bool = False) -> Reference:
    """Tiles of 32 pixels, 16 tokens each; images of up to 3 x 3 tiles; row and column tokens only up to 2 x 2."""
    special = ["<pad>", "<|im_start|>", "<end_of_utterance>", "<fake_token_around_image>", "<image>", "<global-img>"]
    special += [f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2)]
    backend = byte_level(special)
    if bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
        )
    tokenizer = wrapped(backend, bos_token="<|im_start|>", eos_token="<end_of_utterance>", pad_token="<pad>")
    images = Idefics3ImageProcessorPil(size={"longest_edge": 96}, max_image_size={"longest_edge": 32})
    processor = Idefics3Processor(images, tokenizer, image_seq_len=16, chat_template=template)
    processor.save_pretrained(folder)
    return Reference(folder, siglip_spec(32, patch=4, shuffle=2, image=processor.image_token_id), processor)


def qwen2_vl(folder: Path, *, template: str = QWEN_TEMPLATE) -> Reference:
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"]
    backend = byte_level([*special, "<|video_pad|>"])
    backend.add_tokens([AddedToken("<tool_call>", special=False)])
    tokenizer = wrapped(backend, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    images = Qwen2VLImageProcessorPil(size={"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 30})
    videos = Qwen2VLVideoProcessor(
        size={"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 12}, fps=2.0, max_video_tokens=90, **SAMPLED
    )
    processor = Qwen2VLProcessor(images, tokenizer, videos, chat_template=template)  # type: ignore[no-untyped-call]
    processor.save_pretrained(folder)
    spec = qwen_spec(image=processor.image_token_id, video=processor.video_token_id)
    return Reference(folder, _with_vision(spec, norm=NORM), processor)


def qwen3_vl(folder: Path) -> Reference:
    """Qwen2-VL's layout with patches of 16 pixels, and limits in the spelling of Qwen3-VL's checkpoints."""
    reference = qwen2_vl(folder)
    tokenizer = reference.processor.tokenizer
    half = [0.5, 0.5, 0.5]
    images = Qwen2VLImageProcessorPil(
        size={"shortest_edge": 64 * 64, "longest_edge": 32 * 32 * 30}, patch_size=16, image_mean=half, image_std=half
    )
    videos = Qwen3VLVideoProcessor(
        size={"shortest_edge": 32 * 32, "longest_edge": 32 * 32 * 180}, max_video_tokens=10, **SAMPLED
    )
    processor = Qwen3VLProcessor(images, tokenizer, videos, QWEN_TEMPLATE)  # type: ignore[no-untyped-call]
    processor.save_pretrained(folder)
    spec = qwen_spec(patch=16, image=processor.image_token_id, video=processor.video_token_id)
    return Reference(folder, _with_vision(spec, timestamps=True), processor)


def _with_vision(spec: ModelSpec, **changes: Any) -> ModelSpec:
    assert isinstance(spec.vision, QwenVisionSpec)
    return replace(spec, vision=replace(spec.vision, **changes))


def gemma3(folder: Path) -> Reference:
    """Images of 16 tokens; the tokenizer itself puts a beginning-of-sequence token in front."""
    special = ["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>", "<start_of_image>", "<end_of_image>"]
    backend = byte_level([*special, "<image_soft_token>"])
    backend.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    image = {"boi_token": special[5], "eoi_token": special[6], "image_token": "<image_soft_token>"}
    tokenizer = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", extra_special_tokens=image
    )
    images = Gemma3ImageProcessorPil(size={"height": 32, "width": 32})
    processor = Gemma3Processor(images, tokenizer, chat_template=GEMMA3_TEMPLATE, image_seq_length=16)
    processor.save_pretrained(folder)
    return Reference(folder, gemma3_spec(32, patch=4, shuffle=2, start=5, end=6, image=7), processor)


def llama(folder: Path) -> PreTrainedTokenizerFast:
    """A text-only checkpoint in the style of Llama 2: no system role."""
    tokenizer = wrapped(sentencepiece(["<unk>", "<s>", "</s>"]), bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    tokenizer.chat_template = LLAMA_TEMPLATE
    tokenizer.save_pretrained(folder)
    return tokenizer


def picture(width: int, height: int) -> Picture.Image:
    return Picture.fromarray(np.zeros((height, width, 3), np.uint8))


def image_input(tokens: int) -> ImageInput:
    """Of one tile, without pixels."""
    return ImageInput(np.empty(0, np.uint8), (1, 0, 0), tokens, b"")


def question(*parts: str | Picture.Image) -> Message:
    return Message("user", tuple(Text(part) if isinstance(part, str) else Image(b"") for part in parts))


def change_json(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
