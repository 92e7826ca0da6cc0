"""The isolated attention against a closed form over the whole T x T matrix.

In float64; only soft-capped scores pass through a float32 softmax, as they do in transformers.
"""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from luthier.model.attention import (
    KERNELS,
    SDPA,
    VARLEN,
    attention_name,
    causal_window_mask,
    counted_calls,
    segment_mask,
    varlen_segments,
)
from luthier.model.logprobs import install_target_forward
from luthier.types import ModelError
from tests.tiny import VOCAB, tiny_model

BOUNDS = (0, 7, 8, 20, 25)
HEADS, WIDTH = 4, 6
ATTENTION = KERNELS[SDPA]


class Layer(nn.Module):
    """What transformers' own SDPA asks of the layer that calls it."""

    def __init__(self, kv_heads: int) -> None:
        super().__init__()
        self.num_key_value_groups = HEADS // kv_heads
        self.is_causal = True


def tolerance(softcap: float | None) -> dict[str, float]:
    return {"rtol": 1e-7, "atol": 1e-7} if softcap is None else {"rtol": 1e-5, "atol": 1e-5}


def tensors(kv_heads: int, length: int = BOUNDS[-1], batch: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """query (B, H, T, E), key and value (B, K, T, E), large enough that a soft cap matters."""
    generator = torch.Generator().manual_seed(kv_heads)
    q, k, v = (
        3 * torch.randn(batch, heads, length, WIDTH, generator=generator, dtype=torch.float64)
        for heads in (HEADS, kv_heads, kv_heads)
    )
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_()


def visible(bounds: tuple[int, ...], window: int | None) -> Tensor:
    """(T, T) bool by definition: same segment, not later, nearer than the window."""
    segment = [number for number, (start, stop) in enumerate(pairwise(bounds)) for _ in range(stop - start)]
    size = bounds[-1]
    rows = [
        [segment[i] == segment[j] and j <= i and (window is None or i - j < window) for j in range(size)]
        for i in range(size)
    ]
    return torch.tensor(rows)


def closed_form(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float | None, softcap: float | None
) -> Tensor:
    """(B, T, H, E), head by head."""
    groups = q.shape[1] // k.shape[1]
    outputs = []
    for head in range(q.shape[1]):
        scores = q[:, head] @ k[:, head // groups].mT
        scores = scores * (WIDTH**-0.5 if scale is None else scale)
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        probabilities = scores.exp() * seen
        outputs.append(probabilities / probabilities.sum(-1, keepdim=True) @ v[:, head // groups])
    return torch.stack(outputs, dim=2)


def flat(q: Tensor, k: Tensor, v: Tensor, name: str = SDPA, **options: float | None) -> Tensor:
    bounds = torch.tensor(BOUNDS, dtype=torch.int32)
    output, weights = KERNELS[name](
        Layer(k.shape[1]),
        q,
        k,
        v,
        None,
        cu_seq_lens_q=bounds,
        cu_seq_lens_k=bounds,
        max_length_q=12,
        **options,
    )
    assert weights is None
    return output


@pytest.mark.parametrize(("name", "softcap"), [(SDPA, None), (SDPA, 2.0), (VARLEN, 2.0)])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("window", [None, 1, 4, 12, 100])
def test_segments_equal_closed_form(
    window: int | None, softcap: float | None, kv_heads: int, name: str
) -> None:
    """Values and gradients; the variable-length kernel falls back to the exact one for soft caps."""
    scale = 0.3
    inputs = tensors(kv_heads)
    actual = flat(*inputs, name=name, scaling=scale, sliding_window=window, softcap=softcap)
    expected = closed_form(*inputs, visible(BOUNDS, window), scale, softcap)
    torch.testing.assert_close(actual, expected, **tolerance(softcap))
    direction = torch.randn(actual.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for mine, reference in zip(
        torch.autograd.grad((actual * direction).sum(), inputs),
        torch.autograd.grad((expected * direction).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(mine, reference, **tolerance(softcap))


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_default_scale(softcap: float | None) -> None:
    inputs = tensors(2)
    expected = closed_form(*inputs, visible(BOUNDS, None), None, softcap)
    torch.testing.assert_close(flat(*inputs, softcap=softcap), expected, **tolerance(softcap))


def test_varlen_falls_back_in_float32() -> None:
    q, k, v = (tensor.detach().float() for tensor in tensors(2))
    bounds = torch.tensor(BOUNDS, dtype=torch.int32)
    out = varlen_segments(q, k, v, bounds, 12, scale=None, dropout=0.0, window=4, softcap=None)
    torch.testing.assert_close(
        out[None], closed_form(q, k, v, visible(BOUNDS, 4), None, None), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("additive", [False, True])
def test_dense_path_follows_its_mask(softcap: float | None, additive: bool) -> None:
    """Without bounds the given mask decides, as transformers' own attention would read it."""
    inputs = tensors(2, batch=2)
    seen = torch.stack([visible((0, 25), 4), visible((0, 25), None)])
    seen[1, :, :3] = False  # the second row is padded on its left ...
    seen[1, :3, 24] = True  # ... and its padding sees something, so that every row has a softmax
    mask = seen[:, None]
    if additive:
        mask = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, float("-inf"))
    output, _ = ATTENTION(Layer(2), *inputs, mask, scaling=0.3, softcap=softcap)
    torch.testing.assert_close(output, closed_form(*inputs, seen, 0.3, softcap), **tolerance(softcap))


def test_padding_that_sees_nothing_stays_finite() -> None:
    """A fully masked row must not become NaN: as a value it would spoil the next layer, weight 0 or not."""
    q, k, v = tensors(2, length=5)
    mask = visible((0, 5), None)[None, None].clone()
    mask[..., :2] = False
    output, _ = ATTENTION(Layer(2), q, k, v, mask, softcap=2.0)
    assert output.isfinite().all()
    expected = closed_form(q, k, v, mask[0, 0], None, 2.0)[:, 2:]
    torch.testing.assert_close(output[:, 2:], expected, **tolerance(2.0))


def test_one_query_needs_no_mask() -> None:
    """A step of generation: the one new token sees the whole cache."""
    q, k, v = tensors(2)
    output, _ = ATTENTION(Layer(2), q[:, :, -1:], k, v, None)
    torch.testing.assert_close(output, closed_form(q[:, :, -1:], k, v, torch.ones(1, 25), None, None))


def test_neither_mask_nor_bounds_is_refused() -> None:
    with pytest.raises(ModelError, match="neither an attention mask nor segment bounds"):
        ATTENTION(Layer(2), *tensors(2), None)


def test_sinks_are_refused() -> None:
    with pytest.raises(ModelError, match="sinks"):
        flat(*tensors(2), s_aux=torch.zeros(HEADS))  # type: ignore[arg-type]


@pytest.mark.parametrize("window", [None, 1, 3, 9])
def test_window_mask(window: int | None) -> None:
    mask = causal_window_mask(7, window, torch.device("cpu"))
    assert torch.equal(mask, visible((0, 7), window))


def test_mask_function() -> None:
    """No mask for a fresh flat row; a real one, never skipped, for padding and for a cache."""
    fresh = {"batch_size": 2, "q_length": 5, "kv_length": 5}
    assert segment_mask(attention_mask=None, **fresh) is None
    everything = segment_mask(attention_mask=torch.ones(2, 5, dtype=torch.bool), **fresh)
    assert everything is not None
    assert torch.equal(everything, visible((0, 5), None).expand(2, 1, 5, 5))
    padding = torch.tensor([[False, False, True, True, True], [True] * 5])
    padded = segment_mask(attention_mask=padding, **fresh)
    assert padded is not None
    real = torch.arange(5)[:, None] >= 2  # rows of padding may hold anything
    expected = visible((0, 5), None) & padding[:, None, None, :]
    assert torch.equal(padded[0, 0] & real, expected[0, 0] & real)
    assert torch.equal(padded[1], expected[1])
    cached = segment_mask(attention_mask=None, batch_size=1, q_length=2, kv_length=5, q_offset=3)
    assert cached is not None
    assert torch.equal(cached[0, 0], visible((0, 5), None)[3:])


def test_calls_are_counted_only_when_isolated() -> None:
    q, k, v = tensors(2)
    with counted_calls() as calls:
        flat(q, k, v)
        flat(q, k, v, name=VARLEN, softcap=1.0)
        ATTENTION(Layer(2), q, k, v, torch.ones(1, 1, 25, 25, dtype=torch.bool))
    assert calls() == 2


@pytest.mark.parametrize(("choice", "device", "name"), [
    ("auto", "cpu", SDPA), ("auto", "cuda", VARLEN), ("sdpa", "cuda", SDPA), ("varlen", "cuda", VARLEN),
    ("auto", "mps", SDPA),
])  # fmt: skip
def test_choice(choice: str, device: str, name: str) -> None:
    assert attention_name(choice, torch.device(device)) == name


def test_varlen_needs_cuda() -> None:
    with pytest.raises(ModelError, match=r"model\.attention=varlen needs a CUDA device"):
        attention_name("varlen", torch.device("cpu"))


@pytest.mark.parametrize("family", ["llama", "mistral-window", "gemma3-window", "gpt2", "opt"])
def test_plain_call_equals_sdpa(family: str) -> None:
    """`model(input_ids)` without mask or bounds means that every token is real, sliding window kept."""
    ids = torch.randint(3, VOCAB, (2, 17), generator=torch.Generator().manual_seed(0))
    taught, plain = tiny_model(family).eval(), tiny_model(family, "sdpa").eval()
    install_target_forward(taught)
    with torch.no_grad():
        expected = plain(ids).logits
        torch.testing.assert_close(taught(ids).logits, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(taught(input_ids=ids).logits, expected, rtol=1e-5, atol=1e-5)
        # With a cache, in two parts.
        first = taught(ids[:, :9], use_cache=True)
        second = taught(ids[:, 9:], past_key_values=first.past_key_values, use_cache=True)
        torch.testing.assert_close(second.logits, expected[:, 9:], rtol=1e-5, atol=1e-5)
