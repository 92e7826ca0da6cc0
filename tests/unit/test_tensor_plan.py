"""What tensor parallelism refuses before anything is loaded, what it costs, and who has which rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import LlavaConfig

from luthier.check.check import check
from luthier.parallel import build_strategy
from luthier.parallel.cost import Held, Whole, held, sent
from luthier.parallel.strategy import Replicated
from luthier.parallel.tensor import TensorParallel, require_plan
from luthier.recipe.load import load_recipe
from luthier.recipe.parallel_rules import require_parallel
from luthier.recipe.schema import TensorSpec
from luthier.trainer.processes import Processes
from luthier.types import ModelError, RecipeError
from tests.tiny import FAMILIES, chat_model, write_alpaca

NATIVE: dict[str, Any] = {
    "model": {"path": "m"},
    "data": {"train": ["a"], "dev_split": 2},
    "method": {"type": "full"},
    "parallel": {"type": "tensor", "group": 2},
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"parallel": {"type": "tensor", "group": 4}}, "group: 6 processes are not groups of 4; give parallel.process"),
        ({"stage": {"type": "dpo", "reference": "precompute"}}, "group: 2 with stage.reference: precompute"),
        ({"optim": {"type": "muon"}}, "divides matrices, and optim.type: muon as it is set here looks at whole ones"),
        ({"optim": {"type": "adamw", "bits": 8}}, "divides matrices, and optim.type: adamw"),
        ({"method": {"type": "vera"}}, "does not go with method.type: vera: of adapters, LoRA's alone are divided"),
        ({"method": {"type": "lora", "dropout": 0.1}}, "does not go with method.dropout: each process would draw it"),
        ({"method": {"type": "lora", "dora": True}}, "does not go with method.dora, which looks at whole matrices"),
        ({"train": {"precision": "fp16"}}, "does not go with train.precision: fp16"),
        ({"train": {"compile": {}}}, "does not go with train.compile"),
        ({"model": {"path": "m", "activation_offload": True}}, "does not go with model.activation_offload"),
        (
            {"model": {"path": "m", "quantization": {"type": "bitsandbytes"}}, "method": {"type": "lora"}},
            "does not go with model.quantization",
        ),
        (
            {"train": {"generate_at_eval": {}, "eval_every": 1}},
            "does not go with train.generate_at_eval: answers are made by processes that hold the whole model",
        ),
    ],
)  # fmt: skip
def test_recipes_that_are_refused(changes: dict[str, Any], message: str) -> None:
    recipe = load_recipe(NATIVE | changes).recipe
    with pytest.raises(RecipeError) as caught:
        require_parallel(recipe, 6)
    assert str(caught.value).startswith(
        f"parallel: tensor{'.' if message.startswith('group') else ' '}{message}"
    )


def test_what_goes_is_not_refused() -> None:
    for method in ("full", "freeze", "llama_pro", "lora"):
        method_spec = {"type": method, **({"blocks": 2} if method == "llama_pro" else {})}
        require_parallel(load_recipe(NATIVE | {"method": method_spec}).recipe, 6)


def test_models_that_are_refused() -> None:
    def refusal(config: Any, group: int | None = 2) -> str:
        with pytest.raises(ModelError) as caught:
            require_plan(config, group)
        return str(caught.value).removeprefix("parallel: tensor")

    assert refusal(FAMILIES["gpt2"]()).startswith(
        ": transformers has no plan of how GPT2Config is divided; use"
    )
    assert refusal(FAMILIES["qwen3-moe"]()).startswith(": Qwen3MoeConfig is divided by moe_tp_experts")
    assert refusal(LlavaConfig()).startswith(" with LlavaConfig: towers of images or sounds are not divided")
    assert refusal(FAMILIES["llama"](), 4) == (
        ": 4 processes cannot share the 2 heads of LlamaConfig (num_key_value_heads); give a group that divides 2"
    )
    dropping = FAMILIES["llama"]()
    dropping.attention_dropout = 0.1
    assert refusal(dropping).startswith(
        ": the config of LlamaConfig has attention_dropout=0.1, and each process"
    )
    # What Phi-3 divides is gathered before its heads are told apart.
    assert require_plan(FAMILIES["phi3"](), 3)["layers.*.self_attn.qkv_proj"] == "colwise_gather_output"
    assert require_plan(FAMILIES["llama"](), None)


def test_check_says_so(tmp_path: Path) -> None:
    chat_model(tmp_path / "model")
    write_alpaca(tmp_path / "a.json", 8)
    recipe = {
        "model": {"path": str(tmp_path / "model")},
        "data": {"train": [{"file_name": str(tmp_path / "a.json")}], "cache": str(tmp_path / "cache")},
        "method": {"type": "full"},
        "train": {"output": str(tmp_path / "out")},
        "parallel": {"type": "tensor", "processes": 4},
    }
    problems = [problem.message for problem in check(recipe, probe=False).problems]
    assert len(problems) == 1
    assert problems[0].endswith(
        "4 processes cannot share the 2 heads of LlamaForCausalLM (num_key_value_heads); give a group that divides 2"
    )
    recipe["parallel"] = {"type": "tensor", "processes": 4, "group": 2}
    assert check(recipe, probe=False).problems == []


def test_groups_share_rows() -> None:
    recipe, config = load_recipe(NATIVE).recipe, FAMILIES["llama"]()
    strategy = build_strategy(recipe, 6, config)
    assert isinstance(strategy, TensorParallel)
    assert strategy.copies == 2
    shared = [Processes(rank, 6).with_rows(strategy.copies) for rank in range(6)]
    assert [(one.rank, one.count) for one in shared] == [(0, 3), (0, 3), (1, 3), (1, 3), (2, 3), (2, 3)]
    assert isinstance(build_strategy(recipe, 1, config), Replicated)


def test_what_tensor_parallelism_costs() -> None:
    # 1000 bytes of weights, of which 200 stay whole; 10 bytes enter all layers.
    whole = Whole(1000, 1000, 2000, 0, 1000, outside=200, hidden=10)
    assert held(TensorSpec(), 4, whole) == Held(400, 400, 800)
    assert sent(TensorSpec(), 4, whole, passes=3) == round(2 * 3 * 7 * 10 * 3 / 4)
    # Two groups of two: what they hold of gradients, 600 bytes, is averaged between them too.
    assert held(TensorSpec(group=2), 4, whole) == Held(600, 600, 1200)
    assert sent(TensorSpec(group=2), 4, whole) == round(2 * (7 * 10 / 2 + 600 / 2))
