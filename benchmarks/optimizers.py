"""Bytes that each optimizer keeps between steps, against AdamW's, on a model of real proportions.

The model has the layers of SmolLM2-135M, two of them, and 8192 tokens; no data and gradients of ones: states depend on
shapes alone.
Counted are the tensors of `state_dict` after steps, each storage once.
Gradients are those that the optimizer lets exist at once. Writes benchmarks/results/optimizers.json.

    python benchmarks/optimizers.py
"""

from __future__ import annotations

import argparse
import json
import platform
from importlib import util
from pathlib import Path
from typing import Any

import torch
import transformers
from pydantic import TypeAdapter
from transformers import AutoModelForCausalLM, LlamaConfig

from luthier.optim.build import build_optimizer
from luthier.optim.state_size import gradients_at_once, state_bytes
from luthier.recipe.schema import AnyOptimSpec
from luthier.trainer.snapshot import num_bytes

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adamw": {"type": "adamw"},
    "adamw, 8 bits": {"type": "adamw", "bits": 8},
    "sgd": {"type": "sgd"},
    "sgd, momentum": {"type": "sgd", "momentum": 0.9},
    "lion": {"type": "lion"},
    "lion, 8 bits": {"type": "lion", "bits": 8},
    "adafactor": {"type": "adafactor"},
    "muon": {"type": "muon"},
    "schedule_free": {"type": "schedule_free"},
    "galore, rank 128": {"type": "galore"},
    "galore, rank 128, layerwise": {"type": "galore", "layerwise": True, "max_grad_norm": 0},
    "apollo, rank 128": {"type": "apollo"},
    "apollo, rank 1 (mini)": {"type": "apollo", "rank": 1, "scale_type": "tensor", "scale": 128},
    "badam": {"type": "badam"},
    "badam_ratio, 5 %": {"type": "badam_ratio"},
    "adam_mini": {"type": "adam_mini"},
    "adalomo": {"type": "adalomo"},
    "lomo": {"type": "lomo"},
}
STEPS = 2


def tied_model(layers: int) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(
        LlamaConfig(
            vocab_size=8192,
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=layers,
            num_attention_heads=9,
            num_key_value_heads=3,
            tie_word_embeddings=True,
        )
    )


def measure(settings: dict[str, Any], layers: int) -> dict[str, int]:
    """Bytes counted after steps, bytes foretold, and bytes of gradients that are there at once."""
    model = tied_model(layers)
    spec = TypeAdapter(AnyOptimSpec).validate_python(settings)
    foretold = state_bytes(spec, model)
    gradients = sum(p.numel() * p.element_size() for p in gradients_at_once(spec, model))
    parameters = list(model.parameters())
    optimizer = build_optimizer(spec, [{"params": parameters, "weight_decay": 0.0}], model)
    most = 0
    for _ in range(STEPS):
        for parameter in parameters:
            if parameter.requires_grad:
                parameter.sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        most = max(most, num_bytes(optimizer.state_dict()))
    return {"state": most, "foretold": foretold, "gradients": gradients}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results" / "optimizers.json")
    arguments = parser.parse_args()
    parameters = sum(parameter.numel() for parameter in tied_model(arguments.layers).parameters())
    rows, absent = {}, []
    for name, settings in OPTIMIZERS.items():
        if settings.get("bits") and util.find_spec("bitsandbytes") is None:
            absent.append(name)
            continue
        rows[name] = measure(settings, arguments.layers)
        print(f"{name:30} {rows[name]['state'] / 1e6:9.1f} MB of states", flush=True)
    whole = rows["adamw"]["state"]
    for row in rows.values():
        row["state_share_of_adamw"] = round(row["state"] / whole, 4)  # type: ignore[assignment]
        row["state_bytes_per_parameter"] = round(row["state"] / parameters, 3)  # type: ignore[assignment]
    result = {
        "model": {"layers": arguments.layers, "parameters": parameters, "type": "float32"},
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "not_installed": absent,
        "optimizers": rows,
    }
    arguments.results.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
