"""How answers are drawn, in a LLaMA-Factory file: its own defaults where it answers, nothing where it only trains."""

from __future__ import annotations

from typing import Any

import pytest

from luthier.recipe.load import LoadedRecipe, load_recipe
from luthier.recipe.schema import BitsAndBytesSpec, GenerateAtEvalSpec, GenerationSpec
from luthier.types import RecipeError

TRAINS = {"do_train": True, "dataset": "a"}
PREDICTS = {"do_predict": True, "predict_with_generate": True, "eval_dataset": "b"}
DRAWN = GenerationSpec(
    do_sample=True,
    temperature=0.95,
    top_p=0.7,
    top_k=50,
    num_beams=1,
    repetition_penalty=1.0,
    length_penalty=1.0,
    max_new_tokens=1024,
)
"""Of a file that says nothing."""


def load(**values: Any) -> LoadedRecipe:
    return load_recipe({"model_name_or_path": "m", **values}, to_export=True)


def problems(**values: Any) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load(**values)
    return str(caught.value).split("\n")


@pytest.mark.parametrize("values", [{}, {"template": "qwen"}, PREDICTS, TRAINS | PREDICTS], ids=str)
def test_a_file_that_answers_has_that_tools_defaults(values: dict[str, Any]) -> None:
    loaded = load(**values)
    assert loaded.recipe.generation == DRAWN
    assert loaded.origins["generation.temperature"] == "LLaMA-Factory default"


def test_a_file_that_only_trains_says_nothing_of_answers() -> None:
    assert load(**TRAINS).recipe.generation == GenerationSpec()
    # Where it says something, the run's answers are drawn so, and as there in all the rest.
    found = load(**TRAINS, temperature=0.3).recipe.generation
    assert found == DRAWN.model_copy(update={"temperature": 0.3})


@pytest.mark.parametrize("values", [{}, PREDICTS, TRAINS], ids=["talks", "predicts", "trains"])
def test_each_key_has_its_place(values: dict[str, Any]) -> None:
    said = {
        "do_sample": False,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 7,
        "num_beams": 3,
        "repetition_penalty": 1.2,
        "length_penalty": 0.5,
        "max_new_tokens": 9,
        "skip_special_tokens": False,
    }
    loaded = load(**values, **said)
    assert {name: getattr(loaded.recipe.generation, name) for name in said} == said
    assert loaded.recipe.generation.max_length is None


def test_the_longer_length_wins_as_there() -> None:
    loaded = load(max_length=4096)
    assert (loaded.recipe.generation.max_new_tokens, loaded.recipe.generation.max_length) == (1024, None)
    assert "max_length: no effect: max_new_tokens (1024) comes before it, as there" in loaded.notes
    loaded = load(max_length=4096, max_new_tokens=0)
    assert (loaded.recipe.generation.max_new_tokens, loaded.recipe.generation.max_length) == (None, 4096)
    assert not any("max_length" in note for note in loaded.notes)


def test_answers_at_evaluations_follow_the_model_there_and_here() -> None:
    """That tool hands its drawing keys to the last prediction alone."""
    values = {**TRAINS, "eval_dataset": "b", "predict_with_generate": True, "eval_strategy": "epoch"}
    recipe = load(**values).recipe
    assert recipe.train.generate_at_eval == GenerateAtEvalSpec()
    assert recipe.generation == GenerationSpec(max_length=2048)  # cutoff_len
    loaded = load(**values, generation_max_length=300, generation_num_beams=2, temperature=0.1)
    assert loaded.recipe.generation == GenerationSpec(max_length=300, num_beams=2)
    assert "temperature: no effect on this file's answers, as there" in loaded.notes
    assert load(**values, generation_num_beams=2, eval_num_beams=4).recipe.generation.num_beams == 4
    # With predictions in the end there is one way to draw for both.
    loaded = load(**values, do_predict=True, generation_max_length=300)
    assert loaded.recipe.generation == DRAWN and loaded.recipe.train.generate_at_eval is not None
    notes = " ".join(loaded.notes)
    assert "generation_max_length: no effect on this file's answers" in notes
    assert "answers at evaluations are drawn as those of the end here" in notes
    assert "then answer the data set with `luthier predict`" in notes
    assert "eval_num_beams: no effect on this file's answers, as there" in load(eval_num_beams=2).notes


