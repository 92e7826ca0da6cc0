"""Sequence classifiers of one label that are no causal models (BERT, DeBERTa), as plain transformers runs them.

A tokenizer with a chat template renders the conversation. Without one the model is a reader of pairs, as these are
trained: what was asked, and the answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

from luthier.data.rendering import chat_messages
from luthier.environment import detect_hardware
from luthier.model.faults import LOAD_ERRORS, weights_fault
from luthier.model.load import load_config, load_tokenizer, locate
from luthier.recipe.schema import ModelSpec
from luthier.show import quiet_libraries
from luthier.types import Conversation, ModelError

_TOKENS = 8192
"""Of a batch, padding among them."""
_POOLS_LAST = "score"
"""The name of the head of causal classifiers, which read the last token."""

Row = dict[str, list[int]]


def is_encoder(config: PreTrainedConfig) -> bool:
    """Whether its sequence classifier reads all tokens at once, and not the last one with what came before."""
    kind: Any = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING.get(type(config), None)
    if kind is None:
        return False
    with torch.device("meta"):
        return not hasattr(kind(config), _POOLS_LAST)


class Classifier:
    """A classifier with its tokenizer, ready to score conversations.

    Raises ModelError where it cannot be loaded, or has several labels.
    """

    def __init__(self, spec: ModelSpec) -> None:
        quiet_libraries()
        source = locate(spec)
        config = load_config(spec, source)
        names = config.architectures or [config.model_type]
        if not any(name.endswith("ForSequenceClassification") for name in names) or config.num_labels != 1:
            raise ModelError(
                f"{spec.path} is no reward model but a {names[0]} of {config.num_labels} labels; scores come from a "
                "ForSequenceClassification with one label"
            )
        self._tokenizer = load_tokenizer(spec, source)
        if self._tokenizer.pad_token_id is None:
            raise ModelError(f"{spec.path}: the tokenizer has no padding token, and its rows are padded")
        try:
            model: Any = AutoModelForSequenceClassification.from_pretrained(source.path, dtype="auto")
        except LOAD_ERRORS as error:
            raise ModelError(
                f"{spec.path} could not be loaded: {weights_fault(source.path, error)}"
            ) from error
        self._device = torch.device(detect_hardware().device)
        self._model = model.to(self._device).eval().requires_grad_(False)
        positions = getattr(config, "max_position_embeddings", None)
        # RoBERTa's positions begin behind the number of its padding token, and its tokenizer knows.
        told = self._tokenizer.model_max_length
        self.most = min((n for n in (positions, told) if isinstance(n, int) and 0 < n < 10**9), default=None)
        """Tokens that it has positions for."""

    def encode(self, conversation: Conversation) -> Row:
        """The tokens of a conversation that ends with an answer."""
        if self._tokenizer.chat_template:
            text = self._tokenizer.apply_chat_template(chat_messages(conversation), tokenize=False)
            return dict(self._tokenizer(text, add_special_tokens=False))
        *before, answer = [message.content for message in conversation.messages]
        return dict(self._tokenizer("\n".join(before), answer))

    @torch.no_grad()
    def scores(self, rows: Sequence[Row]) -> list[float]:
        """The score of each row; rows of like length go together."""
        found: dict[int, float] = {}
        for group in _groups([len(row["input_ids"]) for row in rows]):
            batch = self._tokenizer.pad([rows[index] for index in group], return_tensors="pt")
            logits = self._model(**batch.to(self._device)).logits[:, 0].float()
            found |= dict(zip(group, logits.tolist(), strict=True))
        return [found[index] for index in range(len(rows))]


def _groups(lengths: Sequence[int]) -> list[list[int]]:
    """Numbers of rows, the shortest first, in batches that are no larger than `_TOKENS` when they are padded."""
    groups: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        if groups and (len(groups[-1]) + 1) * lengths[index] <= _TOKENS:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups
