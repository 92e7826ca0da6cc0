"""A policy of two layers learns by PPO or GRPO to say a letter back and then to stop: the smallest run that can end.

    python examples/toy/echo.py grpo            # or ppo
    python examples/toy/echo.py ppo --seed 1

The best return is known: 1 for every prompt. The random policy that it starts from gets about 0.05. A run takes a
minute on one core.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import luthier

LETTERS = "abcdefgh"
TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def reward(prompt: str, completion: str, row: Mapping[str, Any]) -> float:
    """1 for the letter at the beginning, and a quarter off for each letter after the first."""
    return float(completion.startswith(row["output"])) - 0.25 * max(0, len(completion) - 1)


def make_policy(folder: Path, seed: int) -> None:
    """Random weights and a tokenizer of twelve tokens."""
    tokens = ["<pad>", "<user>", "<assistant>", "<end>", *LETTERS]
    backend = Tokenizer(models.WordLevel({token: number for number, token in enumerate(tokens)}, "<pad>"))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="<end>",
        additional_special_tokens=["<user>", "<assistant>"],
        chat_template=TEMPLATE,
    )
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokens),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=32,
        bos_token_id=None,
        eos_token_id=3,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


STAGES: dict[str, dict[str, Any]] = {
    "grpo": {"type": "grpo", "prompts_per_rollout": 8, "group_size": 16, "entropy": 0.1},
    "ppo": {
        "type": "ppo",
        "prompts_per_rollout": 128,
        "epochs": 2,
        "entropy": 0.1,  # less, and the policy settles on the first letters that it finds
        "trace": 1.0,
        "value_weight": 0.5,
        "kl": {"coefficient": 0.0},
    },
}


def recipe(stage: str, folder: Path, seed: int, steps: int) -> dict[str, Any]:
    """Everything trains; prompts are the letters, again and again."""
    rows = [{"instruction": letter, "output": letter} for letter in LETTERS]
    (folder / "letters.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows * 64))
    (folder / "held_out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "model": {"path": str(folder / "policy")},
        "data": {
            "train": [str(folder / "letters.jsonl")],
            "eval": [str(folder / "held_out.jsonl")],
            "cache": str(folder / "cache"),
            "max_length": 32,
        },
        "stage": {
            "rewards": [{"type": "function", "path": f"{Path(__file__).resolve()}:reward"}],
            **STAGES[stage],
        },
        "method": {"type": "full"},
        "optim": {"type": "adamw", "lr": 1e-3, "schedule": "constant"},
        "generation": {"max_new_tokens": 4, "rows": 128},
        "train": {
            "max_steps": steps,
            "seed": seed,
            "output": str(folder / "run"),
            "save_every": None,
            "log_every": 10,
        },
    }


def returns(stage: str, seed: int = 0, steps: int = 200, *, quiet: bool = False) -> float:
    """The mean reward of sampled answers after training."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_policy(folder / "policy", seed)
        result = luthier.train(recipe(stage, folder, seed, steps), quiet=quiet)
        return result.metrics["eval_reward"]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=200)
    options = parser.parse_args()
    print(
        f"mean reward after training: {returns(options.stage, options.seed, options.steps):.3f} of at most 1"
    )
