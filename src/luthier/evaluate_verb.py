"""The verb `evaluate`: perplexity, multiple-choice benchmarks, pairs, lm-eval's tasks; alone or beside another model.

evaluate(target, ...)  ->  EvaluateResult
"""

from __future__ import annotations

import gc
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from luthier import __version__
from luthier.answering import parts_of
from luthier.data.registry import DatasetAttr
from luthier.evaluating import choices, harness, perplexity as perplexities, report, rewards
from luthier.evaluating.benchmark import Benchmark, read_benchmark
from luthier.evaluating.choices import WORDINGS, Answered, Asking, Layout, answer_benchmark, benchmark_prompts
from luthier.evaluating.judge import Judge, open_judge
from luthier.evaluating.named import described
from luthier.evaluating.perplexity import Likelihood, TokenSet, likelihood
from luthier.evaluating.sets import Windows, named_set, own_sets
from luthier.files import write_whole
from luthier.recipe.schema import Recipe
from luthier.show import Say, quiet_libraries, speaker
from luthier.trained.source import Trained
from luthier.types import DataError, RecipeError, RowKind

RESULTS_NAME = "evaluate_results.json"
BASE = "base"
"""What `against` calls the model that training started from."""
WINDOW = 2048
"""Tokens of a window where neither the call nor a run says so, and the model takes as many."""


@dataclass(frozen=True, slots=True)
class EvaluateResult:
    """What was found (the content of `evaluate_results.json`), and the file, where it was written."""

    report: dict[str, Any]
    file: Path | None = None

    def text(self) -> str:
        """Tables; intervals are of 95 %."""
        return report.text(self.report)

    def json(self) -> str:
        return json.dumps(self.report, indent=2, ensure_ascii=False)


@dataclass(frozen=True, slots=True)
class _Wanted:
    """What is to be measured, read and checked before any model is loaded. sets: descriptions of data, and what each is
    read as. own: nothing is named, so the evaluation sets of the run are meant."""

    sets: Sequence[tuple[DatasetAttr, RowKind]]
    benchmarks: Sequence[Benchmark]
    asking: Asking
    tasks: harness.Tasks
    window: int | None
    stride: int | None
    limit: int | None

    @property
    def own(self) -> bool:
        return not (self.sets or self.benchmarks or self.tasks.names)


@dataclass(slots=True)
class _Tokens:
    """The same for one template: what a model and the one below its adapter are both asked."""

    sets: list[TokenSet] = field(default_factory=list)
    prompts: list[dict[str, list[choices.Prompt]]] = field(default_factory=list)
    windows: Windows | None = None


@dataclass(frozen=True, slots=True)
class _Measured:
    likelihoods: list[Likelihood]
    answered: list[Answered]
    tasks: dict[str, Any]


def evaluate(
    target: str | Path,
    *,
    perplexity: Sequence[str] = (),
    window: int | None = None,
    stride: int | None = None,
    tasks: Sequence[str] = (),
    task_dir: str | Path = "evaluation",
    n_shot: int = 5,
    lang: str = "en",
    layout: Layout = "chat",
    pairs: Sequence[str] = (),
    lm_eval: Sequence[str] = (),
    tasks_folder: str | Path | None = None,
    lm_eval_chat: bool = False,
    against: str | None = None,
    base: str | None = None,
    limit: int | None = None,
    tokens_per_pass: int | None = None,
    output: str | Path | None = None,
    overwrite: bool = False,
    quiet: bool = False,
) -> EvaluateResult:
    """Measure a trained model; without anything to measure named, on the evaluation sets of its own run.

    target: folder of a run, checkpoint, adapter or model, a recipe, a name on the hub. perplexity: data sets, by the
    names of the run or of dataset_info.json, or files. window, stride: tokens of the windows of longer texts, and
    between their beginnings. tasks: benchmarks in `task_dir`, as `mmlu_test`. pairs: ranking data for a reward model.
    lm_eval: tasks of lm-evaluation-harness, those in `tasks_folder` among them; lm_eval_chat: their contexts as
    turns of a conversation. against: `base`, what training started
    from, or another model. limit: rows of a set, questions of a subject, documents of a task. output: folder of
    evaluate_results.json.

    Raises DataError naming file and row, RecipeError for what does not go together, ModelError and CheckpointError for
    models that cannot be loaded. Nothing is written then.
    """
    quiet_libraries()
    file = _free_file(output, overwrite)
    say, trained = speaker(quiet), parts_of(target, base)
    found: dict[str, Any] = {"luthier": __version__, "target": trained.label, "against": against}
    found |= {"perplexity": [], "benchmarks": [], "pairs": [], "lm_eval": {}}
    asking = _asking(n_shot, lang, layout)
    _require_kind(trained, pairs, (*perplexity, *tasks, *lm_eval))
    if trained.kind == "reward":
        found["pairs"] = rewards.compare(trained, target, pairs, against, base)
    else:
        wanted = _Wanted(
            sets=[described(name, trained.recipe) for name in perplexity],
            benchmarks=[read_benchmark(Path(task_dir), one, num_shots=n_shot, limit=limit) for one in tasks],
            asking=asking,
            tasks=harness.find_tasks(lm_eval, tasks_folder, limit, chat=lm_eval_chat),
            window=window,
            stride=stride,
            limit=limit,
        )
        _language(found, trained, wanted, tokens_per_pass, say)
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, json.dumps(found, indent=2, ensure_ascii=False) + "\n")
    return EvaluateResult(found, file)


