"""Attention where several segments continue one prompt, against a closed form over the whole T x T matrix."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from luthier.model.attention import KERNELS, SDPA, VARLEN, keys_with_parents, sdpa_segments
from tests.unit.test_attention import BOUNDS, Layer, closed_form, tensors, tolerance

# Segments of 7, 1, 12 and 5 tokens: the parent may come after the segment, and one stands alone.
PARENTS = {
    "two-branches": (-1, 0, 0, -1),
    "one-token-prompt": (-1, -1, 1, 1),
    "short-prompt": (3, 3, -1, -1),
    "long-prompt": (-1, 2, -1, 2),
    "two-prompts": (-1, -1, 0, 1),
}


def visible(parents: tuple[int, ...], window: int | None) -> Tensor:
    """(T, T) bool by definition: same segment or its parent, not later, nearer than the window by position."""
    tokens = []
    for number, parent in enumerate(parents):
        start = 0 if parent < 0 else BOUNDS[parent + 1] - BOUNDS[parent]
        length = BOUNDS[number + 1] - BOUNDS[number]
        tokens += [(number, start + offset) for offset in range(length)]
    return torch.tensor(
        [
            [
                other in (segment, parents[segment])
                and before <= position
                and (window is None or position - before < window)
                for other, before in tokens
            ]
            for segment, position in tokens
        ]
    )


def flat(
    q: Tensor, k: Tensor, v: Tensor, parents: tuple[int, ...], name: str = SDPA, **options: float | None
) -> Tensor:
    bounds = torch.tensor(BOUNDS, dtype=torch.int32)
    output, _ = KERNELS[name](
        Layer(k.shape[1]),
        q,
        k,
        v,
        None,
        cu_seq_lens_q=bounds,
        cu_seq_lens_k=bounds,
        max_length_q=12,
        segment_parents=torch.tensor(parents),
        **options,
    )
    return output


@pytest.mark.parametrize(("name", "softcap"), [(SDPA, None), (SDPA, 2.0), (VARLEN, 2.0)])
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("window", [None, 1, 3, 6, 9, 100])
@pytest.mark.parametrize("tree", PARENTS)
def test_branches_equal_closed_form(
    tree: str, window: int | None, kv_heads: int, name: str, softcap: float | None
) -> None:
    """Values and gradients, with windows shorter than the prompt, than the branch, and longer than both."""
    inputs = tensors(kv_heads)
    actual = flat(*inputs, PARENTS[tree], name=name, scaling=0.3, sliding_window=window, softcap=softcap)
    expected = closed_form(*inputs, visible(PARENTS[tree], window), 0.3, softcap)
    torch.testing.assert_close(actual, expected, **tolerance(softcap))
    direction = torch.randn(actual.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for mine, reference in zip(
        torch.autograd.grad((actual * direction).sum(), inputs),
        torch.autograd.grad((expected * direction).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(mine, reference, **tolerance(softcap))


@pytest.mark.parametrize("window", [None, 1, 4, 9])
@pytest.mark.parametrize("tree", PARENTS)
def test_gathered_keys_equal_closed_form(tree: str, window: int | None) -> None:
    """The keys that the variable-length kernel gets, attended as it does: causal, aligned at the last key."""
    q, k, v = tensors(4)
    bounds, parents = torch.tensor(BOUNDS, dtype=torch.int32), torch.tensor(PARENTS[tree])
    places, cu_keys, longest = keys_with_parents(bounds, parents)
    assert cu_keys.dtype == torch.int32
    assert cu_keys[-1] == len(places)
    assert longest == int(cu_keys.diff().max())
    outputs = []
    for number in range(len(parents)):
        queries = q[:, :, BOUNDS[number] : BOUNDS[number + 1]]
        seen = places[int(cu_keys[number]) : int(cu_keys[number + 1])]
        num_queries, num_keys = queries.shape[2], len(seen)
        distance = num_keys - num_queries + torch.arange(num_queries)[:, None] - torch.arange(num_keys)
        mask = (distance >= 0) if window is None else (distance >= 0) & (distance < window)
        outputs.append(closed_form(queries, k[:, :, seen], v[:, :, seen], mask, None, None))
    expected = closed_form(q, k, v, visible(PARENTS[tree], window), None, None)
    torch.testing.assert_close(torch.cat(outputs, dim=1), expected, **tolerance(None))


def test_no_parent_is_no_change() -> None:
    """Bitwise, in the type that models compute in."""
    q, k, v = (tensor.detach().float() for tensor in tensors(2))
    bounds = torch.tensor(BOUNDS, dtype=torch.int32)
    for window, softcap in ((None, None), (4, None), (None, 2.0)):
        options = {"scale": None, "dropout": 0.0, "window": window, "softcap": softcap}
        plain = sdpa_segments(q, k, v, bounds, 12, **options)  # type: ignore[arg-type]
        alone = sdpa_segments(q, k, v, bounds, 12, **options, parents=torch.full((4,), -1))  # type: ignore[arg-type]
        assert torch.equal(plain, alone)


@pytest.mark.parametrize(
    ("parents", "message"),
    [
        ((-1, 0, 1, -1), "segment 2 continues segment 1, which must be a segment that continues none"),
        ((0, -1, -1, -1), "segment 0 continues segment 0"),
        ((-1, -1, 4, -1), "segment 2 continues segment 4"),
        ((-1, 0, 0), "3 parents for 4 segments"),
    ],
)
def test_other_trees_are_refused(parents: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        flat(*tensors(2), parents)
    with pytest.raises(ValueError, match=message):
        keys_with_parents(torch.tensor(BOUNDS, dtype=torch.int32), torch.tensor(parents))
