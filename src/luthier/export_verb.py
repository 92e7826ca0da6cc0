"""The verb `export`: a trained model as one plain model in a folder, proven to be the trained one, or marked as not.

export(source, output=...)  ->  ExportResult
"""

from __future__ import annotations

import errno
import gc
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from pydantic import ValidationError
from safetensors import SafetensorError

from luthier.data.encode import EncodeOptions
from luthier.engine.hf import HfEngine
from luthier.environment import detect_hardware
from luthier.exporting import merge
from luthier.exporting.answers import Answers, Distance, ask, distance, only_logits
from luthier.exporting.probes import probes_of
from luthier.exporting.report import REPORT_NAME, report_of
from luthier.exporting.verify import Check, Expected, table, verify
from luthier.model.faults import FAILED_MARK
from luthier.model.load import load_config, locate
from luthier.model.quantize import DTYPES
from luthier.publish import CARD_NAME, model_card, require_repository, upload
from luthier.recipe.load import load_recipe
from luthier.recipe.schema import ExportSpec, ModelSpec
from luthier.show import Say, quiet_libraries, speaker
from luthier.stages import build_stage
from luthier.trained import load
from luthier.trained.dequantize import cast_weights, is_quantized
from luthier.trained.source import (
    Trained,
    from_folder,
    from_recipe,
    json_object,
    require_base,
    with_adapters,
)
from luthier.trained.template import trained_template
from luthier.trainer.checkpoint import MANIFEST_NAME, atomic_folder
from luthier.types import ExportError, ModelError, RecipeError, RowKind


@dataclass(frozen=True, slots=True)
class ExportResult:
    """Where the model is, what the comparison with the trained one found (the content of `export_report.json`), and
    the address that it was uploaded to."""

    output: Path
    report: dict[str, Any]
    uploaded: str | None = None

    @property
    def passed(self) -> bool:
        return bool(self.report["passed"])

    def text(self) -> str:
        """The checks, a line each, and the notes."""
        checks = table([Check(**check) for check in self.report["checks"]])
        uploaded = [] if self.uploaded is None else [f"uploaded: {self.uploaded}"]
        return "\n".join([checks, *(f"note: {note}" for note in self.report["notes"]), *uploaded])

    def json(self) -> str:
        """The report, the folder and the address."""
        return json.dumps(self.report | {"output": str(self.output), "uploaded": self.uploaded}, indent=2)

    def require_passed(self) -> ExportResult:
        """Raise ExportError where the written model is not the trained one."""
        if self.passed:
            return self
        failed = [
            f"{check['name']}: {check['text']}" for check in self.report["checks"] if not check["passed"]
        ]
        raise ExportError(
            f"{self.output} is not the model that was trained and is marked so:\n" + "\n".join(failed)
        )


def export(
    source: str | Path,
    *,
    output: str | Path | None = None,
    dtype: str | None = None,
    shard_size: str | None = None,
    adapters: Sequence[str] = (),
    base: str | None = None,
    push_to_hub: str | None = None,
    overwrite: bool = False,
    quiet: bool = False,
) -> ExportResult:
    """Write what was trained as one model into `output`, read it back, compare it.

    source: folder of a run, a checkpoint, an adapter or a model; or a recipe, native or of LLaMA-Factory. adapters:
    merged on top, in this order. base: the model below the adapter, where it moved. push_to_hub: the repository that
    a model which passed is uploaded to. The others override the recipe's `export` part. A model that fails the
    comparison stays, with EXPORT_FAILED beside it; where it would have replaced another, in `output`.failed.

    Raises ExportError where the output exists or has no room; ModelError, CheckpointError and RecipeError for parts
    that cannot be exported. Nothing is written then. PublishError where a model that passed could not be uploaded.
    """
    quiet_libraries()
    say = speaker(quiet)
    given = {"output": output, "dtype": dtype, "shard_size": shard_size, "push_to_hub.repo": push_to_hub}
    trained, spec = _parts(Path(source), {k: str(v) for k, v in given.items() if v is not None}, base, say)
    if adapters:
        trained = with_adapters(trained, adapters)
    if spec.output is None:
        raise RecipeError(f"{source}: where to? Give --output DIR, or export.output in the recipe")
    folder = Path(spec.output)
    _require_free(folder, overwrite, trained.inputs)
    if spec.push_to_hub is not None:
        require_repository(spec.push_to_hub, "export.push_to_hub", trained.model.token)
    where = detect_hardware().device if spec.device == "auto" else "cpu"
    try:
        result = _export(trained, spec, folder, torch.device(where), say)
    except (OSError, SafetensorError) as error:
        if getattr(error, "errno", None) not in (errno.ENOSPC, errno.EDQUOT) and "No space left" not in str(
            error
        ):
            raise
        raise ExportError(
            f"the disk is full ({folder}): the model was not written, and nothing of it is left"
        ) from error
    return _uploaded(result, spec, trained.model.token, say)


