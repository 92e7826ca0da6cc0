"""What is to be exported, in its parts: a base, the adapters to merge into it, and what is known of the training.

from_folder(folder)    a finished run, one of its checkpoints, an adapter, or a whole model
from_recipe(recipe)    the run of a recipe, or the base and adapters that a recipe without data names
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from luthier.model.base_record import RECORD_NAME, BaseRecord, differences, read_base
from luthier.model.faults import TOKENIZER_FILES, read_json
from luthier.model.load import ModelSource, fingerprint, load_config, locate
from luthier.model.quantize import checkpoint_method
from luthier.recipe.load import load_recipe
from luthier.recipe.schema import AdapterSpec, ModelSpec, Recipe, RmSpec
from luthier.types import CheckpointError, ModelError, ModelKind, RecipeError

_PLAIN: dict[str, Any] = {
    "upcast_layernorm": False,
    "upcast_trained": False,
    "gradient_checkpointing": False,
    "activation_offload": False,
    "rope_scaling": None,
    "vocabulary": None,
    "gguf_file": None,
}
"""What a recipe says of its model that is in the files of a saved one already, or is about training alone."""


@dataclass(frozen=True, slots=True)
class Trained:
    """The parts of a trained model.

    model: the base, or the whole model where there are no adapters. adapters: folders, merged in this order.
    tokenizer: folder or hub name. recipe: of the run, or the one that names the parts. manifest: the run's `run.json`.
    bases: fingerprints of the base by the adapter's folder that asks for it. named_template: whether the recipe's
    template, and not the saved tokenizer's, is what was trained with.
    """

    label: str
    model: ModelSpec
    adapters: tuple[str, ...]
    tokenizer: str
    kind: ModelKind
    recipe: Recipe | None = None
    manifest: Mapping[str, Any] = field(default_factory=dict)
    bases: Mapping[str, str] = field(default_factory=dict)
    named_template: bool = False

    @property
    def inputs(self) -> list[Path]:
        """Local folders that are read."""
        return [
            Path(name) for name in (self.model.path, self.tokenizer, *self.adapters) if Path(name).exists()
        ]


def from_recipe(recipe: Recipe, label: str) -> Trained:
    """The run in `train.output` of a recipe that trains, else the model and `method.adapters` that it names.

    Raises CheckpointError where that run is not there or not finished.
    """
    if recipe.data.train or recipe.train.eval_only:
        folder = Path(recipe.train.output)
        if not folder.is_dir():
            raise CheckpointError(f"{label}: train.output={folder} does not exist; train it first")
        return from_folder(folder)
    method = recipe.method
    adapters = method.adapters if isinstance(method, AdapterSpec) else ()
    runs = [run_of(Path(name)) for name in adapters]
    spec = recipe.model.model_copy(update={"gradient_checkpointing": False, "activation_offload": False})
    if runs and (last := runs[-1]) is not None:
        _require_template(recipe, last, adapters[-1])
        trained = from_folder(Path(adapters[-1]), base=spec)
        return replace(trained, adapters=tuple(adapters), bases=_bases(adapters))
    whole = Path(spec.path)
    if not adapters and (whole / "run.json").is_file():
        trained = from_folder(whole)
        if trained.recipe is not None:
            _require_template(recipe, trained.recipe, spec.path)
        return replace(trained, model=_reached_as(trained.model, spec))
    spec = _as_trained(spec, adapters, label)
    saved = Path(adapters[-1]) if adapters else None
    tokenizer = spec.tokenizer or (str(saved) if saved and _has_tokenizer(saved) else spec.path)
    kind: ModelKind = "reward" if isinstance(recipe.stage, RmSpec) else "language"
    return Trained(
        label, spec, tuple(adapters), tokenizer, kind, recipe, bases=_bases(adapters), named_template=True
    )


def _require_template(recipe: Recipe, run: Recipe, adapter: str) -> None:
    """Raise RecipeError where a recipe that only exports names another template than the adapter's run."""
    wanted = recipe.data.template
    if wanted is not None and wanted != run.data.template:
        raise RecipeError(
            f"data.template: {wanted!r} is not what {adapter} was trained with "
            f"({run.data.template or 'that of its base'}); leave it out"
        )


