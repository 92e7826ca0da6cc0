"""Rollouts: which prompts when, what is known of their answers, and how they are cut into updates and passes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from luthier.conversations import Conversation, Message
from luthier.data.encode import EncodeOptions
from luthier.engine.hf import HfEngine
from luthier.experience import Completion, Prompt, Rollout
from luthier.generation import GenerationSettings
from luthier.model.logprobs import ModelPolicy, install_target_forward
from luthier.model.reference import StartingPoint
from luthier.model.rows import FLAT, Rows
from luthier.online import LiveSampler
from luthier.recipe.online import GrpoSpec, KlSpec, LengthSpec, PpoSpec
from luthier.stages import build_stage
from luthier.trainer.bad_numbers import BadNumbersError
from luthier.trainer.before_update import Asking, Layout
from luthier.trainer.experience_passes import (
    Piece,
    cut_passes,
    from_arrays,
    learnt_samples,
    minibatch,
    part_of,
    sources_of,
    to_arrays,
)
from luthier.trainer.rollout_steps import RolloutStep, RolloutSteps, answer_seed, other_prompts
from luthier.trainer.rollouts import Rollouts, SamplingInterrupted
from luthier.types import Sample, Term
from tests.tiny import FAMILIES, VOCAB, tiny_model

REWARDS = (LengthSpec(most=4),)
OPTIONS = EncodeOptions(max_length=64, overflow="drop")
LAYOUTS: dict[str, Rows] = {
    "flat, prompts shared": Rows(shares_prompts=True),
    "flat, prompts copied": FLAT,
    "padded right": Rows(padded=True, side="right"),
    "padded left": Rows(padded=True, side="left"),
}


def some_prompts(count: int) -> list[Prompt]:
    rng = np.random.default_rng(1)
    asked = Conversation((Message("user", "?"),))
    return [
        Prompt("made", index, tuple(rng.integers(3, VOCAB, int(length)).tolist()), asked)
        for index, length in enumerate(rng.integers(1, 12, count))
    ]


@dataclass
class ByRow:
    """A reward that is a function of the row and of the tokens."""

    value: Callable[[int, list[int]], float] = lambda row, ids: float(sum(ids))
    names: tuple[str, ...] = ("by_row",)
    asked: int = 0

    def __call__(self, completions: Sequence[Completion]) -> Any:
        self.asked += len(completions)
        values = [self.value(one.prompt.index, one.ids.tolist()) for one in completions]
        return np.array(values, np.float32)[:, None]

    def totals(self, rewards: Any) -> Any:
        return rewards[:, 0]


def sampler_of(model: Any, temperature: float = 1.0, stop_ids: tuple[int, ...] = (2, 3, 4, 5)) -> LiveSampler:
    drawn = GenerationSettings(
        max_new_tokens=9, temperature=temperature, stop_ids=stop_ids, logprobs=0, logprobs_of="sampling"
    )
    return LiveSampler(HfEngine(model, rows=3), drawn, lambda generation: str(generation.ids))


def rollouts_of(
    model: Any,
    spec: GrpoSpec | PpoSpec,
    *,
    rows: Rows = FLAT,
    temperature: float = 1.0,
    limit: int = 60,
    prompts: int = 7,
    score: ByRow | None = None,
) -> Rollouts:
    stage: Any = build_stage(
        spec, OPTIONS, share_prompts=rows.shares_prompts, temperature=temperature, max_new_tokens=9
    )
    layout = Layout(limit, rows.shares_prompts, rows.padded)
    sampler = sampler_of(model, temperature)
    return Rollouts(stage, spec, some_prompts(prompts), sampler, score or ByRow(), layout, seed=3)


def asking_of(model: Any, reference: Any = None) -> Asking:
    return Asking(
        policy=ModelPolicy(model, reference=reference),
        model=model,
        arithmetic=nullcontext,
        device=torch.device("cpu"),
        step=1,
    )


def grpo(**changes: Any) -> GrpoSpec:
    return GrpoSpec(rewards=REWARDS, **{"group_size": 3, "prompts_per_rollout": 4, **changes})


# ---- the kernel says what the sampler said -----------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_on_policy_ratio_is_one(layout: str, temperature: float) -> None:
    """Recomputed log-probabilities are those of sampling, to 1e-4, in whatever order and cut the batches have them."""
    rows = LAYOUTS[layout]
    model = tiny_model("llama", "sdpa" if rows.padded else "luthier_segments")
    install_target_forward(model, rows)
    model.train()
    spec = grpo(minibatches=2, kl=KlSpec(coefficient=0.1), importance_cap=2.0)
    rollouts = rollouts_of(model, spec, rows=rows, temperature=temperature)
    seen: list[Rollout] = []
    signals = rollouts.stage.signals
    rollouts.stage.signals = lambda rollout, total: (seen.append(rollout), signals(rollout, total))[1]  # type: ignore[method-assign]
    asking = asking_of(model, StartingPoint(model))
    passes = rollouts.passes(RolloutStep(0, 0, (0, 3, 5, 6)), asking)
    (rollout,) = seen
    assert model.training
    assert len(rollout.completions) == 12
    assert {len(completion) for completion in rollout.completions} > {9}  # not all of one length
    assert float(np.ptp(rollout.sampled)) > 1  # so that another order would be seen
    np.testing.assert_allclose(rollout.logprobs, rollout.sampled, atol=1e-4)
    # The reference is the policy itself, and goes through the same passes.
    np.testing.assert_array_equal(rollout.reference, rollout.logprobs)
    assert len(passes) > 1
    model.eval()
    for batch in passes:
        said = asking.policy.logprobs(batch, temperature=temperature).logprobs
        ratios = (said - batch.signals["logprobs"]).exp()
        torch.testing.assert_close(ratios, torch.ones_like(ratios), atol=1e-4, rtol=0)


def test_another_temperature_is_seen() -> None:
    """The comparison above could fail."""
    model = tiny_model("llama")
    install_target_forward(model)
    rollouts = rollouts_of(model, grpo(epochs=2))
    rollouts.sample = sampler_of(model, temperature=1.3)
    sampled: list[Rollout] = []
    rollouts.stage.after = lambda rollout, means: sampled.append(rollout)  # type: ignore[method-assign]
    rollouts.passes(RolloutStep(0, 0, (0, 3)), asking_of(model))
    assert np.abs(sampled[0].logprobs - sampled[0].sampled).max() > 0.01


def test_answers_depend_on_seed_rollout_and_prompt_alone() -> None:
    model = tiny_model("llama")
    install_target_forward(model)

    def answers(step: RolloutStep, **changes: Any) -> dict[int, list[list[int]]]:
        rollouts = rollouts_of(model, grpo())
        rollouts.seed = changes.get("seed", 3)
        torch.manual_seed(changes.get("global_seed", 0))
        seen: list[Rollout] = []
        rollouts.stage.after = lambda rollout, means: seen.append(rollout)  # type: ignore[method-assign]
        rollouts.passes(step, asking_of(model))
        found: dict[int, list[list[int]]] = {}
        for completion in seen[0].completions:
            found.setdefault(completion.prompt.index, []).append(completion.ids.tolist())
        return found

    first = answers(RolloutStep(4, 0, (0, 1, 2)))
    assert first == answers(RolloutStep(4, 0, (0, 1, 2)), global_seed=9)
    assert answers(RolloutStep(4, 0, (2, 0)))[0] == first[0]
    assert answers(RolloutStep(5, 0, (0, 1, 2))) != first
    assert answers(RolloutStep(4, 0, (0, 1, 2)), seed=4) != first
    assert all(len({tuple(ids) for ids in group}) == 3 for group in first.values())


def test_sampling_leaves_the_generators_alone() -> None:
    model = tiny_model("llama")
    install_target_forward(model)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    rollouts_of(model, grpo()).passes(RolloutStep(0, 0, (0, 1)), asking_of(model))
    assert torch.equal(torch.get_rng_state(), before)


# ---- which prompts when ------------------------------------------------------------------------------------


def test_every_prompt_is_in_one_rollout_of_an_epoch() -> None:
    steps = RolloutSteps(11, prompts_per_rollout=4, updates=3, seed=7)
    assert len(steps) == 9
    orders = []
    for epoch in range(2):
        steps.set_epoch(epoch)
        items = [steps[k] for k in range(len(steps))]
        assert [item.rollout for item in items] == [3 * epoch + k for k in (0, 0, 0, 1, 1, 1, 2, 2, 2)]
        assert [item.update for item in items] == [0, 1, 2] * 3
        firsts = [item.prompts for item in items if item.update == 0]
        assert [len(prompts) for prompts in firsts] == [4, 4, 3]
        orders.append([number for prompts in firsts for number in prompts])
        assert sorted(orders[-1]) == list(range(11))
    assert orders[0] != orders[1] != sorted(orders[1])
    again = RolloutSteps(11, prompts_per_rollout=4, updates=3, seed=7)
    assert [again[k].prompts for k in (0, 3, 6)] == [
        tuple(orders[0][:4]),
        tuple(orders[0][4:8]),
        tuple(orders[0][8:]),
    ]
    with pytest.raises(IndexError):
        steps[9]


def test_seeds_of_answers_are_all_different() -> None:
    seeds = {
        answer_seed(3, "answers", rollout, 0, number, k)
        for rollout in range(5)
        for number in range(5)
        for k in range(5)
    } | {answer_seed(3, "evaluation", number) for number in range(5)}
    assert len(seeds) == 130
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert answer_seed(3, "answers", 1, 2) != answer_seed(-3, "answers", 1, 2)


def test_other_prompts_are_new_and_a_function_of_the_round() -> None:
    drawn = other_prompts(20, 3, 5, 1, used=range(10), wanted=4)
    assert len(set(drawn)) == 4
    assert min(drawn) >= 10
    assert drawn == other_prompts(20, 3, 5, 1, used=range(10), wanted=4)
    assert drawn != other_prompts(20, 3, 5, 2, used=range(10), wanted=4)
    assert other_prompts(20, 3, 5, 1, used=range(19), wanted=4) == [19]


# ---- the cut -----------------------------------------------------------------------------------------------


def made_samples(sizes: Sequence[tuple[int, Sequence[int]]]) -> list[Sample]:
    """Samples of a prompt and answers of these lengths; every token is told apart by its signal."""
    samples, place = [], 0
    for index, (prompt, answers) in enumerate(sizes):
        total = sum(answers)
        bounds = np.cumsum([prompt, *answers])[:-1]
        samples.append(
            Sample(
                np.arange(prompt + total, dtype=np.int32),
                np.repeat(np.array([0, 1], np.float32), [prompt, total]),
                "made" if index % 2 else "other",
                index,
                tuple(bounds.tolist()),
                signals={"place": np.arange(place, place + total, dtype=np.float32)},
            )
        )
        place += total
    return samples


SAMPLES = made_samples([(5, (3, 8, 2)), (9, (4,)), (1, (7, 7, 1, 2)), (6, (30,)), (3, (2, 2))])


def branches_of(pieces: Sequence[Piece]) -> list[tuple[int, int]]:
    return [(piece.sample, k) for piece in pieces for k in range(piece.first, piece.last)]


def test_minibatches_share_the_prompts_anew_each_time() -> None:
    everything = [(k, branch) for k, sample in enumerate(SAMPLES) for branch in range(len(sample.branches))]
    cuts = []
    for epoch in range(2):
        cut = [branches_of(minibatch(SAMPLES, 2 * epoch + number, 2, 3, 8)) for number in range(2)]
        assert sorted(cut[0] + cut[1]) == everything
        assert not {sample for sample, _ in cut[0]} & {sample for sample, _ in cut[1]}  # groups stay together
        cuts.append(cut)
    orders = {tuple(sorted(minibatch(SAMPLES, 2 * e, 2, 3, 8), key=repr)) for e in range(8)}
    assert len(orders) > 1
    assert cuts[0][0] == branches_of(minibatch(SAMPLES, 0, 2, 3, 8))


def test_groups_are_split_where_there_are_fewer_than_minibatches() -> None:
    cut = [branches_of(minibatch(SAMPLES[2:3], number, 4, 3, 8)) for number in range(4)]
    assert sorted(cut) == [[(0, 0)], [(0, 1)], [(0, 2)], [(0, 3)]]
    sizes = [len(minibatch(SAMPLES[1:2], number, 3, 3, 8)) for number in range(3)]
    assert sizes == [1, 0, 0]


@pytest.mark.parametrize(("shared", "padded"), [(True, False), (False, False), (False, True)])
@pytest.mark.parametrize("limit", [12, 25, 1000])
def test_passes_hold_every_completion_once_within_the_limit(shared: bool, padded: bool, limit: int) -> None:
    pieces = [Piece(k, 0, len(sample.branches)) for k, sample in enumerate(SAMPLES)]
    passes = cut_passes(SAMPLES, pieces, limit, shared=shared, padded=padded)
    assert sorted(one for group in passes for one in branches_of(group)) == sorted(branches_of(pieces))
    stage: Any = build_stage(grpo(), OPTIONS, share_prompts=shared)
    places: list[float] = []
    for group in passes:
        batch = stage.collate([part_of(SAMPLES[piece.sample], piece) for piece in group])
        places += batch.signals["place"].tolist()
        rows = batch.cu_seqlens.diff()
        positions = int(rows.max()) * len(rows) if padded else batch.num_tokens
        assert positions <= limit or len(branches_of(group)) == 1
    assert sorted(places) == list(range(sum(int(sample.weights.sum()) for sample in SAMPLES)))
    if limit == 1000:
        assert len(passes) == 1
        computed_once = sum(len(sample) + len(sample.branches) - 1 for sample in SAMPLES)
        assert not shared or batch.num_tokens == computed_once


def test_a_part_keeps_its_own_signals() -> None:
    part = part_of(SAMPLES[0], Piece(0, 1, 3))
    assert part.input_ids.tolist() == [0, 1, 2, 3, 4, *range(8, 18)]
    assert part.branches == (5, 13)
    assert part.signals["place"].tolist() == list(range(3, 13))
    assert part.weights.tolist() == [0] * 5 + [1] * 10


def test_experience_comes_back_from_a_file(tmp_path: Path) -> None:
    save_file(to_arrays(SAMPLES), tmp_path / "experience.safetensors")
    found = from_arrays(load_file(tmp_path / "experience.safetensors"), sources_of(SAMPLES))
    assert len(found) == len(SAMPLES)
    for one, other in zip(found, SAMPLES, strict=True):
        assert (one.source, one.index, one.branches) == (other.source, other.index, other.branches)
        for name in ("input_ids", "weights"):
            assert getattr(one, name).dtype == getattr(other, name).dtype
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
        np.testing.assert_array_equal(one.signals["place"], other.signals["place"])


def test_what_is_not_learnt_is_no_branch() -> None:
    prompts = some_prompts(2)
    completions = tuple(
        Completion(
            prompts[k // 2], np.arange(k, k + k + 1, dtype=np.int32), np.zeros(k + 1, np.float32), "", "stop"
        )
        for k in range(4)
    )
    tokens = np.arange(1 + 2 + 3 + 4, dtype=np.float32)
    zeros = np.zeros(4, np.float32)
    rollout = Rollout(completions, 2, zeros[:, None], zeros, tokens, tokens)
    learnt = np.array([False, True, False, False])
    (sample,) = learnt_samples(rollout, learnt, {"token": tokens})
    length = len(prompts[0].ids)
    assert sample.branches == (length,)
    assert sample.input_ids.tolist() == [*prompts[0].ids, 1, 2]
    assert sample.signals["token"].tolist() == [1, 2]
    assert len(learnt_samples(rollout, ~learnt, {"token": tokens})) == 2


# ---- the loop ----------------------------------------------------------------------------------------------


def flat_model() -> Any:
    model = tiny_model("llama")
    install_target_forward(model)
    return model


def test_groups_of_equal_rewards_make_room_for_other_prompts() -> None:
    """Rows 0 to 3 earn nothing whatever they say; five rounds find others for both of the rollout's."""
    score = ByRow(lambda row, ids: 0.0 if row < 4 else float(sum(ids)))
    model = flat_model()
    rollouts = rollouts_of(model, grpo(dynamic_sampling=5, prompts_per_rollout=2), score=score)
    seen: list[Rollout] = []
    rollouts.stage.after = lambda rollout, means: seen.append(rollout)  # type: ignore[method-assign]
    rollouts.passes(RolloutStep(0, 0, (0, 1)), asking_of(model))
    rows = [completion.prompt.index for completion in seen[0].completions]
    assert Counter(Counter(rows).values()) == {3: 2}
    assert min(rows) >= 4
    assert float(rollouts.metrics["groups_replaced"].total) == score.asked / 3 - 2 >= 2


