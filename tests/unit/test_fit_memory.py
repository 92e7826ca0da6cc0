"""Memory that runs out in a step: smaller passes give what a run with them from the start gives."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import luthier
from luthier.model.logprobs import ModelPolicy
from luthier.trainer.memory import OutOfMemoryError
from luthier.trainer.trainer import PeftTrainer
from luthier.types import Batch, TokenLogprobs
from tests.tiny import chat_model, random_samples, tiny_model, write_alpaca
from tests.training import history, recipe_of, trainer_of, weights

LENGTHS = [9, 30, 4, 17, 12, 40, 6, 8, 25, 3, 11, 19, 22, 5]


class Memory:
    """A device on which a forward, or a backward, over more than `room` tokens runs out of memory."""

    def __init__(self, room: int, where: str = "forward") -> None:
        self.room, self.where = room, where
        self.passes: list[int] = []
        self.failures = 0

    def enter(self, policy: ModelPolicy, batch: Batch, **wanted: Any) -> TokenLogprobs:
        answers = self.usual(policy, batch, **wanted)
        if not torch.is_grad_enabled():
            return answers
        self.passes.append(batch.num_tokens)
        if batch.num_tokens > self.room and self.where == "forward":
            self.fail()
        elif batch.num_tokens > self.room:
            answers.logprobs.register_hook(self.fail)
        return answers

    def fail(self, gradient: Tensor | None = None) -> None:
        self.failures += 1
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 139.00 GiB"
        )

    @contextmanager
    def installed(self, patch: pytest.MonkeyPatch) -> Iterator[Memory]:
        self.usual = ModelPolicy.logprobs
        memory = self
        with patch.context() as context:
            context.setattr(ModelPolicy, "logprobs", lambda *given, **wanted: memory.enter(*given, **wanted))
            yield self


def trainer(output: Path, said: list[str] | None = None, dropout: float = 0.0, **train: Any) -> PeftTrainer:
    recipe = recipe_of(
        output,
        method={"type": "lora", "rank": 4, "dropout": dropout},
        stage={"type": "sft", "label_smoothing": 0.1},
        optim={"lr": 1e-2},
        train={"tokens_per_batch": 80, "epochs": 2, **train},
    )
    say = (lambda text: None) if said is None else said.append
    return trainer_of(recipe, tiny_model("llama"), random_samples(LENGTHS), say=say)


def assert_same_run(actual: PeftTrainer, expected: PeftTrainer) -> None:
    for key in ("loss", "nll", "grad_norm", "learning_rate", "loss_scale"):
        assert history(actual, key) == history(expected, key), key
    assert actual.state.num_input_tokens_seen == expected.state.num_input_tokens_seen
    left = weights(expected.model)
    for name, weight in weights(actual.model).items():
        assert torch.equal(weight, left[name]), name


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_run_that_ran_out_is_one_with_smaller_passes(
    where: str, precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit by bit: losses, metrics, tokens, norms and weights. The first step finds 40 = 80 / 2."""
    expected = trainer(tmp_path / "small", tokens_per_pass=40, precision=precision)
    expected.train()
    said: list[str] = []
    run = trainer(tmp_path / "found", said, tokens_per_pass=80, precision=precision, fit_memory=True)
    with Memory(45, where).installed(monkeypatch) as memory:
        run.train()
    assert memory.failures == 1
    assert run.tokens_per_pass == 40
    assert len(history(run, "loss")) == len(history(run, "nll")) >= 4
    assert_same_run(run, expected)
    assert said == [
        "memory ran out in step 1: passes now have at most 40 tokens (train.tokens_per_pass was 80); the result "
        "stays the same"
    ]


def test_it_is_said_once_and_found_again_only_when_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """4000 is halved to 125, below the pass of 211 tokens, and to 62; one sentence, and no larger pass after it."""
    said: list[str] = []
    run = trainer(tmp_path, said, tokens_per_pass=4000, tokens_per_batch=1000, fit_memory=True)
    with Memory(70).installed(monkeypatch) as memory:
        run.train()
    assert memory.passes[0] == sum(LENGTHS) == 211
    assert 70 < memory.passes[1] <= 125
    assert max(memory.passes[2:]) <= 62
    assert (memory.failures, run.tokens_per_pass) == (2, 62)
    assert len(said) == 1
    assert said[0].endswith("at most 62 tokens (train.tokens_per_pass was 4000); the result stays the same")


