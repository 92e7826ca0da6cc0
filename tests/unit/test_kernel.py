"""The numeric kernel alone, on a linear head: closed forms in float64, and how large its tensors are."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from luthier.model import kernel
from luthier.model.kernel import Anchor, token_logprobs

ROWS, WIDTH, VOCAB = 150, 8, 211
DIFFERENTIABLE = ("logprobs", "entropy", "mean_logprobs", "divergence")


@dataclass(frozen=True, slots=True)
class Problem:
    """Float32 inputs: hidden (N, D) and head (V, D) of the trained model and of an anchor that is another width."""

    hidden: Tensor
    head: Tensor
    targets: Tensor
    anchor_hidden: Tensor
    anchor_head: Tensor

    def anchor(self) -> Anchor:
        return Anchor(self.anchor_hidden, lambda rows: rows @ self.anchor_head.T)

    def answers(self, **wanted: Any) -> dict[str, Tensor]:
        arguments: dict[str, Any] = {
            "entropy": True,
            "mean_logprobs": True,
            "top_entropy": True,
            "predictions": True,
            "anchor": self.anchor(),
            **wanted,
        }
        return token_logprobs(
            self.hidden,
            lambda rows: rows @ self.head.T,
            self.targets,
            vocab_size=len(self.head),
            head_trains=self.head.requires_grad,
            **arguments,
        )


def problem(*, trains: bool, vocab: int = VOCAB, rows: int = ROWS, scale: float = 1.0) -> Problem:
    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return Problem(
        hidden=normal(rows, WIDTH).requires_grad_(),
        head=(normal(vocab, WIDTH) * scale).requires_grad_(trains),
        targets=torch.randint(0, vocab, (rows,), generator=generator),
        anchor_hidden=normal(rows, WIDTH + 3),
        anchor_head=normal(vocab, WIDTH + 3),
    )


def closed_forms(hidden: Tensor, head: Tensor, p: Problem) -> dict[str, Tensor]:
    """Of whole tables of float64."""
    logits = hidden @ head.T
    table = torch.log(torch.softmax(logits, -1))
    anchored = torch.log(torch.softmax(p.anchor_hidden.double() @ p.anchor_head.double().T, -1))
    top = logits.sort(dim=-1, descending=True).values[:, :20]
    share = top.exp() / top.exp().sum(-1, keepdim=True)
    return {
        "logprobs": table[torch.arange(len(table)), p.targets],
        "entropy": -(table.exp() * table).sum(-1),
        "mean_logprobs": table.mean(-1),
        "divergence": (anchored.exp() * (anchored - table)).sum(-1),
        "top_entropy": -(share * share.log()).sum(-1),
        "predictions": logits.argmax(-1),
    }


@pytest.fixture(params=[1, VOCAB * 2 * 37, 2**23], ids=["16-rows", "37-rows", "one-chunk"])
def chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "LOGITS_PER_CHUNK", request.param)


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("trains", [False, True], ids=["frozen", "trains"])
def test_closed_forms(trains: bool) -> None:
    p = problem(trains=trains)
    hidden = p.hidden.detach().double().requires_grad_()
    head = p.head.detach().double().requires_grad_(trains)
    answers, expected = p.answers(), closed_forms(hidden, head, p)
    assert set(answers) == set(expected)
    for name, values in expected.items():
        torch.testing.assert_close(answers[name].double(), values.double(), rtol=1e-5, atol=1e-5)
    weights = torch.randn(len(DIFFERENTIABLE), ROWS, generator=torch.Generator().manual_seed(8))
    for said in (answers, expected):
        parts = [(w * said[name]).sum() for w, name in zip(weights, DIFFERENTIABLE, strict=True)]
        torch.stack([part.double() for part in parts]).sum().backward()
    assert p.hidden.grad is not None
    torch.testing.assert_close(p.hidden.grad.double(), hidden.grad, rtol=1e-4, atol=1e-5)
    if trains:
        assert p.head.grad is not None
        torch.testing.assert_close(p.head.grad.double(), head.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("trains", [False, True], ids=["frozen", "trains"])
def test_what_has_no_gradient(trains: bool) -> None:
    answers = problem(trains=trains).answers()
    assert {name for name, values in answers.items() if values.requires_grad} == set(DIFFERENTIABLE)
    assert answers["predictions"].dtype == torch.int64


@pytest.mark.parametrize("trains", [False, True], ids=["frozen", "trains"])
@pytest.mark.parametrize("name", ["top_entropy", "divergence"])
def test_alone(name: str, trains: bool) -> None:
    """Asked for alone it is the same, and the log-probabilities' gradient is what it is without."""
    p, plain = problem(trains=trains), problem(trains=trains)
    nothing = {
        "entropy": False,
        "mean_logprobs": False,
        "top_entropy": False,
        "predictions": False,
        "anchor": None,
    }
    asked = {"anchor": p.anchor()} if name == "divergence" else {name: True}
    answers, without = p.answers(**{**nothing, **asked}), plain.answers(**nothing)
    assert list(answers) == ["logprobs", name]
    assert list(without) == ["logprobs"]
    torch.testing.assert_close(answers[name], p.answers()[name])
    answers["logprobs"].sum().backward()
    without["logprobs"].sum().backward()
    torch.testing.assert_close(p.hidden.grad, plain.hidden.grad)


