"""Fast paths change nothing: each is compared with the slow one on the device itself, loss and gradients.

Precisions: `fp32` (float32 weights and arithmetic), `bf16` (bfloat16 weights under bfloat16 autocast, as
LoRA runs on a GPU) and `mixed` (float32 weights under bfloat16 autocast, as full fine-tuning runs). All hold the
same weights, so the float32 gradient of transformers' own padded forward is the truth for all of them.

float32 has fixed bounds. In bfloat16 two right answers differ by rounding, so the bound is three times the noise
floor of the same run: how far transformers' padded SDPA and padded eager attention are apart. Beside it stands
the error ratio, the distance to the truth divided by that of the padded SDPA path. The comparison of paths has a
control that must fail it. Differences of gradients are norms over all parameters, relative to the reference.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import gpu_shapes
import torch
from gpu_device import Machine
from gpu_shapes import Shape
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from luthier.data.collate import flat_batch
from luthier.methods.fused import fuse_lora
from luthier.model.attention import attention_name
from luthier.model.kernel import chunk_rows, token_logprobs
from luthier.model.logprobs import ModelPolicy, install_target_forward
from luthier.model.selftest import require_isolation
from luthier.stages.supervised import negative_log_likelihood
from luthier.types import IGNORE_INDEX, Batch, LuthierError, Sample

PRECISIONS = ("fp32", "bf16", "mixed")
LENGTHS = (5, 1, 160, 33, 257, 97)
"""Segments of the compared row: none a multiple of a kernel's tile, one without a target."""
CHANGED = 2
"""The segment whose tokens the leak test changes."""
FP32_LOSS, FP32_GRADIENT = 1e-5, 1e-4
NOISE_FACTOR = 3.0
"""How many times the noise floor a bfloat16 difference may be: the floor is one draw of the same noise."""
BF16_KERNEL = 2**-6
"""For one product and one softmax in bfloat16: four times its rounding unit."""
LEAST_LOSS = 1e-3
"""The loss is one number and two of them can agree by luck, so its bfloat16 bound is never below this."""
ERROR_RATIO = 1.5
CONTROL_FACTOR = 2.0
FAILURES = (RuntimeError, TypeError, ValueError, AttributeError, LuthierError)
"""What a check that breaks may raise; it has then failed, and the others still run."""

Check = dict[str, Any]


def judge(
    name: str,
    precision: str,
    values: dict[str, float],
    at_most: dict[str, float] | None = None,
    at_least: dict[str, float] | None = None,
) -> Check:
    """A line of the result: what was measured, what was allowed, and whether it holds (NaN never does)."""
    below, above = at_most or {}, at_least or {}
    passed = all(values[key] <= bound for key, bound in below.items())
    passed = passed and all(values[key] >= bound for key, bound in above.items())
    return {
        "check": name,
        "precision": precision,
        "values": values,
        "at_most": below,
        "at_least": above,
        "passed": passed,
    }


def autocast(precision: str, device: torch.device) -> AbstractContextManager[Any]:
    return nullcontext() if precision == "fp32" else torch.autocast(device.type, torch.bfloat16)


def luthier_attention(precision: str, device: torch.device) -> str:
    """What `auto` resolves to: the variable-length kernel for 16 bits on CUDA, else SDPA by segments."""
    return attention_name("sdpa" if precision == "fp32" else "auto", device)


@dataclass(frozen=True, slots=True)
class Answer:
    """A mean loss and its gradients (float32), one for each trained parameter."""

    loss: float
    gradients: list[Tensor]


def relative(ours: Answer, reference: Answer) -> dict[str, float]:
    """Relative differences of loss and gradients."""
    difference = scale = 0.0
    for mine, theirs in zip(ours.gradients, reference.gradients, strict=True):
        difference += float((mine - theirs).norm()) ** 2
        scale += float(theirs.norm()) ** 2
    return {
        "loss": abs(ours.loss - reference.loss) / abs(reference.loss),
        "gradient": (difference / scale) ** 0.5,
    }


