"""The one numeric kernel: hidden states -> log-probabilities of the targets, in chunks, never T x V logits.

`install_target_forward` gives a loaded model a forward that accepts `targets=`. It changes the classes of the
model and of its output head to subclasses that behave as before when `targets` is absent, so `generate` and
`save_pretrained` are untouched. The head is called exactly once per forward and chunks inside that call, so
DDP and FSDP see one ordinary module call.

Shapes: T tokens, N supervised positions, D hidden, V vocabulary, C rows of one chunk.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from luthier.model.rows import FLAT, Rows, padded_rows
from luthier.types import IGNORE_INDEX, Batch, ModelError, TokenLogprobs

Logits = Callable[[Tensor], Tensor]

LOGITS_PER_CHUNK = 2**23
"""Logits (C x V) that exist at one time: 32 MiB in float32; larger chunks were not faster on CPU."""
LOGITS_PER_CHUNK_CUDA = 2**27


def chunk_rows(num_rows: int, vocab_size: int, device: torch.device) -> int:
    """Rows of a chunk, so that its logits stay within the limit of the device; at least 16."""
    limit = LOGITS_PER_CHUNK_CUDA if device.type == "cuda" else LOGITS_PER_CHUNK
    return max(16, min(num_rows, limit // vocab_size))


def token_logprobs(
    hidden_ND: Tensor,
    logits_of: Logits,
    targets_N: Tensor,
    *,
    vocab_size: int,
    entropy: bool,
    mean_logprobs: bool,
    head_trains: bool,
    predictions: bool = False,
) -> dict[str, Tensor]:
    """Log-probabilities of `targets_N` under `logits_of(hidden)`, each (N,) float32; differentiable.

    `entropy` is -sum p log p of each position; `mean_logprobs` is the mean log-probability of the vocabulary;
    `predictions` is the most likely token, (N,) int64.
    Where the head does not train, each row's gradient with respect to its own hidden state is computed
    together with its value, because a log-probability depends on no other row: the logits are then computed
    once. Where the head trains, every chunk is checkpointed and its logits are computed again in backward.
    """
    rows = chunk_rows(len(targets_N), vocab_size, hidden_ND.device)
    if torch.is_grad_enabled() and hidden_ND.requires_grad and not head_trains and not predictions:
        arguments = (hidden_ND, targets_N, logits_of, rows, entropy, mean_logprobs)
        outputs = _RowwiseLogprobs.apply(*arguments)  # type: ignore[no-untyped-call]
        assert isinstance(outputs, tuple)
    else:
        chunks = [
            _chunk(hidden, targets, logits_of, entropy, mean_logprobs, predictions)
            for hidden, targets in zip(
                torch.split(hidden_ND, rows), torch.split(targets_N, rows), strict=True
            )
        ]
        outputs = tuple(torch.cat(column) for column in zip(*chunks, strict=True))
    names = ["logprobs"] + ["entropy"] * entropy + ["mean_logprobs"] * mean_logprobs
    names += ["predictions"] * predictions
    return dict(zip(names, outputs, strict=True))


def _chunk(
    hidden: Tensor,
    targets: Tensor,
    logits_of: Logits,
    entropy: bool,
    mean_logprobs: bool,
    predictions: bool,
) -> tuple[Tensor, ...]:
    def run(hidden: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        return _statistics(logits_of(hidden).float(), targets, entropy, mean_logprobs, predictions)

    if not torch.is_grad_enabled():
        return run(hidden, targets)
    return tuple(checkpoint(run, hidden, targets, use_reentrant=False))


def _statistics(
    logits_CV: Tensor, targets_C: Tensor, entropy: bool, mean_logprobs: bool, predictions: bool = False
) -> tuple[Tensor, ...]:
    normaliser_C = logits_CV.logsumexp(dim=-1)
    outputs = [logits_CV.gather(-1, targets_C[:, None])[:, 0] - normaliser_C]
    if entropy:
        probabilities = (logits_CV - normaliser_C[:, None]).exp()
        outputs.append(normaliser_C - (probabilities * logits_CV).sum(-1))
    if mean_logprobs:
        outputs.append(logits_CV.mean(dim=-1) - normaliser_C)
    if predictions:
        outputs.append(logits_CV.argmax(dim=-1))
    return tuple(outputs)


class _RowwiseLogprobs(torch.autograd.Function):
    """Values and per-row gradients in one pass over the chunks, for a head that does not train."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        targets_N: Tensor,
        logits_of: Logits,
        rows: int,
        entropy: bool,
        mean: bool,
    ) -> tuple[Tensor, ...]:
        values: list[tuple[Tensor, ...]] = []
        num_outputs = 1 + entropy + mean
        gradients = [torch.empty_like(hidden_ND) for _ in range(num_outputs)]
        start = 0
        for hidden, targets in zip(torch.split(hidden_ND, rows), torch.split(targets_N, rows), strict=True):
            stop = start + len(targets)
            with torch.enable_grad():
                leaf = hidden.detach().requires_grad_()
                raw = logits_of(leaf)
            logits = raw.detach().float()
            values.append(_statistics(logits, targets, entropy, mean))
            slopes = _slopes(logits, targets, values[-1], entropy, mean)
            for index, slope in enumerate(slopes):
                last = index == num_outputs - 1
                (grad,) = torch.autograd.grad(raw, leaf, slope.to(raw.dtype), retain_graph=not last)
                gradients[index][start:stop] = grad
                del slope, grad
            start = stop
        ctx.save_for_backward(*gradients)
        return tuple(torch.cat(column) for column in zip(*values, strict=True))

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        total: Tensor | None = None
        for up_N, gradient_ND in zip(upstream, ctx.saved_tensors, strict=True):
            part = gradient_ND * up_N[:, None].to(gradient_ND.dtype)
            total = part if total is None else total.add_(part)
        return total, None, None, None, None, None


