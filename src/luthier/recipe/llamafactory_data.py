"""The data of a LLaMA-Factory file: which sets, which columns, how long a row is, what becomes a token."""

from __future__ import annotations

import math
import os
from pathlib import PurePath
from typing import Any

from luthier.recipe.flat import Flat
from luthier.recipe.known_keys import KEYS
from luthier.recipe.llamafactory_thinking import THINKING_SUBJECTS
from luthier.recipe.problems import found

_COLUMNS = {f"{name}_column": name for name in ("prompt", "query", "response", "history")}
_PREFERENCES = ("rm", "dpo", "kto", "ppo")
_ENDS = {"interleave_under": "first", "interleave_over": "all", "interleave_once": "once"}
_SUFFIXES = (".arrow", ".csv", ".json", ".jsonl", ".parquet", ".txt")


def _sources(flat: Flat) -> None:
    directory = flat.get("dataset_dir")
    online = directory == "ONLINE"
    details = _details(flat)
    for key, target in (("dataset", "data.train"), ("eval_dataset", "data.eval")):
        names = flat.names(key)
        entries = [_entry(name, online, details) for name in names]
        plain = next((name for name, entry in zip(names, entries, strict=True) if entry == name), None)
        for early in details if plain is not None else ():
            flat.problem(early, f"write it into dataset_info.json, where {plain} is described")
        flat.put(target, entries, key)
    if isinstance(directory, str) and directory.startswith("REMOTE:"):
        flat.put("data.directory", f"hf://datasets/{directory.removeprefix('REMOTE:')}", "dataset_dir")
    elif not online:
        flat.put("data.directory", directory, "dataset_dir")
    held_out = flat.number("val_size")
    if held_out > 0 and flat.given("eval_dataset"):
        flat.problem("val_size", "val_size and eval_dataset exclude each other; keep one")
    elif held_out > 0 and not flat.given("dataset"):
        flat.problem("val_size", "there is no dataset to hold rows out of")
    elif held_out > 1 or held_out == int(held_out):
        flat.put("data.dev_split", int(held_out), "val_size")
    if not flat.given("preprocessing_num_workers"):
        flat.drop("data.workers")


def _details(flat: Flat) -> dict[str, Any]:
    """What early versions said of all data sets at once: columns and split."""
    return {key: flat.get(key) for key in (*_COLUMNS, "split") if flat.changed(key)}


def _entry(name: str, online: bool, details: dict[str, Any]) -> str | dict[str, Any]:
    """A name as it is, or the whole description where there is more to say of it."""
    if not online and (not details or PurePath(name).suffix not in _SUFFIXES):
        return name
    hub = (
        "ms_hub_url"
        if os.environ.get("USE_MODELSCOPE_HUB", "0").lower() in ("true", "y", "1")
        else "hf_hub_url"
    )
    entry: dict[str, Any] = {hub if online else "file_name": name}
    columns = {_COLUMNS[key]: value for key, value in details.items() if key in _COLUMNS}
    if columns:
        entry["columns"] = columns
    if "split" in details:
        entry["split"] = details["split"]
    return entry


def _mixture(flat: Flat) -> None:
    """Rows in the order of `datasets.interleave_datasets`, fixed for all epochs as there."""
    strategy = flat.choice("mix_strategy", ("concat", *_ENDS))
    probabilities, names = _probabilities(flat), flat.names("dataset")
    if probabilities is not None and strategy == "concat":
        flat.problem(
            "interleave_probs", f"goes with mix_strategy: {', '.join(_ENDS)}; remove it or give one of these"
        )
    elif probabilities is not None and len(probabilities) != len(names):
        flat.problem(
            "interleave_probs", f"there are {len(probabilities)} for {len(names)} data sets; give each one"
        )
    elif probabilities is not None and not math.isclose(sum(probabilities), 1, rel_tol=0, abs_tol=1e-8):
        flat.problem("interleave_probs", f"should sum to 1, and sum to {sum(probabilities):.10g}")
    if strategy not in _ENDS or len(names) < 2:
        return
    mix: dict[str, Any] = {"strategy": "interleave", "until": _ENDS[strategy]}
    if probabilities is not None:
        mix["probabilities"] = probabilities
    flat.put("data.mix", mix, "mix_strategy")
    if len(flat.names("eval_dataset")) > 1:
        flat.note(f"mix_strategy: evaluation sets are evaluated whole; there {strategy} mixes them, too")
    if strategy == "interleave_over" and flat.number("val_size") > 0:
        flat.note("val_size: a row that interleave_over repeats may be held out and trained, as there")


