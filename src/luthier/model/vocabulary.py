"""Tokens that a model does not have yet: the tokenizer extended, the embeddings grown, both recorded.

A `VocabularyChange` holds everything that decides the new rows, so the same base gets the same rows again
wherever an adapter that was trained on them is attached: on resume, in the next run, before a merge.

New rows start, as those of LLaMA-Factory do, at the mean of the old rows plus Gaussian noise of standard
deviation 1 / sqrt(hidden size); with a description they start at the mean of the rows of its words.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.hub import cached_file

from luthier.recipe.schema import VocabularySpec
from luthier.types import CheckpointError, ModelError

RECORD_NAME = "vocabulary.json"
RECORD_VERSION = 1

ROWS_MULTIPLE = 64
"""Grown embeddings are padded to this many rows, which GPUs multiply fastest."""

_MEAN_CHUNK = 4096
"""Rows that exist in float64 at one time while a mean is taken."""


@dataclass(frozen=True, slots=True)
class VocabularyChange:
    """What a recipe adds to a vocabulary; with `rows`, also what became of the embeddings.

    `ids` are the ids of `added` and then of `added_special`; tokens that existed before are in neither.
    `descriptions` pairs a token with the ids of the words that describe it. `num_before` and `num_tokens` are
    one more than the highest id, before and after. `rows_before` and `rows` are those of the embeddings, known
    once `resize_embeddings` has run.
    """

    added: tuple[str, ...] = ()
    added_special: tuple[str, ...] = ()
    ids: tuple[int, ...] = ()
    num_before: int = 0
    num_tokens: int = 0
    pad_token: str | None = None
    descriptions: tuple[tuple[str, tuple[int, ...]], ...] = ()
    noise: float = 1.0
    seed: int = 0
    resize: bool = False
    rows_before: int | None = None
    rows: int | None = None
    notes: tuple[str, ...] = field(default=(), compare=False)

    @property
    def new_ids(self) -> tuple[int, ...]:
        """Ids of the tokens whose rows have to be learnt: the added ones, and any that had no row before."""
        without_row = range(self.rows or 0)[self.rows_before :] if self.rows_before is not None else range(0)
        return tuple(sorted({*self.ids, *(row for row in without_row if row < self.num_tokens)}))

    @property
    def is_needed(self) -> bool:
        """Whether the model has to change at all."""
        return bool(self.ids) or self.resize

    def listed(self) -> str:
        """The tokens in words."""
        kinds = [*map(repr, self.added), *(f"{token!r} (special)" for token in self.added_special)]
        return ", ".join(kinds) or "none"

    def to_dict(self) -> dict[str, Any]:
        """The record as JSON values."""
        values = asdict(self)
        del values["notes"]
        values["descriptions"] = {token: list(ids) for token, ids in self.descriptions}
        return {"version": RECORD_VERSION, **values}


# --------------------------------------------------------------------------------------------------
# The tokenizer


def extend_tokenizer(
    tokenizer: PreTrainedTokenizerBase, spec: VocabularySpec | None, *, seed: int
) -> VocabularyChange:
    """Add the tokens of `spec` to the tokenizer and set its padding token; returns what was added.

    Call it before a `ChatTemplate` copies the tokenizer. Tokens that exist already are left as they are, with
    a note. A padding token that does not exist is added as a special token; where none is named the
    tokenizer's own stays (`load_template` gives its end token to a tokenizer without one).
    """
    spec = spec or VocabularySpec()
    known = tokenizer.get_vocab()
    pad = (
        ()
        if spec.pad_token is None or spec.pad_token in (*spec.add, *spec.add_special)
        else (spec.pad_token,)
    )
    added = tuple(token for token in spec.add if token not in known)
    added_special = tuple(token for token in (*spec.add_special, *pad) if token not in known)
    notes = [
        _note(tokenizer, known, token, spec) for token in (*spec.add, *spec.add_special) if token in known
    ]
    # Read by the old tokenizer: a description may not lean on the new tokens.
    words = {token: _words(tokenizer, text) for token, text in spec.descriptions.items()}
    ids = _add(tokenizer, added, added_special)
    if spec.pad_token is not None:
        tokenizer.pad_token = spec.pad_token
    return VocabularyChange(
        added=added,
        added_special=added_special,
        ids=ids,
        num_before=_num_ids(known),
        num_tokens=_num_ids(tokenizer.get_vocab()),
        pad_token=tokenizer.pad_token,
        descriptions=tuple((token, words[token]) for token in (*added, *added_special) if words.get(token)),
        noise=spec.noise,
        seed=seed,
        resize=spec.resize,
        notes=tuple(notes),
    )


def _note(tokenizer: PreTrainedTokenizerBase, known: dict[str, int], token: str, spec: VocabularySpec) -> str:
    kind = ""
    if token in spec.add_special and token not in tokenizer.all_special_tokens:
        added = tokenizer.added_tokens_decoder.get(known[token])
        kind = "" if added is not None and added.special else ", as an ordinary token"
    return f"model.vocabulary: {token!r} is in the vocabulary already{kind} (id {known[token]}); it stays as it is"


def _words(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[int, ...]:
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


def _num_ids(vocabulary: dict[str, int]) -> int:
    return max(vocabulary.values(), default=-1) + 1


def _add(
    tokenizer: PreTrainedTokenizerBase, added: Sequence[str], added_special: Sequence[str]
) -> tuple[int, ...]:
    tokenizer.add_tokens(list(added))
    tokenizer.add_tokens(list(added_special), special_tokens=True)
    known = tokenizer.get_vocab()
    return tuple(known[token] for token in (*added, *added_special))


def recorded_change(adapters: Iterable[str]) -> VocabularyChange | None:
    """The change that these adapters (folders or hub names) were trained with; None where none has a record.

    Raises ModelError where two of them were trained with different ones: they fit no one model.
    """
    found: tuple[str, VocabularyChange] | None = None
    for folder in adapters:
        record = read_record(folder)
        if record is None:
            continue
        if found is not None and record != found[1]:
            raise ModelError(
                f"method.adapters: {found[0]} and {folder} were trained with different new tokens "
                f"({found[1].listed()}; {record.listed()}), so no model fits both"
            )
        found = folder, record
    return None if found is None else found[1]


def replay_tokenizer(
    tokenizer: PreTrainedTokenizerBase, record: VocabularyChange, spec: VocabularySpec | None
) -> VocabularyChange:
    """Give the tokenizer the tokens of a record, at the same ids; returns the record.

    It may have them already. Raises ModelError where `spec` names other new tokens, and where the tokenizer
    would give them other ids: then it is not the one that the adapter was trained with.
    """
    known = tokenizer.get_vocab()
    recorded = (*record.added, *record.added_special)
    if spec is not None:
        special = {*spec.add_special, *filter(None, [spec.pad_token])} - (known.keys() - set(recorded))
        ordinary = set(spec.add) - (known.keys() - set(recorded))
        if (ordinary, special) != (set(record.added), set(record.added_special)):
            named = VocabularyChange(tuple(sorted(ordinary)), tuple(sorted(special)))
            raise ModelError(
                f"model.vocabulary names the new tokens {named.listed()}, but the adapter was trained with "
                f"{record.listed()}; name the same or leave model.vocabulary out"
            )
    _add(
        tokenizer,
        [token for token in record.added if token not in known],
        [token for token in record.added_special if token not in known],
    )
    extended = tokenizer.get_vocab()
    for token, index in zip(recorded, record.ids, strict=True):
        if extended[token] != index:
            raise ModelError(
                f"the adapter was trained with {token!r} as token {index}, and this tokenizer has it as "
                f"{extended[token]}; model.path or model.tokenizer is not what the adapter was trained with"
            )
    pad = record.pad_token if spec is None or spec.pad_token is None else spec.pad_token
    if pad is not None:
        tokenizer.pad_token = pad
    return record


# --------------------------------------------------------------------------------------------------
# The embeddings


def resize_embeddings(model: PreTrainedModel, change: VocabularyChange) -> VocabularyChange:
    """Give the new tokens their rows, in the input embeddings and in the output head where it is not tied.

    The matrices grow only where the tokens do not fit, to a multiple of 64; what is padded up starts like a
    new token. Drawn from a generator of the change's own seed, so nothing else decides the rows and they
    change nothing that is drawn elsewhere. Returns the change with its rows.
    Raises ModelError for a record made on a model of another size, and for heads that cannot grow.
    """
    before = len(token_modules(model)[0].weight)
    if change.rows_before is not None and change.rows_before != before:
        raise ModelError(
            f"the new tokens {change.listed()} were recorded on a model of {change.rows_before:,} embedding rows, "
            f"and this one has {before:,}; it is not the model that the adapter was trained on"
        )
    rows = before
    if change.is_needed and change.num_tokens > before:
        rows = math.ceil(change.num_tokens / ROWS_MULTIPLE) * ROWS_MULTIPLE
        _grow(model, rows)
    resized = replace(change, rows_before=before, rows=rows)
    fresh = sorted({*change.ids, *range(before, rows)})
    if fresh:
        _start(model, resized, fresh)
    return resized


def _grow(model: PreTrainedModel, rows: int) -> None:
    embedding, head = token_modules(model)
    if head is not None and not isinstance(head, nn.Linear):
        raise ModelError(
            f"the output head of {type(model).__name__} is a {type(head).__name__}, which cannot get new rows"
        )
    bias, weight = getattr(head, "bias", None), embedding.weight
    # transformers fills the new rows from the global generators; they are filled again below.
    with torch.random.fork_rng(devices=[weight.device] if weight.is_cuda else []):
        model.resize_token_embeddings(rows, mean_resizing=False)
    embedding, head = token_modules(model)
    assert embedding.weight.shape[0] == rows
    if head is None:  # a reward model's has no rows for tokens
        return
    if bias is not None and len(head.bias) != rows:  # tied heads keep the old one
        longer = torch.cat([bias.data, bias.data.new_zeros(rows - len(bias))])
        head.bias = nn.Parameter(longer, requires_grad=bias.requires_grad)
    assert head.weight.shape[0] == rows and head.out_features == rows


@torch.no_grad()
def _start(model: PreTrainedModel, change: VocabularyChange, fresh: Sequence[int]) -> None:
    """Fill the rows `fresh` of every matrix that has one row per token."""
    assert change.rows_before is not None
    known = min(change.num_before, change.rows_before)
    token_ids = dict(zip((*change.added, *change.added_special), change.ids, strict=True))
    described = {
        token_ids[token]: [index for index in words if index < known] for token, words in change.descriptions
    }
    generator = torch.Generator().manual_seed(change.seed)
    embedding, head = token_modules(model)
    matrices = [embedding] if head is None or is_tied(model) else [embedding, head]
    for weight in (module.weight for module in matrices):
        dim = weight.shape[1]
        mean_D = _mean(weight[:known])
        start_RD = torch.stack(
            [_mean(weight[described[row]]) if described.get(row) else mean_D for row in fresh]
        )
        noise_RD = torch.randn(len(fresh), dim, generator=generator) * (change.noise / math.sqrt(dim))
        weight[torch.tensor(fresh, device=weight.device)] = (start_RD + noise_RD).to(weight)
    bias = getattr(head, "bias", None)
    if bias is not None:
        bias[torch.tensor(fresh, device=bias.device)] = _mean(bias[:known, None]).to(bias)


def token_modules(model: PreTrainedModel) -> tuple[Any, Any]:
    """The input embeddings and the output head: the modules with one row per token; no head of a reward model."""
    return model.get_input_embeddings(), model.get_output_embeddings()  # type: ignore[no-untyped-call]


def is_tied(model: PreTrainedModel) -> bool:
    """Whether the output head multiplies by the input embeddings themselves."""
    embedding, head = token_modules(model)
    return head is not None and head.weight is embedding.weight


def _mean(rows_ND: Tensor) -> Tensor:
    """The mean row (D,) in float32 on the CPU, summed in float64: the same whatever the device or threads."""
    total_D = sum(chunk.double().sum(0) for chunk in torch.split(rows_ND, _MEAN_CHUNK))
    assert isinstance(total_D, Tensor)
    return (total_D / len(rows_ND)).float().cpu()


# --------------------------------------------------------------------------------------------------
# The record


def write_record(folder: Path, change: VocabularyChange) -> None:
    """Write `vocabulary.json` beside an adapter."""
    text = json.dumps(change.to_dict(), indent=2, ensure_ascii=False)
    (folder / RECORD_NAME).write_text(text + "\n", encoding="utf-8")


def read_record(folder: str | Path) -> VocabularyChange | None:
    """The record in an adapter's folder or hub repository; None where it has none.

    Raises CheckpointError for a record that cannot be read.
    """
    path = Path(folder) / RECORD_NAME if Path(folder).is_dir() else _from_hub(str(folder))
    if path is None or not path.is_file():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        version = values.pop("version")
        if version != RECORD_VERSION:
            raise CheckpointError(f"{path} has version {version!r}; this Luthier reads {RECORD_VERSION}")
        values |= {name: tuple(values[name]) for name in ("added", "added_special", "ids")}
        values["descriptions"] = tuple((token, tuple(ids)) for token, ids in values["descriptions"].items())
        return VocabularyChange(**values)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged: {error!r}") from error


def _from_hub(repository: str) -> Path | None:
    try:
        found = cached_file(
            repository,
            RECORD_NAME,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
    except OSError:  # no such repository: whoever attaches the adapter says so
        return None
    return None if found is None else Path(found)