def _slopes(
    logits_CV: Tensor, targets_C: Tensor, values: tuple[Tensor, ...], entropy: bool, mean: bool
) -> list[Tensor]:
    """d output / d logits (C, V) of each output of `_statistics`, in its order; overwrites `logits_CV`."""
    normaliser_C = logits_CV.gather(-1, targets_C[:, None])[:, 0] - values[0]
    probabilities = logits_CV.sub_(normaliser_C[:, None])
    slopes: list[Tensor] = []
    if entropy:
        # dH/dz_v = -p_v (log p_v + H)
        slopes.append(-probabilities.exp() * (probabilities + values[1][:, None]))
    probabilities = probabilities.exp_()
    if mean:
        slopes.append(1.0 / probabilities.shape[-1] - probabilities)
    of_target = probabilities.neg_()
    of_target[torch.arange(len(targets_C), device=targets_C.device), targets_C] += 1.0
    return [of_target, *slopes]


# --------------------------------------------------------------------------------------------------
# What a family does to its logits after the head


def logits_transform(config: Any) -> Logits:
    """The scaling and soft-capping that the model's own forward applies after its head, from its config.

    Covers `logit_scale` (Cohere), `logits_scaling` (Granite), `lm_head_multiplier` (Falcon-H1) and the soft caps of
    Gemma, RecurrentGemma and xLSTM. The self-test at start compares with the model's own logits, so that a
    family with another rule is found, not trained wrongly.
    """
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    scale = 1.0
    for name, invert in (("logit_scale", False), ("logits_scaling", True), ("lm_head_multiplier", False)):
        value = getattr(text, name, None)
        if isinstance(value, (int, float)):
            scale *= 1.0 / value if invert else value
    caps = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
    cap = next((value for value in (getattr(text, name, None) for name in caps) if value), None)

    def transform(logits: Tensor) -> Tensor:
        if scale != 1.0:
            logits = logits * scale
        if cap:
            logits = torch.tanh(logits / cap) * cap
        return logits

    return transform


# --------------------------------------------------------------------------------------------------
# The hook