def _probabilities(flat: Flat) -> list[float] | None:
    """Numbers that are written as `0.3, 0.7`."""
    value = flat.get("interleave_probs")
    if value is None:
        return None
    parts = value.split(",") if isinstance(value, str) else value if isinstance(value, list) else [value]
    try:
        numbers = [float(part) for part in parts]
    except (TypeError, ValueError, OverflowError):
        numbers = [-1.0]
    if any(isinstance(part, bool) for part in parts) or not all(0 <= number <= 1 for number in numbers):
        flat.problem(
            "interleave_probs", f"expected numbers from 0 to 1 with commas between them, found {found(value)}"
        )
        return None
    return numbers


def _length(flat: Flat) -> None:
    """Length, truncation and packing: exactly the rows that LLaMA-Factory would cut."""
    stage = flat.get("stage")
    pt, preferences = stage == "pt", stage in _PREFERENCES
    asked = flat.flag("packing") or flat.flag("neat_packing")
    packing = (asked or (pt and not flat.given("packing"))) and not preferences
    cutoff = flat.get("cutoff_len")
    if asked and isinstance(cutoff, int) and not isinstance(cutoff, bool):
        cutoff -= 1  # packing, where a file asks for it, keeps one token of the row for padding there
        flat.note(f"packing: takes one token off cutoff_len there, so rows hold {cutoff} tokens")
    flat.put("data.max_length", cutoff, "cutoff_len")
    flat.put("data.rules", "llamafactory")
    flat.put("data.overflow", "split" if pt and packing else "truncate")
    flat.put("data.max_lost", None)
    flat.put("data.packing", packing, "neat_packing" if flat.flag("neat_packing") else "packing")
    if preferences and flat.flag("packing"):
        flat.note(f"packing: nothing is packed with stage: {stage}, as there")
    elif packing and pt:
        flat.note("packing: documents in a block see each other, as there; a native recipe keeps them apart")
    elif packing and not flat.flag("neat_packing"):
        flat.note("packing: what shares a row does not see each other here (there only with neat_packing)")
    for key in ("neat_packing", "train_on_prompt", "mask_history"):
        if flat.flag(key) and not pt and key == "mask_history" and flat.flag("train_on_prompt"):
            flat.problem(key, "mask_history and train_on_prompt exclude each other; keep one")
        elif flat.flag(key) and (pt or preferences):
            flat.problem(key, "goes with stage: sft only")


def _rows(flat: Flat) -> None:
    """What becomes a token, in which order."""
    pt = flat.get("stage") == "pt"
    flat.put("data.parse_special_tokens", not flat.flag("split_special_tokens"), "split_special_tokens")
    if not pt:
        flat.put("data.template", flat.get("template"), "template")
        if flat.get("stage") != "ppo":  # whose rows are prompts
            flat.put("data.train_after_stop", True)
    elif flat.get("template") == "llama3":
        flat.put("data.template", "llama3", "template")  # the one that ends documents with a token of its own
    elif flat.given("template"):
        flat.note("template: plain text is trained without a template")
    sampling = flat.choice("train_sampling_strategy", ("random", "sequential", "group_by_length"))
    if sampling == "group_by_length":
        flat.problem("train_sampling_strategy", KEYS["group_by_length"].text)
    shuffle = sampling == "random" and not flat.flag("disable_shuffling")
    keys = ("disable_shuffling", "train_sampling_strategy")
    flat.put("data.shuffle", shuffle, *(key for key in keys if flat.changed(key)), *keys)


def _media(flat: Flat) -> None:
    """What the processor of a model that sees is told; the limits of pixels are plain names."""
    for key, target in (("image_do_pan_and_scan", "pan_and_scan"), ("crop_to_patches", "crop_to_patches")):
        if flat.flag(key):
            flat.put(f"data.media.{target}", True, key)


def _streaming(flat: Flat) -> None:
    """Rows that are read in training; what that tool refuses with them is refused here."""
    if not flat.flag("streaming"):
        return
    flat.put("data.stream", {"buffer": flat.get("buffer_size")}, "buffer_size", "streaming")
    if not flat.given("max_steps") or flat.number("max_steps") <= 0:
        flat.problem("streaming", "needs max_steps, as there: a stream does not know how long an epoch is")
    if 0 < flat.number("val_size") < 1:
        flat.problem("val_size", "with streaming it is a number of rows, as there; give a whole number")
    if flat.given("max_samples"):
        flat.problem("max_samples", "does not go with streaming, as there; remove it")
    workers = flat.get("dataloader_num_workers")
    if flat.given("dataloader_num_workers") and isinstance(workers, int):
        flat.put("data.workers", max(1, workers), "dataloader_num_workers")
        flat.note(
            "dataloader_num_workers: with streaming these are the processes that tokenize (data.workers)"
        )


DATA_SUBJECTS = (_sources, _mixture, _length, _rows, _media, _streaming, *THINKING_SUBJECTS)
