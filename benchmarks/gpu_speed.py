"""Tokens per second, MFU and peak memory of optimizer steps: Luthier's flat rows beside padded rows.

Both contenders are the loop that a trainer runs (batch to device, forward, backward, clip to norm 1, fused
AdamW), under bfloat16 autocast, on the same weights and the same rows. The other one is plain transformers: rows
padded on the right in micro-batches of eight, SDPA with a padding mask, its own loss, PEFT's own layers, no
cache. Rounds are interleaved, each contender alone on the device while it is measured; ratios are within a round.

MFU counts the operations that the step cannot do without (`floor.py`: real tokens and targets only, no padding,
no recomputation), against the rate of one large bfloat16 product measured in the same run. So both contenders
are held to the same work.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import floor
import gpu_shapes
import torch
from gpu_device import Machine
from gpu_equalities import FAILURES
from gpu_shapes import SHAPES, Shape
from peft import LoraConfig, PeftModel, get_peft_model
from summary import Spread
from torch import Tensor, nn
from transformers import PreTrainedModel

from luthier.data.collate import flat_batch
from luthier.data.packing import best_fit
from luthier.methods import build_method
from luthier.model.attention import attention_name
from luthier.model.logprobs import ModelPolicy, install_target_forward
from luthier.optim.build import build_optimizer
from luthier.recipe.resolve import TOKENS_PER_PASS
from luthier.recipe.schema import AdamwSpec, FullSpec, LoraSpec
from luthier.stages.supervised import negative_log_likelihood
from luthier.types import Sample

RANK = 8
LEARNING_RATE = 1e-4
MICRO_ROWS = 8
WARMUP = 2
GIB = 2**30
ACTIVATIONS = 16 * GIB
"""Asked for beside weights, gradients and optimizer states before full fine-tuning is tried."""
GUESSED_MFU = 0.15
"""What the slower contender is taken to reach when the time of a case is estimated before it runs."""
LOSS_BOUND = 5e-3
"""Largest relative difference of the first step's loss: far above bfloat16 noise, far below another loss."""
TRAINED_BYTES = {"float32": 16, "bfloat16": 8}
"""Weight, gradient and two AdamW states of one parameter."""


@dataclass(frozen=True, slots=True)
class Case:
    """One setting in which the two contenders meet."""

    shape: str
    method: str
    weights: str
    checkpointing: bool
    rows: int

    @property
    def name(self) -> str:
        recomputed = ", checkpointed" if self.checkpointing else ""
        return f"{self.shape} {self.method} ({self.weights}{recomputed}), {self.rows} rows a step"


def plan(shapes: Sequence[str], row_counts: Sequence[int]) -> list[Case]:
    """The cases, most telling first: what the time does not allow is missing from the end."""
    cases = []
    for rows in row_counts:
        for name in shapes:
            large = SHAPES[name].large
            cases.append(Case(name, "lora", "bfloat16", large, rows))
            if rows == row_counts[0]:
                cases.append(Case(name, "lora", "bfloat16", not large, rows))
                cases.append(Case(name, "full", "bfloat16" if large else "float32", large, rows))
    return sorted(cases, key=_lateness)


def _lateness(case: Case) -> int:
    """Full fine-tuning of a large model goes last: it needs the most memory and time, and may not fit at all."""
    large = SHAPES[case.shape].large
    return 2 if large and case.method == "full" else int(case.checkpointing and not large)


class Contender(Protocol):
    """A model with its optimizer."""

    def step(self, rows: Sequence[Sample]) -> Tensor:
        """One optimizer step; returns its mean loss, detached, on the device."""
        ...


class Luthier:
    """The flat path: what `PeftTrainer` does in a step, through the same functions."""

    def __init__(self, case: Case, machine: Machine) -> None:
        self._device = machine.device
        base = _base(case, attention_name("auto", machine.device), machine)
        method = build_method(LoraSpec(rank=RANK) if case.method == "lora" else FullSpec())
        self._model = method.apply(base)
        install_target_forward(base)
        self._model.train()
        groups = method.parameter_groups(self._model, 0.0, LEARNING_RATE)
        self._optimizer = build_optimizer(AdamwSpec(lr=LEARNING_RATE), groups, self._model)
        self._policy = ModelPolicy(self._model)

    def step(self, rows: Sequence[Sample]) -> Tensor:
        groups = best_fit([len(row) for row in rows], TOKENS_PER_PASS[self._device.type])
        batches = [flat_batch([rows[index] for index in group]).to(self._device) for group in groups]
        weight = torch.stack([batch.target_weights.sum() for batch in batches]).sum()
        total = torch.zeros((), device=self._device)
        for batch in batches:
            with torch.autocast(self._device.type, torch.bfloat16):
                loss = negative_log_likelihood(self._policy, batch, 0.0).terms["loss"].total / weight
            loss.backward()
            total += loss.detach()
        _update(self._model, self._optimizer)
        return total


