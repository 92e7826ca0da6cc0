"""The nouns of Luthier: values that travel between its parts, and the protocols of those parts.

Nothing here imports torch, so that the command line can parse, check and explain a recipe at once.

Shape legend, used in the whole project:
    T  tokens of a flat row      S  segments of a flat row     N  supervised tokens (targets)
    D  hidden size               V  vocabulary size            L  tokens of one sample
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from luthier.conversations import (
    Conversation as Conversation,
    Media as Media,
    Message as Message,
    Row as Row,
    ToolCall as ToolCall,
)
from luthier.errors import (
    CheckpointError as CheckpointError,
    DataError as DataError,
    ExportError as ExportError,
    LuthierError as LuthierError,
    ModelError as ModelError,
    ProcessFailed as ProcessFailed,
    RecipeError as RecipeError,
    RowError as RowError,
    RunInterrupted as RunInterrupted,
)
from luthier.generation import (
    Event as Event,
    Generation as Generation,
    GenerationError as GenerationError,
    GenerationSettings as GenerationSettings,
    Request as Request,
    TokenChoice as TokenChoice,
)
from luthier.samples import (
    Batch as Batch,
    Encoded as Encoded,
    Lost as Lost,
    Sample as Sample,
)

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor, nn

IGNORE_INDEX = -100
"""The target of a position that is not trained, as everywhere in this field."""


# --------------------------------------------------------------------------------------------------
# Losses


@dataclass(slots=True)
class Term:
    """One term of a loss: a sum and the weight that divides it in the *global* step."""

    total: Tensor
    weight: Tensor


@dataclass(slots=True)
class LossSum:
    """A loss as sums. The trainer divides by global weights; no stage ever takes a mean.

    `terms` are added after each is divided by its own global weight. `metrics` are detached
    (sum, weight) pairs that are averaged the same way for the log. `by_target` (N,) or `by_sample` (n,), detached, say
    what each target or sample adds to the loss and with which weight, for the loss of each data set.
    """

    terms: dict[str, Term]
    metrics: dict[str, Term] = field(default_factory=dict)
    by_target: Term | None = None
    by_sample: Term | None = None


@dataclass(slots=True)
class TokenLogprobs:
    """What a policy says of the targets of a batch, in the order of their positions.

    logprobs (N,) float32; entropy (N,) float32 or None; mean_logprobs (N,) float32 or None: the average
    log-probability over the vocabulary, which is what label smoothing needs; predictions (N,) int64 or None: the
    most likely token; top_entropy (N,) float32 or None: the entropy of the softmax over the 20 largest logits alone,
    without a graph; divergence (N,) float32 or None: KL(reference || policy) over the whole vocabulary; values (N,)
    float32 or None: what the critic says of the state before each target.
    """

    logprobs: Tensor
    entropy: Tensor | None = None
    mean_logprobs: Tensor | None = None
    predictions: Tensor | None = None
    top_entropy: Tensor | None = None
    divergence: Tensor | None = None
    values: Tensor | None = None


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

    def encode(self, conversation: Conversation, parts: Sequence[Part] = ()) -> EncodedConversation:
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
class Part:
    """Characters [start, stop) of a message's content or reasoning, whose tokens are asked for.

    `ends`: with the token that ends the turn, where it follows the part at once.
    """

    message: int
    start: int
    stop: int
    of: Literal["content", "reasoning"] = "content"
    ends: bool = False


@dataclass(frozen=True, slots=True)
class EncodedConversation:
    """Token ids of a whole conversation and the spans that the assistant generates (stop token included).

    `rewritten` names the assistant messages that the template shows differently once the conversation goes on
    (reasoning removed, say): here they are only context, and they must be learnt from a conversation that ends
    with them.
    """

    ids: np.ndarray[Any, np.dtype[np.int32]]
    answers: tuple[Span, ...]
    rewritten: tuple[int, ...] = ()
    parts: tuple[tuple[int, int], ...] = ()
    """Tokens [start, stop) of each part that was asked for: those whose last character is in it; (0, 0) of one that
    the template does not show."""
    media: tuple[tuple[int, int], ...] = ()
    """Tokens [start, stop) of each image, film and sound, in the order of the messages' media."""

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, EncodedConversation):
            return NotImplemented
        mine, others = (
            (one.input_ids, one.answers, one.rewritten, one.parts, one.media) for one in (self, other)
        )
        return mine == others

    @property
    def input_ids(self) -> list[int]:
        """The ids as a list."""
        found: list[int] = self.ids.tolist()
        return found


