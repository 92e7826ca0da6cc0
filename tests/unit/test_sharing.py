"""The self-test of shared prompts: what it lets through, and every fault that it must find."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from luthier.model import attention
from luthier.model.logprobs import chosen_rows, install_target_forward
from luthier.model.rows import Rows, SharingTest
from luthier.model.selftest import build_with_rows
from luthier.model.sharing import (
    BRANCHES,
    PROMPTS,
    NotSharedError,
    require_sharing,
    run_sharing_test,
    tree_batch,
)
from luthier.types import IGNORE_INDEX
from tests.padded import builder
from tests.tiny import FAMILIES, VOCAB, tiny_model

Parts = Sequence[tuple[Tensor, Tensor, Tensor]]
Seen = Iterator[tuple[Tensor, Tensor, Tensor, int]]
ORIGINAL = attention._with_parents


def taught(family: str) -> Any:
    model = tiny_model(family)
    install_target_forward(model, Rows(shares_prompts=True))
    return model


def faint() -> Any:
    """A fresh model of so small weights that most faults move its numbers by less than rounding may."""
    torch.manual_seed(0)
    config = FAMILIES["llama"]()
    config.initializer_range = 0.01
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention.SDPA)
    install_target_forward(model, Rows(shares_prompts=True))
    return model


# ---- what passes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_known_families_pass(family: str) -> None:
    model = taught(family).train()
    result = require_sharing(model)
    assert result.difference < 1e-5
    assert result.gradient < 1e-5
    assert result.reach == 0.0
    assert model.training


@pytest.mark.parametrize("arithmetic", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "gemma2-softcap", "qwen3-moe"])
def test_sixteen_bits_pass(family: str, arithmetic: torch.dtype) -> None:
    assert require_sharing(taught(family), arithmetic).gradient < 0.05


def test_faint_models_pass() -> None:
    assert require_sharing(faint()).reach == 0.0


def test_tree() -> None:
    """The same branches in the same order, once with their prompts before all and once each with its own."""
    shared, apart = (tree_batch(VOCAB, torch.device("cpu"), shared=share) for share in (True, False))
    assert shared.parent.tolist() == [-1, -1, 0, 1, 0, 1]
    assert apart.parent.tolist() == [-1] * 4
    trunk, rows = (
        [batch.input_ids[0, start:stop].tolist() for start, stop in pairwise(batch.cu_seqlens.tolist())]
        for batch in (shared, apart)
    )
    assert [len(one) for one in trunk] == [*PROMPTS, *(BRANCHES[n][k] for k in range(2) for n in range(2))]
    assert rows == [trunk[0] + trunk[2], trunk[1] + trunk[3], trunk[0] + trunk[4], trunk[1] + trunk[5]]
    assert trunk[2][0] == trunk[4][0] and trunk[3][0] == trunk[5][0]
    chosen = [batch.targets[batch.targets != IGNORE_INDEX].tolist() for batch in (shared, apart)]
    assert chosen[0] == chosen[1] == [token for branch in trunk[2:] for token in branch[1:]]
    assert shared.position_ids[0, sum(PROMPTS)] == PROMPTS[0]
    assert apart.position_ids[0, : len(rows[0])].tolist() == list(range(len(rows[0])))


# ---- what does not ----------------------------------------------------------------------------------------


def _forgets_last_key(parts: Parts, parents: Sequence[int], groups: int, window: int | None) -> Seen:
    for q, k, v, before in ORIGINAL(parts, parents, groups, window):
        if before:
            kept = torch.arange(k.shape[2]) != before - 1
            yield q, k[:, :, kept], v[:, :, kept], before - 1
        else:
            yield q, k, v, before


def _sees_the_other_branch(parts: Parts, parents: Sequence[int], groups: int, window: int | None) -> Seen:
    for number, (q, k, v, before) in enumerate(ORIGINAL(parts, parents, groups, window)):
        others = [
            n for n, parent in enumerate(parents) if before and parent == parents[number] and n != number
        ]
        for other in others:
            (_, other_k, other_v, _) = list(ORIGINAL(parts, [-1] * len(parts), groups, window))[other]
            k, v = torch.cat((other_k, k), dim=2), torch.cat((other_v, v), dim=2)
            before += other_k.shape[2]
        yield q, k, v, before


def _takes_the_other_prompt(parts: Parts, parents: Sequence[int], groups: int, window: int | None) -> Seen:
    return ORIGINAL(parts, [parent if parent < 0 else 1 - parent for parent in parents], groups, window)


def _learns_nothing_of_the_prompt(
    parts: Parts, parents: Sequence[int], groups: int, window: int | None
) -> Seen:
    """Right numbers; the second branches send no gradient back."""
    for number, (q, k, v, before) in enumerate(ORIGINAL(parts, parents, groups, window)):
        if number >= len(parts) - 2:
            k = torch.cat((k[:, :, :before].detach(), k[:, :, before:]), dim=2)
            v = torch.cat((v[:, :, :before].detach(), v[:, :, before:]), dim=2)
        yield q, k, v, before


FAULTS: dict[str, Callable[..., Seen]] = {
    "last-key": _forgets_last_key,
    "other-branch": _sees_the_other_branch,
    "other-prompt": _takes_the_other_prompt,
    "no-gradient": _learns_nothing_of_the_prompt,
}


@pytest.mark.parametrize("make", [lambda: taught("llama"), lambda: taught("gemma2-softcap"), faint])
@pytest.mark.parametrize("fault", FAULTS)
def test_faults_of_the_kernel(fault: str, make: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model = make()
    require_sharing(model)
    monkeypatch.setattr(attention, "_with_parents", FAULTS[fault])
    with pytest.raises(NotSharedError, match="failed the self-test of shared prompts"):
        require_sharing(model)


@pytest.mark.parametrize("make", [lambda: taught("llama"), faint])
def test_a_look_ahead_is_found(make: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def shifted(length: int, window: int | None, device: torch.device, before: int = 0) -> Tensor:
        return torch.ones(length, before + length, dtype=torch.bool).tril(before + 1)

    model = make()
    monkeypatch.setattr(attention, "causal_window_mask", shifted)
    assert run_sharing_test(model).reach > 1e-6
    with pytest.raises(NotSharedError, match="of a branch's gradient goes where none should"):
        require_sharing(model)


def _change_arguments(model: Any, change: Callable[[dict[str, Any]], None]) -> None:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        if "segment_parents" in kwargs:
            kwargs = dict(kwargs)
            change(kwargs)
        return args, kwargs

    model.model.register_forward_pre_hook(hook, with_kwargs=True)


def _drop_parents(kwargs: dict[str, Any]) -> None:
    del kwargs["segment_parents"]


def _positions_from_zero(kwargs: dict[str, Any]) -> None:
    lengths = kwargs["cu_seq_lens_q"].diff().tolist()
    kwargs["position_ids"] = torch.cat([torch.arange(length) for length in lengths])[None]


def _refuse(kwargs: dict[str, Any]) -> None:
    raise TypeError("forward() got an unexpected keyword argument 'segment_parents'")


@pytest.mark.parametrize("make", [lambda: taught("llama"), faint])
@pytest.mark.parametrize("change", [_drop_parents, _positions_from_zero, _refuse])
def test_models_that_do_not_go_along(
    change: Callable[[dict[str, Any]], None], make: Callable[[], Any]
) -> None:
    model = make()
    _change_arguments(model, change)
    message = "cannot compute a shared prompt .*unexpected" if change is _refuse else "failed the self-test"
    with pytest.raises(NotSharedError, match=message):
        require_sharing(model)


def test_not_a_number_does_not_pass() -> None:
    model = taught("llama")
    with torch.no_grad():
        next(model.parameters())[:] = float("nan")
    with pytest.raises(NotSharedError):
        require_sharing(model)


# ---- the choice -------------------------------------------------------------------------------------------


def _build(own_attention: bool) -> nn.Module:
    return tiny_model("llama", "sdpa" if own_attention else attention.SDPA)


def test_sharing_is_tried_where_it_is_wanted() -> None:
    rows = chosen_rows(build_with_rows(_build, "auto", "right", share_prompts=True))
    assert (rows.padded, rows.shares_prompts, rows.unshared_reason) == (False, True, "")
    assert set(rows.tests) == {"flat", "shared"}
    record = rows.record()
    assert record["shares_prompts"] is True and "unshared_reason" not in record
    measured = rows.tests["shared"]
    assert isinstance(measured, SharingTest)
    assert record["self_test"]["shared"] == {
        "difference": measured.difference,
        "gradient": measured.gradient,
        "reach": 0.0,
    }
    unasked = chosen_rows(build_with_rows(_build, "auto", "right"))
    assert not unasked.shares_prompts and set(unasked.tests) == {"flat"}
    assert "shares_prompts" not in unasked.record()


def test_a_model_that_fails_keeps_flat_rows() -> None:
    def build(own_attention: bool) -> nn.Module:
        model = _build(own_attention)
        _change_arguments(model, _drop_parents)
        return model

    rows = chosen_rows(build_with_rows(build, "flat", "right", share_prompts=True))
    assert (rows.padded, rows.shares_prompts) == (False, False)
    assert set(rows.tests) == {"flat"}
    assert rows.unshared_reason.startswith(
        "LlamaForCausalLM failed the self-test of shared prompts: log-prob"
    )
    assert rows.record()["shares_prompts"] is False
    assert rows.record()["unshared_reason"] == rows.unshared_reason


@pytest.mark.parametrize("family", ["bloom", "jamba"])
def test_padded_rows_never_share(family: str) -> None:
    rows = chosen_rows(build_with_rows(builder(family), "auto", "right", share_prompts=True))
    assert (rows.padded, rows.shares_prompts) == (True, False)
    assert "rows are padded" in rows.unshared_reason
    assert set(rows.tests) == {"padded"}