class Padded:
    """Plain transformers: right-padded micro-batches, accumulated to the same step."""

    def __init__(self, case: Case, machine: Machine) -> None:
        self._device = machine.device
        base = _base(case, "sdpa", machine)
        self._model: nn.Module = base
        if case.method == "lora":
            config = LoraConfig(
                task_type="CAUSAL_LM", r=RANK, lora_alpha=2 * RANK, target_modules="all-linear"
            )
            model = get_peft_model(base, config)
            assert isinstance(model, PeftModel)
            self._model = model
            if case.checkpointing:
                base.enable_input_require_grads()
        self._model.train()
        trained = [parameter for parameter in self._model.parameters() if parameter.requires_grad]
        self._optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0, fused=True)

    def step(self, rows: Sequence[Sample]) -> Tensor:
        count = gpu_shapes.num_targets(rows)
        total = torch.zeros((), device=self._device)
        for start in range(0, len(rows), MICRO_ROWS):
            inputs = gpu_shapes.padded(rows[start : start + MICRO_ROWS], self._device)
            with torch.autocast(self._device.type, torch.bfloat16):
                loss = self._model(**inputs, use_cache=False, num_items_in_batch=count).loss
            loss.backward()
            total += loss.detach()
        _update(self._model, self._optimizer)
        return total


CONTENDERS: dict[str, Callable[[Case, Machine], Contender]] = {"luthier": Luthier, "padded": Padded}


