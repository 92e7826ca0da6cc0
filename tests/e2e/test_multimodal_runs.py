"""Runs on images: what the loss is, what changes and what does not, what is saved, resumed and exported."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForMultimodalLM, AutoProcessor, Qwen2_5_VLProcessor

import luthier
from luthier.data.processors import processor_class
from luthier.export_verb import export
from luthier.model.multimodal import PARTS
from luthier.types import ModelError
from tests.media import picture
from tests.multimodal import media_model

QWEN = "qwen2.5-vl"
PROCESSOR_FILE = "processor_config.json"


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {
        family: media_model(tmp_path_factory.mktemp(family), family) for family in (QWEN, "gemma3", "llava")
    }


def _rows(folder: Path, kind: str) -> dict[str, Any]:
    """Eight rows, every third without a picture, and how to read them."""
    rows = []
    for k in range(8):
        images = [] if k % 3 == 2 else [picture(folder / f"{k}.png", 40 + 9 * k, 30, seed=k).name]
        question = {"role": "user", "content": "<image>" * len(images) + f"What is in {k}?"}
        answer, other = ({"role": "assistant", "content": text} for text in (f"It is {k}.", "Nothing."))
        if kind == "conversation":
            rows.append({"messages": [question, answer], "images": images})
        else:
            rows.append({"messages": [question], "chosen": answer, "rejected": other, "images": images})
    (folder / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    columns = {"messages": "messages", "images": "images"}
    if kind == "pair":
        columns |= {"chosen": "chosen", "rejected": "rejected"}
    tags = {
        "role_tag": "role",
        "content_tag": "content",
        "user_tag": "user",
        "assistant_tag": "assistant",
    }
    described = {"file_name": "rows.json", "formatting": "sharegpt", "columns": columns, "tags": tags}
    return described | ({"ranking": True} if kind == "pair" else {})


def _recipe(folder: Path, base: Path, kind: str = "conversation", **sections: Any) -> dict[str, Any]:
    return {
        "model": {"path": str(base), **sections.pop("model", {})},
        "data": {
            "train": [_rows(folder, kind)],
            "directory": str(folder),
            "cache": str(folder / "cache"),
        },
        "method": {"type": "full"},
        "optim": {"lr": 0.01},
        **sections,
        "train": {
            "rows_per_device": 4,
            "epochs": 2,
            "save_every": 1,
            "log_every": 1,
            "plots": False,
            "output": str(folder / "run"),
            **sections.get("train", {}),
        },
    }


def _log(run: Path, key: str = "loss") -> list[float]:
    lines = [json.loads(line) for line in (run / "trainer_log.jsonl").read_text().splitlines()]
    return [line[key] for line in lines if key in line]


def _state(folder: Path) -> dict[str, Tensor]:
    """The weights in a folder as transformers reads them."""
    return dict(AutoModelForMultimodalLM.from_pretrained(folder).state_dict())


def _processor(folder: Path, family: str) -> Any:
    """As anybody loads it; of Qwen2.5-VL, where torchvision is missing, without films."""
    if family == QWEN:
        return processor_class(Qwen2_5_VLProcessor).from_pretrained(folder)
    return AutoProcessor.from_pretrained(folder)


def _part(name: str) -> str:
    inside = name.removeprefix("model.")
    fitting = [known for known in PARTS if inside.startswith(f"{known}.")]
    return PARTS[max(fitting, key=len)] if fitting else "language"


def test_the_loss_is_that_of_plain_transformers_on_the_demonstration(
    bases: dict[str, Path], shared_data: Path, tmp_path: Path
) -> None:
    """Six conversations with real pictures, as processor, template and model of transformers have them."""
    base = bases[QWEN]
    recipe = _recipe(tmp_path, base, train={"rows_per_device": 6, "epochs": 1})
    recipe["data"] |= {"train": ["mllm_demo"], "directory": str(shared_data)}
    luthier.train(recipe, quiet=True)
    model, processor = AutoModelForMultimodalLM.from_pretrained(base), _processor(base, QWEN)
    encode = processor.tokenizer.encode
    opening = encode("<|im_start|>assistant\n", add_special_tokens=False)
    end = processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    total, num_targets = 0.0, 0
    for row in json.loads((shared_data / "mllm_demo.json").read_text(encoding="utf-8")):
        text = processor.tokenizer.apply_chat_template(row["messages"], tokenize=False)
        text = text.replace("<image>", "<|vision_start|><|image_pad|><|vision_end|>")
        images = [Image.open(shared_data / name).convert("RGB") for name in row["images"]]
        inputs = processor(text=[text], images=images, return_tensors="pt", add_special_tokens=False)
        ids, labels = inputs["input_ids"][0].tolist(), [-100] * inputs["input_ids"].shape[1]
        for start in range(len(ids)):
            if ids[start : start + len(opening)] == opening:
                begin = start + len(opening)
                stop = ids.index(end, begin) + 1
                labels[begin:stop] = ids[begin:stop]
        targets = sum(label != -100 for label in labels)
        with torch.no_grad():
            total += float(model(**inputs, labels=torch.tensor([labels])).loss) * targets
        num_targets += targets
    assert num_targets == 880
    assert _log(tmp_path / "run")[0] == pytest.approx(
        total / num_targets, abs=1e-4
    )  # the log has four places


@pytest.mark.parametrize(
    ("family", "method", "parts", "moved"),
    [
        (QWEN, {"type": "full"}, None, {"language"}),
        (QWEN, {"type": "full"}, ["language"], {"tower", "projector"}),
        ("gemma3", {"type": "full"}, ["tower"], {"projector", "language"}),
        ("llava", {"type": "freeze", "layers": 1}, ["tower"], {"projector", "language"}),
    ],
)
def test_what_is_frozen_keeps_its_bits(
    family: str,
    method: dict[str, Any],
    parts: list[str] | None,
    moved: set[str],
    bases: dict[str, Path],
    tmp_path: Path,
) -> None:
    base, run = bases[family], tmp_path / "run"
    model = {} if parts is None else {"frozen_parts": parts}
    luthier.train(
        _recipe(tmp_path, base, model=model, method=method),
        quiet=True,
    )
    before, after = _state(base), _state(run)
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {_part(name) for name in changed} == moved
    if method["type"] == "freeze":
        layers = {name for name in changed if ".language_model.layers." in name}
        assert layers and all(".layers.1." in name for name in layers)
    # The processor goes with the model, and the template that was trained is its template.
    saved = _processor(run, family)
    assert saved.image_processor.to_dict() == _processor(base, family).image_processor.to_dict()
    assert (run / PROCESSOR_FILE).read_bytes() == (base / PROCESSOR_FILE).read_bytes()
    assert saved.chat_template == saved.tokenizer.chat_template


@pytest.mark.parametrize("method", [{"type": "full"}, {"type": "lora", "rank": 2, "dropout": 0.1}])
def test_resumed_is_uninterrupted(method: dict[str, Any], bases: dict[str, Path], tmp_path: Path) -> None:
    """Bit by bit, though transformers writes LLaVA's weights under other names than the model has."""
    recipe = _recipe(tmp_path, bases["llava"], method=method, model={"frozen_parts": ["tower"]})
    luthier.train(recipe, quiet=True)
    straight, output = tmp_path / "run", tmp_path / "again"
    output.mkdir()
    shutil.copytree(straight / "checkpoint-2", output / "checkpoint-2")
    assert (output / "checkpoint-2" / PROCESSOR_FILE).is_file()
    recipe["train"] |= {"output": str(output), "resume": "auto"}
    luthier.train(recipe, quiet=True)
    (first,), (second,) = (list(run.glob("*model.safetensors")) for run in (straight, output))
    ours, theirs = load_file(second), load_file(first)
    assert ours.keys() == theirs.keys()
    for name, weight in theirs.items():
        assert torch.equal(ours[name], weight), name
    assert len(_log(straight)) == 4 and _log(output) == _log(straight)[2:]


