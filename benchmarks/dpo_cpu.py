"""Direct preference optimization on a CPU, side by side: Luthier and TRL, each in its variants.

    python benchmarks/dpo_cpu.py
    python benchmarks/dpo_cpu.py --rounds 1 --steps 3 --max-length 256     # a short run

Every contender trains LoRA on all linear layers in float32 on the same token ids of the same pairs, the same
number of pairs a step, in a process of its own; each round runs all of them once and the next round starts with
another one. Only ratios within a round are quoted. Counted are the tokens of the two answers, neither prompts nor
padding.

    luthier            prompts computed once for both answers, the reference is the base below the adapter
    luthier_unshared   each answer with a prompt of its own
    luthier_cached     the reference's log-probabilities before training (stage.reference: precompute)
    trl                TRL's defaults: all pairs of a step at once
    trl_accumulated    one pair at a time, accumulated to a step: less padding, less memory
    trl_cached         as trl, precompute_ref_log_probs
    trl_cached_accumulated   both
    llamafactory       one pair at a time, accumulated
"""

from __future__ import annotations

import argparse
from typing import Any

import pair_summary
import pairs
import side_by_side
import summary
from side_by_side import Contender

ONE_BY_ONE = {"rows_per_pass": 1}
CONTENDERS = {
    "luthier": Contender("luthier_dpo.py"),
    "luthier_unshared": Contender("luthier_dpo.py", settings={"share_prompts": False}),
    "luthier_cached": Contender("luthier_dpo.py", settings={"precompute": True}),
    "trl": Contender("trl_dpo.py", "trl_python"),
    "trl_accumulated": Contender("trl_dpo.py", "trl_python", ONE_BY_ONE),
    "trl_cached": Contender("trl_dpo.py", "trl_python", {"precompute": True}),
    "trl_cached_accumulated": Contender("trl_dpo.py", "trl_python", {"precompute": True, **ONE_BY_ONE}),
    "llamafactory": Contender("llama_factory.py", "lf_python", ONE_BY_ONE),
}


def parse() -> argparse.Namespace:
    parser = side_by_side.parser(__doc__, CONTENDERS, dataset="dpo_en_demo", steps=4, results="dpo_cpu.json")
    parser.add_argument("--pairs-per-step", type=int, default=8)
    parser.add_argument(
        "--max-length", type=int, default=1024, help="pairs with a longer prompt and answer are left out"
    )
    return side_by_side.parse(parser, CONTENDERS)


def build_job(options: argparse.Namespace) -> dict[str, Any]:
    """What all workers are told."""
    count = options.steps * options.pairs_per_step
    chosen, rows = pairs.load(options.model, options.data, options.dataset, count, options.max_length)
    return {
        **side_by_side.job_settings(options),
        "stage": "dpo",
        "loss": "sigmoid",
        "beta": 0.1,
        "pairs": chosen,
        "max_samples": rows,
        "max_length": options.max_length,
        "rows_per_step": options.pairs_per_step,
        "rows_per_pass": options.pairs_per_step,
    }


def main() -> None:
    options = parse()
    job = build_job(options)
    settings = {key: value for key, value in job.items() if key not in ("pairs", "model", "data")}
    rounds: list[summary.Round] = []
    result: dict[str, Any] = {}
    for measured in side_by_side.rounds_of(options, job, CONTENDERS, summary.speed):
        rounds.append(measured)
        result = {
            "settings": settings,
            "pairs": pair_summary.sizes(job["pairs"]),
            **pair_summary.summarise(rounds, options.contenders),
            "rounds": rounds,
        }
        side_by_side.write(result, options.results)
    pair_summary.show(result)


if __name__ == "__main__":
    main()
