"""What a model is asked for its targets: the hook that calls the numeric kernel, and the policy around it.

`install_target_forward` gives a loaded model a forward that accepts `targets=`. It changes the classes of the
model and of its output head to subclasses that behave as before when `targets` is absent, so `generate` and
`save_pretrained` are untouched. The head is called exactly once per forward and chunks inside that call, so
DDP and FSDP see one ordinary module call.

Shapes: T tokens, N supervised positions, D hidden, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any, Literal

import torch
from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn

from luthier.model.critic import PART
from luthier.model.kernel import Anchor, Logits, chunk_rows, token_logprobs
from luthier.model.multimodal import makes_positions
from luthier.model.offload import keeping_activations
from luthier.model.reference import Reference
from luthier.model.rows import FLAT, Rows, is_token_types, padded_media, padded_rows
from luthier.types import IGNORE_INDEX, Batch, ModelError, TokenLogprobs

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
    `values=True` asks the model's critic (`model.critic`) too: {"values": (N,)}, of the state before each target.
    With `only_hidden` it stops before the head: {"hidden": (N, D)} of the targets, or of one position where there are
    none.
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
            return super().forward(*args, **with_explicit_mask(args, kwargs))
        request = {
            "entropy": kwargs.pop("entropy", False),
            "mean_logprobs": kwargs.pop("mean_logprobs", False),
            "predictions": kwargs.pop("predictions", False),
            "top_entropy": kwargs.pop("top_entropy", False),
            "anchor": kwargs.pop("anchor", None),
            "temperature": kwargs.pop("temperature", 1.0),
            "vocab_size": self.config.get_text_config().vocab_size,  # type: ignore[union-attr, operator]
            "transform": logits_transform(self.config),
        }
        only_hidden, values = kwargs.pop("only_hidden", False), kwargs.pop("values", False)
        require_flat(kwargs)
        backbone, head = self.base_model, self.get_output_embeddings()  # type: ignore[operator]
        inputs, targets = backbone_inputs(self.luthier_rows, backbone, args, kwargs, targets)
        hidden = backbone(**inputs).last_hidden_state  # type: ignore[operator]
        hidden_TD = hidden.reshape(-1, hidden.shape[-1])
        supervised = (targets != IGNORE_INDEX).nonzero()[:, 0]
        num_targets = len(supervised)
        if not num_targets:
            # The head must run on every rank; one position (a real token) is computed and none of it is kept.
            supervised = targets.new_full((1,), len(targets) - 1 if self.luthier_rows.side == "left" else 0)
        if only_hidden:
            return {"hidden": hidden_TD[supervised]}
        request["targets"] = targets[supervised].clamp(min=0)
        answers = head(hidden_TD[supervised], luthier_request=request)
        if values:
            critic = getattr(self, PART, None)
            if critic is None:
                raise ModelError("this stage needs values, and the model was given no critic")
            answers["values"] = critic.values(self, inputs, hidden_TD, supervised)
        return {name: values[:num_targets] for name, values in answers.items()}


def require_flat(kwargs: dict[str, Any]) -> None:
    """Take out what PEFT's wrapper always passes on and a flat row has no use for; ModelError where it is set."""
    kwargs.pop("return_dict", None)
    for unused in ("labels", "attention_mask", "inputs_embeds", "output_attentions", "output_hidden_states"):
        if kwargs.pop(unused, None) is not None:
            raise ModelError(f"a forward pass with targets or positions takes no {unused}")


