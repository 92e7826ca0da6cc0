"""Generated texts against what they should have been: BLEU, ROUGE, chrF and exact matches, all in percent.

ComputeMetrics()(predictions, labels)         -> the numbers by name
ComputeMetrics().scores(predictions, labels)  -> TextScores: numbers of any resample of the rows

Needs jieba, nltk, rouge-chinese and sacrebleu (`pip install 'luthier[metrics]'`).

Shapes: N rows, K statistics of a row.
"""

from __future__ import annotations

import logging
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from luthier.measures.libraries import require_libraries

ROW_METRICS = ("bleu-4", "rouge-1", "rouge-2", "rouge-l", "exact_match")
"""Means over rows: each row has its own."""
CORPUS_METRICS = ("bleu", "chrf")
"""Of all rows together: sums of counts, not means."""

Floats = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True, slots=True)
class TextScores:
    """Of N rows: (N,) numbers by name, and for numbers of the whole the (N, K) statistics that they are made of."""

    rows: Mapping[str, Floats]
    statistics: Mapping[str, Floats] = field(default_factory=dict)
    from_sums: Mapping[str, Callable[[list[float]], float]] = field(default_factory=dict)
    signatures: Mapping[str, str] = field(default_factory=dict)
    """How sacrebleu computed its numbers, in its own words."""

    def __len__(self) -> int:
        return len(next(iter(self.rows.values())))

    def take(self, indices: Sequence[int]) -> TextScores:
        """The same of some rows."""
        chosen = np.asarray(indices, dtype=np.int64)
        rows = {name: values[chosen] for name, values in self.rows.items()}
        statistics = {name: values[chosen] for name, values in self.statistics.items()}
        return TextScores(rows, statistics, self.from_sums, self.signatures)

    def numbers(self, counts_N: np.ndarray[Any, Any] | None = None) -> dict[str, float]:
        """Every number, each row counted once, or as often as `counts_N` says."""
        weights = np.ones(len(self)) if counts_N is None else counts_N.astype(np.float64)
        total = weights.sum()
        means = {name: float(weights @ values / total) for name, values in self.rows.items()}
        sums = {name: (weights @ values).tolist() for name, values in self.statistics.items()}
        return means | {name: self.from_sums[name](sums[name]) for name in sums}


class ComputeMetrics:
    """What generated texts are worth: sentence BLEU-4 and ROUGE-1/2/L as LLaMA-Factory reports them, corpus BLEU and
    chrF of sacrebleu (Post, 2018, arXiv:1804.08771), and the share of exact matches.

    BLEU-4 of a row compares characters (Papineni et al., 2002; smoothing 3 of Chen and Cherry, 2014, as nltk has
    it). ROUGE compares words as jieba cuts them (F1; Lin, 2004). An exact match is equal but for space at both ends.

    Raises RecipeError where a library is missing.
    """

    def __init__(self) -> None:
        require_libraries("BLEU and ROUGE of generated texts")
        import jieba
        from nltk.translate.bleu_score import SmoothingFunction
        from rouge_chinese import Rouge

        jieba.setLogLevel(logging.WARNING)
        self._cut: Callable[[str], Any] = jieba.cut
        self._rouge = Rouge()
        self._smoothing = SmoothingFunction().method3

    def __call__(self, predictions: Sequence[str], labels: Sequence[str]) -> dict[str, float]:
        """The numbers by name. Raises ValueError for lists of different lengths, or none."""
        return self.scores(predictions, labels).numbers()

    def row(self, prediction: str, label: str) -> dict[str, float]:
        """The numbers of one row, rounded to four places as LLaMA-Factory rounds them."""
        from nltk.translate.bleu_score import sentence_bleu

        bleu = sentence_bleu([list(label)], list(prediction), smoothing_function=self._smoothing)
        numbers = {"bleu-4": round(float(bleu) * 100, 4), **self._rouges(prediction, label)}
        return numbers | {"exact_match": 100.0 * (prediction.strip() == label.strip())}

    def _rouges(self, prediction: str, label: str) -> dict[str, float]:
        words, expected = (" ".join(self._cut(text)) for text in (prediction, label))
        if not words.split() or not expected.split():
            return dict.fromkeys(("rouge-1", "rouge-2", "rouge-l"), 0.0)
        (scores,) = self._rouge.get_scores(words, expected)
        return {name: round(float(score["f"]) * 100, 4) for name, score in scores.items()}

    def scores(self, predictions: Sequence[str], labels: Sequence[str]) -> TextScores:
        """What every number is made of. Raises ValueError for lists of different lengths, or none."""
        if not predictions:
            raise ValueError("no rows: there is nothing to measure")
        from sacrebleu.metrics import BLEU, CHRF

        rows = [self.row(prediction, label) for prediction, label in zip(predictions, labels, strict=True)]
        columns = {name: np.array([row[name] for row in rows]) for name in ROW_METRICS}
        # `force` only silences a warning about texts that look tokenized.
        metrics = {
            "bleu": BLEU(tokenize="zh" if is_chinese(labels) else "13a", force=True),
            "chrf": CHRF(),
        }
        statistics, from_sums = dict[str, Floats](), dict[str, Callable[[list[float]], float]]()
        for name, metric in metrics.items():
            # The statistics of each row are what sacrebleu's own significance tests resample.
            counted = metric._extract_corpus_statistics(list(predictions), [list(labels)])
            statistics[name] = np.array(counted, dtype=np.float64)
            from_sums[name] = _FromSums(metric)
        signatures = {name: str(metric.get_signature()) for name, metric in metrics.items()}
        return TextScores(columns, statistics, from_sums, signatures)


@dataclass(frozen=True, slots=True)
class _FromSums:
    metric: Any

    def __call__(self, sums: list[float]) -> float:
        return float(self.metric._compute_score_from_stats([round(value) for value in sums]).score)


def is_chinese(texts: Sequence[str]) -> bool:
    """Whether most letters are Chinese characters, so that words have no spaces between them."""
    letters = [letter for text in texts for letter in text if unicodedata.category(letter)[0] == "L"]
    chinese = sum("一" <= letter <= "鿿" or "㐀" <= letter <= "䶿" for letter in letters)
    return 2 * chinese > len(letters)
