"""What goes wrong in the middle of a run of ppo or grpo: services, answers without words, engines."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import luthier
from luthier.experience import RewardError
from luthier.launch import verb
from luthier.recipe.schema import Recipe
from luthier.trainer.checkpoint import verify
from luthier.types import RecipeError
from tests.online import logged, online_recipe

ROLLOUTS = 2
"""That a service answers well before it no longer does."""


@contextmanager
def service(fault: str) -> Iterator[str]:
    """The address of a service that scores two rollouts, and then fails in one way for ever."""
    asked: list[int] = []
    released = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            conversations = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["messages"]
            asked.append(len(conversations))
            body = json.dumps({"scores": [0.5] * len(conversations)})
            if len(asked) > ROLLOUTS:
                if fault == "slow":
                    released.wait(10)
                    return
                body = {
                    "down": "",
                    "shape": json.dumps({"scores": [0.5] * (len(conversations) + 1)}),
                    "nan": json.dumps({"scores": [math.nan] * len(conversations)}),
                }[fault]
            self.send_response(503 if not body else 200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/score"
    finally:
        released.set()
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.parametrize(
    ("fault", "words"),
    [("down", "503"), ("slow", "seconds"), ("shape", "numbers|scores"), ("nan", "nan|finite|NaN")],
)
def test_a_service_that_fails_later_ends_the_run_and_its_checkpoints_are_whole(
    fault: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    recipe = online_recipe(tmp_path, {"type": "grpo", "group_size": 2})
    recipe["train"]["save_every"] = 1
    with service(fault) as url:
        recipe["stage"]["rewards"] = [{"type": "http", "url": url, "timeout": 0.5, "retries": 0}]
        with pytest.raises(RewardError, match=words):
            luthier.train(recipe, quiet=True)
    run = tmp_path / "run"
    assert sorted(path.name for path in run.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]
    for checkpoint in run.glob("checkpoint-*"):
        verify(checkpoint)
    assert {line["rollout"] for line in logged(run, "samples.jsonl")} == {0, 1}


@pytest.mark.parametrize("stage", ["ppo", "grpo"])
def test_answers_without_words_are_learnt_from(stage: str, tmp_path: Path) -> None:
    """A policy that nearly always stops at once: its answer is the stop token, so no sum over the tokens is empty."""
    recipe = online_recipe(tmp_path, {"type": stage, "prompts_per_rollout": 4})
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    stop = AutoTokenizer.from_pretrained(tmp_path / "model").eos_token_id
    with torch.no_grad():  # one number is large in every state, and the head reads a stop from it
        model.model.embed_tokens.weight[:, 0] = 10.0
        model.lm_head.weight[stop, 0] = 1.5
    model.save_pretrained(tmp_path / "model")
    run = luthier.train(recipe, quiet=True).output
    steps = [line for line in logged(run) if "loss" in line]
    assert steps and all(math.isfinite(line["loss"]) and math.isfinite(line["grad_norm"]) for line in steps)
    answers = logged(run, "samples.jsonl")
    empty = [line for line in answers if line["completion"] == ""]
    assert len(empty) > len(answers) / 2
    assert {(line["tokens"], line["finish"], line["reward"]) for line in empty} == {(1, "stop", 0.0)}
    weights = load_file(run / "adapter_model.safetensors")
    assert all(torch.isfinite(weight).all() for weight in weights.values())


def test_another_engine_is_refused_where_the_model_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the recipe's own rule did not see it."""
    told = verb.resolve

    def changed(recipe: Recipe, *args: Any, **options: Any) -> Any:
        found = told(recipe, *args, **options)
        generation = found.recipe.generation.model_copy(update={"engine": "vllm"})
        object.__setattr__(found, "recipe", found.recipe.model_copy(update={"generation": generation}))
        return found

    monkeypatch.setattr(verb, "resolve", changed)
    with pytest.raises(
        RecipeError, match="engine: vllm: it would answer with weights of its own, which do not learn"
    ):
        luthier.train(online_recipe(tmp_path, {"type": "grpo"}), quiet=True)