def backbone_inputs(
    rows: Rows, backbone: Any, args: tuple[Any, ...], kwargs: dict[str, Any], targets: Tensor
) -> tuple[dict[str, Any], Tensor]:
    """What the backbone is called with for a flat batch, and the targets (positions,) in the order of its output.

    Models without positions of their own (Mamba, Bloom) take none; the self-test shows whether that is right.
    """
    inputs = dict(zip(("input_ids",), args, strict=False)) | kwargs
    media = inputs.pop("media", {})
    if all(is_token_types(name) for name in media):
        media = {}  # text alone: all tokens are of one type
    if inputs.get("segment_parents") is not None and not rows.shares_prompts:
        raise ModelError("a batch whose answers share prompts needs a model that is proven to share them")
    if rows.padded:
        spread = padded_rows(
            inputs["input_ids"], inputs["position_ids"], inputs["cu_seq_lens_q"], targets, rows.side
        )
        inputs = {
            "input_ids": spread.input_ids,
            "attention_mask": spread.attention_mask,
            "position_ids": spread.position_ids,
            **padded_media(media, kwargs["cu_seq_lens_q"], rows.side),
        }
        if media and makes_positions(backbone):
            del inputs["position_ids"]
        targets = spread.targets.flatten()
    elif media:
        raise ModelError(
            "images, films and sounds need padded rows: towers and positions of media know no segments of a flat row; "
            "give model.rows=padded or auto"
        )
    else:
        inputs["attention_mask"] = None
    inputs["use_cache"] = False
    names, takes_others = _accepted(type(backbone).forward)
    if not takes_others:
        inputs = {name: value for name, value in inputs.items() if name in names}
    elif rows.padded and "position_ids" not in names:
        inputs.pop("position_ids", None)
    return inputs, targets


@cache
def _accepted(forward: Callable[..., Any]) -> tuple[frozenset[str], bool]:
    """The named arguments of a backbone's forward, and whether it takes others too."""
    parameters = inspect.signature(forward).parameters
    return frozenset(parameters), any(one.kind is one.VAR_KEYWORD for one in parameters.values())


