"""The template that a model was trained with, on the tokenizer that was saved with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import PreTrainedTokenizerFast

from luthier.data.media_template import MEDIA_PARTS
from luthier.data.template import ChatTemplate, load_template
from luthier.model.load import load_tokenizer, locate
from luthier.model.value_head import choose_padding
from luthier.model.vocabulary import recorded_change, replay_tokenizer
from luthier.recipe.schema import DataSpec
from luthier.trained.source import Trained
from luthier.types import ModelError


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
        update |= {} if ours is not None else {"default_system": None}
        data = data.model_copy(update=update)
    saved = tokenizer.chat_template
    template = load_template(tokenizer, data, pieces=data.rules == "llamafactory")
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
