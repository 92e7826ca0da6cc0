"""The reward of the benchmarks: cheap, and different from answer to answer."""

from __future__ import annotations


def distinct_words(text: str) -> float:
    """The share of its words that are different."""
    words = text.split()
    return len(set(words)) / max(1, len(words))


def luthier_reward(prompt: str, completion: str, row: object) -> float:
    return distinct_words(completion)
