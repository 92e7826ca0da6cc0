"""Greedy answers on a CPU, side by side: Luthier, LLaMA-Factory's predict, plain transformers generate.

    python benchmarks/generate_cpu.py --lf-python PEER/bin/python

Every contender answers the same prompts (token ids) in float32, in a process of its own, at each of the batch sizes;
each round runs all of them once. What is timed is generation alone, from the first prompt to the last answer, models
loaded. Rows per second are compared within a round, and the answers token by token.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import sequences
import side_by_side
from side_by_side import Contender

CONTENDERS = {
    "luthier": Contender("luthier_generate.py"),
    "llamafactory": Contender("llama_factory_generate.py", "lf_python"),
    "transformers": Contender("plain_generate.py"),
}


def parse() -> Any:
    parser = side_by_side.parser(
        __doc__, CONTENDERS, dataset="alpaca_en_demo", steps=2, results="generate_cpu.json"
    )
    parser.add_argument("--rows", type=int, default=64, help="prompts")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--max-new-tokens", type=int, default=128)
    return side_by_side.parse(parser, CONTENDERS)


def prompts_of(options: Any) -> list[list[int]]:
    rows = sequences.load(options.model, options.data, options.dataset, options.rows)
    return [row["input_ids"][: _answer_start(row["labels"])] for row in rows]


def _answer_start(labels: list[int]) -> int:
    return next(place for place, label in enumerate(labels) if label != sequences.IGNORE)


def same_answers(mine: list[list[int]], theirs: list[list[int]]) -> int:
    return sum(a == b for a, b in zip(mine, theirs, strict=True))


def summarised(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Of each contender the rows per second and, against Luthier at the same batch size and at the best of both, the
    median ratio over the rounds with its range."""
    first = rounds[0]
    table: dict[str, Any] = {}
    for name, line in first.items():
        speeds = [measured[name]["rows"] / measured[name]["seconds"] for measured in rounds]
        table[name] = {
            "rows_per_second": round(statistics.median(speeds), 3),
            "tokens": line["tokens"],
            "peak_mib": line["peak_mib"],
            "answers_as_luthiers": same_answers(
                first[f"luthier {line['batch_size']}"]["answers"], line["answers"]
            ),
        }
    ratios = {}
    peers = sorted({line["contender"] for line in first.values()} - {"luthier"})
    for peer in peers:
        for size in sorted({line["batch_size"] for line in first.values()}):
            ratios[f"{peer}, batch size {size}"] = _ratio(
                [m[f"{peer} {size}"]["seconds"] / m[f"luthier {size}"]["seconds"] for m in rounds]
            )
        ratios[f"{peer}, each at its best"] = _ratio([_best(m, peer) / _best(m, "luthier") for m in rounds])
    return {"contenders": table, "luthier_times_faster_than": ratios}


def _best(measured: dict[str, Any], contender: str) -> float:
    return min(line["seconds"] for line in measured.values() if line["contender"] == contender)


def _ratio(values: list[float]) -> dict[str, float]:
    return {
        "median": round(statistics.median(values), 3),
        "min": round(min(values), 3),
        "max": round(max(values), 3),
    }


def main() -> None:
    options = parse()
    job = {
        **side_by_side.job_settings(options),
        "prompts": prompts_of(options),
        "max_new_tokens": options.max_new_tokens,
    }
    rounds: list[dict[str, Any]] = []
    for number in range(options.rounds):
        measured: dict[str, Any] = {}
        for size in options.batch_sizes:
            turn = number % len(options.contenders)
            for name in [*options.contenders[turn:], *options.contenders[:turn]]:
                line = side_by_side.run(options, {**job, "batch_size": size}, name, CONTENDERS[name])
                measured[f"{name} {size}"] = {**line, "batch_size": size}
                print(
                    f"round {number + 1}: {name} at {size}: {line['rows'] / line['seconds']:.2f} rows/s",
                    flush=True,
                )
        rounds.append(measured)
        settings = {key: value for key, value in job.items() if key not in ("prompts", "model", "data")}
        result = {"settings": settings, "rounds": len(rounds), **summarised(rounds)}
        side_by_side.write(result, Path(options.results))
    print(result["luthier_times_faster_than"])


if __name__ == "__main__":
    main()