def _free_file(output: str | Path | None, overwrite: bool) -> Path | None:
    """Where the results go. Raises DataError where some are already."""
    file = None if output is None else Path(output) / RESULTS_NAME
    if file is not None and file.exists() and not overwrite:
        raise DataError(f"{file} exists already; choose another folder or give --overwrite")
    return file


def _require_kind(trained: Trained, pairs: Sequence[str], texts: Sequence[str]) -> None:
    """Raise RecipeError where a reward model is asked for texts, or a language model for pairs."""
    if trained.kind == "reward" and texts:
        raise RecipeError(
            f"{trained.label} is a reward model: it has pairs to compare (--pairs), and no text to say"
        )
    if trained.kind == "language" and pairs:
        raise RecipeError(
            f"--pairs: {trained.label} is a language model, and pairs are for reward models (stage.type: rm)"
        )


def _asking(n_shot: int, lang: str, layout: Layout) -> Asking:
    if lang not in WORDINGS:
        raise RecipeError(f"--lang {lang}: choose from {', '.join(WORDINGS)}")
    if n_shot < 0:
        raise RecipeError(f"--n-shot {n_shot}: expected 0 or more")
    return Asking(lang, layout, n_shot)


# --------------------------------------------------------------------------------------------------
# A language model, and the one beside it


def _language(
    found: dict[str, Any], trained: Trained, wanted: _Wanted, tokens_per_pass: int | None, say: Say
) -> None:
    """Measure the target, then the other model, and put both and their differences into the report."""
    against = found["against"]
    other = None if against in (None, BASE) else parts_of(against)
    media = _has_media(trained, wanted)
    judge = open_judge(trained, tokens_per_pass=tokens_per_pass, media=media, say=say)
    if against == BASE and not judge.has_adapter:
        other = _base_of(trained)
    tokens = _tokens(judge, trained, wanted)
    mine = _measured(judge, tokens, wanted, say)
    theirs = None
    if against == BASE and other is None:
        with judge.without_adapter():
            theirs = _measured(judge, tokens, wanted, say)
    elif other is not None:
        template = judge.template if against == BASE else None
        run, windows = trained.recipe, tokens.windows
        del judge
        gc.collect()
        judge = open_judge(other, template=template, tokens_per_pass=tokens_per_pass, media=media, say=say)
        if against != BASE:
            tokens = _tokens(judge, replace(other, recipe=run), wanted, windows)
        theirs = _measured(judge, tokens, wanted, say)
    _put(found, mine, theirs, tokens.windows)


def _has_media(trained: Trained, wanted: _Wanted) -> bool:
    """Whether a named set has columns of images, films or sounds, or the run had rows with them."""
    columns = [attr.columns for attr, _ in wanted.sets]
    return trained.manifest.get("rows", {}).get("layout") == "padded" or any(
        one.images or one.videos or one.audios for one in columns
    )