def answer(
    model: nn.Module, losses: Sequence[Callable[[], Tensor]], context: AbstractContextManager[Any]
) -> Answer:
    """The sum of the losses and of their gradients, in float32, so that summing adds no noise of its own."""
    model.train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    total, sums = 0.0, [torch.zeros_like(parameter, dtype=torch.float32) for parameter in parameters]
    for loss_of in losses:
        with context:
            loss = loss_of()
        loss.backward()
        total += float(loss.detach())
        for parameter, gradient in zip(parameters, sums, strict=True):
            if parameter.grad is not None:
                gradient += parameter.grad
            parameter.grad = None
    return Answer(total, sums)


@dataclass(frozen=True, slots=True)
class Comparison:
    """The compared row, and the paths through the model that must agree on it."""

    shape: Shape
    machine: Machine
    rows: list[Sample]

    @property
    def batch(self) -> Batch:
        return flat_batch(self.rows).to(self.machine.device)

    def model(self, precision: str, attention: str | None = None) -> nn.Module:
        """Luthier's model, or transformers' own with the attention that is named."""
        device = self.machine.device
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        name = attention or luthier_attention(precision, device)
        model = gpu_shapes.random_model(self.shape, name, dtype, device)
        if attention is None:
            install_target_forward(model)
        return model

    def padded(self, precision: str, attention: str) -> Answer:
        """transformers alone: padded rows, its mask, its loss."""
        device, model = self.machine.device, self.model(precision, attention)
        inputs = gpu_shapes.padded(self.rows, device)
        count = gpu_shapes.num_targets(self.rows)

        def loss() -> Tensor:
            value = model(**inputs, use_cache=False, num_items_in_batch=count).loss
            assert isinstance(value, Tensor)
            return value

        return answer(model, [loss], autocast(precision, device))

    def flat(self, model: nn.Module, precision: str, batches: Sequence[Batch]) -> Answer:
        policy, count = ModelPolicy(model), gpu_shapes.num_targets(self.rows)
        losses = [lambda batch=batch: _mean(policy, batch, count) for batch in batches]
        return answer(model, losses, autocast(precision, self.machine.device))


def _mean(policy: ModelPolicy, batch: Batch, count: int) -> Tensor:
    return negative_log_likelihood(policy, batch, 0.0).terms["loss"].total / count


# --------------------------------------------------------------------------------------------------
# The checks


def paths(comparison: Comparison, precision: str, truth: Answer) -> Iterator[Check]:
    """Flat = padded transformers, flat = one segment at a time, and a control without segment bounds."""
    exact = precision == "fp32"
    reference = truth if exact else comparison.padded(precision, "sdpa")
    floor = relative(comparison.padded(precision, "eager"), reference)
    allowed = {"loss": FP32_LOSS, "gradient": FP32_GRADIENT}
    yield judge("padded eager = padded sdpa (noise floor)", precision, floor, allowed if exact else None)
    if not exact:
        allowed = {
            "loss": max(LEAST_LOSS, NOISE_FACTOR * floor["loss"]),
            "gradient": NOISE_FACTOR * floor["gradient"],
        }
    comparison.machine.release()

    model, batch = comparison.model(precision), comparison.batch
    flat = comparison.flat(model, precision, [batch])
    values, bounds = relative(flat, reference), dict(allowed)
    if not exact:
        values["error_ratio"] = relative(flat, truth)["gradient"] / relative(reference, truth)["gradient"]
        bounds["error_ratio"] = ERROR_RATIO
    yield judge("flat = padded sdpa", precision, values, bounds)

    alone = [flat_batch([row]).to(comparison.machine.device) for row in comparison.rows]
    single = comparison.flat(model, precision, alone)
    yield judge("flat = one segment at a time", precision, relative(flat, single), allowed)
    del single

    ends = torch.tensor([0, batch.num_tokens], dtype=torch.int32, device=batch.cu_seqlens.device)
    leaky = comparison.flat(model, precision, [replace(batch, cu_seqlens=ends, max_length=batch.num_tokens)])
    least = {"gradient": CONTROL_FACTOR * allowed["gradient"]}
    yield judge("control: without bounds it differs", precision, relative(leaky, reference), at_least=least)


