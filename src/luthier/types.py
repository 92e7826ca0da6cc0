"""The nouns of Luthier: values that travel between its parts, and the protocols of those parts.

Nothing here imports torch, so that the command line can parse, check and explain a recipe at once.

Shape legend, used in the whole project:
    T  tokens of a flat row      S  segments of a flat row     N  supervised tokens (targets)
    D  hidden size               V  vocabulary size            L  tokens of one sample
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor, nn

IGNORE_INDEX = -100
"""The target of a position that is not trained, as everywhere in this field."""


# --------------------------------------------------------------------------------------------------
# Errors. Each carries one message for the person who runs the command; the command line prints it alone.


class LuthierError(Exception):
    """The base of every error that is the input's or the machine's fault, not a bug."""


class RecipeError(LuthierError):
    """A recipe that cannot be run: unknown key, wrong type, impossible combination."""


class DataError(LuthierError):
    """A data file, row, column or template that cannot be used."""


class RowError(DataError):
    """One row that cannot be used. It is dropped and counted under `reason`, a short phrase without values."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason


class ModelError(LuthierError):
    """A model, tokenizer or adapter that cannot be loaded or trained exactly."""


class CheckpointError(LuthierError):
    """A checkpoint or run directory that is damaged, foreign or in the way."""


class RunInterrupted(LuthierError):
    """A run that a signal stopped after it had saved a checkpoint; the command line has a status for it."""


# --------------------------------------------------------------------------------------------------
# Data, before tokens


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One function call of the assistant; `arguments` is a JSON object or the text that stood in its place."""

    name: str
    arguments: Mapping[str, Any] | str
    id: str | None = None


@dataclass(frozen=True, slots=True)
class Message:
    """One turn.

    `role` is any role that the template can render (system, user, assistant, tool, ...).
    `weight` is the loss weight of the turn's own tokens; None means the stage's rule (answers 1, the rest 0).
    """

    role: str
    content: str = ""
    reasoning: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    weight: float | None = None


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages in order, and the tools that the assistant may call (JSON schemas)."""

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a data file, after its format has been read: a conversation, or plain text."""

    source: str
    """Name of the data set."""
    index: int
    """Position in the data set as it was read, from 0."""
    conversation: Conversation | None = None
    text: str | None = None


# --------------------------------------------------------------------------------------------------
# Data, as tokens


@dataclass(frozen=True, slots=True)
class Sample:
    """One tokenized example: the unit that is packed, never cut again.

    input_ids (L,) int32 and weights (L,) float32: `weights[i]` is the loss weight of token i *as a target*
    (it is predicted from the tokens before it); 0 means context only.
    """

    input_ids: np.ndarray[Any, np.dtype[np.int32]]
    weights: np.ndarray[Any, np.dtype[np.float32]]
    source: str = ""
    index: int = -1
    """Row index in the data set, for reports and for naming a bad row."""

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass(frozen=True, slots=True)
class Lost:
    """What did not become tokens when one row was encoded."""

    dropped: str | None = None
    """Why the whole row was left out; None where it was not."""
    tokens: int = 0
    """Tokens cut off."""
    answers: int = 0
    """Answers of which no token is left."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """What a stage makes of one row: samples, and what was lost on the way."""

    samples: tuple[Sample, ...] = ()
    lost: Lost = Lost()


@dataclass(slots=True)
class Batch:
    """One flat row of real tokens for one forward pass; see the design's "The flat batch".

    input_ids (1, T) int64, position_ids (1, T) int64, cu_seqlens (S + 1,) int32,
    targets (T,) int64: the next token, already shifted, IGNORE_INDEX where there is no loss,
    target_weights (T,) float32: the loss weight of each target,
    parent (S,) int64: the segment that this one continues, or -1.
    `samples` names where each segment came from, as (source, row index).
    """

    input_ids: Tensor
    position_ids: Tensor
    cu_seqlens: Tensor
    targets: Tensor
    target_weights: Tensor
    parent: Tensor
    max_length: int
    """Length of the longest segment."""
    samples: list[tuple[str, int]] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return int(self.input_ids.shape[1])

    @property
    def num_segments(self) -> int:
        return int(self.cu_seqlens.shape[0]) - 1

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with its tensors on `device` (copied only where they are elsewhere)."""
        moved = {
            name: getattr(self, name).to(device, non_blocking=True)
            for name in ("input_ids", "position_ids", "cu_seqlens", "targets", "target_weights", "parent")
        }
        return replace(self, **moved)


@dataclass(slots=True)
class Term:
    """One term of a loss: a sum and the weight that divides it in the *global* step."""

    total: Tensor
    weight: Tensor


@dataclass(slots=True)
class LossSum:
    """A loss as sums. The trainer divides by global weights; no stage ever takes a mean.

    `terms` are added after each is divided by its own global weight. `metrics` are detached
    (sum, weight) pairs that are averaged the same way for the log.
    """

    terms: dict[str, Term]
    metrics: dict[str, Term] = field(default_factory=dict)