def _base_of(trained: Trained) -> Trained:
    """The model that a run without an adapter started from."""
    run = trained.recipe
    if run is None:
        raise RecipeError(
            f"--against base: no run says what {trained.label} was trained from; name that model"
        )
    if run.model.vocabulary is not None:
        raise RecipeError(
            f"--against base: {trained.label} has tokens that {run.model.path} lacks, so they cannot be asked the "
            f"same; give --against {run.model.path}, which is then asked with its own tokens"
        )
    spec = run.model.model_copy(update={"gradient_checkpointing": False, "activation_offload": False})
    return Trained(spec.path, spec, (), spec.tokenizer or spec.path, "language", run)


def _tokens(judge: Judge, trained: Trained, wanted: _Wanted, windows: Windows | None = None) -> _Tokens:
    """What is asked, in the tokens of this model's template."""
    template, run, most = judge.template, trained.recipe, judge.context_length
    if windows is None:
        windows = _windows(wanted, run, most)
    elif most is not None and windows.window > most and wanted.sets:
        raise RecipeError(
            f"--against {trained.label}: it has positions for {most} tokens, and windows have {windows.window}; give "
            f"--window {most} or less, for both"
        )
    if wanted.own:
        if run is None or not (run.data.eval or run.data.dev_split):
            raise RecipeError(
                f"{trained.label} has no evaluation sets of its own; name what to evaluate on with --perplexity, "
                "--task or --lm-eval"
            )
        sets = own_sets(run, template)
    else:
        sets = [
            named_set(attr, kind, template, windows, run=run, limit=wanted.limit)
            for attr, kind in wanted.sets
        ]
    prompts = [benchmark_prompts(one, wanted.asking, template, most) for one in wanted.benchmarks]
    return _Tokens(sets, prompts, windows)


def _windows(wanted: _Wanted, run: Recipe | None, most: int | None) -> Windows:
    window = wanted.window or (run.data.max_length if run is not None else min(WINDOW, most or WINDOW))
    if most is not None and wanted.window is not None and window > most:
        raise RecipeError(f"--window {window}: the model has positions for {most} tokens")
    stride = wanted.stride or max(1, window // 2)
    if window < 2 or not 0 < stride < window:
        raise RecipeError(
            f"--stride {stride}: expected at least 1 and less than the window of {window} tokens, so that every token "
            "has some before it"
        )
    return Windows(window, stride)


def _measured(judge: Judge, tokens: _Tokens, wanted: _Wanted, say: Say) -> _Measured:
    likelihoods, answered = [], []
    for one in tokens.sets:
        say(f"{one.name}: {sum(len(sample) for sample in one.samples):,} tokens")
        likelihoods.append(likelihood(judge, one))
    for benchmark, prompts in zip(wanted.benchmarks, tokens.prompts, strict=True):
        say(f"{benchmark.task}: {sum(len(one) for one in prompts.values()):,} questions")
        answered.append(answer_benchmark(judge, prompts, benchmark, wanted.asking))
    return _Measured(likelihoods, answered, harness.run(judge, wanted.tasks))


def _put(found: dict[str, Any], mine: _Measured, theirs: _Measured | None, windows: Windows | None) -> None:
    for k, one in enumerate(mine.likelihoods):
        entry: dict[str, Any] = {"name": one.data.name, "target": one.to_dict()}
        if theirs is not None:
            other = theirs.likelihoods[k]
            entry |= {"against": other.to_dict(), "difference": perplexities.difference(one, other)}
        found["perplexity"].append(entry)
    for k, answers in enumerate(mine.answered):
        entry = {"task": answers.benchmark.task, "target": answers.to_dict()}
        if theirs is not None:
            others = theirs.answered[k]
            entry |= {"against": others.to_dict(), "difference": choices.difference(answers, others)}
        found["benchmarks"].append(entry)
    if windows is not None and mine.likelihoods:
        found["windows"] = {"window": windows.window, "stride": windows.stride}
    if mine.tasks:
        found["lm_eval"] = {"target": mine.tasks} | ({} if theirs is None else {"against": theirs.tasks})