def leaks(comparison: Comparison, precision: str) -> Iterator[Check]:
    """Nothing of one segment reaches another, forward or backward."""
    model, batch = comparison.model(precision), comparison.batch
    bounds = batch.cu_seqlens.tolist()
    context = autocast(precision, comparison.machine.device)
    ids = batch.input_ids.clone()
    start, stop = bounds[CHANGED], bounds[CHANGED + 1]
    ids[:, start:stop] = ids[:, start:stop].flip(1)
    policy = ModelPolicy(model)
    with torch.no_grad(), context:
        moved = (
            policy.logprobs(replace(batch, input_ids=ids)).logprobs - policy.logprobs(batch).logprobs
        ).abs()
    where = (batch.targets != IGNORE_INDEX).nonzero()[:, 0]
    inside = (where >= start) & (where < stop)
    values = {"others_nats": float(moved[~inside].max()), "changed_nats": float(moved[inside].max())}
    most = 1e-5 if precision == "fp32" else 1e-3
    yield judge("leak forward", precision, values, {"others_nats": most}, {"changed_nats": 10 * most})

    last = batch.targets.clone()
    last[: bounds[-2]] = IGNORE_INDEX
    kept: list[Tensor] = []
    with _embeddings(model, kept), context:
        loss = -policy.logprobs(replace(batch, targets=last)).logprobs.sum()
    loss.backward()
    gradient = kept[0].grad
    assert gradient is not None
    values = {
        "others": float(gradient[0, : bounds[-2]].abs().max()),
        "own": float(gradient[0, bounds[-2] :].abs().max()),
    }
    yield judge("leak backward", precision, values, {"others": 0.0}, {"own": 1e-9})


