"""Parts of models that read media: what is held still, what adapters are put on, and which models have parts."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import Gemma3ForSequenceClassification, PreTrainedModel

from luthier.methods import build_method
from luthier.methods.full import decoder_layers
from luthier.model.checkpointing import checkpoint_layers
from luthier.model.multimodal import (
    frozen_modules,
    hold_parts,
    is_multimodal,
    language_class,
    sorter,
)
from luthier.model.probes import inner_model
from luthier.recipe.model import ModelPart
from luthier.recipe.schema import (
    CheckpointingSpec,
    FreezeSpec,
    FullSpec,
    LoraSpec,
    MethodSpec,
    OftSpec,
    PeftSpec,
)
from luthier.types import ModelError
from tests.multimodal import MULTIMODAL, tiny_multimodal
from tests.tiny import FAMILIES, tiny_model

FULL, FREEZE, LORA = FullSpec(type="full"), FreezeSpec(type="freeze", layers=1), LoraSpec(type="lora", rank=2)


def _held(family: str, parts: tuple[ModelPart, ...] | None, spec: MethodSpec) -> nn.Module:
    model = tiny_multimodal(family)
    hold_parts(model, parts)
    trained: nn.Module = build_method(spec).apply(model)
    return trained


def _trained_parts(model: nn.Module) -> dict[str | None, int]:
    """How many parameters of each part train."""
    inner = inner_model(model)
    assert isinstance(inner, PreTrainedModel)
    part_of, found = sorter(inner), {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            part = part_of(name.removeprefix("base_model.model."))
            found[part] = found.get(part, 0) + 1
    return found


@pytest.mark.parametrize(
    ("family", "tower", "projector", "language"),
    [("qwen2.5-vl", 25, 5, 27), ("gemma3", 48, 2, 28), ("llava", 39, 4, 21), ("qwen2-audio", 37, 2, 27)],
)
def test_full_trains_what_is_not_frozen(family: str, tower: int, projector: int, language: int) -> None:
    every = {"tower": tower, "projector": projector, "language": language}
    assert sum(every.values()) == len(list(tiny_multimodal(family).parameters()))
    assert _trained_parts(_held(family, (), FULL)) == every
    assert _trained_parts(_held(family, None, FULL)) == {"language": language}
    assert _trained_parts(_held(family, ("language", "tower"), FULL)) == {"projector": projector}
    # freeze chooses among the language model's layers; what is not frozen beside it trains as a whole.
    layer = len(list(decoder_layers(tiny_multimodal(family))[1][0].parameters()))
    assert _trained_parts(_held(family, None, FREEZE)) == {"language": layer}
    assert _trained_parts(_held(family, ("projector",), FREEZE)) == {"tower": tower, "language": layer}


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        (None, {"language": 28}),
        ((), {"tower": 20, "projector": 4, "language": 28}),
        (("tower",), {"projector": 4, "language": 28}),
        (("tower", "language"), {"projector": 4}),
        (("projector", "language"), {"tower": 20}),
    ],
)
def test_adapters_go_on_the_other_parts_alone(
    parts: tuple[ModelPart, ...] | None, expected: dict[str, int]
) -> None:
    """Qwen2.5-VL's merger lies inside the tower by name, and is its projector all the same."""
    assert _trained_parts(_held("qwen2.5-vl", parts, LORA)) == expected


def test_named_targets_are_kept_off_frozen_parts_too() -> None:
    """`q_proj` and `fc1` are names that towers have as well."""
    named = LoraSpec(type="lora", rank=2, targets=("q_proj", "fc1"))
    assert _trained_parts(_held("llava", ("projector",), named)) == {"tower": 8, "language": 4}
    assert _trained_parts(_held("llava", None, named)) == {"language": 4}
    only = LoraSpec(type="lora", rank=2, targets=("fc1",))
    with pytest.raises(ModelError, match=r"method\.targets"):
        _held("llava", None, only)


@pytest.mark.parametrize(
    "spec",
    [
        OftSpec(type="oft", block_size=4),
        PeftSpec(type="peft", config={"peft_type": "LOHA", "r": 2}),
        LoraSpec(type="lora", rank=2, layers=(1,)),
    ],
)
def test_other_adapters_spare_frozen_parts(spec: MethodSpec) -> None:
    assert set(_trained_parts(_held("gemma3", None, spec))) == {"language"}


def test_a_module_that_is_named_to_be_saved_trains() -> None:
    """Low-rank in the language model, the projector as a whole: the recipe says both."""
    spec = LoraSpec(type="lora", rank=2, modules_to_save=("multi_modal_projector",))
    assert _trained_parts(_held("llava", None, spec)) == {"language": 28, "projector": 4}


def test_layers_are_those_of_the_language_model() -> None:
    """The tower has as many, and comes first."""
    for family in MULTIMODAL:
        name, layers = decoder_layers(tiny_multimodal(family))
        assert len(layers) == 2 and ".language_model." in name
    model = tiny_multimodal("qwen2.5-vl")
    assert checkpoint_layers(model, CheckpointingSpec(every=2)) == [0]


def test_nothing_left_to_train_is_refused() -> None:
    every: tuple[ModelPart, ...] = ("tower", "projector", "language")
    for spec in (FULL, FREEZE):
        with pytest.raises(ModelError, match=r"model\.frozen_parts"):
            _held("llava", every, spec)
    with pytest.raises(ModelError, match=r"method\.targets"):
        _held("llava", every, LORA)


def test_models_without_parts() -> None:
    for family in FAMILIES:
        assert not is_multimodal(FAMILIES[family]()), family
    model = tiny_model("llama")
    hold_parts(model, None)
    assert frozen_modules(model) is None
    with pytest.raises(ModelError, match="LlamaForCausalLM reads no media"):
        hold_parts(model, ("tower",))


def test_an_unknown_structure_says_so() -> None:
    model = tiny_multimodal("llava")
    model.model.ears = nn.Linear(2, 2)
    hold_parts(model, None)  # it can be asked all the same
    for spec in (FULL, FREEZE, LORA):
        with pytest.raises(ModelError, match=r"to which part model\.ears\.weight belongs; set it to \[\]"):
            build_method(spec).apply(model)
    hold_parts(model, ())
    assert frozen_modules(model) is None


def test_which_class_loads() -> None:
    config = MULTIMODAL["gemma3"]()
    assert is_multimodal(config)
    config.architectures = ["Gemma3ForConditionalGeneration"]
    assert is_multimodal(config)
    # A text model's architecture under a config that has a tower as well: what was saved is the text model.
    config.architectures = ["Gemma3ForCausalLM"]
    assert not is_multimodal(config)
    assert language_class(config).__name__ == "AutoModelForCausalLM"
    assert not is_multimodal(config.get_text_config())


def test_a_reward_model_has_parts() -> None:
    config = MULTIMODAL["gemma3"]()
    config.num_labels = 1
    config.architectures = ["Gemma3ForSequenceClassification"]
    torch.manual_seed(0)
    model = Gemma3ForSequenceClassification(config)
    hold_parts(model, None)
    trained = build_method(FULL).apply(model)
    assert trained.score.weight.requires_grad
    assert _trained_parts(trained) == {"language": 29}