def with_explicit_mask(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Our attention refuses to guess; a call without a mask means that every token is real, those in a cache too.

    `generate` leaves out a mask of ones: with one prompt, or with prompts of equal length.
    """
    ids, cache = args[0] if args else kwargs.get("input_ids"), kwargs.get("past_key_values")
    if ids is None or len(args) > 1 or kwargs.get("attention_mask") is not None or ids.shape[1] == 1:
        return kwargs
    seen = int(cache.get_seq_length()) if cache is not None else 0
    return {**kwargs, "attention_mask": ids.new_ones(ids.shape[0], seen + ids.shape[1])}


def specialise(module: nn.Module, mixin: type[nn.Module]) -> None:
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
    specialise(head, _TargetHead)
    specialise(model, _TargetForward)
    model.luthier_rows = rows  # type: ignore[assignment]


def _language_model(model: nn.Module) -> nn.Module:
    """The model with the target forward, inside what DDP and PEFT wrap around it."""
    bare: Any = extract_model_from_parallel(model, keep_fp32_wrapper=True)
    inner = bare.get_base_model() if hasattr(bare, "get_base_model") else bare
    assert isinstance(inner, nn.Module)
    return inner


def chosen_rows(model: nn.Module) -> Rows:
    """The layout that was installed in a model, or in the one inside its PEFT wrapper."""
    rows = _language_model(model).luthier_rows
    assert isinstance(rows, Rows)
    return rows


class ModelPolicy:
    """`types.Policy` over a model with the target forward, wrapped by DDP or FSDP or bare."""

    def __init__(
        self,
        model: nn.Module,
        arithmetic: torch.dtype | None = None,
        *,
        reference: Reference | None = None,
    ) -> None:
        """`arithmetic` is the type that the model computes in by autocast, float32 for none at all; without it
        the model's wrapper decides. `reference` is the model to compare with."""
        self._model = model
        self._arithmetic = arithmetic
        self._reference = reference

    def logprobs(
        self,
        batch: Batch,
        *,
        entropy: bool | Literal["value"] = False,
        mean_logprobs: bool = False,
        predictions: bool = False,
        top_entropy: bool = False,
        divergence: bool = False,
        values: bool = False,
        temperature: float = 1.0,
    ) -> TokenLogprobs:
        """Statistics of the supervised targets of `batch`, in the order of their positions.

        The logits, the reference's of a divergence too, are divided by `temperature`, > 0. `values` come from the
        critic that the model was given, in the same forward pass; raises ModelError where it was given none.
        """
        anchor = self._anchor(batch) if divergence else None
        with keeping_activations(_language_model(self._model)):
            answers = self._model(
                **model_inputs(batch),
                targets=batch.targets,
                arithmetic=self._arithmetic,
                entropy=entropy,
                mean_logprobs=mean_logprobs,
                predictions=predictions,
                top_entropy=top_entropy,
                anchor=anchor,
                values=values,
                temperature=temperature,
            )
        return TokenLogprobs(**answers)

    def _anchor(self, batch: Batch) -> Anchor:
        """The reference's distribution at the targets: its backbone runs now, its head later, chunk by chunk."""
        reference = self._live_reference()

        def logits_of(hidden_CD: Tensor) -> Tensor:
            with torch.no_grad(), reference.active(self._model) as model:
                inner = _language_model(model)
                head = inner.get_output_embeddings()  # type: ignore[operator]
                return logits_transform(inner.config)(head(hidden_CD))

        with torch.no_grad(), reference.active(self._model) as model:
            answers = model(
                **model_inputs(batch), targets=batch.targets, arithmetic=self._arithmetic, only_hidden=True
            )
        return Anchor(answers["hidden"], logits_of)

    def reference_logprobs(self, batch: Batch, *, temperature: float = 1.0) -> Tensor:
        """Those that the batch brings along, or what the reference says of logits divided by `temperature`; (N,)
        float32, without a graph. What a batch brings along is of the temperature 1."""
        if batch.reference is not None and temperature == 1.0:
            return batch.reference
        if self._reference is None and not bool((batch.targets != IGNORE_INDEX).any()):
            # The pass of a process that has nothing to do: no sample of it has brought anything along.
            return torch.zeros(0, device=batch.targets.device)
        with torch.no_grad(), self._live_reference().active(self._model) as model:
            return ModelPolicy(model, self._arithmetic).logprobs(batch, temperature=temperature).logprobs

    def _live_reference(self) -> Reference:
        if self._reference is None:
            raise ModelError("this stage compares with a reference model, and none was built")
        return self._reference

    @torch.no_grad()
    def next_logprobs(self, batch: Batch, tokens_K: Tensor) -> Tensor:
        """(N, K) float32 log-probabilities of each of these tokens at the supervised positions, whatever their targets
        are; without a graph."""
        inputs = {**model_inputs(batch), "targets": batch.targets, "arithmetic": self._arithmetic}
        hidden_ND = self._model(**inputs, only_hidden=True)["hidden"]
        inner = _language_model(self._model)
        head, transform = inner.get_output_embeddings(), logits_transform(inner.config)  # type: ignore[operator]
        rows = chunk_rows(len(hidden_ND), inner.config.get_text_config().vocab_size, hidden_ND.device)  # type: ignore[union-attr, operator]
        mixed = self._arithmetic not in (None, torch.float32)
        found = []
        with torch.autocast(hidden_ND.device.type, dtype=self._arithmetic if mixed else None, enabled=mixed):
            for hidden_CD in hidden_ND.split(rows):
                logits_CV = transform(head(hidden_CD)).float()
                found.append(logits_CV[:, tokens_K] - logits_CV.logsumexp(dim=-1, keepdim=True))
        return torch.cat(found)

    def scores(self, batch: Batch) -> Tensor:
        """What a reward model says at the last token of each row; (R,) float32."""
        assert batch.rows is not None
        last_R = batch.cu_seqlens[1:].long()[batch.rows] - 1
        with keeping_activations(_language_model(self._model)):
            scores: Tensor = self._model(**model_inputs(batch), positions=last_R, arithmetic=self._arithmetic)
        return scores


def model_inputs(batch: Batch) -> dict[str, Any]:
    """What the forward pass of a flat batch takes, besides what is asked of it."""
    inputs: dict[str, Any] = {
        "input_ids": batch.input_ids,
        "position_ids": batch.position_ids,
        "cu_seq_lens_q": batch.cu_seqlens,
        "cu_seq_lens_k": batch.cu_seqlens,
        "max_length_q": batch.max_length,
        "max_length_k": batch.max_length,
    }
    if bool((batch.parent >= 0).any()):
        inputs["segment_parents"] = batch.parent
    if batch.media:
        inputs["media"] = batch.media
    return inputs