class Policy(Protocol):
    """A plain handle around the (possibly wrapped) model: all that a stage may know of it."""

    def logprobs(
        self,
        batch: Batch,
        *,
        entropy: bool | Literal["value"] = False,
        mean_logprobs: bool = False,
        top_entropy: bool = False,
        divergence: bool = False,
        values: bool = False,
        temperature: float = 1.0,
    ) -> TokenLogprobs:
        """Statistics of the targets, of logits divided by `temperature`; "value": the entropy without a gradient."""
        ...

    def reference_logprobs(self, batch: Batch, *, temperature: float = 1.0) -> Tensor:
        """(N,) float32 log-probabilities of the targets by the reference model; without a graph."""
        ...

    def scores(self, batch: Batch) -> Tensor:
        """(R,) float32: what a reward model says of each row, at its last token."""
        ...


RowKind = Literal["text", "conversation", "pair", "feedback", "prompt"]
"""What a stage learns from: documents, conversations, pairs of answers, answers with a label, or prompts alone."""

ModelKind = Literal["language", "reward"]
"""What a stage trains: a causal language model, or one with a value head in place of the output head."""


Observed = Mapping[str, "Tensor"]
"""What `Stage.observe` saw: tensors by name, over all rows of a step."""


class Stage(Protocol):
    """What is learnt. One file under `luthier/stages` each."""

    name: str
    kind: RowKind
    model: ModelKind
    needs_reference: bool
    """Whether `loss` asks the policy for `reference_logprobs`, or for the divergence from the reference."""
    needs_mismatched: bool
    """Whether each sample comes with an answer to another prompt (kto)."""
    share_prompts: bool
    """Whether its batches have prompts that several answers continue."""
    terms: tuple[str, ...]
    """Names of the terms of its loss; one alone is called `loss`."""
    is_likelihood: bool
    """Whether the loss is a mean over tokens in nats, so that its exponential is a perplexity."""

    def encode(self, row: Row, template: Template) -> Encoded: ...

    def collate(self, samples: Sequence[Sample]) -> Batch: ...

    def weight(self, batch: Batch) -> dict[str, Tensor]:
        """The weight of each loss term in this batch, known before the forward pass."""
        ...

    def observe(self, policy: Policy, passes: Sequence[Batch], *, alone: bool = True) -> Observed:
        """Numbers of the rows of a whole step that the loss of each of its passes depends on: tensors whose first
        dimension are rows, since those of other processes are put behind them where these passes are not `alone`.

        Called without gradients, before the passes. Empty where the loss is a sum over rows.
        """
        ...

    def loss(self, policy: Policy, batch: Batch, observed: Observed) -> LossSum: ...

    def derived(self, means: Mapping[str, float]) -> dict[str, float]:
        """Numbers for the log that follow from the means of the others, as a difference of two of them does."""
        ...


class Method(Protocol):
    """What may change: which parameters train, how they are saved and merged."""

    def apply(self, model: Any) -> Any:
        """The model to train: adapters attached, everything that must not change frozen."""
        ...

    def parameter_groups(self, model: nn.Module, weight_decay: float, lr: float) -> list[dict[str, Any]]:
        """Groups for the optimizer; one with a learning rate other than `lr` says it under `lr`."""
        ...

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

    def generate(
        self, prompts: Sequence[Sequence[int]], settings: GenerationSettings, adapter: str | None = None
    ) -> list[Generation]:
        """The answer to each prompt, in order."""
        ...

    def answers(self, requests: Sequence[Request]) -> Iterator[tuple[int, Generation]]:
        """The number of each request and its answer, as they are finished."""
        ...

    def stream(self, request: Request) -> Iterator[Event]:
        """The tokens of one answer as they come; the last event has its end."""
        ...
