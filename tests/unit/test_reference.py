"""The model that a policy is compared with, and what it said, kept on disk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

from luthier.data.collate import branch_batch
from luthier.data.encode import EncodeOptions
from luthier.data.partners import Mismatched
from luthier.data.reference_cache import ReferenceCache, sample_key
from luthier.methods import build_method
from luthier.model.logprobs import ModelPolicy, install_target_forward
from luthier.model.reference import AdaptersOff, AsItIs, OtherModel, Reference, StartingPoint
from luthier.recipe.schema import FreezeSpec, FullSpec, LoraSpec, RmSpec
from luthier.stages import build_stage
from luthier.stages.answers import answers_batch
from luthier.trainer.precompute import Precomputation
from luthier.trainer.steps import idle
from luthier.types import DataError, ModelError, Sample
from tests.tiny import random_answers, random_pairs, tiny_model

PAIRS = random_pairs([(5, 4, 7), (9, 3, 3), (1, 6, 2), (12, 8, 5), (3, 2, 9)])
METHODS = {
    "full": FullSpec(),
    "freeze": FreezeSpec(layers=1),
    "lora": LoraSpec(rank=4, dropout=0.3),
    "lora-saved": LoraSpec(rank=4, modules_to_save=("lm_head",)),
}


def policy_model(method: str) -> Any:
    model = build_method(METHODS[method]).apply(tiny_model("llama"))
    install_target_forward(model.get_base_model() if isinstance(model, PeftModel) else model)
    return model


def plain(model: nn.Module) -> Tensor:
    model.eval()
    with torch.no_grad():
        return ModelPolicy(model).logprobs(branch_batch(PAIRS, share_prompts=False)).logprobs


def train_a_little(model: nn.Module, reference: Reference | None = None) -> None:
    """Two steps, the reference asked between forward and backward."""
    batch = branch_batch(PAIRS, share_prompts=False)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.05)
    for _ in range(2):
        model.train()
        policy = ModelPolicy(model, reference=reference)
        logprobs = policy.logprobs(batch).logprobs
        if reference is not None:
            assert not policy.reference_logprobs(batch).requires_grad
        logprobs.square().mean().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()


CASES = [(method, StartingPoint) for method in METHODS] + [("lora", AdaptersOff), ("lora-saved", AdaptersOff)]


@pytest.mark.parametrize(("method", "kind"), CASES)
def test_it_stays_what_training_started_from(method: str, kind: Any) -> None:
    """While the policy moves, and whatever mode it is in; and the policy's own numbers come back."""
    model = policy_model(method)
    start = plain(model)
    reference = kind(model)
    train_a_little(model, reference)
    moved = plain(model)
    assert (moved - start).abs().max() > 0.01
    model.train()
    policy = ModelPolicy(model, reference=reference)
    batch = branch_batch(PAIRS, share_prompts=False)
    torch.testing.assert_close(policy.reference_logprobs(batch), start, rtol=0, atol=1e-5)
    assert model.training
    assert torch.equal(plain(model), moved)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_asking_it_changes_no_step(method: str) -> None:
    alone, asked = policy_model(method), policy_model(method)
    for model, reference in ((alone, None), (asked, StartingPoint(asked))):
        torch.manual_seed(3)
        train_a_little(model, reference)
    for (name, weight), other in zip(alone.named_parameters(), asked.parameters(), strict=True):
        assert torch.equal(weight, other), name


def test_the_copy_is_only_of_what_trains() -> None:
    model = policy_model("freeze")
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert sum(copy.numel() for copy in StartingPoint(model)._copies) == trained
    assert trained < sum(parameter.numel() for parameter in model.parameters())


def test_another_model() -> None:
    other = tiny_model("llama", seed=5)
    install_target_forward(other)
    expected = plain(other)
    model = policy_model("lora")
    reference = OtherModel(other)
    assert not any(parameter.requires_grad for parameter in other.parameters())
    found = ModelPolicy(model, reference=reference).reference_logprobs(
        branch_batch(PAIRS, share_prompts=False)
    )
    assert torch.equal(found, expected)


def test_none_is_an_error() -> None:
    with pytest.raises(ModelError, match="none was built"):
        ModelPolicy(policy_model("full")).reference_logprobs(branch_batch(PAIRS, share_prompts=False))


# --------------------------------------------------------------------------------------------------
# Precomputed


def precomputation(
    folder: Path, model: nn.Module, asked: list[str], *, tokens: int = 30, name: str = "a"
) -> Precomputation:
    def reference() -> Reference:
        asked.append(name)
        return AsItIs()

    return Precomputation(
        cache=ReferenceCache(str(folder), {"name": name}),
        reference=reference,
        model=model,
        device=torch.device("cpu"),
        arithmetic=torch.float32,
        tokens_per_pass=tokens,
        share_prompts=False,
        padded=False,
        say=lambda text: None,
    )