def from_folder(folder: Path, *, base: ModelSpec | None = None) -> Trained:
    """The parts of what a folder holds. `base`: the model below the adapter, where it is not what its run says.

    Raises ModelError where it holds no model, CheckpointError for a run that is not finished or was changed since.
    """
    if not folder.is_dir():
        raise ModelError(f"{folder}: no such file or folder")
    run = run_of(folder)
    manifest = _manifest_of(folder)
    if run is not None and not manifest:
        raise CheckpointError(
            f"{folder} is a run that is not finished (it has no run.json); name one of its checkpoints, or finish it"
        )
    _require_unchanged(folder, manifest)
    if (folder / "adapter_config.json").is_file():
        return _adapter(folder, run, manifest, base)
    if base is not None:
        raise RecipeError(f"--base: {folder} is a whole model, which has no model below it")
    spec = (
        ModelSpec(path=str(folder))
        if run is None
        else run.model.model_copy(update={"path": str(folder), "dtype": run.model.saved_dtype, **_PLAIN})
    )
    spec = spec.model_copy(update={"tokenizer": None, "revision": "main"})
    names = load_config(spec, locate(spec)).architectures or [""]
    kind: ModelKind = "reward" if names[0].endswith("ForSequenceClassification") else "language"
    return Trained(str(folder), spec, (), str(folder), kind, run, manifest)


def _adapter(
    folder: Path, run: Recipe | None, manifest: Mapping[str, Any], base: ModelSpec | None
) -> Trained:
    config = read_json(folder / "adapter_config.json", str(folder))
    kind: ModelKind = "reward" if config.get("task_type") == "SEQ_CLS" else "language"
    adapters = (*_below(folder, run), str(folder))
    if base is None:
        spec = run.model if run is not None else ModelSpec(path=str(config.get("base_model_name_or_path")))
    else:
        _as_trained(base, adapters, "the recipe")
        spec = base if run is None else _reached_as(run.model, base)
        spec = spec.model_copy(update={"path": base.path, "revision": base.revision})
    tokenizer = str(folder) if _has_tokenizer(folder) else spec.tokenizer or spec.path
    spec = spec.model_copy(update={**_PLAIN, "tokenizer": None, "gguf_file": spec.gguf_file})
    spec = _as_trained(spec, adapters, "the recipe")
    return Trained(str(folder), spec, adapters, tokenizer, kind, run, manifest, _bases(adapters))


def _reached_as(model: ModelSpec, given: ModelSpec) -> ModelSpec:
    """The model of a run, with what a recipe says of reaching it: runs keep no token."""
    said = {name: getattr(given, name) for name in ("token", "cache_dir", "trust_remote_code")}
    return model.model_copy(update={name: value for name, value in said.items() if value})


def with_adapters(trained: Trained, adapters: Sequence[str]) -> Trained:
    """The same with further adapters on top."""
    merged = (*trained.adapters, *adapters)
    spec = _as_trained(trained.model, merged, trained.model.path)
    rewards = [_scores(name) for name in adapters]
    kind: ModelKind = "reward" if any(rewards) else trained.kind
    return replace(trained, model=spec, adapters=merged, kind=kind, bases=_bases(merged))


def _below(folder: Path, run: Recipe | None) -> tuple[str, ...]:
    """The adapters that were in the base when this one was trained, by its run or else by its own record.

    Raises ModelError where the record names folders that are not there.
    """
    if run is not None and isinstance(run.method, AdapterSpec):
        return run.method.merged_first
    record = read_base(folder)
    below = () if record is None else record.adapters
    missing = [name for name in below if not Path(name).is_dir()]
    if missing:
        raise ModelError(
            f"{folder} was trained on top of {', '.join(below)}, and {missing[0]} is not there; export the base with "
            "all adapters in this order: luthier export BASE --adapters ... --adapters ..."
        )
    return below


