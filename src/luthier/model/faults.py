"""What is wrong with a model's files, as one sentence for the person who named them.

transformers answers most faults with a text about itself, some with a traceback, and two not at all: weights that are
missing are drawn at random, and a config of other shapes is a table in a log.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Set
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedConfig, __version__
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from luthier.model.multimodal import is_multimodal
from luthier.types import ModelError

LOAD_ERRORS = (OSError, ValueError, RuntimeError, ImportError, SafetensorError, StrictDataclassError)
"""What transformers and its friends raise for files that are missing, damaged or of another kind."""

TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt"),
    *("spiece.model", "sentencepiece.bpe.model", "tekken.json", "tiktoken.model"),
)


FAILED_MARK = "EXPORT_FAILED"
"""A file in the folder of an exported model that turned out to be another one than was trained."""


def reason(error: Exception) -> str:
    """The first paragraph of a library's message, on one line: what follows is advice for another program."""
    if isinstance(error, StrictDataclassError) and error.__cause__ is not None:
        error = error.__cause__  # type: ignore[assignment]
    return " ".join(str(error).strip().split("\n\n")[0].split())


def read_json(file: Path, label: str) -> dict[str, Any]:
    """The JSON object in `file`. Raises ModelError, beginning with `label`, where it is none."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{label}: {file.name} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{label}: {file.name} is no JSON object")
    return value


def check_folder(folder: Path, label: str, trust_remote_code: bool) -> None:
    """Raise ModelError unless `folder` has the config of a model whose type is known or brings trusted code."""
    if (folder / FAILED_MARK).is_file():
        raise ModelError(
            f"{label}: the folder holds an export that failed its verification (see {FAILED_MARK} and "
            "export_report.json in it); export it anew"
        )
    if not (folder / "config.json").is_file():
        if (folder / "adapter_config.json").is_file():
            raise ModelError(
                f"{label}: the folder holds an adapter; name it in method.adapters, and in model.path the model that "
                "it was trained on"
            )
        raise ModelError(f"{label}: the folder has no config.json, so it is not a model")
    config = read_json(folder / "config.json", label)
    kind = config.get("model_type")
    if isinstance(kind, str) and kind in CONFIG_MAPPING:
        return
    if isinstance(config.get("auto_map"), Mapping):
        if not trust_remote_code:
            raise ModelError(
                f"{label}: the model brings Python code of its own; read it, then set model.trust_remote_code: true"
            )
        return
    if not isinstance(kind, str):
        raise ModelError(f"{label}: config.json has no model_type, so it is not a model of transformers")
    near = get_close_matches(kind, list(CONFIG_MAPPING), n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise ModelError(
        f"{label}: transformers {__version__} does not know the model_type {kind!r} of config.json{hint}"
    )


def require_causal(config: PreTrainedConfig, label: str) -> None:
    """Raise ModelError for a model that has no form with a language-model head (T5, CLIP)."""
    brings = getattr(config, "auto_map", None) or {}
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or "AutoModelForCausalLM" in brings:
        return
    if is_multimodal(config):
        return
    name = (config.architectures or [config.model_type])[0]
    raise ModelError(f"{label}: {name} is no causal language model")


def tokenizer_fault(path: str, error: Exception) -> str:
    """Why no tokenizer could be loaded from `path`, a folder or a hub name."""
    folder = Path(path)
    if not folder.is_dir():
        return reason(error)
    present = [name for name in TOKENIZER_FILES if (folder / name).is_file()]
    if not present:
        return "the folder has no tokenizer files (tokenizer.json); name one with model.tokenizer"
    for name in present:
        if name.endswith(".json"):
            try:
                json.loads((folder / name).read_text(encoding="utf-8"))
            except ValueError as broken:
                return f"{name} is not valid JSON: {broken}"
    return reason(error)


def weights_fault(folder: str, error: Exception) -> str:
    """Why the weights in `folder` could not be loaded: the file that is damaged, else what the library says."""
    for file in sorted(Path(folder).glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt"):
                pass
        except SafetensorError as damage:
            return f"{file.name} is damaged or cut short ({damage}); copy it again"
    if not isinstance(error, LOAD_ERRORS) and any(Path(folder).glob("*.bin")):
        return "its .bin file is damaged or no file of weights; copy it again"
    return reason(error)


def require_all_weights(
    report: Mapping[str, Any], total: int, label: str, *, drawn: Set[str] = frozenset()
) -> None:
    """Raise ModelError where weights were not loaded but drawn, but for those that should be: `report` is transformers'
    loading info."""
    for name, in_file, in_model in sorted(report["mismatched_keys"])[:1]:
        raise ModelError(
            f"{label}: {name} is {tuple(in_file)} in its files and {tuple(in_model)} by its config; "
            "they are of different models"
        )
    missing = sorted(set(report["missing_keys"]) - drawn)
    if missing:
        raise ModelError(
            f"{label}: {len(missing)} of the {total} weights that its config asks for are not in its files, "
            f"{missing[0]} for one; the config is of another model or the files are incomplete"
        )


def require_token_rows(num_tokens: int, rows: int, label: str) -> None:
    """Raise ModelError where the tokenizer has ids that the embeddings have no row for."""
    if num_tokens > rows:
        raise ModelError(
            f"{label}: the tokenizer has {num_tokens:,} tokens and the model rows for {rows:,}; give it its own "
            "tokenizer, or set model.vocabulary.resize: true to add rows that are learnt anew"
        )