def test_rounds_of_replacing_are_bounded_and_so_are_the_prompts() -> None:
    model = flat_model()
    for rounds, asked in ((0, 2), (1, 4), (9, 7)):  # of 7 prompts
        score = ByRow(lambda row, ids: 1.0)
        rollouts = rollouts_of(model, grpo(dynamic_sampling=rounds, prompts_per_rollout=2), score=score)
        rollouts.passes(RolloutStep(0, 0, (0, 1)), asking_of(model))
        assert score.asked == 3 * asked


def test_too_far_a_policy_ends_the_updates_of_its_rollout() -> None:
    model = flat_model()
    spec = grpo(epochs=2, minibatches=2, target_kl=0.1)
    rollouts, asking = rollouts_of(model, spec), asking_of(model)

    def moved(by: float) -> dict[str, Term]:
        return {"approx_kl": Term(torch.tensor(by * 8), torch.tensor(8.0))}

    prompts = (0, 1, 2, 3)
    assert rollouts.passes(RolloutStep(0, 0, prompts), asking)
    rollouts.updated(moved(0.0999))
    assert rollouts.passes(RolloutStep(0, 1, prompts), asking)
    assert float(rollouts.metrics["updates_left_out"].total) == 0
    rollouts.updated(moved(0.1001))
    for update in (2, 3):
        assert not rollouts.passes(RolloutStep(0, update, prompts), asking)
        assert float(rollouts.metrics["updates_left_out"].total) == 1
    assert rollouts.passes(RolloutStep(1, 0, prompts), asking)