@pytest.mark.parametrize(
    ("stage", "family", "first"),
    [
        ({"type": "dpo", "beta": 0.3}, QWEN, 0.6931),
        ({"type": "rm"}, "gemma3", None),
    ],
)
def test_pairs_with_pictures(
    stage: dict[str, Any], family: str, first: float | None, bases: dict[str, Path], tmp_path: Path
) -> None:
    """A pair is learnt; at the start policy and reference are one, so they see the same picture."""
    lora = {"type": "lora", "rank": 4}
    recipe = _recipe(tmp_path, bases[family], "pair", stage=stage, method=lora, train={"epochs": 8})
    luthier.train(recipe, quiet=True)
    losses = _log(tmp_path / "run")
    assert losses[-1] < 0.5 * losses[0]
    if first is not None:
        assert losses[0] == pytest.approx(first, abs=1e-4)
    assert json.loads((tmp_path / "run/run.json").read_text())["rows"]["layout"] == "padded"
    assert (tmp_path / "run" / PROCESSOR_FILE).is_file()


@pytest.mark.parametrize("family", [QWEN, "gemma3"])
def test_text_alone_needs_no_padding(family: str, bases: dict[str, Path], tmp_path: Path) -> None:
    """The same model with and without pictures in its data: flat rows where they are proven, the same first loss."""
    recipe = _recipe(tmp_path, bases[family], train={"epochs": 1})
    rows = json.loads((tmp_path / "rows.json").read_text())
    for row in rows:
        row["images"], row["messages"][0]["content"] = [], "What is it?"
    (tmp_path / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    losses = []
    for layout in ("flat", "padded"):
        recipe["train"]["output"] = str(tmp_path / layout)
        recipe["model"]["rows"] = "auto" if layout == "flat" else layout
        luthier.train(recipe, quiet=True)
        assert json.loads((tmp_path / layout / "run.json").read_text())["rows"]["layout"] == layout
        losses.append(_log(tmp_path / layout))
    assert losses[0] == pytest.approx(losses[1], abs=2e-4)


def test_a_family_without_value_head_says_so(bases: dict[str, Path], tmp_path: Path) -> None:
    recipe = _recipe(tmp_path, bases[QWEN], "pair", stage={"type": "rm"})
    with pytest.raises(ModelError, match=r"Qwen2_5_VL.* cannot be a reward model; .* it has one of gemma3"):
        luthier.train(recipe, quiet=True)


def test_the_merged_model_sees_what_was_trained(bases: dict[str, Path], tmp_path: Path) -> None:
    """The adapter's model and the exported one, read by plain transformers, on a picture."""
    family = QWEN
    method = {"type": "lora", "rank": 4}
    luthier.train(
        _recipe(tmp_path, bases[family], method=method, model={"frozen_parts": ["tower"]}), quiet=True
    )
    run, out = tmp_path / "run", tmp_path / "merged"
    weights = load_file(run / "adapter_model.safetensors")
    assert any(".visual.merger." in name for name in weights)
    assert not any(".visual.blocks." in name for name in weights)
    assert export(run, output=out, quiet=True).passed
    live = PeftModel.from_pretrained(AutoModelForMultimodalLM.from_pretrained(bases[family]), run).eval()
    merged, processor = AutoModelForMultimodalLM.from_pretrained(out).eval(), _processor(out, family)
    text = "<|vision_start|><|image_pad|><|vision_end|>What is it?"
    inputs = processor(text=[text], images=[Image.open(tmp_path / "4.png")], return_tensors="pt")
    with torch.no_grad():
        seen, expected = merged(**inputs).logits, live(**inputs).logits
        base = AutoModelForMultimodalLM.from_pretrained(bases[family])(**inputs).logits
    torch.testing.assert_close(seen, expected, rtol=1e-5, atol=1e-4)
    assert float((base - expected).abs().max()) > 1e-2


def test_a_llamafactory_file_of_a_vision_model_runs(
    bases: dict[str, Path], shared_data: Path, tmp_path: Path
) -> None:
    """Its default: tower and projector still, low rank in the language model."""
    values = {
        "model_name_or_path": str(bases[QWEN]),
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "lora",
        "lora_rank": 8,
        "lora_target": "all",
        "freeze_vision_tower": True,
        "dataset": "mllm_demo",
        "dataset_dir": str(shared_data),
        "template": "qwen",
        "cutoff_len": 2048,
        "output_dir": str(tmp_path / "run"),
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 8,
        "learning_rate": 1.0e-4,
        "num_train_epochs": 3.0,
        "lr_scheduler_type": "cosine",
        "warmup_ratio": 0.1,
        "overwrite_output_dir": True,
        "save_only_model": False,
        "report_to": "none",
        "plot_loss": False,
    }
    luthier.train(values, quiet=True)
    names = load_file(tmp_path / "run/adapter_model.safetensors")
    assert len(names) == 28 and all(".language_model." in name for name in names)


def test_a_stream_with_pictures_is_its_table(bases: dict[str, Path], tmp_path: Path) -> None:
    """Rows in their order, one in a pass, so that passes without a picture are among them."""
    losses = []
    for name, stream in (("table", {}), ("stream", {"stream": {"buffer": 1}})):
        recipe = _recipe(tmp_path, bases["gemma3"], train={"tokens_per_pass": 1, "max_steps": 4})
        recipe["data"] |= {"shuffle": False, **stream}
        recipe["train"] |= {"output": str(tmp_path / name)}
        luthier.train(recipe, quiet=True)
        losses.append(_log(tmp_path / name))
    assert losses[1] == losses[0] and len(losses[0]) == 4