def test_rows_are_cut_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under the rows rule a step keeps its rows."""
    rows = {"tokens_per_batch": None, "rows_per_device": 4, "accumulation": 2}
    expected = trainer(tmp_path / "small", tokens_per_pass=40, **rows)
    expected.train()
    run = trainer(tmp_path / "found", tokens_per_pass=80, fit_memory=True, **rows)
    with Memory(45).installed(monkeypatch) as memory:
        run.train()
    assert memory.failures >= 1
    assert run.state.global_step == expected.state.global_step == 4
    assert_same_run(run, expected)


def test_a_repeated_step_draws_what_a_first_one_draws(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With dropout: the masks of the failed attempt are not used up."""
    expected = trainer(tmp_path / "small", dropout=0.3, tokens_per_pass=40)
    expected.train()
    run = trainer(tmp_path / "found", dropout=0.3, tokens_per_pass=80, fit_memory=True)
    with Memory(45, "backward").installed(monkeypatch):
        run.train()
    assert_same_run(run, expected)


def test_items_that_a_worker_cut_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A loader's process knows nothing of the new limit until the next epoch."""
    expected = trainer(tmp_path / "small", tokens_per_pass=40)
    expected.train()
    workers = {"extra": {"dataloader_num_workers": 1}}
    run = trainer(tmp_path / "found", tokens_per_pass=80, fit_memory=True, **workers)
    with Memory(45).installed(monkeypatch) as memory:
        run.train()
    assert memory.failures == 1
    assert_same_run(run, expected)


def test_a_sample_that_does_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = trainer(tmp_path, tokens_per_pass=80, fit_memory=True)
    with Memory(35).installed(monkeypatch), pytest.raises(OutOfMemoryError) as caught:
        run.train()
    assert str(caught.value) == (
        "memory ran out on one sample of 40 tokens, and a sample is never cut; give a smaller data.max_length or "
        "model.gradient_checkpointing=true"
    )


def test_without_it_the_error_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = trainer(tmp_path, tokens_per_pass=80)
    with Memory(35).installed(monkeypatch), pytest.raises(OutOfMemoryError) as caught:
        run.train()
    assert str(caught.value).startswith("memory ran out in a pass of ")
    assert str(caught.value).endswith(
        "give a smaller train.tokens_per_pass, or train.fit_memory=true to have it found"
    )


def test_other_errors_are_not_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = trainer(tmp_path, tokens_per_pass=80, fit_memory=True)

    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(ModelPolicy, "logprobs", fail)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        run.train()


def test_nothing_of_the_failed_pass_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second attempt starts without gradients and without tensors of the first."""
    run = trainer(tmp_path, tokens_per_pass=80, max_steps=1, fit_memory=True)
    attempts: list[tuple[set[int], bool]] = []
    usual = run._run_passes

    def run_passes(model: nn.Module, passes: Any) -> Any:
        hidden = {id(one) for one in live_tensors() if one.grad_fn is not None}
        attempts.append((hidden, any(parameter.grad is not None for parameter in model.parameters())))
        return usual(model, passes)

    run._run_passes = run_passes  # type: ignore[method-assign]
    with Memory(45, "backward").installed(monkeypatch):
        run.train()
    (before, _), (after, _) = attempts  # what other tests of this process left may go in between
    assert after <= before
    assert [left for _, left in attempts] == [False, False]


def live_tensors() -> list[Any]:
    gc.collect()
    return [one for one in gc.get_objects() if type(one) is Tensor]


def test_resume_begins_with_what_was_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the whole run: checkpoint, run.json, and the sentence is not said again."""
    model = chat_model(tmp_path / "model")
    write_alpaca(tmp_path / "rows.json", 20)
    output = tmp_path / "run"
    recipe = {
        "model": {"path": str(model)},
        "data": {"train": ["rows.json"], "directory": str(tmp_path), "cache": str(tmp_path / "cache")},
        "method": {"type": "lora", "rank": 4},
        "train": {
            "tokens_per_batch": 800, "tokens_per_pass": 800, "max_steps": 4, "output": str(output), "log_every": 1,
            "save_every": 1, "plots": False, "fit_memory": True,
        },
    }  # fmt: skip
    with Memory(400).installed(monkeypatch) as memory:
        luthier.train(recipe, quiet=True)
    assert memory.failures == 1
    found = json.loads((output / "run.json").read_text())["tokens_per_pass"]
    assert found == 400
    with Memory(found).installed(monkeypatch) as memory:
        luthier.train(recipe, [f"train.resume={output / 'checkpoint-2'}"], quiet=True)
    assert memory.failures == 0
    assert sum(tokens > 100 for tokens in memory.passes) == 3  # two steps; the self-test has few tokens
    assert json.loads((output / "run.json").read_text())["tokens_per_pass"] == found
    with Memory(150).installed(monkeypatch) as memory:  # the recipe may ask for less
        luthier.train(
            recipe, [f"train.resume={output / 'checkpoint-2'}", "train.tokens_per_pass=150"], quiet=True
        )
    assert memory.failures == 0
