"""Whether a run may write into its output folder, and what overwriting a run removes from it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path

from luthier.recipe.schema import TrainSpec
from luthier.trainer.checkpoint import MANIFEST_NAME, discard, is_temporary, sweep_temporary
from luthier.types import CheckpointError

TRACKERS = "trackers"
"""The folder of what trackers write."""

RUN_MARKERS = ("recipe.yaml", "trainer_log.jsonl", "checkpoint-*")
"""Names that make a folder a run."""

RUN_FILES = (
    *RUN_MARKERS,
    *(
        "run.json",
        MANIFEST_NAME,
        "data_report.json",
        "trainer_state.json",
        "training_args.bin",
        "bad_numbers.jsonl",
        "training_*.png",
    ),
    "quickstart.json",
    "launch.json",
    *("all_results.json", "train_results.json", "eval_results.json", "predict_results.json"),
    *("generated_predictions.jsonl", "README.md", "config.json", "generation_config.json"),
    *("vocabulary.json", "positions.json", "base.json"),
    *("adapter_config.json", "adapter_model.safetensors", "value_head.safetensors"),
    *("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json"),
    *("model.safetensors", "model-*-of-*.safetensors"),
    *("model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja"),
    TRACKERS,
)
"""Everything that a run writes into its own folder, and so everything that overwriting it may remove."""

RUN_FOLDERS = (TRACKERS,)
"""The folders of it, checkpoints aside."""


def begin_run(output: Path, train: TrainSpec) -> None:
    """Make the run directory and remove what a killed run left half-written. Raises what `run_guard` raises."""
    run_guard(output, overwrite=train.overwrite, resume=train.resume)
    output.mkdir(parents=True, exist_ok=True)
    sweep_temporary(output)


def run_guard(output: Path, *, overwrite: bool, resume: str, remove: bool = True) -> None:
    """Make sure that a run may write into `output`; with `overwrite`, remove the run that is there.

    Without `remove` it is only asked whether that could be done.

    Only names that a run writes (`RUN_FILES`) are removed; other files in a run's folder stay.
    Raises CheckpointError where `output` holds a run and neither or both of `overwrite` and `resume` are
    given, where the checkpoint to resume is another run's, and where `output` holds files but no run.
    """
    if output.exists() and not output.is_dir():
        raise CheckpointError(f"train.output={output} is a file; name a folder")
    names = sorted(path.name for path in output.iterdir()) if output.is_dir() else []
    if not any(_named(name, RUN_MARKERS) for name in names):
        foreign = [name for name in names if not _is_ours(name)]
        if foreign:
            raise CheckpointError(
                f"train.output={output} is not a run but holds other files ({', '.join(foreign[:3])}"
                f"{', …' if len(foreign) > 3 else ''}); name a new or an empty folder"
            )
        return
    if resume != "never":
        _check_same_run(output, overwrite, resume)
    elif not overwrite:
        raise CheckpointError(
            f"train.output={output} holds a run already. train.overwrite=true removes it first, "
            f"train.resume=auto goes on from its newest checkpoint"
        )
    else:
        _refuse_precious(output)
        if remove:
            _remove_run(output, names)


def _check_same_run(output: Path, overwrite: bool, resume: str) -> None:
    if overwrite:
        raise CheckpointError(
            f"train.overwrite=true would remove the run in {output} that train.resume={resume} goes on from; "
            f"give one of the two"
        )
    if resume != "auto" and Path(resume).resolve().parent != output.resolve():
        raise CheckpointError(
            f"train.resume={resume} is not a checkpoint of the run in train.output={output}; "
            f"to go on from it, name a new output"
        )


def _refuse_precious(output: Path) -> None:
    here = output.resolve()
    for precious in (Path.home().resolve(), Path.cwd().resolve()):
        if here == precious or here in precious.parents:
            raise CheckpointError(f"train.output={output} is or contains {precious}; it is not overwritten")


def _remove_run(output: Path, names: list[str]) -> None:
    sweep_temporary(output)
    for name in names:
        if fnmatchcase(name, "checkpoint-*"):
            discard(output / name)
    # The marks of a run go last, so that what an interruption leaves can still be overwritten.
    ours = [name for name in names if _named(name, RUN_FILES) and not fnmatchcase(name, "checkpoint-*")]
    for name in sorted(ours, key=lambda name: name in RUN_MARKERS):
        if not (output / name).is_dir():  # a folder of that name is not ours
            (output / name).unlink()
        elif name in RUN_FOLDERS:
            shutil.rmtree(output / name)


def _named(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _is_ours(name: str) -> bool:
    return _named(name, RUN_FILES) or is_temporary(name)


@contextmanager
def published_files(output: Path) -> Iterator[Path]:
    """A folder whose files replace those of the same name in `output`, if the block ends well.

    Each file is on the disk before it takes its name, so a crash leaves the old or the new one, never half.
    """
    temporary = output / f".tmp-final-{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for path in sorted(temporary.rglob("*")):
            if path.is_file():
                with path.open("rb") as file:
                    os.fsync(file.fileno())
                target = output / path.relative_to(temporary)
                target.parent.mkdir(parents=True, exist_ok=True)
                os.replace(path, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
