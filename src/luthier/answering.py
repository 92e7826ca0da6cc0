"""A trained model, ready to answer: what predict, evaluate, chat and serve share.

open_model(target)  ->  Answerer: engine and template of a run, a checkpoint, an adapter, an export, a model or a recipe

A run directory is enough: its base, adapter, template, type and new tokens are read from it, and a base that is not
the one of the training is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from luthier.data.answer_form import THINK, AnswerForm
from luthier.data.calls.form import Offered
from luthier.data.encode import media_of
from luthier.data.template import ChatTemplate
from luthier.engine.hf import HfEngine
from luthier.engine.packed import can_pack, pack_linears
from luthier.engine.precedence import model_settings, settings_of
from luthier.engine.protocol import BASE, Engine
from luthier.engine.text import answer_text
from luthier.environment import detect_hardware
from luthier.methods.adapter_files import ADAPTER, attach_adapter, attach_further
from luthier.model.load import ModelSource, fingerprint, locate
from luthier.model.vocabulary import recorded_change
from luthier.recipe.load import load_recipe
from luthier.recipe.schema import DataSpec, GenerationSpec, ModelSpec, Recipe
from luthier.trained import load
from luthier.trained.dequantize import is_quantized
from luthier.trained.source import Trained, from_folder, from_recipe, require_base
from luthier.trained.template import trained_template
from luthier.types import (
    Conversation,
    Generation,
    GenerationSettings,
    Message,
    ModelError,
    ModelKind,
    RecipeError,
    Request,
)

Note = Callable[[str], object]

_MARK = 32
"""Tokens at a prompt's end that hold a mark, were each byte of it a token."""


@dataclass(frozen=True)
class Answerer:
    """A loaded model with its template.

    spec: how the recipe says that answers are drawn. said: what the model's generation_config.json says. kind: a
    language model, or a reward model, which scores and does not answer.
    """

    label: str
    engine: Engine
    template: ChatTemplate
    trained: Trained
    spec: GenerationSpec = field(default_factory=GenerationSpec)
    said: Mapping[str, Any] = field(default_factory=dict)

    @property
    def kind(self) -> ModelKind:
        return self.trained.kind

    @property
    def adapters(self) -> tuple[str, ...]:
        """The names that requests may choose from; the first is the default."""
        return self.engine.adapters

    def settings(self, **call: Any) -> GenerationSettings:
        """The settings that hold for a call that says these: see `engine.precedence`."""
        return settings_of(
            call,
            self.spec.model_dump(),
            self.said,
            stop_ids=self.template.stop_ids,
        )

    def request(self, conversation: Conversation, *, adapter: str | None = None, **call: Any) -> Request:
        """The request for the assistant's next turn, with the ids that training had for it: like there, an empty
        system message is none.

        `enable_thinking`, `reasoning_effort` and `template_variables` of the call are of the template. Raises DataError
        for a conversation that the template cannot render and for a variable that it does not know, GenerationError
        for a wrong setting.
        """
        first = conversation.messages[0] if conversation.messages else None
        if first is not None and first.role == "system" and not first.content:
            conversation = replace(conversation, messages=conversation.messages[1:])
        prompt = self.template.prompt(conversation, self.variables(call))
        settings = self.settings(**call)
        return Request(tuple(prompt), settings, adapter, media_of(conversation), self.template.opener)

    def variables(self, call: Mapping[str, Any]) -> dict[str, Any]:
        """The variables of the template for a call: the recipe's, and before them the call's own.

        Raises DataError for one that the template does not know.
        """
        said = {
            name: call[name] for name in ("enable_thinking", "reasoning_effort") if call.get(name) is not None
        }
        said |= call.get("template_variables") or {}
        found = {**self.spec.template_variables, **said}
        self.template.require_variables(found)
        return found

    @cached_property
    def form(self) -> AnswerForm:
        """How the template marks reasoning and tool calls."""
        return AnswerForm.of(self.template)

    def form_after(self, request: Request) -> AnswerForm:
        """How the answer to a request is read: see `AnswerForm.after`."""
        return self.form.after(self.template.decode(request.prompt[-_MARK:]))

    def message(self, text: str, form: AnswerForm, tools: Offered = ()) -> Message:
        """The text of an answer as the message that training data would have in its place; form: see `form_after`;
        tools: those that it might call.

        Reasoning stands apart where the template has a place for it, else in the content.
        """
        spoken = form.read(text, tools=tools)
        if self.template.has_reasoning or form.channels:
            return Message("assistant", spoken.content, spoken.reasoning or None, spoken.calls)
        if spoken.calls:
            thought = f"{form.reason_opens or THINK[0]}\n{spoken.reasoning}\n{form.reason_closes}\n\n"
            return Message(
                "assistant", (thought if spoken.reasoning else "") + spoken.content, None, spoken.calls
            )
        return Message("assistant", text if form.reason_opens else f"{THINK[0]}\n{text}")

    def decoder(self, *, skip_special_tokens: bool | None = None) -> Callable[[Sequence[int]], str]:
        """Tokens to text: special tokens are left out where the recipe says so, but not the template's own marks."""
        template, marks = self.template, self.form.marks
        skip = self.spec.skip_special_tokens if skip_special_tokens is None else skip_special_tokens
        added = template.tokenizer.backend_tokenizer.get_added_tokens_decoder()
        hidden = {
            index
            for index, token in added.items()
            if skip and token.special and not any(token.content in mark for mark in marks)
        }
        return lambda ids: template.decode([index for index in ids if index not in hidden])

    def text(self, answer: Generation | Sequence[int], *, skip_special_tokens: bool | None = None) -> str:
        """The text of an answer, up to its stop string."""
        skip = self.spec.skip_special_tokens if skip_special_tokens is None else skip_special_tokens
        decode = partial(self.template.decode, skip_special_tokens=skip)
        return answer_text(answer, decode) if isinstance(answer, Generation) else decode(answer)


