"""`luthier quickstart`: ask the embedded model, train it, load the result from disk and ask again."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from luthier.data.template import load_template
from luthier.engine.hf import HfEngine
from luthier.environment import detect_hardware
from luthier.methods.lora import load_adapter
from luthier.model.load import load_model, load_tokenizer, locate
from luthier.recipe.load import load_recipe
from luthier.recipe.resolve import resolve
from luthier.recipe.schema import Recipe
from luthier.run import TrainResult, train
from luthier.show import quiet_libraries
from luthier.types import Conversation, GenerationSettings, Message

FOLDER = Path(__file__).parent
MAX_NEW_TOKENS = 48


@dataclass(frozen=True, slots=True)
class Question:
    """A held-out question and how its answer is judged: it must be, or contain, `expected`."""

    skill: str
    question: str
    check: str
    expected: str

    def passed(self, answer: str) -> bool:
        if self.check == "exact":
            return answer.strip() == self.expected
        return self.expected.casefold() in answer.casefold()


def read_questions() -> list[Question]:
    """The held-out questions, none of which is in the training data."""
    lines = (FOLDER / "heldout.jsonl").read_text(encoding="utf-8").splitlines()
    return [Question(**json.loads(line)) for line in lines if line.strip()]


def run(output: Path) -> TrainResult:
    """Train into `output`, or beside it where a run is there already, and print the answers side by side."""
    quiet_libraries()
    console, questions = Console(), read_questions()
    output = _free(output)
    overrides = [f"data.directory={FOLDER}", f"train.output={output}"]
    settings = resolve(load_recipe(FOLDER / "recipe.yaml", overrides), detect_hardware()).recipe
    console.print(f"[bold]Asking the untrained model {len(questions)} held-out questions[/]")
    before = answers(settings, questions, adapter=None)
    console.print("[bold]Training[/]")
    result = train(FOLDER / "recipe.yaml", overrides)
    console.print("[bold]Asking the trained model, loaded back from its folder[/]")
    after = answers(settings, questions, adapter=result.output)
    _report(console, questions, before, after, result)
    return result


def answers(settings: Recipe, questions: Sequence[Question], adapter: Path | None) -> list[str]:
    """Greedy answers of the recipe's base model, with the adapter in a run's folder if one is given."""
    source = locate(settings.model)
    tokenizer = load_tokenizer(settings.model, source)
    template = load_template(tokenizer, settings.data)
    base = load_model(settings.model, source, torch.device(detect_hardware().device))
    model = base if adapter is None else load_adapter(base, adapter)
    prompts = [template.prompt(Conversation((Message("user", question.question),))) for question in questions]
    limits = GenerationSettings(max_new_tokens=MAX_NEW_TOKENS, stop_ids=template.stop_ids)
    return [template.decode(answer.ids).strip() for answer in HfEngine(model).generate(prompts, limits)]


def _free(output: Path) -> Path:
    """`output`, or the first of output-2, output-3, ... that does not exist: a run is never overwritten."""
    number, candidate = 1, output
    while candidate.exists():
        number += 1
        candidate = output.with_name(f"{output.name}-{number}")
    return candidate


def _report(
    console: Console,
    questions: Sequence[Question],
    before: Sequence[str],
    after: Sequence[str],
    result: TrainResult,
) -> None:
    table = Table(title="Held-out questions, before and after", show_lines=True)
    for title in ("question", "before", "after"):
        table.add_column(title, overflow="fold", ratio=1)
    records = []
    for question, old, new in zip(questions, before, after, strict=True):
        cells = [f"{'✓' if question.passed(text) else '✗'} {escape(text)}" for text in (old, new)]
        table.add_row(escape(question.question), *cells)
        records.append(
            {"question": question.question, "expected": question.expected, "before": old, "after": new}
        )
    console.print(table)
    scores = [
        sum(q.passed(text) for q, text in zip(questions, texts, strict=True)) for texts in (before, after)
    ]
    scored = {"before": scores[0], "after": scores[1], "of": len(questions), "answers": records}
    (result.output / "quickstart.json").write_text(json.dumps(scored, indent=2) + "\n", encoding="utf-8")
    console.print(
        f"[bold]{scores[0]} of {len(questions)} right before, {scores[1]} of {len(questions)} after.[/]\n"
        f"Result:     {result.output}  (the adapter, its tokenizer and template)\n"
        f"Loss curve: {result.output / 'training_loss.png'}\n"
        f"Log:        {result.output / 'trainer_log.jsonl'}\n\n"
        "Try next:\n"
        f"  luthier train {result.output / 'recipe.yaml'} train.output=runs/longer train.epochs=6\n"
        "  luthier train my_recipe.yaml            your own model and data; a LLaMA-Factory YAML runs as it is\n"
        "  luthier migrate their_recipe.yaml       the same file as a native recipe\n"
        "  luthier schema, luthier env             every key, and what this machine can do",
        highlight=False,
    )
