"""Luthier fine-tunes language models, and proves every step on your own machine.

    import luthier
    run = luthier.train("recipe.yaml")

    luthier.export(run.output, output="merged")
    luthier.predict(run.output, data=["questions.jsonl"])

Importing this package imports no torch; `train`, `export`, `predict` and `evaluate` do, when they are called.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from luthier.evaluate_verb import EvaluateResult
    from luthier.export_verb import ExportResult
    from luthier.predict_verb import PredictResult
    from luthier.run import TrainResult

__version__ = "0.1.0"
__all__ = ["__version__", "evaluate", "export", "predict", "train"]


def train(
    recipe: str | Path | Mapping[str, Any], overrides: Sequence[str] = (), *, quiet: bool = False
) -> TrainResult:
    """Train what the recipe describes.

    recipe: path of a native or LLaMA-Factory YAML/JSON file, or the same as a mapping.
    overrides: `["train.epochs=2"]`, as on the command line.
    It trains in this process where the recipe takes one, or under torchrun; otherwise (several visible GPUs, or
    `parallel.processes`) it starts the others, waits for them and returns their numbers. Several machines are for the
    command line.
    Raises a `luthier.types.LuthierError` whose message says what to mend.
    """
    from luthier.launch.verb import train as run_train

    return run_train(recipe, overrides, quiet=quiet)


def export(source: str | Path, **options: Any) -> ExportResult:
    """Write what was trained as one plain model, and prove that it is the trained one.

    source: folder of a run, checkpoint, adapter or model, or a recipe. options: `output`, `dtype`, `shard_size`,
    `adapters`, `base`, `overwrite`, `quiet`, as those of `luthier export`.
    Raises a `luthier.types.LuthierError`; ExportError where the written model is not the trained one.
    """
    from luthier.export_verb import export as run_export

    return run_export(source, **options).require_passed()


def evaluate(target: str | Path, **options: Any) -> EvaluateResult:
    """Measure a trained model: perplexity, multiple-choice benchmarks, pairs, beside another model where asked for.

    target: folder of a run, checkpoint, adapter or model, or a recipe. options: `perplexity`, `tasks`, `task_dir`,
    `against`, `output` and the others of `luthier evaluate`; with none, the run's own evaluation sets.
    Raises a `luthier.types.LuthierError` whose message says what to mend.
    """
    from luthier.evaluate_verb import evaluate as run_evaluate

    return run_evaluate(target, **options)


def predict(target: str | Path | Any, overrides: Sequence[str] = (), **options: Any) -> PredictResult:
    """Answer the rows of data sets with what was trained, and measure the answers: BLEU, ROUGE, chrF, exact matches.

    target: folder of a run, checkpoint, adapter or model, or a recipe. overrides: `["generation.temperature=0.7"]`.
    options: `data`, `output`, `compare`, `max_samples`, `base`, `overwrite`, `quiet`, as those of `luthier predict`.
    Raises a `luthier.types.LuthierError` whose message says what to mend.
    """
    from luthier.predict_verb import predict as run_predict

    return run_predict(target, overrides, **options)