def open_model(
    target: str | Path | Recipe,
    *,
    adapters: Mapping[str, str | Path] | None = None,
    base: str | None = None,
    template: str | None = None,
    generation: GenerationSpec | None = None,
    rows: int | None = None,
    device: str | None = None,
    engine: Literal["hf", "vllm"] | None = None,
    say: Note = lambda text: None,
) -> Answerer:
    """Load what `target` names: the folder of a run, checkpoint, adapter or model, a recipe (file or value), a name on
    the hub, or `embedded`.

    adapters: more of them by name, each on the same base, for requests to choose from; with any, the trained one is
    called `default` and the base `base`. base: the model below the adapter, where it moved. template: of a model that
    nobody trained here, where its own is not wanted. generation: in place of the recipe's; what a recipe that only
    answers says comes before what the run of its adapter says. rows, engine: in place of these settings alone. Raises
    ModelError, CheckpointError and RecipeError for parts that do not fit together.
    """
    asked = target if isinstance(target, Recipe) else recipe_in(target)
    trained = parts_of(target if asked is None else asked, base)
    if template is not None:
        trained = _with_template(trained, template)
    source = locate(trained.model)
    if trained.bases:
        require_base(trained, source)
    chat = trained_template(trained, say)
    hardware = detect_hardware()
    where = torch.device(device or hardware.device)
    trained = typed(trained, where, bf16=hardware.bf16)
    label = trained.label if asked is None or isinstance(target, Recipe) else str(target)
    spec = generation or _generation(asked, trained.recipe)
    given = {"rows": rows, "engine": engine}
    spec = spec.model_copy(update={name: value for name, value in given.items() if value is not None})
    if spec.engine == "vllm":
        return _over_vllm(label, trained, source, chat, spec, adapters or {}, where)
    model: Any = load.Loader(trained, source, where).live()
    names: tuple[str, ...] = ()
    if adapters:
        model, names = _with_choices(model, trained, source, adapters)
    elif isinstance(model, PeftModel) and _merges_exactly(model):
        model = load.merged(model, trained)
    if can_pack(model) and trained.kind == "language":
        pack_linears(model)
    model.requires_grad_(False)
    return replace(answerer(trained, source, model, chat, names=names, generation=spec), label=label)


def answerer(
    trained: Trained,
    source: ModelSource,
    model: torch.nn.Module,
    template: ChatTemplate,
    *,
    names: Sequence[str] = (),
    generation: GenerationSpec | None = None,
) -> Answerer:
    """A model that is loaded already, ready to answer; `names` of its adapters for requests to choose from."""
    spec = generation or (trained.recipe.generation if trained.recipe is not None else GenerationSpec())
    engine = HfEngine(
        model.eval(),
        rows=spec.rows,
        memory=spec.memory,
        decode=template.decode,
        adapters=names,
    )
    said = model_settings(_settings_folder(trained, source))
    return Answerer(trained.label, engine, template, trained, spec, said)


def _over_vllm(
    label: str,
    trained: Trained,
    source: ModelSource,
    template: ChatTemplate,
    spec: GenerationSpec,
    adapters: Mapping[str, str | Path],
    device: torch.device,
) -> Answerer:
    from luthier.engine.vllm_model import open_vllm  # an extra, in an environment of its own

    if adapters:
        _require_choices(trained, source, adapters)
    engine = open_vllm(trained, source, spec, decode=template.decode, adapters=adapters, device=device)
    said = model_settings(_settings_folder(trained, source))
    return Answerer(label, engine, template, trained, spec, said)


def parts_of(target: str | Path | Recipe, base: str | None = None) -> Trained:
    """What `target` names, in its parts, nothing loaded. Raises as `open_model` does."""
    below = None if base is None else ModelSpec(path=base)
    recipe = target if isinstance(target, Recipe) else recipe_in(target)
    if recipe is not None and below is not None:
        raise RecipeError(
            "--base: a recipe names its own model; change model.path there, or name the run's folder"
        )
    if isinstance(target, Recipe):
        return from_recipe(target, "the recipe")
    if recipe is not None:
        return from_recipe(recipe, str(target))
    path = Path(target).expanduser()
    if path.is_dir():
        return from_folder(path, base=below)
    if below is not None:
        raise RecipeError(f"--base: {target} is a whole model, which has no model below it")
    spec = ModelSpec(path=str(target))
    locate(spec)  # a path that is not there is refused here
    return Trained(str(target), spec, (), str(target), "language", named_template=True)