@contextmanager
def _embeddings(model: nn.Module, kept: list[Tensor]) -> Iterator[None]:
    """Keep the embedded tokens of a forward pass, to read their gradient after its backward."""

    def keep(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
        output.retain_grad()
        kept.append(output)

    handle = model.get_input_embeddings().register_forward_hook(keep)  # type: ignore[operator]
    try:
        yield
    finally:
        handle.remove()


def kernels(comparison: Comparison, precision: str) -> Iterator[Check]:
    """The start-up self-test, and which attention operators a flat forward runs (CUDA: the varlen one)."""
    model, machine = comparison.model(precision), comparison.machine
    result = require_isolation(model)  # outside autocast, as it runs before training
    values = {
        "attention_calls": float(result.attention_calls),
        "nats": result.difference,
        "leak": result.leak,
    }
    yield judge("self-test", precision, values, at_least={"attention_calls": 1.0})

    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profile, autocast(precision, machine.device):
        ModelPolicy(model).logprobs(comparison.batch)
    operators = {
        event.key: float(event.count) for event in profile.key_averages() if "att" in event.key.lower()
    }
    varlen = sum(count for name, count in operators.items() if name.startswith("torch_attn::"))
    least = {"varlen_calls": float(comparison.shape.layers)} if machine.cuda and precision != "fp32" else None
    yield judge("attention operators", precision, {**operators, "varlen_calls": varlen}, at_least=least)


def chunks(comparison: Comparison, precision: str) -> Iterator[Check]:
    """Chunked log-probabilities, entropy and mean = the dense ones; with the head frozen and trained."""
    device, vocabulary = comparison.machine.device, gpu_shapes.SHAPES["0.6B"].vocabulary
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    rows = chunk_rows(2**30, vocabulary, device)
    torch.manual_seed(0)
    hidden = torch.randn(2 * rows + rows // 2, comparison.shape.hidden, device=device, dtype=dtype)
    head = nn.Linear(comparison.shape.hidden, vocabulary, bias=False, device=device, dtype=dtype)
    targets = torch.randint(0, vocabulary, (len(hidden),), device=device)
    upstream = torch.randn(3, len(hidden), device=device)

    def run(of: Callable[[Tensor], dict[str, Tensor]]) -> list[Tensor]:
        leaf = hidden.clone().requires_grad_()
        values = torch.stack(list(of(leaf).values()))
        inputs = [leaf, *(parameter for parameter in head.parameters() if parameter.requires_grad)]
        return [values.detach(), *torch.autograd.grad((values * upstream).sum(), inputs)]

    def dense(leaf: Tensor) -> dict[str, Tensor]:
        logprobs = head(leaf).float().log_softmax(-1)
        entropy = -(logprobs.exp() * logprobs).sum(-1)
        return {
            "logprobs": logprobs.gather(-1, targets[:, None])[:, 0],
            "entropy": entropy,
            "mean": logprobs.mean(-1),
        }

    for trains in (False, True):
        head.requires_grad_(trains)
        ours = run(
            lambda leaf, trains=trains: token_logprobs(
                leaf,
                head,
                targets,
                vocab_size=vocabulary,
                entropy=True,
                mean_logprobs=True,
                head_trains=trains,
            )
        )
        pairs = zip(("value", "hidden_gradient", "head_gradient"), ours, run(dense), strict=False)
        values = {name: float((a - b).float().norm() / b.float().norm()) for name, a, b in pairs}
        bound = FP32_GRADIENT if precision == "fp32" else BF16_KERNEL
        name = f"chunked = dense log-probs, head {'trained' if trains else 'frozen'}"
        yield judge(name, precision, values, dict.fromkeys(values, bound))


def fused(comparison: Comparison, precision: str) -> Iterator[Check]:
    """Luthier's LoRA layer = PEFT's, on adapters that are not zero; the truth is PEFT in float32."""

    def adapted(at: str) -> tuple[nn.Module, Answer]:
        model = comparison.model(at)
        config = LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules="all-linear")
        wrapped = get_peft_model(model, config)  # type: ignore[arg-type]
        torch.manual_seed(1)
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                drawn = torch.randn_like(parameter, dtype=torch.float32).mul_(0.02)
                parameter.data = drawn.bfloat16().to(parameter.dtype)
        return wrapped, comparison.flat(wrapped, at, [comparison.batch])

    _, truth = adapted("fp32")
    comparison.machine.release()
    model, reference = adapted(precision)
    layers = fuse_lora(model)
    ours = comparison.flat(model, precision, [comparison.batch])
    values = {**relative(ours, reference), "layers": float(layers)}
    if precision == "fp32":
        bounds = {"loss": FP32_LOSS, "gradient": FP32_GRADIENT}
    else:
        noise = relative(reference, truth)
        values["error_ratio"] = relative(ours, truth)["gradient"] / noise["gradient"]
        loss = max(LEAST_LOSS, NOISE_FACTOR * noise["loss"])
        bounds = {"loss": loss, "gradient": NOISE_FACTOR * noise["gradient"], "error_ratio": ERROR_RATIO}
    least = {"layers": 7.0 * comparison.shape.layers}
    yield judge("fused LoRA = PEFT", precision, values, bounds, least)


# --------------------------------------------------------------------------------------------------


def run_equalities(shape: Shape, machine: Machine, precisions: Sequence[str]) -> Iterator[Check]:
    """Every check in every precision that it speaks of; one that breaks is a failed line, not the end."""
    from gpu_memory_tricks import memory_tricks  # it compares with what stands above

    comparison = Comparison(shape, machine, gpu_shapes.rows_of(LENGTHS, shape, seed=0))
    truth = comparison.padded("fp32", "sdpa")
    machine.release()
    for precision in precisions:
        groups: dict[str, Callable[[], Iterator[Check]]] = {
            "paths": lambda p=precision: paths(comparison, p, truth),
            "leaks": lambda p=precision: leaks(comparison, p),
            "kernels": lambda p=precision: kernels(comparison, p),
            "memory": lambda p=precision: memory_tricks(comparison, p),
        }
        if precision != "mixed":
            groups["chunks"] = lambda p=precision: chunks(comparison, p)
            groups["fused LoRA"] = lambda p=precision: fused(comparison, p)
        for name, group in groups.items():
            try:
                yield from group()
            except FAILURES as error:
                yield {
                    **judge(name, precision, {}),
                    "passed": False,
                    "error": f"{type(error).__name__}: {error}",
                }
            machine.release()
