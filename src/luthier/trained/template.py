"""The template that a model was trained with, on the tokenizer that was saved with it, and its processor."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast, ProcessorMixin

from luthier.data.media_template import MEDIA_PARTS, load_media_template
from luthier.data.processors import load_processor
from luthier.data.template import ChatTemplate, load_template
from luthier.model.load import hub_arguments, load_config, load_tokenizer, locate
from luthier.model.processor import PROCESSOR_FILES
from luthier.model.value_head import choose_padding
from luthier.model.vocabulary import recorded_change, replay_tokenizer
from luthier.recipe.schema import DataSpec
from luthier.trained.source import Trained
from luthier.types import ModelError

_REFUSED = "text is answered, images, films and sounds are refused"


def trained_template(trained: Trained, say: Callable[[str], object]) -> ChatTemplate:
    """The template of the training, on the tokenizer that was saved with it.

    Raises ModelError where the run's manifest says that it was another one.
    """
    # A base that brings its own is found where its weights are: `embedded` and GGUF files are no folders.
    own = trained.tokenizer == trained.model.path
    spec = trained.model.model_copy(update={"tokenizer": None if own else trained.tokenizer})
    tokenizer: PreTrainedTokenizerFast = load_tokenizer(spec, locate(trained.model))
    record = recorded_change(trained.adapters)
    if record is not None:
        replay_tokenizer(tokenizer, record, None)
    recipe = trained.recipe
    data = recipe.data if recipe is not None else DataSpec()
    if not trained.named_template:
        # The saved tokenizer has the default system prompt in its template, and the text of a .jinja file.
        ours = (
            data.template
            if isinstance(data.template, str) and not data.template.endswith(("jinja", "jinja2"))
            else None
        )
        update: dict[str, Any] = {"template": ours}
        update |= {} if ours is not None else {"default_system": None, "tool_format": None}
        data = data.model_copy(update=update)
    saved = tokenizer.chat_template
    pieces, processor = data.rules == "llamafactory", trained_processor(trained, say)
    template: ChatTemplate | None = None
    if processor is not None:
        if not trained.named_template:
            processor.chat_template = saved
        try:
            template = load_media_template(tokenizer, processor, data, pieces=pieces)
        except ModelError as error:
            say(f"note: {error}; {_REFUSED}")
    template = template or load_template(tokenizer, data, pieces=pieces)
    if isinstance(saved, str) and saved.endswith(MEDIA_PARTS + str(tokenizer.chat_template)):
        tokenizer.chat_template = saved  # it was trained with images, films or sounds, and takes them
    if not trained.named_template and tokenizer.chat_template != saved:
        raise ModelError(
            f"{trained.tokenizer}: its chat template is not the one that this Luthier has under the name "
            f"{data.template!r}; export with the version that trained it ({trained.manifest.get('luthier', 'unknown')})"
        )
    if trained.kind == "reward" and trained.named_template:
        note = choose_padding(tokenizer, template.stop_ids[0], template.stop_ids, named=False)
        if note is not None:
            say(f"note: {note}")
    return template


def trained_processor(trained: Trained, say: Callable[[str], object]) -> ProcessorMixin | None:
    """The processor that the model was trained with, saved beside its adapter, else that of the base; None of a model
    that reads text alone, and, with a note, where it cannot be loaded: text can be answered without."""
    source = locate(trained.model)
    saved = [Path(folder) for folder in reversed(trained.adapters)]
    where = next((str(one) for one in saved if any((one / name).is_file() for name in PROCESSOR_FILES)), None)
    try:
        config = load_config(trained.model, source)
        return load_processor(where or source.path, hub_arguments(trained.model), config)
    except ModelError as error:
        say(f"note: {error}; {_REFUSED}")
        return None
