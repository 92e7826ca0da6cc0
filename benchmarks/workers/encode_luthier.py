"""Luthier prepares the rows: reads, checks, renders, tokenizes, masks, counts and caches them."""

from __future__ import annotations

import time
from pathlib import Path

import clock
import encoded
from transformers import AutoTokenizer

from luthier.data.encode import EncodeOptions
from luthier.data.prepare import Preparation, prepare
from luthier.data.template import load_template
from luthier.recipe.schema import DatasetSpec, DataSpec, SftSpec
from luthier.stages import build_stage


def main() -> None:
    job = clock.load_job()
    rows = DatasetSpec(file_name=job["rows"], formatting="openai")
    spec = DataSpec(
        train=(rows,),
        template="chatml",
        max_length=2048,
        workers=job["processes"],
        cache=str(Path(job["output"]) / "cache"),
    )
    template = load_template(AutoTokenizer.from_pretrained(job["model"]), spec)
    stage = build_stage(SftSpec(), EncodeOptions.of(spec, "sft"))
    how = Preparation(stage.encode, template, stage.kind, {"stage": "sft"}, seed=0)
    with encoded.Spent() as spent:
        table = prepare(spec, how).train
    peak = clock.memory("VmHWM")
    start = time.perf_counter()
    again = prepare(spec, how).train
    second = time.perf_counter() - start
    assert len(again) == len(table)
    targets = sum(int((table[k].weights[1:] > 0).sum()) for k in range(len(table)))
    encoded.report(job, spent, len(table), int(table.lengths.sum()), targets, second, peak)


if __name__ == "__main__":
    main()
