"""Tiny processors of models that see and hear, and pictures made for tests: no download."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    Gemma3Processor,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen2_5_VLProcessor,
    Qwen2AudioProcessor,
    Qwen2VLVideoProcessor,
    WhisperFeatureExtractor,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.utils.import_utils import is_torchvision_available

from luthier.data.processors import processor_class

Kind = Literal["qwen2_5_vl", "gemma3", "llava"]

_CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}IMAGE{% elif part['type'] == 'video' %}VIDEO{% elif part['type'] == 'audio' %}AUDIO"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_GEMMA = (
    "{{ bos_token }}{% for message in messages %}<start_of_turn>"
    "{{ 'model' if message['role'] == 'assistant' else message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<start_of_image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)


def _chatml(image: str, video: str = "", audio: str = "") -> str:
    return _CHATML.replace("IMAGE", image).replace("VIDEO", video).replace("AUDIO", audio)


def media_tokenizer(
    special: list[str], template: str, *, eos: str, named: dict[str, str] | None = None
) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer of some 270 ids; `named` are special tokens that a processor asks for by name."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<|pad|>", "<bos>", *special, *alphabet]
    backend = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(tokens[: len(special) + 2])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<|pad|>",
        bos_token="<bos>",
        eos_token=eos,
        extra_special_tokens=named or {},
        chat_template=template,
    )


def tiny_processor(kind: Kind, folder: Path, **changes: Any) -> ProcessorMixin:
    """A processor with a small tokenizer, saved to `folder` as a model's own is; films need torchvision.

    qwen2_5_vl: patches of 14, 2 x 2 of them a token, images of at most 16 tokens. gemma3: always 4 tokens between
    marks. llava: 14 x 14 patches of 28 x 28 pixels, 4 tokens. `changes` go to the image processor.
    """
    processor = _BUILDERS[kind](changes)
    processor.save_pretrained(folder)
    return processor


def _qwen2_5_vl(changes: dict[str, Any]) -> ProcessorMixin:
    special = [
        "<|im_start|>",
        "<|im_end|>",
        "<|vision_start|>",
        "<|vision_end|>",
        "<|image_pad|>",
        "<|video_pad|>",
    ]
    images, films = ("<|vision_start|>" + token + "<|vision_end|>" for token in special[4:])
    template = _chatml(images, films)
    pictures = Qwen2VLImageProcessorPil(
        **{"size": {"shortest_edge": 28 * 28, "longest_edge": 28 * 28 * 16}, **changes}
    )
    tokenizer = media_tokenizer(special, template, eos="<|im_end|>")
    parts = {"image_processor": pictures, "tokenizer": tokenizer}
    if is_torchvision_available():
        parts["video_processor"] = Qwen2VLVideoProcessor()
    return processor_class(Qwen2_5_VLProcessor)(**parts, chat_template=template)


def _gemma3(changes: dict[str, Any]) -> ProcessorMixin:
    named = {
        "image_token": "<image_soft_token>",
        "boi_token": "<start_of_image>",
        "eoi_token": "<end_of_image>",
    }
    special = ["<start_of_turn>", "<end_of_turn>", *named.values()]
    tokenizer = media_tokenizer(special, _GEMMA, eos="<end_of_turn>", named=named)
    pictures = Gemma3ImageProcessorPil(**{"size": {"height": 28, "width": 28}, **changes})
    return Gemma3Processor(pictures, tokenizer, chat_template=_GEMMA, image_seq_length=4)


def _llava(changes: dict[str, Any]) -> ProcessorMixin:
    template = _chatml("<image>")
    tokenizer = media_tokenizer(["<|im_start|>", "<|im_end|>", "<image>"], template, eos="<|im_end|>")
    edges = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
    return LlavaProcessor(
        CLIPImageProcessorPil(**{**edges, **changes}),
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    )


_BUILDERS = {"qwen2_5_vl": _qwen2_5_vl, "gemma3": _gemma3, "llava": _llava}


def picture(file: Path, width: int = 40, height: int = 30, seed: int = 0) -> Path:
    """An image of random colours."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(pixels).save(file)
    return file


# --------------------------------------------------------------------------------------------------
# Films and sounds


def film(file: Path, *, frames: int, fps: int, width: int = 64, height: int = 48) -> Path:
    """A film without loss, of random colours; frame k has k in the red of its first pixel."""
    import av

    rng = np.random.default_rng(frames)
    with av.open(str(file), "w") as container:
        stream = container.add_stream("ffv1", rate=fps)
        stream.width, stream.height, stream.pix_fmt = width, height, "bgr0"
        for k in range(frames):
            pixels = rng.integers(0, 256, (height, width, 3), np.uint8)
            pixels[0, 0, 0] = k
            for packet in stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return file


def tone(rate: int, seconds: float, hertz: float = 440.0, channels: int = 1) -> np.ndarray[Any, Any]:
    """Samples of a sine, (n, channels) float32; the second channel is half as loud."""
    times = np.arange(int(rate * seconds)) / rate
    loud = np.array([0.5 / 2**k for k in range(channels)])
    return (np.sin(2 * np.pi * hertz * times)[:, None] * loud).astype(np.float32)


SOUND_RATE = 16000


def tiny_sound_processor(folder: Path) -> Any:
    """Qwen2-Audio's with 8 mel bands and sounds of at most a second: 100 frames of them, 25 tokens."""
    special = ["<|im_start|>", "<|im_end|>", "<|audio_bos|>", "<|AUDIO|>", "<|audio_eos|>"]
    template = _chatml("", audio="<|audio_bos|><|AUDIO|><|audio_eos|>")
    tokenizer = media_tokenizer(special, template, eos="<|im_end|>")
    ears = WhisperFeatureExtractor(feature_size=8, chunk_length=1, sampling_rate=SOUND_RATE)
    processor = Qwen2AudioProcessor(ears, tokenizer, chat_template=template)
    processor.save_pretrained(folder)
    return processor