def _uploaded(result: ExportResult, spec: ExportSpec, token: str | None, say: Say) -> ExportResult:
    """A model that passed, on the hub where the recipe asks for it. Reports name folders of this machine and stay."""
    if spec.push_to_hub is None:
        return result
    if not result.passed:
        say(f"not uploaded to {spec.push_to_hub.repo}: it is not the model that was trained")
        return result
    names = sorted(path.name for path in result.output.iterdir() if path.is_file())
    files = [name for name in names if name not in (REPORT_NAME, MANIFEST_NAME)]
    whole = f"the model in {result.output} is verified and whole"
    return replace(result, uploaded=upload(spec.push_to_hub, token, result.output, files, whole))


def _parts(source: Path, given: dict[str, str], base: str | None, say: Say) -> tuple[Trained, ExportSpec]:
    """What `source` holds or names, and how it is to be written."""
    if source.is_file():
        words = [f"export.{name}={json.dumps(value)}" for name, value in given.items()]
        words += [f"model.path={json.dumps(base)}"] if base is not None else []
        loaded = load_recipe(source, words, to_export=True)
        for note in loaded.notes:
            say(f"note: {note}")
        return from_recipe(loaded.recipe, str(source)), loaded.recipe.export
    trained = from_folder(source, base=None if base is None else ModelSpec(path=base))
    saved = ExportSpec() if trained.recipe is None else trained.recipe.export
    try:
        return trained, ExportSpec.model_validate(_overridden(saved.model_dump(), given))
    except ValidationError as error:
        first = error.errors()[0]
        raise RecipeError(f"--{str(first['loc'][0]).replace('_', '-')}: {first['msg']}") from error


def _overridden(tree: dict[str, Any], given: Mapping[str, str]) -> dict[str, Any]:
    """The tree with values by their dotted names."""
    for name, value in given.items():
        section, _, last = name.rpartition(".")
        if section:
            tree[section] = {**(tree[section] or {}), last: value}
        else:
            tree[last] = value
    return tree


def _require_free(folder: Path, overwrite: bool, inputs: Sequence[Path]) -> None:
    """Raise ExportError unless nothing is lost where `folder` is written."""
    here = folder.absolute().resolve()
    for precious in (*(path.resolve() for path in inputs), Path.home().resolve(), Path.cwd().resolve()):
        if here == precious or here in precious.parents:
            raise ExportError(f"--output {folder} is or contains {precious}; name another folder")
    if folder.is_file():
        raise ExportError(f"--output {folder} is a file; name a folder")
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    if not overwrite:
        raise ExportError(f"--output {folder} exists already; name another folder, or give --overwrite")
    if (folder / "recipe.yaml").exists() or not (folder / "config.json").is_file():
        raise ExportError(
            f"--output {folder} is no exported model, so it is not overwritten; name another folder"
        )
    aside = _failed_beside(folder)
    if not (folder / FAILED_MARK).exists() and aside.exists() and not (aside / FAILED_MARK).is_file():
        raise ExportError(
            f"{aside} is in the way: a model that fails its verification would be put there; move it away"
        )


def _failed_beside(folder: Path) -> Path:
    """Where a model that failed stays when `folder` holds one that did not."""
    return folder.with_name(f"{folder.name}.failed")


# --------------------------------------------------------------------------------------------------
# From the parts to a verdict