class _TargetHead(nn.Module):
    """Mixed into the class of the output head: `forward(hidden, targets=...)` returns log-probabilities."""

    def forward(
        self, hidden: Tensor, *args: Any, luthier_request: dict[str, Any] | None = None, **kw: Any
    ) -> Any:
        dense = super().forward
        if luthier_request is None:
            return dense(hidden, *args, **kw)
        request = dict(luthier_request)
        transform = request.pop("transform")
        trains = any(parameter.requires_grad for parameter in self.parameters())
        return token_logprobs(
            hidden, lambda rows: transform(dense(rows)), request.pop("targets"), head_trains=trains, **request
        )


class _TargetForward(nn.Module):
    """Mixed into the class of the model: `forward(targets=...)` runs the backbone, then the head once.

    `arithmetic` is the type of an autocast around both, float32 for none at all; without it the caller's holds.
    """

    luthier_rows: Rows = FLAT

    def forward(
        self,
        *args: Any,
        targets: Tensor | None = None,
        arithmetic: torch.dtype | None = None,
        **kwargs: Any,
    ) -> Any:
        if arithmetic is not None:
            # The innermost autocast wins: this holds under the one that accelerate wraps around the model.
            mixed, kind = arithmetic != torch.float32, next(self.parameters()).device.type
            with torch.autocast(kind, dtype=arithmetic if mixed else None, enabled=mixed):
                return _TargetForward.forward(self, *args, targets=targets, **kwargs)
        if targets is None:
            return super().forward(*args, **_with_explicit_mask(args, kwargs))
        request = {
            "entropy": kwargs.pop("entropy", False),
            "mean_logprobs": kwargs.pop("mean_logprobs", False),
            "predictions": kwargs.pop("predictions", False),
            "vocab_size": self.config.get_text_config().vocab_size,  # type: ignore[union-attr, operator]
            "transform": logits_transform(self.config),
        }
        kwargs.pop("return_dict", None)
        # PEFT's wrapper always passes these on; a flat row has no use for them.
        for unused in (
            "labels",
            "attention_mask",
            "inputs_embeds",
            "output_attentions",
            "output_hidden_states",
        ):
            if kwargs.pop(unused, None) is not None:
                raise ModelError(f"a forward pass with targets takes no {unused}")
        backbone, head = self.base_model, self.get_output_embeddings()  # type: ignore[operator]
        inputs, targets = _backbone_inputs(self.luthier_rows, backbone, args, kwargs, targets)
        hidden = backbone(**inputs).last_hidden_state  # type: ignore[operator]
        hidden_TD = hidden.reshape(-1, hidden.shape[-1])
        supervised = (targets != IGNORE_INDEX).nonzero()[:, 0]
        if len(supervised):
            return head(hidden_TD[supervised], luthier_request={"targets": targets[supervised], **request})
        # The head must run on every rank; one position (a real token) is computed and none of it is kept.
        one_D = hidden_TD[-1:] if self.luthier_rows.side == "left" else hidden_TD[:1]
        answers = head(one_D, luthier_request={"targets": torch.zeros_like(targets[:1]), **request})
        return {name: values[:0] for name, values in answers.items()}


def _backbone_inputs(
    rows: Rows, backbone: Any, args: tuple[Any, ...], kwargs: dict[str, Any], targets: Tensor
) -> tuple[dict[str, Any], Tensor]:
    """What the backbone is called with for a flat batch, and the targets (positions,) in the order of its output.

    Models without positions of their own (Mamba, Bloom) take none; the self-test shows whether that is right.
    """
    inputs = dict(zip(("input_ids",), args, strict=False)) | kwargs
    if rows.padded:
        spread = padded_rows(
            inputs["input_ids"], inputs["position_ids"], inputs["cu_seq_lens_q"], targets, rows.side
        )
        inputs = {
            "input_ids": spread.input_ids,
            "attention_mask": spread.attention_mask,
            "position_ids": spread.position_ids,
        }
        targets = spread.targets.flatten()
    else:
        inputs["attention_mask"] = None
    inputs["use_cache"] = False
    names, takes_others = _accepted(type(backbone).forward)
    if not takes_others:
        inputs = {name: value for name, value in inputs.items() if name in names}
    elif rows.padded and "position_ids" not in names:
        del inputs["position_ids"]
    return inputs, targets


