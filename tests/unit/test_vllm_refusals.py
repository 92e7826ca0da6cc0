"""What is refused before vLLM is asked anything: these hold with and without it."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib import util
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig

from luthier.engine.vllm import require_plain_lora
from luthier.engine.vllm_model import open_vllm, require_held
from luthier.model.load import ModelSource
from luthier.recipe.generation import GenerationSpec
from luthier.recipe.schema import ModelSpec
from luthier.recipe.settings import read_settings
from luthier.trained.source import Trained
from luthier.types import ModelError, RecipeError

WHOLE = Trained("exported", ModelSpec(path="exported", dtype="float32"), (), "exported", "language")
LOCAL = ModelSource("exported", local=True)


def adapter(folder: Path, **changes: Any) -> Path:
    config = LoraConfig(**{"r": 6, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"} | changes)
    config.save_pretrained(str(folder))
    return folder


@pytest.mark.parametrize(
    "changes", [{}, {"use_rslora": True, "lora_alpha": 3}, {"lora_dropout": 0.1}], ids=str
)
def test_a_plain_lora_adapter_is_held(tmp_path: Path, changes: dict[str, Any]) -> None:
    assert require_plain_lora("one", adapter(tmp_path, **changes)) == 6


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
        ({"bias": "all"}, "bias"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights pissa"),
        ({"trainable_token_indices": [3]}, "trainable_token_indices"),
        ({"r": 600}, "rank 600"),
    ],
    ids=str,
)
def test_more_than_a_plain_lora_adapter_is_refused(tmp_path: Path, changes: dict[str, Any], why: str) -> None:
    with pytest.raises(
        ModelError, match=rf"vLLM can add to its base \({why}\): export it with `luthier export`"
    ):
        require_plain_lora("one", adapter(tmp_path, **changes))


def test_another_type_of_adapter_is_refused(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "IA3"}), encoding="utf-8")
    with pytest.raises(ModelError, match=r"\(type IA3\)"):
        require_plain_lora("one", tmp_path)
    with pytest.raises(ModelError, match=r"its adapter_config\.json cannot be read"):
        require_plain_lora("one", tmp_path / "nothing")


@pytest.mark.parametrize(
    ("trained", "source", "why"),
    [
        (replace(WHOLE, kind="reward"), LOCAL, "it is a reward model"),
        (replace(WHOLE, adapters=("a", "b")), LOCAL, "it has adapters below the last one"),
        (
            replace(WHOLE, model=ModelSpec.model_validate({"path": "m", "trust_remote_code": True})),
            LOCAL,
            "it runs code of its own",
        ),
        (
            replace(
                WHOLE, model=ModelSpec.model_validate({"path": "m", "quantization": {"type": "bitsandbytes"}})
            ),
            LOCAL,
            "it is quantized while it is loaded",
        ),
        (WHOLE, ModelSource("owner/name", local=False), "it is not in a local folder"),
    ],
    ids=lambda value: value.replace(" ", "_") if isinstance(value, str) else "",
)
def test_a_model_that_is_not_in_its_folder_as_it_was_trained(
    trained: Trained, source: ModelSource, why: str
) -> None:
    require_held(WHOLE, LOCAL)
    with pytest.raises(ModelError, match=f"and {why}: export it with `luthier export`"):
        require_held(trained, source)


def test_another_device_than_that_of_vllm_is_refused() -> None:
    other = torch.device("cpu" if torch.cuda.is_available() else "cuda")
    with pytest.raises(ModelError, match=f"--device {other}: vLLM chooses its device itself"):
        open_vllm(WHOLE, LOCAL, GenerationSpec(), decode=str, adapters={}, device=other)


def test_the_engine_is_no_setting_of_an_answer() -> None:
    with pytest.raises(
        RecipeError, match="engine=vllm: the engine is chosen before the model is loaded: --engine vllm"
    ):
        read_settings(["engine=vllm"])


@pytest.mark.skipif(util.find_spec("vllm") is not None, reason="vLLM is installed here")
def test_without_vllm_its_install_line_is_said() -> None:
    here = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(
        ModelError, match=r"pip install 'luthier\[vllm\]' on a GPU, or as docs/engines\.md says"
    ):
        open_vllm(WHOLE, LOCAL, GenerationSpec(), decode=str, adapters={}, device=here)
