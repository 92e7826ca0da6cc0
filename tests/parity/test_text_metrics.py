"""BLEU and ROUGE are those that LLaMA-Factory reports, row by row; BLEU and chrF of the whole are sacrebleu's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from luthier.measures.text import CORPUS_METRICS, ROW_METRICS, ComputeMetrics, is_chinese

GOLDEN: list[dict[str, Any]] = json.loads(
    (Path(__file__).parent / "data" / "llamafactory_similarity.json").read_text(encoding="utf-8")
)["rows"]
PREDICTIONS, LABELS = [row["predict"] for row in GOLDEN], [row["label"] for row in GOLDEN]


@pytest.fixture(scope="module")
def metrics() -> ComputeMetrics:
    return ComputeMetrics()


@pytest.mark.parametrize("row", GOLDEN, ids=lambda row: f"{row['predict'][:12]!r}-{row['label'][:12]!r}")
def test_a_row_has_the_recorded_numbers(metrics: ComputeMetrics, row: dict[str, Any]) -> None:
    ours = metrics.row(row["predict"], row["label"])
    assert {name: ours[name] for name in row["scores"]} == row["scores"]


def test_the_recorded_rows_tell_metrics_apart() -> None:
    """Chinese, empty and short rows are among them, and no two numbers are the same everywhere."""
    assert any(is_chinese([row["label"]]) for row in GOLDEN) and "" in PREDICTIONS and "" in LABELS
    columns = [
        tuple(row["scores"][name] for row in GOLDEN) for name in ("bleu-4", "rouge-1", "rouge-2", "rouge-l")
    ]
    assert len(set(columns)) == 4


def test_numbers_of_all_rows_are_means_and_sacrebleus_own(metrics: ComputeMetrics) -> None:
    from sacrebleu import corpus_bleu, corpus_chrf

    numbers = metrics(PREDICTIONS, LABELS)
    assert set(numbers) == {*ROW_METRICS, *CORPUS_METRICS}
    for name in ("bleu-4", "rouge-1", "rouge-2", "rouge-l"):
        assert numbers[name] == pytest.approx(np.mean([row["scores"][name] for row in GOLDEN]), abs=1e-12)
    assert numbers["exact_match"] == pytest.approx(100 * 4 / len(GOLDEN))
    assert numbers["bleu"] == pytest.approx(corpus_bleu(PREDICTIONS, [LABELS], force=True).score, abs=1e-9)
    assert numbers["chrf"] == pytest.approx(corpus_chrf(PREDICTIONS, [LABELS]).score, abs=1e-9)


def test_a_resample_is_the_number_of_the_repeated_rows(metrics: ComputeMetrics) -> None:
    """Rows counted several times give what the written-out list of rows gives, corpus numbers included."""
    counts = np.array([place % 3 for place in range(len(GOLDEN))])
    predictions = [text for text, count in zip(PREDICTIONS, counts, strict=True) for _ in range(count)]
    labels = [text for text, count in zip(LABELS, counts, strict=True) for _ in range(count)]
    expected = metrics(predictions, labels)
    resampled = metrics.scores(PREDICTIONS, LABELS).numbers(counts)
    assert resampled == pytest.approx(expected, abs=1e-9)
    assert resampled["bleu"] != pytest.approx(metrics(PREDICTIONS, LABELS)["bleu"])


def test_chinese_labels_are_cut_into_characters_by_sacrebleu(metrics: ComputeMetrics) -> None:
    from sacrebleu import corpus_bleu

    predictions, labels = ["今天天气很好，我们去公园散步吧。"], ["今天的天气非常好，我们一起去公园散步。"]
    scores = metrics.scores(predictions, labels)
    assert "tok:zh" in scores.signatures["bleu"]
    expected = corpus_bleu(predictions, [labels], tokenize="zh").score
    assert 10 < expected < 90
    assert scores.numbers()["bleu"] == pytest.approx(expected, abs=1e-9)


def test_lists_that_do_not_belong_together_are_refused(metrics: ComputeMetrics) -> None:
    with pytest.raises(ValueError, match="no rows"):
        metrics([], [])
    with pytest.raises(ValueError, match="shorter"):
        metrics(["a", "b"], ["a"])