@cache
def _accepted(forward: Callable[..., Any]) -> tuple[frozenset[str], bool]:
    """The named arguments of a backbone's forward, and whether it takes others too."""
    parameters = inspect.signature(forward).parameters
    return frozenset(parameters), any(one.kind is one.VAR_KEYWORD for one in parameters.values())


def _with_explicit_mask(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Our attention refuses to guess; a call without a mask means that every token is real, those in a cache too.

    `generate` leaves out a mask of ones: with one prompt, or with prompts of equal length.
    """
    ids, cache = args[0] if args else kwargs.get("input_ids"), kwargs.get("past_key_values")
    if ids is None or len(args) > 1 or kwargs.get("attention_mask") is not None or ids.shape[1] == 1:
        return kwargs
    seen = int(cache.get_seq_length()) if cache is not None else 0
    return {**kwargs, "attention_mask": ids.new_ones(ids.shape[0], seen + ids.shape[1])}


def _specialise(module: nn.Module, mixin: type[nn.Module]) -> None:
    """Make `module`'s class a subclass with `mixin` in front, of the same name (saved as `architectures`).

    Its `forward` shows the signature of the original one: `generate` passes `position_ids` only to models whose
    signature names them, and without them learned positions would count the padding.
    """
    cls = type(module)
    if issubclass(cls, mixin):
        return

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return mixin.forward(self, *args, **kwargs)

    forward.__signature__ = inspect.signature(cls.forward)  # type: ignore[attr-defined]
    module.__class__ = type(cls.__name__, (mixin, cls), {"__module__": cls.__module__, "forward": forward})


def install_target_forward(model: nn.Module, rows: Rows = FLAT) -> None:
    """Teach a loaded causal language model (not its PEFT wrapper) to answer `forward(targets=...)`.

    Batches stay flat; with `rows.padded` the model lays their segments out as padded rows by itself.
    Call it after adapters are attached and before the model is wrapped by accelerate; once more to change `rows`.
    Raises ModelError where the model has no output head.
    """
    head = model.get_output_embeddings()  # type: ignore[operator]
    if head is None:
        raise ModelError(f"{type(model).__name__} has no output head; a causal language model is needed")
    if model.base_model is model:
        raise ModelError(
            f"{type(model).__name__} has no backbone apart from its head, so it cannot be trained"
        )
    _specialise(head, _TargetHead)
    _specialise(model, _TargetForward)
    model.luthier_rows = rows  # type: ignore[assignment]


def chosen_rows(model: nn.Module) -> Rows:
    """The layout that was installed in a model, or in the one inside its PEFT wrapper."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    rows = inner.luthier_rows
    assert isinstance(rows, Rows)
    return rows


class ModelPolicy:
    """`types.Policy` over a model with the target forward, wrapped by DDP or FSDP or bare."""

    def __init__(self, model: nn.Module, arithmetic: torch.dtype | None = None) -> None:
        """`arithmetic` is the type that the model computes in by autocast, float32 for none at all; without it
        the model's wrapper decides."""
        self._model = model
        self._arithmetic = arithmetic

    def logprobs(
        self, batch: Batch, *, entropy: bool = False, mean_logprobs: bool = False, predictions: bool = False
    ) -> TokenLogprobs:
        """Statistics of the supervised targets of `batch`, in the order of their positions."""
        answers = self._model(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            cu_seq_lens_q=batch.cu_seqlens,
            cu_seq_lens_k=batch.cu_seqlens,
            max_length_q=batch.max_length,
            max_length_k=batch.max_length,
            targets=batch.targets,
            arithmetic=self._arithmetic,
            entropy=entropy,
            mean_logprobs=mean_logprobs,
            predictions=predictions,
        )
        return TokenLogprobs(**answers)
