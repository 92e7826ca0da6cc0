"""The matrix products that one optimizer step cannot do without, in floating-point operations.

Counted for a frozen decoder of the Llama shape under LoRA (Hu et al., 2021, arXiv:2106.09685), per step of
T real tokens in segments of length L, of which N are targets. A product of (a, b) and (b, c) is 2abc.

    base     every linear layer once forward and once backward (no weight gradients: the base is frozen)
    head     hidden states x vocabulary, forward and backward, only at the N targets
    scores   causal attention: L(L+1)/2 pairs, two products forward and four backward
    lora     A and B forward, and for each of them input and weight gradient backward
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Decoder:
    """Sizes that `config.json` of a Llama-shaped model gives."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    key_value_heads: int
    head_dim: int
    vocabulary: int

    @classmethod
    def from_config(cls, config: dict[str, int]) -> Decoder:
        heads = config["num_attention_heads"]
        return cls(
            layers=config["num_hidden_layers"],
            hidden=config["hidden_size"],
            intermediate=config["intermediate_size"],
            heads=heads,
            key_value_heads=config["num_key_value_heads"],
            head_dim=config.get("head_dim") or config["hidden_size"] // heads,
            vocabulary=config["vocab_size"],
        )

    def linears(self) -> list[tuple[int, int]]:
        """(in, out) of the seven linear maps of one layer: q, k, v, o, gate, up, down."""
        queries, keys = self.heads * self.head_dim, self.key_value_heads * self.head_dim
        wide = self.intermediate
        return [
            (self.hidden, queries),
            (self.hidden, keys),
            (self.hidden, keys),
            (queries, self.hidden),
            (self.hidden, wide),
            (self.hidden, wide),
            (wide, self.hidden),
        ]


def step_flops(decoder: Decoder, lengths: Sequence[int], targets: int, rank: int) -> dict[str, float]:
    """Operations of one step by part. `lengths`: tokens of each segment; `targets`: supervised tokens."""
    tokens = sum(lengths)
    linears = decoder.linears()
    pairs = sum(length * (length + 1) // 2 for length in lengths)
    return {
        "base": 4.0 * tokens * decoder.layers * sum(inner * outer for inner, outer in linears),
        "head": 4.0 * targets * decoder.hidden * decoder.vocabulary,
        "scores": 12.0 * pairs * decoder.heads * decoder.head_dim * decoder.layers,
        "lora": 6.0 * tokens * rank * decoder.layers * sum(inner + outer for inner, outer in linears),
    }


def products(decoder: Decoder, tokens: int, targets: int) -> list[tuple[int, int, int, int]]:
    """(rows, inner, columns, how often) of the base's and the head's products in one step of that size."""
    shapes: dict[tuple[int, int, int], int] = {}
    for inner, outer in decoder.linears():
        for shape in ((tokens, inner, outer), (tokens, outer, inner)):
            shapes[shape] = shapes.get(shape, 0) + decoder.layers
    for shape in (
        (targets, decoder.hidden, decoder.vocabulary),
        (targets, decoder.vocabulary, decoder.hidden),
    ):
        shapes[shape] = 1
    return [(*shape, count) for shape, count in shapes.items()]