def test_a_file_that_predicts_reads_its_rows_and_trains_nothing() -> None:
    loaded = load(**PREDICTS, dataset="a", max_samples=3, per_device_eval_batch_size=2, output_dir="out")
    recipe = loaded.recipe
    assert (recipe.data.train, recipe.data.eval, recipe.data.max_samples) == ((), ("b",), 3)
    assert (recipe.generation.rows, recipe.train.output) == (2, "out")
    assert "dataset: no effect: this file trains nothing" in loaded.notes
    assert load(**TRAINS, per_device_eval_batch_size=2).recipe.generation == GenerationSpec()
    assert load(predict_with_generate=True, eval_dataset="b").recipe.data.eval == ("b",)


def test_how_the_model_is_loaded_to_answer() -> None:
    recipe = load(infer_dtype="float16", quantization_bit=4, flash_attn="sdpa", add_tokens="<x>").recipe
    assert recipe.model.dtype == "float16" and recipe.model.attention == "sdpa"
    assert isinstance(recipe.model.quantization, BitsAndBytesSpec) and recipe.model.quantization.bits == 4
    assert recipe.model.vocabulary is not None and recipe.model.vocabulary.add == ("<x>",)
    assert load().recipe.model.dtype == load(infer_dtype="auto").recipe.model.dtype == "auto"
    loaded = load(**TRAINS, infer_dtype="float16")
    assert "infer_dtype: is about generating and has no effect on this training" in loaded.notes
    assert loaded.recipe.model.dtype == load(**TRAINS).recipe.model.dtype


@pytest.mark.parametrize(("backend", "engine"), [("huggingface", "hf"), ("vllm", "vllm")])
def test_what_answers_is_chosen(backend: str, engine: str) -> None:
    assert load(**TRAINS, infer_backend=backend).recipe.generation.engine == engine


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"infer_backend": "sglang"},
            "infer_backend: sglang is another program here: write huggingface or vllm, or give it the model that "
            "`luthier export` writes",
        ),
        (
            {"infer_backend": "hugging"},
            "infer_backend: 'hugging' is none of its values; did you mean huggingface?",
        ),
        ({"infer_dtype": "int8"}, "infer_dtype: 'int8' is none of its values"),
        ({"rope_scaling": "yarn"}, "rope_scaling: what a run was stretched by is in its folder"),
        ({"generation_config": "g.json"}, "generation_config: write its values into the file itself"),
        ({"temperature": "hot"}, "temperature: expected a number or null, found the text 'hot'"),
        ({"top_p": 0}, "top_p"),
        ({"max_new_tokens": "many"}, "max_new_tokens: expected a number"),
        ({"do_sample": "yes"}, "do_sample: expected true or false"),
        ({"do_predict": True}, "do_predict: there is nothing to answer; name it in eval_dataset"),
        ({"task": "mmlu_test"}, "task: this file runs a benchmark: run luthier evaluate m --task mmlu_test"),
        (
            TRAINS | {"predict_with_generate": True},
            "predict_with_generate: there is nothing to answer; give eval_dataset or val_size",
        ),
        (
            TRAINS | {"predict_with_generate": True, "stage": "pt", "val_size": 2},
            "predict_with_generate: goes with stage: sft, and this is pt; remove it",
        ),
        (TRAINS | {"n_shot": 3}, "n_shot: belongs to LLaMA-Factory's benchmark command"),
    ],
    ids=str,
)
def test_what_is_refused(values: dict[str, Any], message: str) -> None:
    assert any(message in line for line in problems(**values)), problems(**values)