@pytest.mark.parametrize("trains", [False, True], ids=["frozen", "trains"])
def test_the_number_of_the_entropy_alone(trains: bool) -> None:
    """It has no gradient, and those of the others are what they are without it."""
    p, plain = problem(trains=trains), problem(trains=trains)
    answers, without = p.answers(entropy="value"), plain.answers(entropy=False)
    assert not answers["entropy"].requires_grad
    torch.testing.assert_close(answers["entropy"], p.answers()["entropy"].detach())
    for said in (answers, without):
        torch.stack([said[name].sum() for name in DIFFERENTIABLE if name != "entropy"]).sum().backward()
    assert torch.equal(p.hidden.grad, plain.hidden.grad)


def test_divergence_from_itself_is_nothing() -> None:
    """A run that starts at its reference is pulled nowhere."""
    p = problem(trains=False)
    itself = Anchor(p.hidden.detach(), lambda rows: rows @ p.head.T)
    divergence = p.answers(anchor=itself)["divergence"]
    assert torch.equal(divergence, torch.zeros(ROWS))
    divergence.sum().backward()
    assert p.hidden.grad is not None
    assert float(p.hidden.grad.abs().max()) < 1e-5


@pytest.mark.parametrize("vocab", [2, 19, 20, 21])
def test_top_entropy_of_a_small_vocabulary(vocab: int) -> None:
    """Of all tokens, where there are no more than twenty; of twenty, it is below the whole."""
    answers = problem(trains=False, vocab=vocab).answers()
    whole, top = answers["entropy"], answers["top_entropy"]
    if vocab <= 20:
        torch.testing.assert_close(top, whole)
    else:
        assert bool((top < whole + 1e-5).all())
        assert float((whole - top).max()) > 0.02
    assert float(top.max()) <= math.log(min(vocab, 20)) + 1e-6


def test_top_entropy_of_certainty_is_not_negative() -> None:
    """A root of it must not be a NaN."""
    top = problem(trains=False, scale=40.0).answers()["top_entropy"]
    assert float(top.min()) == 0.0
    assert bool(torch.isfinite(top.sqrt()).all())


# ---- memory ------------------------------------------------------------------------------------------------


class Sizes(TorchDispatchMode):
    """The largest result of any operation, in numbers."""

    largest = 0

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.largest = max(self.largest, tensor.numel())
        return result


@contextmanager
def sizes() -> Iterator[Sizes]:
    with Sizes() as seen:
        yield seen


@pytest.mark.parametrize("trains", [False, True], ids=["frozen", "trains"])
def test_no_table_of_all_targets(trains: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the trained model's logits nor the anchor's exist for more targets than one chunk has."""
    monkeypatch.setattr(kernel, "LOGITS_PER_CHUNK", 1)
    p = problem(trains=trains)
    with sizes() as seen:
        answers = p.answers()
        torch.stack([answers[name].sum() for name in DIFFERENTIABLE]).sum().backward()
    assert seen.largest == 16 * VOCAB
    assert 16 * VOCAB < ROWS * VOCAB / 9


def test_an_anchor_counts_as_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """With an anchor a chunk has two tables, so it has half of the rows."""
    monkeypatch.setattr(kernel, "LOGITS_PER_CHUNK", VOCAB * 40)
    called: list[int] = []
    p = problem(trains=False)

    def anchored(rows: Tensor) -> Tensor:
        called.append(len(rows))
        return rows @ p.anchor_head.T

    p.answers(anchor=Anchor(p.anchor_hidden, anchored))
    assert called == [20] * 7 + [10]