def _export(trained: Trained, spec: ExportSpec, folder: Path, device: torch.device, say: Say) -> ExportResult:
    source = locate(trained.model)
    about_base = require_base(trained, source)
    template = trained_template(trained, say)
    probes = probes_of(trained.recipe, template, _row_kind(trained), spec.probes)
    dtype = _dtype(trained, spec)
    loader = load.Loader(trained, source, device)
    live = loader.live()
    merge.require_space(folder, merge.num_bytes(live, dtype))
    say(f"comparing on {len(probes.probes)} probes of {probes.origin}")
    kind, stops = trained.kind, template.stop_ids
    quantized = is_quantized(live)
    live = live if quantized else cast_weights(live, torch.float32)
    answers = ask(live, probes.probes, kind, HfEngine, stops)
    moved = _moved(live, answers, trained)
    if quantized:
        del live
        gc.collect()
        live = loader.live(dequantized=True)
    model = cast_weights(load.merged(cast_weights(live, torch.float32), trained), dtype)
    del live
    say(f"writing {folder} ({dtype})".replace("torch.", ""))
    written = folder
    if folder.is_dir() and any(folder.iterdir()) and not (folder / FAILED_MARK).exists():
        written = _failed_beside(folder)  # what fails never replaces what did not

    def elsewhere(partial: Path) -> Path | None:
        return written if (partial / FAILED_MARK).exists() else None

    with atomic_folder(folder, metadata={"resumable": False}, replace=True, otherwise=elsewhere) as partial:
        merge.write_model(model, template.tokenizer, partial, stop_ids=stops, shard_size=spec.shard_size)
        if kind == "reward":
            merge.keep_value_head(model, trained, partial)
        tensors = merge.tensor_hashes(model, dtype)
        del model
        gc.collect()
        rounding = _rounding(loader, answers, dtype, quantized)
        expected = Expected(kind, dtype, template, probes, answers, rounding, tensors)
        trusted = trained.model.trust_remote_code
        checks, apart = verify(partial, expected, HfEngine, device, trust_remote_code=trusted)
        report = report_of(trained, expected, checks, apart, moved, about_base)
        _finish(partial, folder.name, trained, report)
    return ExportResult(folder if report["passed"] else written, report)


def _row_kind(trained: Trained) -> RowKind:
    """What the run learnt from."""
    if trained.recipe is None:
        return "pair" if trained.kind == "reward" else "conversation"
    recipe = trained.recipe
    return build_stage(recipe.stage, EncodeOptions.of(recipe.data, recipe.stage.type)).kind


def _dtype(trained: Trained, spec: ExportSpec) -> torch.dtype:
    """The type of the files: as asked for, else that of the files that training started from."""
    if spec.dtype != "auto":
        return DTYPES[spec.dtype]
    models = [trained.model]
    if trained.recipe is not None:
        models.insert(0, trained.recipe.model)
    for model in models:
        try:
            found = load_config(model, locate(model)).dtype
        except ModelError:  # the base of a whole model need not be there any more
            continue
        if isinstance(found, torch.dtype) and found in DTYPES.values():
            return found
    return torch.float32


def _moved(live: Any, answers: Answers, trained: Trained) -> Distance | None:
    """How far the last adapter takes the model from the one below it; None where there is none."""
    if not isinstance(live, PeftModel):
        return None
    with live.disable_adapter():
        return distance(answers, only_logits(live, answers, trained.kind))


def _rounding(loader: load.Loader, answers: Answers, dtype: torch.dtype, quantized: bool) -> Distance:
    """How far the unmerged model moves when its weights and its arithmetic are in `dtype`, its base dequantized."""
    if dtype == torch.float32 and not quantized:
        return Distance()
    cast = cast_weights(loader.live(dequantized=True), dtype)
    return distance(answers, only_logits(cast, answers, loader.trained.kind))


def _finish(partial: Path, name: str, trained: Trained, report: Mapping[str, Any]) -> None:
    """The report, the mark of a failure, and the model card of a run."""
    text = json.dumps(report, indent=2, ensure_ascii=False) + "\n"
    (partial / REPORT_NAME).write_text(text, encoding="utf-8")
    if not report["passed"]:
        failed = [f"{one['name']}: {one['text']}" for one in report["checks"] if not one["passed"]]
        words = ["This model is not the one that was trained. What differs:", *failed, ""]
        (partial / FAILED_MARK).write_text("\n".join(words), encoding="utf-8")
    recipe, manifest = trained.recipe, trained.manifest
    if recipe is None or "reports" not in manifest:
        return
    results = Path(trained.label) / "all_results.json"
    numbers = json_object(results) if results.is_file() else {}
    metrics = {key: value for key, value in numbers.items() if isinstance(value, int | float)}
    (partial / CARD_NAME).write_text(model_card(recipe, manifest, metrics, merged_as=name), encoding="utf-8")
