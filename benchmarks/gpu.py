"""One CUDA GPU, one command: are the fast paths exact on it, and how fast are they?

    python benchmarks/gpu.py                                   # a machine with a GPU, within eight minutes
    python benchmarks/gpu.py --device cpu --shapes tiny        # the same program, small, on a CPU

It runs from a checkout without installing it and reads no file: models of the real sizes of Qwen3-0.6B and
Qwen3-8B get random weights on the device, rows are random tokens with lengths like alpaca's. It needs torch >=
2.11, transformers >= 5.17, peft, accelerate, numpy, pydantic, PyYAML (transformers brings it) and rich; the
modules of luthier that it imports need no more (no datasets, no pydantic-settings, no typer).

First come the equalities (`gpu_equalities.py`), on the smallest of the shapes, then speed and memory
(`gpu_speed.py`) for as many settings as the time allows; what was left out is in the result with its reason.
The result is written after every part, so an interrupted run leaves what it had. The exit status is 0 only if
every equality holds and no contender broke.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import checkout
from gpu_device import open_machine

DEFAULT_SHAPES = "0.6B,8B"
PRECISIONS = "fp32,bf16,mixed"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = checkout.REPOSITORY / "benchmarks" / "results" / "gpu.json"
    parser.add_argument("--out", type=Path, default=default, help="the result, JSON")
    parser.add_argument("--minutes", type=float, default=8.0, help="time for everything")
    parser.add_argument("--shapes", default=DEFAULT_SHAPES, help="sizes to measure: tiny, 0.6B, 8B")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--precisions", default=PRECISIONS, help="of the equalities")
    parser.add_argument(
        "--rows", default="8,64", help="rows of an optimizer step; every method at the first number"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--steps", type=int, default=10, help="timed optimizer steps of a contender in a round"
    )
    options = parser.parse_args()
    for field, known in (("shapes", ("tiny", "0.6B", "8B")), ("precisions", tuple(PRECISIONS.split(",")))):
        chosen = getattr(options, field).split(",")
        unknown = sorted(set(chosen) - set(known))
        if unknown:
            parser.error(f"--{field}: {', '.join(unknown)} is unknown; choose from {', '.join(known)}")
        setattr(options, field, chosen)
    try:
        options.rows = [int(rows) for rows in options.rows.split(",")]
    except ValueError:
        parser.error("--rows: numbers with commas between them are expected")
    if min(*options.rows, options.rounds, options.steps) < 1 or options.minutes <= 0:
        parser.error("--rows, --rounds, --steps and --minutes must be positive")
    return options


def write(result: dict[str, Any], out: Path) -> None:
    """Put the result in place whole: a reader never sees half of one."""
    out.parent.mkdir(parents=True, exist_ok=True)
    staging = out.with_name(f".{out.name}.{os.getpid()}")
    staging.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    staging.replace(out)


def show_check(check: dict[str, Any]) -> None:
    verdict = "ok    " if check["passed"] else "FAILED"
    numbers = ", ".join(f"{name} {value:.2g}" for name, value in check["values"].items())
    print(f"{verdict} {check['precision']:5} {check['check']}: {check.get('error', numbers)}", flush=True)


def show_case(case: dict[str, Any]) -> None:
    if "skipped" in case:
        print(f"skipped {case['case']}: {case['skipped']}", flush=True)
        return
    measured = [name for name in ("luthier", "padded") if name in case]
    parts = [f"{name} {case[name]['tokens_per_second']['median']:.0f} tokens/s" for name in measured]
    parts += [f"{name} {ratio['median']:.2f}x" for name, ratio in case.get("luthier_over_padded", {}).items()]
    print(
        f"{'ok    ' if case['passed'] else 'FAILED'} {case['case']}: {', '.join(parts + case['errors'])}",
        flush=True,
    )


def main() -> None:
    options = parse()
    started = time.monotonic()
    machine = open_machine(options.device)
    # After the device is known to be there: these take seconds to import.
    import gpu_speed
    from gpu_equalities import run_equalities
    from gpu_shapes import SHAPES

    peak = machine.matmul_rate()
    result: dict[str, Any] = {
        "machine": machine.describe(),
        "matmul_flops_per_second": peak,
        "known_peak_flops_per_second": machine.known_peak(),
        "flops": "matrix products of real tokens and targets (floor.py): 4 per weight and token for LoRA, 6 for "
        "full, 12 per causal pair and head dimension; no padding, no recomputation",
        "settings": {
            "shapes": options.shapes,
            "rows": options.rows,
            "rounds": options.rounds,
            "steps": options.steps,
            "warmup": gpu_speed.WARMUP,
            "minutes": options.minutes,
        },
        "equalities": [],
        "speed": [],
    }
    smallest = min((SHAPES[name] for name in options.shapes), key=gpu_speed.num_parameters)
    for check in run_equalities(smallest, machine, options.precisions):
        result["equalities"].append(check)
        show_check(check)
    write(result, options.out)
    budget = gpu_speed.Budget(started + 60 * options.minutes)
    meter = gpu_speed.Meter(machine, budget, peak, options.rounds, options.steps)
    for case in gpu_speed.run_speed(meter, gpu_speed.plan(options.shapes, options.rows)):
        result["speed"].append(case)
        show_case(case)
        write(result, options.out)
    failed = [
        f"{check['check']} ({check['precision']})" for check in result["equalities"] if not check["passed"]
    ]
    failed += [case["case"] for case in result["speed"] if not case.get("passed", True)]
    result |= {"passed": not failed, "failed": failed, "seconds": time.monotonic() - started}
    write(result, options.out)
    print(f"{options.out}: {result['seconds']:.0f} s")
    if failed:
        raise SystemExit("failed: " + "; ".join(failed))


if __name__ == "__main__":
    main()