def _as_trained(spec: ModelSpec, adapters: Sequence[str], label: str) -> ModelSpec:
    """The base as the training of its adapters had it: quantized in the same way, in the same type.

    Raises ModelError where they, or `label` with a quantization of its own, say different things.
    """
    records = {name: record for name in adapters if (record := _record_of(Path(name))) is not None}
    said = [(name, record.quantization) for name, record in records.items()]
    if spec.quantization is not None:
        said.append((label, spec.quantization))
    different = differences(said)
    if different is not None:
        raise ModelError(f"they were not trained on one base: {different}; export them one by one")
    if not records or spec.quantization is not None:
        return spec
    last = records[list(records)[-1]]
    if last.quantization is None:
        return spec
    dtype = last.dtype if spec.dtype == "auto" else spec.dtype
    return spec.model_copy(update={"quantization": last.quantization, "dtype": dtype})


def _record_of(folder: Path) -> BaseRecord | None:
    """What an adapter was trained on: its own record, or of adapters without one the recipe of their run."""
    record, run = read_base(folder), run_of(folder)
    if record is not None or run is None:
        return record
    return BaseRecord(None, run.model.quantization, run.model.dtype)


def require_base(trained: Trained, source: ModelSource) -> dict[str, Any]:
    """What is known of the base, for the report. Raises ModelError where an adapter was trained on another one."""
    found = fingerprint(source) if trained.bases else None
    quantization = trained.model.quantization
    for folder, expected in trained.bases.items():
        if found != expected:
            raise ModelError(
                f"{trained.model.path} is not the base that {folder} was trained on: its files have the fingerprint\n"
                f"    {found}\nand those of its training had\n    {expected}\nName the right one with --base"
            )
    return {
        "path": trained.model.path,
        "fingerprint": found,
        "is_the_trained_one": bool(trained.bases) or None,
        "quantized": quantization is not None
        or checkpoint_method(load_config(trained.model, source)) is not None,
        "quantization": None if quantization is None else quantization.model_dump(mode="json"),
        "said_by": "its run" if trained.manifest else RECORD_NAME if trained.bases else None,
    }


# --------------------------------------------------------------------------------------------------
# What a folder says of its run


def _around(folder: Path) -> Path:
    return folder.parent if folder.name.startswith("checkpoint-") else folder


def run_of(folder: Path) -> Recipe | None:
    """The recipe of the run that a folder is, or is a checkpoint of; None of any other folder.

    Raises RecipeError for one that cannot be read.
    """
    file = _around(folder) / "recipe.yaml"
    return load_recipe(file).recipe if file.is_file() else None


def _manifest_of(folder: Path) -> dict[str, Any]:
    """What was written beside the weights: `run.json` of a finished run, or `manifest.json` of a checkpoint."""
    if (folder / "run.json").is_file():
        return json_object(folder / "run.json")
    if folder.name.startswith("checkpoint-") and (folder / "manifest.json").is_file():
        manifest = json_object(folder / "manifest.json")
        identity = manifest.get("metadata", {}).get("identity", {})
        files = {entry["path"]: entry["sha256"] for entry in manifest.get("files", ())}
        return {"base": {"fingerprint": identity.get("base")}, "files": files}
    return {}


def json_object(file: Path) -> dict[str, Any]:
    """Raises CheckpointError for a file that is no JSON object."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{file} is damaged: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{file} is damaged: it is no JSON object")
    return value


def _require_unchanged(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Raise CheckpointError where a file is not what the training wrote."""
    for name, expected in manifest.get("files", {}).items():
        file = folder / name
        if not file.is_file():
            raise CheckpointError(f"{file} is missing: it belongs to what the run saved")
        with file.open("rb") as stream:
            if hashlib.file_digest(stream, "sha256").hexdigest() != expected:
                raise CheckpointError(f"{file} was changed after the run saved it (its SHA-256 is another)")


def _bases(adapters: Sequence[str]) -> dict[str, str]:
    """Fingerprints by adapter: of its run's manifest, or of its own record where it was copied away from the run."""
    said = {name: _manifest_of(Path(name)).get("base", {}).get("fingerprint") for name in adapters}
    for name in adapters:
        if not said[name] and (record := read_base(name)) is not None:
            said[name] = record.fingerprint
    return {name: base for name, base in said.items() if base}


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in TOKENIZER_FILES)


def _scores(folder: str) -> bool:
    file = Path(folder) / "adapter_config.json"
    return file.is_file() and read_json(file, folder).get("task_type") == "SEQ_CLS"
