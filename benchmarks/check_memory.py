"""Whether the memory that `luthier check` estimates is the memory that `luthier train` then takes.

    python benchmarks/check_memory.py --model FOLDER

Every recipe is checked in one process, without its probe, and trained for a few steps in another one, whose
resident set's high-water mark is the truth. The model is the embedded one, or a folder with a small one.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import checkout

from luthier.environment import detect_hardware, version_of
from luthier.model.load import locate
from luthier.recipe.schema import EMBEDDED_MODEL, ModelSpec

HERE = Path(__file__).resolve().parent
CHAT = {"train": ["alpaca_en_demo"], "max_samples": 200}
TEXT = {"train": ["wiki_demo"], "max_samples": 10, "max_length": 1024}

RECIPES: dict[str, dict[str, Any]] = {
    "sft full, adamw": {"method": {"type": "full"}},
    "sft lora": {"method": {"type": "lora"}},
    "sft lora, 256 tokens a pass": {"method": {"type": "lora"}, "train": {"tokens_per_pass": 256}},
    "sft lora, 2048 tokens a pass, checkpointed": {
        "model": {"gradient_checkpointing": True},
        "method": {"type": "lora"},
        "train": {"tokens_per_pass": 2048},
    },
    "sft freeze": {"method": {"type": "freeze"}},
    "sft full in bfloat16, sgd": {
        "model": {"dtype": "bfloat16"},
        "method": {"type": "full"},
        "optim": {"type": "sgd"},
        "train": {"tokens_per_pass": 256, "tokens_per_batch": 1024},
    },
    "pt lora, blocks of 1024": {"stage": {"type": "pt"}, "method": {"type": "lora"}, "data": TEXT},
    "sft full, saved after each step": {
        "method": {"type": "full"},
        "train": {"save_every": 1, "save_total_limit": 1, "tokens_per_pass": 256, "tokens_per_batch": 512},
    },
}

FEW = {
    "data": {"train": ["alpaca_en_demo"], "max_samples": 40},
    "train": {"tokens_per_pass": 256, "tokens_per_batch": 512, "max_steps": 2},
}
METHODS: dict[str, dict[str, Any]] = {
    "dora": {"type": "lora", "dora": True},
    "pissa": {"type": "lora", "init": "pissa", "init_iterations": 4},
    "lora-fa": {"type": "lora", "freeze_a": True},
    "oft": {"type": "oft"},
    "vera": {"type": "vera"},
    "ia3": {"type": "ia3"},
    "miss": {"type": "miss"},
    "loha": {"type": "peft", "config": {"peft_type": "LOHA", "r": 8}},
    "llama_pro": {"type": "llama_pro", "blocks": 2},
}
BASES: dict[str, dict[str, Any]] = {
    "nf4": {"type": "bitsandbytes"},
    "int8": {"type": "bitsandbytes", "bits": 8},
    "torchao int8": {"type": "torchao"},
    "hqq": {"type": "hqq"},
}
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adamw, 8 bits": {"type": "adamw", "bits": 8},
    "adafactor": {"type": "adafactor"},
    "muon": {"type": "muon"},
    "galore": {"type": "galore"},
    "galore, layerwise": {"type": "galore", "layerwise": True, "max_grad_norm": 0},
    "apollo": {"type": "apollo"},
    "badam": {"type": "badam"},
    "lomo": {"type": "lomo"},
}
IN_ONE_PASS = {"train": FEW["train"] | {"tokens_per_batch": 256}}
"""An optimizer that works within the backward pass takes steps of one pass."""
RECIPES |= {f"sft {name}": FEW | {"method": method} for name, method in METHODS.items()}
RECIPES |= {
    f"sft {how} on {name}": FEW | {"model": {"quantization": base}, "method": {"type": how}}
    for how in ("lora", "oft")
    for name, base in BASES.items()
    if how == "lora" or name in ("nf4", "int8")
}
RECIPES |= {
    f"sft full, {name}": FEW
    | {"method": {"type": "full"}, "optim": optim}
    | (IN_ONE_PASS if optim["type"].endswith("lomo") or "layerwise" in optim else {})
    for name, optim in OPTIMIZERS.items()
}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=EMBEDDED_MODEL, help="folder with weights and tokenizer")
    parser.add_argument(
        "--data", type=Path, default=checkout.REPOSITORY.parent / "shared" / "data", help="data folder"
    )
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--steps", type=int, default=3, help="optimizer steps of each training")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--kept-peaks", action="store_true", help="do not train where the results file has a recipe's peak"
    )
    parser.add_argument("--results", type=Path, default=HERE / "results" / "check_memory.json")
    options = parser.parse_args()
    options.model = Path(locate(ModelSpec(path=options.model)).path)
    return options


def recipe_of(options: argparse.Namespace, name: str, folder: Path) -> Path:
    changes = RECIPES[name]
    tree = {
        "model": {"path": str(options.model.resolve())} | changes.get("model", {}),
        "data": {"directory": str(options.data.resolve()), "cache": str(folder / "cache")}
        | changes.get("data", CHAT),
        "stage": changes.get("stage", {"type": "sft"}),
        "method": changes["method"],
        "optim": changes.get("optim", {"type": "adamw"}),
        "train": {
            "max_steps": options.steps,
            "tokens_per_batch": 2048,
            "output": str(folder / "run"),
            "save_every": None,
            "plots": False,
        }
        | changes.get("train", {}),
    }
    file = folder / "recipe.json"
    file.write_text(json.dumps(tree), encoding="utf-8")
    return file


def run(options: argparse.Namespace, *command: str) -> dict[str, Any]:
    """The JSON object that a command prints last. Raises SystemExit with its last lines where it fails."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(options.threads),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(checkout.REPOSITORY / "src"),
    }
    done = subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed ({done.returncode}):\n{done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout[done.stdout.index("{") :])
    return found