def live(model: nn.Module, samples: Sequence[Sample]) -> list[np.ndarray[Any, Any]]:
    """Each sample alone, its branches one after the other."""
    policy = ModelPolicy(model.eval(), torch.float32, reference=AsItIs())
    return [policy.reference_logprobs(branch_batch([one], share_prompts=False)).numpy() for one in samples]


@pytest.mark.parametrize(
    "samples", [PAIRS, Mismatched(random_answers([(4, 5, True), (7, 2, False), (3, 3, True)]))]
)
def test_kept_equals_live(samples: Sequence[Sample], tmp_path: Path) -> None:
    """Other samples share a pass; in the batch the numbers stand where the live ones would."""
    model = policy_model("lora")
    kept = precomputation(tmp_path, model, [])(samples)
    for sample, expected in zip(kept, live(model, samples), strict=True):
        assert sample.reference is not None
        np.testing.assert_allclose(sample.reference, expected, rtol=0, atol=1e-5)
    batch = branch_batch([kept[2], kept[0]], share_prompts=False)
    policy = ModelPolicy(model.eval(), torch.float32, reference=AsItIs())
    expected = policy.reference_logprobs(replace(batch, reference=None))
    assert batch.reference is not None
    torch.testing.assert_close(policy.reference_logprobs(batch), expected, rtol=0, atol=1e-5)


def test_each_sample_is_computed_once(tmp_path: Path) -> None:
    """Other order, a part, more samples: only what is new is computed; another reference begins anew."""
    model, asked = policy_model("lora"), list[str]()
    first = precomputation(tmp_path, model, asked)(PAIRS[:3])
    again = precomputation(tmp_path, model, asked)([PAIRS[2], PAIRS[0]])
    assert asked == ["a"]
    assert np.array_equal(again[0].reference, first[2].reference)  # type: ignore[arg-type]
    cache = ReferenceCache(str(tmp_path), {"name": "a"})
    before = set(cache.load())
    precomputation(tmp_path, model, asked)(PAIRS)
    assert asked == ["a", "a"]
    assert set(cache.load()) - before == {sample_key(one) for one in PAIRS[3:]}
    precomputation(tmp_path, model, asked, name="b")(PAIRS[:1])
    assert asked == ["a", "a", "b"]


def test_a_damaged_part_is_computed_again(tmp_path: Path) -> None:
    model, asked = policy_model("lora"), list[str]()
    kept = precomputation(tmp_path, model, asked)(PAIRS)
    (part,) = ReferenceCache(str(tmp_path), {"name": "a"}).folder.glob("*.arrow")
    part.write_bytes(part.read_bytes()[:-200])
    again = precomputation(tmp_path, model, asked)(PAIRS)
    assert asked == ["a", "a"]
    for one, other in zip(kept, again, strict=True):
        np.testing.assert_allclose(one.reference, other.reference, rtol=0, atol=1e-6)  # type: ignore[arg-type]


def test_what_a_sample_is() -> None:
    """Tokens, targets and branches; not where it comes from."""
    sample = PAIRS[0]
    key = sample_key(sample)
    assert sample_key(replace(sample, source="other", index=9, label=1.0)) == key
    other_weights = sample.weights.copy()
    other_weights[-1] = 0
    changed = [
        replace(sample, input_ids=sample.input_ids + 1),
        replace(sample, weights=other_weights),
        replace(sample, branches=(5, 10)),
        replace(sample, branches=(5,)),
    ]
    assert len({key, *map(sample_key, changed)}) == 5


def test_no_room_is_said(tmp_path: Path) -> None:
    (tmp_path / "reference").write_text("a file in the way")
    with pytest.raises(DataError, match="cannot write the reference's log-probabilities"):
        precomputation(tmp_path, policy_model("lora"), [])(PAIRS)


def test_a_pass_without_work_needs_no_precomputed_reference() -> None:
    """The one token of a process that waits for others brought nothing along; a pass with work has to."""
    policy = ModelPolicy(policy_model("full"))
    waiting = answers_batch([idle(PAIRS)])
    assert policy.reference_logprobs(waiting).shape == policy.logprobs(waiting).logprobs.shape == (0,)
    with pytest.raises(ModelError, match="none was built"):
        policy.reference_logprobs(answers_batch(PAIRS))


def test_a_reward_model_waits_for_others_with_one_token() -> None:
    batch = build_stage(RmSpec(), EncodeOptions(64, "error")).collate([idle(PAIRS)])
    assert batch.num_tokens == 1
    assert batch.rows is not None and batch.rows.shape == (0,)
    assert batch.labels is not None and batch.labels.shape == (0,)