def _base(case: Case, attention: str, machine: Machine) -> PreTrainedModel:
    dtype = getattr(torch, case.weights)
    model = gpu_shapes.random_model(SHAPES[case.shape], attention, dtype, machine.device)
    if case.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def _update(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
    optimizer.step()
    optimizer.zero_grad()


# --------------------------------------------------------------------------------------------------
# What a step cannot do without


def decoder_of(shape: Shape) -> floor.Decoder:
    return floor.Decoder.from_config(shape.as_config())


def num_parameters(shape: Shape) -> int:
    """Weights of the matrices: layers, embeddings, and the head where it is not tied."""
    layers = shape.layers * sum(inner * outer for inner, outer in decoder_of(shape).linears())
    return layers + shape.vocabulary * shape.hidden * (1 if shape.tied else 2)


def step_flops(case: Case, rows: Sequence[Sample]) -> float:
    """Operations for these rows. A weight that trains has a third product, for its own gradient."""
    decoder = decoder_of(SHAPES[case.shape])
    parts = floor.step_flops(decoder, [len(row) for row in rows], gpu_shapes.num_targets(rows), RANK)
    if case.method == "lora":
        return sum(parts.values())
    return 1.5 * (parts["base"] + parts["head"]) + parts["scores"]


# --------------------------------------------------------------------------------------------------
# Measuring


@dataclass(frozen=True, slots=True)
class Budget:
    """Seconds of the whole run; `deadline` is a reading of `time.monotonic`."""

    deadline: float

    @property
    def left(self) -> float:
        return self.deadline - time.monotonic()


@dataclass(frozen=True, slots=True)
class Meter:
    """How each case is measured, and against what."""

    machine: Machine
    budget: Budget
    peak: float
    """Operations per second of the large product of this run."""
    rounds: int
    steps: int

    def measure(self, case: Case) -> dict[str, Any]:
        """Rounds of both contenders, or the reason why there are none."""
        rows = gpu_shapes.random_rows(SHAPES[case.shape], case.rows * (WARMUP + self.steps), seed=7)
        steps = [rows[start : start + case.rows] for start in range(0, len(rows), case.rows)]
        result: dict[str, Any] = {"case": case.name, **asdict(case)}
        reason = self._obstacle(case, steps)
        if reason is not None:
            return {**result, "skipped": reason}
        rounds: list[dict[str, dict[str, Any]]] = []
        for number in range(self.rounds):
            started = time.monotonic()
            order = list(CONTENDERS) if number % 2 == 0 else list(reversed(CONTENDERS))
            rounds.append({name: self._contender(name, case, steps) for name in order})
            if any("error" in line for line in rounds[-1].values()):
                break
            if number + 1 < self.rounds and self.budget.left < 1.2 * (time.monotonic() - started):
                result["fewer_rounds"] = f"{number + 1} of {self.rounds}: the time budget allows no more"
                break
        timed = steps[WARMUP:]
        flops = sum(step_flops(case, step) for step in timed)
        return {**result, "flops_of_timed_steps": flops, **self._summary(rounds, flops), "rounds": rounds}

    def _obstacle(self, case: Case, steps: Sequence[Sequence[Sample]]) -> str | None:
        """Why this case is not tried: memory or time."""
        self.machine.release()  # what the allocator still holds of the last case is free to us
        shape, free = SHAPES[case.shape], self.machine.free_memory()
        per_parameter = TRAINED_BYTES[case.weights] if case.method == "full" else 2
        activations = ACTIVATIONS if shape.large else 0
        needed = num_parameters(shape) * per_parameter + activations
        if free is not None and needed > free:
            return f"memory: about {needed / GIB:.0f} GiB are needed, {free / GIB:.0f} GiB are free"
        slowest = sum(step_flops(case, step) for step in steps) / (GUESSED_MFU * self.peak)
        seconds = len(CONTENDERS) * (2.0 + num_parameters(shape) / 2e9 + slowest)
        if self.budget.left < seconds:
            left = max(0.0, self.budget.left)
            return f"time: one round would take about {seconds:.0f} s, {left:.0f} s are left"
        return None

    def _contender(self, name: str, case: Case, steps: Sequence[Sequence[Sample]]) -> dict[str, Any]:
        """Build, warm up, time, and give everything back. Running out of memory is a result, not a fault."""
        self.machine.release()
        try:
            return self._timed(CONTENDERS[name](case, self.machine), steps)
        except torch.OutOfMemoryError as error:
            return {"error": str(error).split(". ")[0], "out_of_memory": True}
        except FAILURES as error:
            return {"error": f"{type(error).__name__}: {error}", "out_of_memory": False}

    def _timed(self, contender: Contender, steps: Sequence[Sequence[Sample]]) -> dict[str, Any]:
        self.machine.synchronize()
        self.machine.reset_peak()
        losses = [contender.step(rows) for rows in steps[:WARMUP]]
        self.machine.synchronize()
        started = time.perf_counter()
        losses += [contender.step(rows) for rows in steps[WARMUP:]]
        self.machine.synchronize()
        seconds = time.perf_counter() - started
        tokens = sum(gpu_shapes.num_tokens(rows) for rows in steps[WARMUP:])
        return {
            "tokens": tokens,
            "seconds": seconds,
            "tokens_per_second": tokens / seconds,
            "peak_memory": self.machine.peak(),
            "losses": [float(loss) for loss in losses],
        }

    def _summary(self, rounds: Sequence[dict[str, dict[str, Any]]], flops: float) -> dict[str, Any]:
        """Spreads over the complete rounds, and whether both contenders trained on the same thing."""
        broken = [line["error"] for one in rounds for line in one.values() if "error" in line]
        faults = [
            line["error"]
            for one in rounds
            for line in one.values()
            if "error" in line and not line["out_of_memory"]
        ]
        whole = [one for one in rounds if not any("error" in line for line in one.values())]
        summary: dict[str, Any] = {"errors": broken, "passed": not faults}
        for name in CONTENDERS:
            lines = [one[name] for one in rounds if "error" not in one.get(name, {"error": ""})]
            if lines:
                summary[name] = self._spreads(lines, flops)
        if whole:
            first = [abs(one["luthier"]["losses"][0] / one["padded"]["losses"][0] - 1) for one in whole]
            summary["first_loss_difference"] = max(first)
            summary["passed"] = not faults and max(first) <= LOSS_BOUND
            summary["luthier_over_padded"] = {"speed": _ratio(whole, _speed)}
            if self.machine.cuda:
                summary["luthier_over_padded"]["peak_memory"] = _ratio(whole, _allocated)
        return summary

    def _spreads(self, lines: Sequence[dict[str, Any]], flops: float) -> dict[str, Any]:
        known = self.machine.known_peak()
        spreads = {
            "tokens_per_second": Spread.of(map(_speed, lines)).as_dict(),
            "mfu": Spread.of(flops / line["seconds"] / self.peak for line in lines).as_dict(),
        }
        if known is not None:
            spreads["mfu_of_known_peak"] = Spread.of(
                flops / line["seconds"] / known for line in lines
            ).as_dict()
        if self.machine.cuda:
            spreads["peak_gib"] = Spread.of(_allocated(line) / GIB for line in lines).as_dict()
        return spreads


def _speed(line: dict[str, Any]) -> float:
    return float(line["tokens_per_second"])


def _allocated(line: dict[str, Any]) -> float:
    return float(line["peak_memory"]["allocated"])


def _ratio(rounds: Sequence[dict[str, Any]], value: Callable[[dict[str, Any]], float]) -> dict[str, float]:
    return Spread.of(value(one["luthier"]) / value(one["padded"]) for one in rounds).as_dict()


def run_speed(meter: Meter, cases: Sequence[Case]) -> Iterator[dict[str, Any]]:
    for case in cases:
        yield meter.measure(case)