@dataclass(slots=True)
class TokenLogprobs:
    """What a policy says of the targets of a batch, in the order of their positions.

    logprobs (N,) float32; entropy (N,) float32 or None; mean_logprobs (N,) float32 or None: the average
    log-probability over the vocabulary, which is what label smoothing needs; predictions (N,) int64 or None: the
    most likely token.
    """

    logprobs: Tensor
    entropy: Tensor | None = None
    mean_logprobs: Tensor | None = None
    predictions: Tensor | None = None


@dataclass(frozen=True, slots=True)
class EvalRow:
    """What a model said of one sample of an evaluation set; what a metric computes from.

    Arrays of the K >= 1 supervised positions of the sample, in their order: `targets` (K,) int64 are the tokens
    that were to be predicted, `predictions` (K,) int64 the most likely tokens, `logprobs` (K,) float32 the
    log-probabilities of the targets, `weights` (K,) float32 their loss weights.
    """

    source: str
    """Name of the data set."""
    index: int
    """Position of the row in the data set as it was read, from 0; a row that was split has several samples."""
    targets: np.ndarray[Any, np.dtype[np.int64]]
    predictions: np.ndarray[Any, np.dtype[np.int64]]
    logprobs: np.ndarray[Any, np.dtype[np.float32]]
    weights: np.ndarray[Any, np.dtype[np.float32]]


# --------------------------------------------------------------------------------------------------
# The parts


class Template(Protocol):
    """Conversation -> token ids and a loss mask; pure."""

    name: str

    def encode(self, conversation: Conversation) -> EncodedConversation:
        """All tokens of the conversation, cut into turns. Raises DataError where it cannot be rendered."""
        ...

    def prompt(self, conversation: Conversation) -> list[int]:
        """Token ids of a conversation that the assistant is to continue."""
        ...

    def text(self, text: str) -> list[int]:
        """Token ids of plain text, special tokens in it read as text, no markers added."""
        ...

    def document(self, text: str, *, begin: bool = True) -> list[int]:
        """Token ids of a whole document: the tokenizer's begin marker if it adds one, the text, the end token."""
        ...

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """The tokens at which a generated answer ends."""
        ...


@dataclass(frozen=True, slots=True)
class Span:
    """Tokens [start, stop) of an answer: what message `message` of the conversation generated.

    Tokens [stop, end) are what the template writes between the stop token and the next turn (often one newline).
    """

    start: int
    stop: int
    message: int
    end: int


@dataclass(frozen=True, slots=True)
class EncodedConversation:
    """Token ids of a whole conversation and the spans that the assistant generates (stop token included).

    `rewritten` names the assistant messages that the template shows differently once the conversation goes on
    (reasoning removed, say): here they are only context, and they must be learnt from a conversation that ends
    with them.
    """

    input_ids: list[int]
    answers: tuple[Span, ...]
    rewritten: tuple[int, ...] = ()


class Policy(Protocol):
    """A plain handle around the (possibly wrapped) model: all that a stage may know of it."""

    def logprobs(
        self, batch: Batch, *, entropy: bool = False, mean_logprobs: bool = False
    ) -> TokenLogprobs: ...


class Stage(Protocol):
    """What is learnt. One file under `luthier/stages` each."""

    name: str

    def encode(self, row: Row, template: Template) -> Encoded: ...

    def collate(self, samples: Sequence[Sample]) -> Batch: ...

    def weight(self, batch: Batch) -> dict[str, Tensor]:
        """The weight of each loss term in this batch, known before the forward pass."""
        ...

    def loss(self, policy: Policy, batch: Batch) -> LossSum: ...


class Method(Protocol):
    """What may change: which parameters train, how they are saved and merged."""

    def apply(self, model: Any) -> Any:
        """The model to train: adapters attached, everything that must not change frozen."""
        ...

    def parameter_groups(self, model: nn.Module, weight_decay: float) -> list[dict[str, Any]]: ...

    def save(self, model: Any, folder: Path, state: Mapping[str, Tensor] | None = None) -> None:
        """Write what was trained, so that `load` on the same base gives the same function.

        `state` is a copy of the model's state dict, where the model itself may change meanwhile.
        """
        ...

    def load(self, model: Any, folder: Path) -> None:
        """Put saved weights back into a model that `apply` returned (resume, best checkpoint)."""
        ...


class Engine(Protocol):
    """Token ids in, tokens out."""

    def generate(self, prompts: Sequence[Sequence[int]], settings: GenerationSettings) -> list[list[int]]: ...


@dataclass(frozen=True, slots=True)
class GenerationSettings:
    """How an answer is drawn; temperature 0 is greedy."""

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop_ids: tuple[int, ...] = ()
