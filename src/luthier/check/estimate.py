"""From a recipe, its data and its model to the memory that training will take."""

from __future__ import annotations

import platform
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from peft import PeftModel
from torch import nn

from luthier.check.memory import (
    HELD,
    SMALL_TENSORS,
    Activations,
    Memory,
    PassShape,
    Sizes,
    at_its_fullest,
    gradient_bytes,
    head_bytes,
    layer_bytes,
    measure_activations,
    reference_bytes,
    tensor_bytes,
    trained,
    weight_bytes,
    without_checkpointing,
)
from luthier.check.schedule import Schedule
from luthier.methods.full import decoder_layers
from luthier.methods.groups import checkpoints_activations
from luthier.model.load import ModelSource
from luthier.model.offload import without_offload
from luthier.model.reference import Reference
from luthier.optim.state_size import gradients_at_once, state_bytes
from luthier.parallel.cost import Whole, held
from luthier.recipe.deepspeed_json import zero_stage
from luthier.recipe.resolve import Hardware
from luthier.recipe.schema import DeepSpeedSpec, OptimSpec, PtSpec, Recipe, SftSpec, TrainSpec
from luthier.references import reference_spec
from luthier.trainer.precision import autocast_type
from luthier.types import Stage


def memory_before(device: str) -> int:
    """Bytes that are taken before a model is there: by this process, or on the GPU by its context and by others."""
    if device != "cuda":
        return int(psutil.Process().memory_info().rss) + SMALL_TENSORS[device]
    torch.cuda.init()  # type: ignore[no-untyped-call]
    free, total = torch.cuda.mem_get_info()
    return total - free - torch.cuda.memory_reserved()


def estimate_memory(
    settings: Recipe,
    source: ModelSource,
    hardware: Hardware,
    model: nn.Module,
    stage: Stage,
    schedule: Schedule,
    shape: PassShape,
    process: int,
    reference: Reference | None = None,
    sampling: int = 0,
    processes: int = 1,
) -> Memory:
    """The memory of one of a run's `processes` at its fullest. Three short forward passes are run, or six.

    process: what `memory_before` said before the model was loaded. reference: what the stage compares with; where the
    recipe asks it in advance, it counts before training only. sampling: keys and values while answers are drawn.
    """
    arithmetic = autocast_type(settings.train.precision)
    measured = partial(
        measure_activations, model, stage.model, arithmetic, shape.positions, pairs=stage.share_prompts
    )
    checkpointed = checkpoints_activations(model)
    with without_offload(model):
        kept = plain = measured()
        if checkpointed:
            with without_checkpointing(model):
                plain = measured()
    num_layers = model.config.get_text_config().num_hidden_layers  # type: ignore[union-attr, operator]
    layer = layer_bytes(plain.growth, shape, num_layers, checkpointed=checkpointed)
    smoothed = isinstance(settings.stage, PtSpec | SftSpec) and settings.stage.label_smoothing > 0
    scored = stage.model == "reward"
    head, transient = (0, 0) if scored else head_bytes(model, shape, arithmetic=arithmetic, smoothed=smoothed)
    compared, in_advance = reference_bytes(reference, model), reference_spec(settings).precompute
    optimizer, on_cpu = state_bytes(settings.optim, model), hardware.device != "cuda"
    moved = settings.model.activation_offload and not on_cpu
    sizes = Sizes(
        process=process,
        weights=weight_bytes(model),
        gradients=gradient_bytes(settings.optim, model),
        optimizer=optimizer,
        # On a GPU they wait in host memory, which this is not the sum of.
        activations=0 if moved else kept.growth(shape.positions, shape.squares),
        logits=head + transient,
        # The head is done before the first layer's backward begins.
        workspace=max(0, layer - transient),
        allocator=_held(plain, shape, schedule, checkpointed) if hardware.device == "cpu" else 0,
        head_gradient=_head_gradient(settings.optim, model),
        copied=_copied(settings.train, model, optimizer) if on_cpu else 0,
        converted=_converted(source, model) if on_cpu else 0,
        reference=0 if in_advance else compared,
        asked=compared if in_advance else 0,
        sampling=sampling,
    )
    return at_its_fullest(
        divided(sizes, settings, model, processes),
        _limit(settings, hardware, processes),
        several_passes=schedule.several_passes,
        copies_remain=_saves_before_the_end(settings.train, schedule),
    )


def divided(sizes: Sizes, settings: Recipe, model: nn.Module, processes: int) -> Sizes:
    """What one of several processes holds of weights, gradients and optimizer, by the formulae of `parallel.cost`."""
    spec = settings.parallel
    if processes == 1:
        return sizes
    if isinstance(spec, DeepSpeedSpec):
        spec = spec.model_copy(update={"zero": zero_stage(settings, processes) or None})
    inner: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    layers = [weight_bytes(layer) for layer in decoder_layers(inner)[1]]
    ends = {
        id(one): one
        for one in (inner.get_input_embeddings(), inner.get_output_embeddings())
        if one is not None
    }
    outside = tensor_bytes({id(p): p for end in ends.values() for p in end.parameters()}.values())
    whole = Whole(
        weights=sizes.weights,
        gradients=sizes.gradients,
        optimizer=sizes.optimizer,
        group=max([*layers, outside]),
        trained=tensor_bytes(trained(model)),
        outside=outside,
    )
    part = held(spec, processes, whole)
    return replace(
        sizes,
        weights=part.weights + part.gathered,
        gradients=part.gradients + part.exchanged,
        optimizer=part.optimizer,
    )


def _limit(settings: Recipe, hardware: Hardware, processes: int) -> int:
    """The memory of one process: of its GPU, or its part of the machine's, which those on CPUs share."""
    return hardware.memory // (1 if hardware.device == "cuda" else -(-processes // settings.parallel.nodes))


def _held(plain: Activations, shape: PassShape, schedule: Schedule, checkpointed: bool) -> int:
    """What glibc's heap will hold without use; other C libraries were not measured."""
    if platform.libc_ver()[0] != "glibc":
        return 0
    how = "recomputed" if checkpointed else "many lengths" if schedule.several_passes else "one length"
    whole = plain.growth(shape.positions, shape.squares)
    return round(HELD[how] * plain.heap_share(shape.positions) * whole)


def _head_gradient(spec: OptimSpec, model: nn.Module) -> int:
    """The gradient of embeddings that train; that of a tied head waits for it."""
    embeddings: nn.Module = model.get_input_embeddings()  # type: ignore[operator]
    at_once = {id(parameter) for parameter in gradients_at_once(spec, model)}
    return tensor_bytes(parameter for parameter in embeddings.parameters() if id(parameter) in at_once)


def _copied(spec: TrainSpec, model: nn.Module, optimizer: int) -> int:
    """What a checkpoint copies to host memory: what trains, and the optimizer's states."""
    if spec.save_every is None:
        return 0
    return tensor_bytes(trained(model)) + (0 if spec.save_only_model else optimizer)


def _saves_before_the_end(spec: TrainSpec, schedule: Schedule) -> bool:
    if spec.save_every is None:
        return False
    every = schedule.steps_per_epoch if spec.save_every == "epoch" else int(spec.save_every)
    return every < schedule.steps


def _converted(source: ModelSource, model: nn.Module) -> int:
    """Bytes of the weight files where their type is another than the model's: both are there while loading."""
    if not source.local:
        return 0
    size = sum(file.stat().st_size for file in Path(source.path).glob("*.safetensors"))
    weights = weight_bytes(model)
    return size if not 0.8 < size / weights < 1.25 else 0
