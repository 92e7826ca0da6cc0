"""How well a reward model tells better answers from worse ones that it never saw: k-fold cross-validation.

    python benchmarks/rm_cross_validation.py --model embedded --data FOLDER_OF_DPO_EN_DEMO

Every pair is held out once: for each fold a LoRA reward model is trained on the others, and its own pairs are scored
by `luthier score` from the saved folder. The correct ones of all folds together give the accuracy, with its 95 %
interval (Wilson, 1927). Chance is one half; the accuracy of saying that the shorter answer is the better one stands
beside it. A pair longer than `--max-length` is cut (oldest tokens of the prompt first), not left out.

A fold that the results file holds already, with the same settings, is not trained again. Seconds are not compared
with anything.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

import luthier
from luthier.score import score_file
from preference import DATA_SET, lora_recipe, parser_of, surroundings, wilson


def run_fold(
    arguments: argparse.Namespace, pairs: list[Any], held_out: list[int], fold: int
) -> dict[str, Any]:
    """Train on all pairs but `held_out`, and score these."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        kept = [pair for index, pair in enumerate(pairs) if index not in held_out]
        (place / "train.json").write_text(json.dumps(kept), encoding="utf-8")
        (place / "test.json").write_text(json.dumps([pairs[index] for index in held_out]), encoding="utf-8")
        recipe = lora_recipe(
            arguments,
            place / "train.json",
            place,
            stage={"type": "rm", "center": arguments.center},
            train={"epochs": arguments.epochs, "log_every": 5, "seed": arguments.seed + fold},
        )
        metrics = luthier.train(recipe).metrics
        scores = score_file(place / "run", place / "test.json").rows
    found = {held_out[row.index]: row.scores for row in scores if row.reason is None}
    return {
        "train_loss": metrics["train_loss"],
        "train_tokens": metrics["train_tokens"],
        "seconds": round(time.perf_counter() - started, 1),
        "scores": {str(index): found.get(index) for index in held_out},
    }


def summary(folds: dict[str, dict[str, Any]], pairs: list[Any]) -> dict[str, Any]:
    """Accuracy over all pairs that were held out so far; a tie is half right."""
    scores = {
        int(i): pair for fold in folds.values() for i, pair in fold["scores"].items() if pair is not None
    }
    lost = sum(pair is None for fold in folds.values() for pair in fold["scores"].values())
    right = sum(1.0 if a > b else 0.5 if a == b else 0.0 for a, b in scores.values())
    lengths = [[len(pairs[i][name]["value"]) for name in ("chosen", "rejected")] for i in scores]
    shorter = sum(1.0 if a < b else 0.5 if a == b else 0.0 for a, b in lengths)
    apart = np.array([a - b for a, b in scores.values()])
    return {
        "pairs": len(scores),
        "not_scored": lost,
        "accuracy": right / len(scores),
        "interval_95": wilson(right, len(scores)),
        "shorter_answer_accuracy": shorter / len(scores),
        "mean_margin": float(apart.mean()),
        "margin_spread": float(apart.std()),
        "bradley_terry_loss": float(np.logaddexp(0, -apart).mean()),
    }


def parsed() -> argparse.Namespace:
    parser = parser_of(__doc__, "rm_cross_validation.json")
    parser.add_argument("--pairs", type=int, default=300)
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--only", type=int, nargs="*", help="these folds alone, from 0")
    parser.add_argument("--epochs", type=float, default=1)
    parser.add_argument("--center", type=float, default=0.01)
    return parser.parse_args()


def main() -> None:
    arguments = parsed()
    pairs = json.loads((arguments.data / DATA_SET).read_text(encoding="utf-8"))[: arguments.pairs]
    order = np.random.default_rng(arguments.seed).permutation(len(pairs)).tolist()
    names = ("model", "pairs", "folds", "max_length", "epochs", "rank", "rows", "lr", "center", "seed")
    settings = {"data_set": DATA_SET, **{name: getattr(arguments, name) for name in names}}
    done = json.loads(arguments.output.read_text()) if arguments.output.is_file() else {}
    folds: dict[str, dict[str, Any]] = done["per_fold"] if done.get("settings") == settings else {}
    for fold in range(arguments.folds):
        if str(fold) in folds or (arguments.only is not None and fold not in arguments.only):
            continue
        print(f"fold {fold + 1} of {arguments.folds}", flush=True)
        folds[str(fold)] = run_fold(arguments, pairs, order[fold :: arguments.folds], fold)
        result = {
            "settings": settings,
            **surroundings(),
            "folds_done": len(folds),
            **summary(folds, pairs),
            "per_fold": folds,
        }
        arguments.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        low, high = result["interval_95"]
        print(
            f"{result['pairs']} pairs so far: accuracy {result['accuracy']:.3f} (95 % interval {low:.3f} to "
            f"{high:.3f}); the shorter answer {result['shorter_answer_accuracy']:.3f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
