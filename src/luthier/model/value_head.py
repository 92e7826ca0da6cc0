"""Reward models: a causal backbone with a value head, one linear layer that gives each position one number.

They are transformers' own sequence classifiers with one label (`score`, a Linear of the hidden size without bias), so
that a saved one loads anywhere. `install_score_forward` gives a loaded one a forward that accepts `positions=`; without
them it behaves as before. The head computes in float32, whatever the backbone does: two answers often differ by less
than 16 bits tell apart.

Shapes: T tokens of a flat row, R positions that are scored, D hidden.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_MULTIMODAL_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
)

from luthier.model.logprobs import backbone_inputs, model_inputs, require_flat, specialise, with_explicit_mask
from luthier.model.rows import FLAT, Rows
from luthier.types import IGNORE_INDEX, Batch, ModelError, RecipeError

HEAD_WEIGHT = "score.weight"
"""The one weight of a reward model that the language model below it has not."""
VALUE_HEAD_NAME = "value_head.safetensors"
"""The head alone, under the name and the keys that PPO trainers of this field read."""

_HEAD_NAMES = ("v_head.summary.weight", "v_head.summary.bias")
_CLASSIFIER = "ForSequenceClassification"


# --------------------------------------------------------------------------------------------------
# Loading and saving


def _families_that_see(config: PreTrainedConfig) -> str:
    """Of a model that reads media: which such families have a classifier."""
    if config.get_text_config() is config:
        return ""
    both = [
        one for one in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING if one in MODEL_FOR_MULTIMODAL_LM_MAPPING
    ]
    decoders = [one for one in both if one.sub_configs and not getattr(one, "is_encoder_decoder", False)]
    names = sorted(one.model_type for one in decoders)
    return f"; of those that read images, films or sounds it has one of {', '.join(names)}"


def reward_config(config: PreTrainedConfig, label: str) -> bool:
    """Ask the config for one label; returns whether its files hold a trained value head already.

    Raises ModelError for a family that has no sequence classifier, and for one of several labels.
    """
    name = (config.architectures or [config.model_type])[0]
    brings = getattr(config, "auto_map", None) or {}
    if (
        type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
        and f"AutoModel{_CLASSIFIER}" not in brings
    ):
        raise ModelError(
            f"{label}: transformers has no form of {name} with a value head ({_CLASSIFIER}), so it cannot be a reward "
            f"model; choose a base of another family{_families_that_see(config)}"
        )
    trained = any(architecture.endswith(_CLASSIFIER) for architecture in config.architectures or ())
    if trained and config.num_labels != 1:
        raise ModelError(
            f"{label}: {name} is a classifier of {config.num_labels} labels; a reward model has one, its score"
        )
    config.num_labels = 1
    return trained


def value_head(model: nn.Module) -> nn.Module | None:
    """The value head of a reward model, inside its PEFT wrapper too; None of a language model."""
    head = getattr(model, "score", None)
    return head if isinstance(head, nn.Module) else None


def finish_loading(model: nn.Module, label: str) -> None:
    """Make the head compute in float32. Raises ModelError for a head that is not one number for each token."""
    head = value_head(model)
    if not isinstance(head, nn.Linear) or head.out_features != 1 or head.bias is not None:
        raise ModelError(
            f"{label}: the head of {type(model).__name__} is not one linear layer without bias named score, so scores "
            "at chosen tokens cannot be computed"
        )
    head.float()


def write_value_head(folder: Path, state: Mapping[str, Tensor]) -> None:
    """Write the head in `state` (a model's state dict, adapters or not) as `v_head.summary.weight` (1, D) and
    `v_head.summary.bias` (1,), which is 0."""
    trained = [name for name in state if ".modules_to_save." in name and ".score." in name]
    name = trained[0] if trained else HEAD_WEIGHT
    write_head(folder, state[name], torch.zeros(1))


def write_head(folder: Path, weight: Tensor, bias: Tensor) -> None:
    """Write a head of any model, weight (1, D) and bias (1,), in float32 under the names that `read_head` reads."""
    tensors = {
        name: tensor.detach().float().cpu().contiguous().clone()
        for name, tensor in zip(_HEAD_NAMES, (weight, bias), strict=True)
    }
    save_file(tensors, folder / VALUE_HEAD_NAME, metadata={"format": "pt"})


def read_head(folder: Path, label: str) -> tuple[Tensor, Tensor]:
    """Weight (1, D) and bias (1,) of the head in a folder: the file that `write_head` writes, or else a reward model's
    own `score` among its weights.

    Raises ModelError, beginning with `label`, where there is none of one output, or its file is damaged.
    """
    if not folder.is_dir():
        raise ModelError(f"{label}: no such folder")
    files, alone = sorted(folder.glob("*.safetensors")), folder / VALUE_HEAD_NAME
    found: dict[str, Tensor] = {}
    for path in [alone] if alone.is_file() else files:
        try:
            with safe_open(path, framework="pt") as file:
                names = list(file.keys())
                wanted = [one for one in names if one in _HEAD_NAMES or f".{one}".endswith(f".{HEAD_WEIGHT}")]
                found |= {one: file.get_tensor(one).float() for one in wanted}
        except SafetensorError as error:
            raise ModelError(
                f"{label}: {path.name} is damaged or cut short ({error}); copy it again"
            ) from error
    bias = found.pop(_HEAD_NAMES[1], torch.zeros(1))
    weight = next(iter(found.values()), None)
    if weight is None or weight.ndim != 2 or len(weight) != 1 or bias.shape != (1,):
        raise ModelError(
            f"{label} has no value head of one output ({VALUE_HEAD_NAME}, or {HEAD_WEIGHT} among its weights); name a "
            "run of stage rm"
        )
    return weight, bias


def choose_padding(
    tokenizer: PreTrainedTokenizerBase, last_id: int, stop_ids: Sequence[int], *, named: bool
) -> str | None:
    """Give the tokenizer a padding token that is not the last one of a row; returns what was changed, as a note.

    transformers scores the last token of a row that is not padding: were padding what ends a row, it would score the
    token before. `last_id`: what ends a row. `named`: whether the recipe chose the padding token itself.
    Raises RecipeError where it did and that one ends rows, and where the vocabulary has no other.
    """
    before, key = tokenizer.pad_token, "model.vocabulary.pad_token"
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id != last_id:
        return None
    if named:
        raise RecipeError(
            f"{key}: {before!r} ends rows, and a reward model is read at the last token that is not padding; name "
            "another token"
        )
    special = {
        index: str(token) for index, token in sorted(tokenizer.added_tokens_decoder.items()) if token.special
    }
    template = str(tokenizer.chat_template)
    taken = {last_id, *stop_ids, tokenizer.bos_token_id}
    free = [token for index, token in special.items() if index not in taken]
    choices = [
        *(token for token in free if "pad" in token.lower()),
        *(token for token in free if token == tokenizer.unk_token),
        *(token for token in free if token not in template),
    ]
    if not choices:
        raise RecipeError(
            f"{key}: every special token of the tokenizer begins or ends something, and a reward model is read at the "
            f"last token that is not padding; name a new one, for example {key}='<|pad|>'"
        )
    tokenizer.pad_token = choices[0]
    return f"padding is {choices[0]!r} and not {before!r}, which ends rows: a row's last token is scored"


# --------------------------------------------------------------------------------------------------
# The forward


class _ScoreHead(nn.Module):
    """Mixed into the class of the value head: float32 under any autocast."""

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        with torch.autocast(hidden.device.type, enabled=False):
            return super().forward(hidden.float(), *args, **kwargs)


class _ScoreForward(nn.Module):
    """Mixed into the class of the model: `forward(positions=...)` gives the scores there, (R,) float32.

    `positions` (R,) index the flat row, however it is laid out. `arithmetic` as with targets.
    """

    luthier_rows: Rows = FLAT

    def forward(
        self,
        *args: Any,
        positions: Tensor | None = None,
        arithmetic: torch.dtype | None = None,
        **kwargs: Any,
    ) -> Any:
        if arithmetic is not None:
            mixed, kind = arithmetic != torch.float32, next(self.parameters()).device.type
            with torch.autocast(kind, dtype=arithmetic if mixed else None, enabled=mixed):
                return _ScoreForward.forward(self, *args, positions=positions, **kwargs)
        if positions is None:
            return super().forward(*args, **with_explicit_mask(args, kwargs))
        require_flat(kwargs)
        backbone: Any = self.base_model
        ids: Tensor = args[0] if args else kwargs["input_ids"]
        order = torch.arange(ids.shape[1], device=ids.device)
        inputs, placed = backbone_inputs(self.luthier_rows, backbone, args, kwargs, order)
        hidden = backbone(**inputs).last_hidden_state
        if self.luthier_rows.padded:
            real = (placed != IGNORE_INDEX).nonzero()[:, 0]
            positions = real[placed[real].argsort()][positions]
        scores: Tensor = self.score(hidden.reshape(-1, hidden.shape[-1])[positions])  # type: ignore[operator]
        return scores[:, 0].float()


def install_score_forward(model: nn.Module, rows: Rows = FLAT) -> None:
    """Teach a loaded reward model (not its PEFT wrapper) to answer `forward(positions=...)`, laid out as `rows`.

    As `logprobs.install_target_forward`. Raises ModelError where the model has no value head.
    """
    head = value_head(model)
    if head is None or model.base_model is model:
        raise ModelError(f"{type(model).__name__} has no value head; a reward model is needed")
    specialise(head, _ScoreHead)
    specialise(model, _ScoreForward)
    model.luthier_rows = rows  # type: ignore[assignment]


# --------------------------------------------------------------------------------------------------
# The self-test


class ScoreProbe:
    """What the self-test asks of a reward model: its scores, divided by their spread over the first row it sees.

    A tolerance then means the same for every head: a fresh one says far smaller numbers than a trained one.
    """

    outputs = "scores (in units of their spread)"
    unit = ""

    def __init__(self) -> None:
        self._spread: float | None = None

    def install(self, model: nn.Module, rows: Rows) -> None:
        self._spread = None
        install_score_forward(model, rows)

    def together(self, model: nn.Module, batch: Batch) -> Tensor:
        """(N,) scores at the supervised positions of a flat batch."""
        positions_N = (batch.targets != IGNORE_INDEX).nonzero()[:, 0]
        scores_N: Tensor = model(**model_inputs(batch), positions=positions_N)
        if self._spread is None:
            self._spread = float(scores_N.detach().std())
            if self._spread == 0:
                raise ModelError(
                    "the value head gives every token the same score, so nothing can be told from it"
                )
        return scores_N / (1.0 if math.isnan(self._spread) else self._spread)

    def alone(self, model: nn.Module, ids: Tensor) -> Tensor:
        """(L - 1,) scores of one sequence (L,) by the model's ordinary forward, which computes them at every token."""
        assert self._spread is not None
        seen: list[Tensor] = []
        head = value_head(model)
        assert head is not None
        handle = head.register_forward_hook(lambda module, args, output: seen.append(output))
        try:
            model(input_ids=ids[None], attention_mask=torch.ones_like(ids[None]), use_cache=False)
        finally:
            handle.remove()
        if seen[-1].shape != (1, len(ids), 1):
            raise ModelError(
                f"the head gives {tuple(seen[-1].shape)} for {len(ids)} tokens, not one score for each"
            )
        return seen[-1][0, :-1, 0].float() / (1.0 if math.isnan(self._spread) else self._spread)