def test_a_rollout_that_was_not_sampled_has_no_updates() -> None:
    """A rewound run leaves steps out, those that sample too."""
    model = flat_model()
    rollouts, asking = rollouts_of(model, grpo(minibatches=2)), asking_of(model)
    assert rollouts.passes(RolloutStep(0, 0, (0, 1)), asking)
    assert not rollouts.passes(RolloutStep(1, 1, (2, 3)), asking)


def test_smaller_passes_of_the_same_update() -> None:
    model = flat_model()
    rollouts = rollouts_of(model, grpo(), limit=1000)
    (whole,) = rollouts.passes(RolloutStep(0, 0, (0, 1, 2)), asking_of(model))
    rollouts.limit_passes(whole.num_tokens // 3)
    parts = rollouts.again(0)
    assert len(parts) >= 3
    assert rollouts.tokens_per_pass == whole.num_tokens // 3
    together = torch.cat([batch.signals["advantages"] for batch in parts])
    assert sorted(together.tolist()) == sorted(whole.signals["advantages"].tolist())


def test_an_interrupted_sampler_gives_up_at_once() -> None:
    model = flat_model()
    sampler, told = sampler_of(model), list[tuple[int, int]]()
    sampler.told, sampler.interrupted = (
        (lambda done, total: told.append((done, total))),
        lambda: len(told) > 2,
    )
    asked = [(prompt, number) for number, prompt in enumerate(some_prompts(7))]
    with pytest.raises(SamplingInterrupted):
        sampler(asked, interruptible=True)
    assert told == [(0, 7), (1, 7), (2, 7)]
    sampler.interrupted = lambda: True
    assert len(sampler(asked, interruptible=False)) == 7  # and the engine is free again


def test_scores_that_are_no_numbers_stop_the_run_with_the_row() -> None:
    model = flat_model()
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(BadNumbersError, match="made, row 2: the model's scores"):
        sampler_of(model)([(some_prompts(3)[2], 1)], interruptible=True)


def test_single_scores_that_are_no_numbers_are_counted() -> None:
    model = flat_model()
    with torch.no_grad():
        model.lm_head.weight[7].fill_(float("nan"))
    (completion,) = sampler_of(model)([(some_prompts(1)[0], 1)], interruptible=True)
    assert completion.bad_scores == len(completion) > 0 and 7 not in completion.ids


def test_an_answer_that_ends_at_once_is_its_stop_token() -> None:
    model = flat_model()
    sampler = sampler_of(model, stop_ids=tuple(range(VOCAB)))
    (completion,) = sampler([(some_prompts(1)[0], 1)], interruptible=True)
    assert (len(completion), completion.finish, completion.text) == (1, "stop", "[]")
    rollouts, asking = rollouts_of(model, grpo(minibatches=2)), asking_of(model)
    rollouts.sample = sampler
    for batch in rollouts.passes(RolloutStep(0, 0, (0, 1)), asking):
        loss = rollouts.stage.loss(asking.policy, batch, {})
        assert len(batch.signals["advantages"]) == 3
        assert all(bool(term.total.isfinite()) for term in loss.terms.values())


@pytest.mark.parametrize(
    ("changes", "asked"),
    [
        ({}, False),
        ({"epochs": 2}, True),
        ({"importance_cap": 2.0}, True),
        ({"kl": KlSpec(coefficient=0.1)}, True),
    ],
)
def test_the_policy_is_asked_again_where_that_serves_something(changes: dict[str, Any], asked: bool) -> None:
    model = flat_model()
    asking, calls = asking_of(model, StartingPoint(model)), list[Any]()
    said = asking.policy.logprobs
    asking.policy.logprobs = lambda *a, **k: (calls.append(a), said(*a, **k))[1]  # type: ignore[method-assign]
    passes = rollouts_of(model, grpo(**changes)).passes(RolloutStep(0, 0, (0, 1)), asking)
    assert bool(calls) == asked
    # What an update reads is never what the sampler rounded.
    assert all(("logprobs" in batch.signals) <= asked for batch in passes)


def test_room_is_what_prompt_and_answer_need() -> None:
    sampler = sampler_of(flat_model())
    context = FAMILIES["llama"]().max_position_embeddings
    assert sampler.has_room(context - 1)
    assert not sampler.has_room(context)