def measure(options: argparse.Namespace, name: str, before: dict[str, Any] | None) -> dict[str, Any]:
    """Estimate and peak of a recipe; `before` is the row whose peak is kept."""
    with tempfile.TemporaryDirectory() as folder:
        recipe = recipe_of(options, name, Path(folder))
        said = run(
            options, "-m", "luthier.cli", "check", str(recipe), "--json", "--no-probe", "--samples", "0"
        )
        trained = before and {"peak": before["measured"], "tokens": before["tokens"]}
        trained = trained or run(options, str(HERE / "workers" / "luthier_peak.py"), str(recipe))
    estimate = said["memory"]
    return {
        "recipe": RECIPES[name],
        "estimated": estimate["total"],
        "measured": trained["peak"],
        "ratio": estimate["total"] / trained["peak"],
        "fullest": estimate["fullest"],
        "parts": estimate["parts"],
        "longest_pass": said["schedule"]["longest_pass"],
        "tokens": trained["tokens"],
        "threads": (before or {}).get("threads", options.threads),
    }


def main() -> None:
    options = parse()
    hardware = detect_hardware()
    kept = json.loads(options.results.read_text(encoding="utf-8")) if options.results.is_file() else {}
    rows: dict[str, Any] = {name: row for name, row in kept.get("recipes", {}).items() if name in RECIPES}
    for name in options.recipes:
        before = rows.get(name) if options.kept_peaks else None
        same = before is not None and before["recipe"] == RECIPES[name]
        rows[name] = row = measure(options, name, before if same else None)
        mib = [row[key] / 2**20 for key in ("estimated", "measured")]
        print(f"{name:<48}{mib[0]:7.0f} MiB estimated {mib[1]:7.0f} measured {row['ratio']:6.3f}", flush=True)
        result = {
            "machine": {"device": hardware.name, "cores": hardware.cores},
            "libraries": {package: version_of(package) for package in ("torch", "transformers", "peft")},
            "steps": options.steps,
            "largest_error": max(abs(one["ratio"] - 1) for one in rows.values()),
            "recipes": rows,
        }
        options.results.parent.mkdir(parents=True, exist_ok=True)
        options.results.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
