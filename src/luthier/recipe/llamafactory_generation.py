"""The generation of a LLaMA-Factory file: how answers are drawn, at evaluations, over a data set or in a chat.

That tool draws in two ways. Where it answers a data set or a user, the file's own keys hold, and its defaults where
the file says nothing. At evaluations of a training they do not: there the model's generation_config.json holds, with
a length and a number of beams from other keys.
"""

from __future__ import annotations

from luthier.recipe.flat import Flat
from luthier.recipe.llamafactory_export import exports

_DRAWN = ("do_sample", "temperature", "top_p", "top_k", "num_beams", "repetition_penalty", "length_penalty")
_LENGTHS = ("max_new_tokens", "max_length")
_AT_EVALUATIONS = ("generation_max_length", "generation_num_beams", "eval_num_beams")
_TYPES = ("auto", "float16", "bfloat16", "float32")
_BACKENDS = ("huggingface", "vllm", "sglang", "ktransformers")


def trains(flat: Flat) -> bool:
    """Whether the file trains or measures a loss, whatever else it does."""
    return flat.get("do_train") is True or flat.get("do_eval") is True


def predicts(flat: Flat) -> bool:
    """Whether the file answers a data set and trains nothing."""
    asked = flat.get("do_predict") is True or flat.get("predict_with_generate") is True
    return asked and not trains(flat)


def talks(flat: Flat) -> bool:
    """Whether the file only names a model to talk to."""
    data = flat.given("dataset") or flat.given("eval_dataset")
    return not (data or trains(flat) or predicts(flat) or exports(flat))


def _rolls_out(flat: Flat) -> bool:
    """Whether the file trains on answers of its own."""
    return flat.get("stage") == "ppo" and trains(flat)


def _engine(flat: Flat) -> None:
    backend = flat.choice("infer_backend", _BACKENDS)
    if _rolls_out(flat) and backend != "huggingface":
        flat.note("infer_backend: no effect with stage: ppo: rollouts are drawn by transformers, as there")
    elif backend == "vllm":
        flat.put("generation.engine", "vllm", "infer_backend")
    elif backend in _BACKENDS[1:]:
        flat.problem(
            "infer_backend",
            f"{backend} is another program here: write huggingface or vllm, or give it the model that `luthier export` "
            "writes",
        )
    if not (predicts(flat) or talks(flat)):
        return
    if flat.given("rope_scaling"):
        flat.problem(
            "rope_scaling",
            "what a run was stretched by is in its folder, and other models say it in their config.json; remove it",
        )
    dtype = flat.choice("infer_dtype", _TYPES)
    if dtype != "auto":
        flat.put("model.dtype", dtype, "infer_dtype")


def _settings(flat: Flat) -> None:
    at_end = flat.flag("do_predict") or predicts(flat) or talks(flat) or _rolls_out(flat)
    with_evaluations = flat.flag("predict_with_generate") and trains(flat)
    keys = (*_DRAWN, *_LENGTHS, "skip_special_tokens")
    if at_end or (not with_evaluations and any(flat.changed(key) for key in keys)):
        _drawn(flat)
        unused = [key for key in _AT_EVALUATIONS if flat.changed(key)]
    elif with_evaluations:
        _drawn_at_evaluations(flat)
        unused = [key for key in keys if flat.changed(key)]
    else:
        unused = [key for key in _AT_EVALUATIONS if flat.changed(key)]
    for key in unused:
        flat.note(f"{flat.written(key)}: no effect on this file's answers, as there")


def _drawn(flat: Flat) -> None:
    """What the file says and, where it says nothing, what that tool does."""
    for key in _DRAWN:
        flat.put(f"generation.{key}", flat.get(key), key)
    longest = flat.number("max_new_tokens")
    if longest > 0:
        flat.put("generation.max_new_tokens", longest, "max_new_tokens")
        if flat.changed("max_length"):
            flat.note(f"max_length: no effect: max_new_tokens ({longest}) comes before it, as there")
    else:
        flat.put("generation.max_length", flat.get("max_length"), "max_length")
    flat.put("generation.skip_special_tokens", flat.flag("skip_special_tokens"), "skip_special_tokens")


def _drawn_at_evaluations(flat: Flat) -> None:
    length = "generation_max_length" if flat.given("generation_max_length") else "cutoff_len"
    flat.put("generation.max_length", flat.get(length), length)
    beams = "eval_num_beams" if flat.get("eval_num_beams") else "generation_num_beams"
    if flat.get(beams):
        flat.put("generation.num_beams", flat.get(beams), beams)


def _answers(flat: Flat) -> None:
    """Answers to a data set: a verb of its own, and at evaluations."""
    if trains(flat):
        if flat.flag("do_predict"):
            flat.note("do_predict: `luthier train` trains; then answer the data set with `luthier predict`")
        if flat.flag("predict_with_generate"):
            _answers_at_evaluations(flat)
        return
    if not predicts(flat):
        return
    if not flat.given("eval_dataset"):
        key = "do_predict" if flat.flag("do_predict") else "predict_with_generate"
        flat.problem(key, "there is nothing to answer; name it in eval_dataset")
    if flat.given("dataset"):
        flat.note("dataset: no effect: this file trains nothing")
    flat.put("data.train", [])
    if flat.given("per_device_eval_batch_size"):
        flat.put("generation.rows", flat.get("per_device_eval_batch_size"), "per_device_eval_batch_size")


def _answers_at_evaluations(flat: Flat) -> None:
    key, stage = "predict_with_generate", flat.get("stage")
    if stage != "sft":
        flat.problem(key, f"goes with stage: sft, and this is {stage}; remove it")
    elif flat.given("eval_dataset") or flat.number("val_size") > 0:
        flat.put("train.generate_at_eval", {}, key)
        if flat.flag("do_predict"):
            flat.note(
                "predict_with_generate: answers at evaluations are drawn as those of the end here; there they follow "
                "the model's generation_config.json"
            )
    else:
        flat.problem(key, "there is nothing to answer; give eval_dataset or val_size")


GENERATION_SUBJECTS = (_engine, _settings, _answers)