def recipe_in(target: str | Path, overrides: Sequence[str] = ()) -> Recipe | None:
    """The recipe in a file; None where `target` is no file of a recipe. Raises RecipeError for a wrong one."""
    path = Path(target).expanduser()
    if not path.is_file() or path.suffix not in (".yaml", ".yml", ".json"):
        return None
    return load_recipe(path, overrides, to_export=True).recipe


def _generation(asked: Recipe | None, run: Recipe | None) -> GenerationSpec:
    """What the recipe that was named says, and where it says nothing the recipe of the run that it names."""
    spec = GenerationSpec() if run is None else run.generation
    if asked is None or asked is run:
        return spec
    given = {name: getattr(asked.generation, name) for name in asked.generation.model_fields_set}
    return spec.model_copy(update=given)


def _with_template(trained: Trained, template: str) -> Trained:
    """With another template than the tokenizer's. Raises RecipeError for a model that was trained with one."""
    if trained.recipe is not None or trained.adapters:
        raise RecipeError(
            f"template: {trained.label} answers with the template that it was trained with; leave it out"
        )
    recipe = Recipe(model=trained.model, data=DataSpec(template=template), generation=GenerationSpec())
    return replace(trained, recipe=recipe, named_template=True)


def typed(trained: Trained, device: torch.device, *, bf16: bool) -> Trained:
    """With the type of the weights: that of the training; of a bare model on a GPU bfloat16, else float32."""
    spec = trained.model
    if spec.dtype != "auto":
        return trained
    precision = trained.recipe.train.precision if trained.recipe is not None else "auto"
    half = device.type == "cuda" and bf16
    dtype = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}.get(
        precision, "bfloat16" if half else "float32"
    )
    return replace(trained, model=spec.model_copy(update={"dtype": dtype}))


def _merges_exactly(model: PeftModel) -> bool:
    """Whether merged weights say what base and adapter say, to float32's rounding: not where they would be rounded."""
    if is_quantized(model) or model.dtype != torch.float32:
        return False
    return hasattr(model.base_model, "merge_and_unload") and not model.active_peft_config.is_prompt_learning


def _require_choices(trained: Trained, source: ModelSource, adapters: Mapping[str, str | Path]) -> None:
    """Raise ModelError for an adapter of another base, one that needs more than itself, and a name that is taken."""
    if len(trained.adapters) > 1 or recorded_change(trained.adapters) is not None:
        raise ModelError(
            f"{trained.label} changes its base itself (adapters below the last one, or new tokens), so no other "
            "adapter can share it; export it, and load adapters on the exported model"
        )
    found = fingerprint(source)
    for name, path in adapters.items():
        if name in (ADAPTER, BASE) or not name.isidentifier():
            raise ModelError(
                f"the adapter {name}={path}: choose another name, letters and digits, not {ADAPTER} or {BASE}"
            )
        parts = from_folder(Path(path))
        for folder, expected in parts.bases.items():
            if expected != found:
                raise ModelError(
                    f"the adapter {name}={folder} was not trained on {trained.model.path}: its base is another"
                )
        if not parts.adapters:
            raise ModelError(
                f"the adapter {name}={path} holds no adapter (adapter_config.json) but a whole model"
            )
        if parts.model.quantization != trained.model.quantization:
            raise ModelError(
                f"the adapter {name}={path} was trained on a base that is quantized in another way than "
                f"{trained.model.path} is here; load it by itself"
            )
        if (
            len(parts.adapters) != 1
            or recorded_change((str(path),)) is not None
            or parts.kind != trained.kind
        ):
            raise ModelError(
                f"the adapter {name}={path} needs other parts than its base (adapters below it, new tokens or a value "
                "head), so it cannot share one; load it by itself"
            )


def _with_choices(
    model: PreTrainedModel | PeftModel,
    trained: Trained,
    source: ModelSource,
    adapters: Mapping[str, str | Path],
) -> tuple[PeftModel, tuple[str, ...]]:
    """The model with further adapters, and the names to choose from. Raises as `_require_choices` does."""
    _require_choices(trained, source, adapters)
    given = {name: str(path) for name, path in adapters.items()}
    names = [*([ADAPTER] if isinstance(model, PeftModel) else []), *given]
    if not isinstance(model, PeftModel):
        first = next(iter(given))
        model = attach_adapter(model, given.pop(first), trainable=False, name=first)
    for name, path in given.items():
        attach_further(model, path, name)
    return model, tuple(names)


def _settings_folder(trained: Trained, source: ModelSource) -> str:
    """Where generation_config.json is: with the trained model, or with its base."""
    folder = Path(trained.adapters[-1]) if trained.adapters else Path(source.path)
    return str(folder if (folder / "generation_config.json").is_file() else source.path)
