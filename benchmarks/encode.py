"""Rows of a file to tokens with their mask, side by side: Luthier, LLaMA-Factory and TRL.

    python benchmarks/encode.py --lf-python PEER/bin/python

Every contender reads the same file of conversations (1 to 3 turns, some with a system message; the sentences of real
rows, put together anew), renders ChatML and tokenizes it with the same tokenizer, learns the answers alone, and
leaves the result on disk; with 1 process, and with `--processes` of them. What is timed is the preparation alone,
imports and tokenizer loaded: seconds of the wall, and of all processors, which other work on the machine disturbs
less. Luthier checks rows against the saved template on the way (its gate is always on). TRL tokenizes the same texts
by a template with marks for the answers.
"""

from __future__ import annotations

import json
import random
import re
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import side_by_side
from side_by_side import Contender

CONTENDERS = {
    "luthier": Contender("encode_luthier.py"),
    "llamafactory": Contender("encode_llama_factory.py", "lf_python"),
    "trl": Contender("encode_trl.py", "trl_python"),
}
_SENTENCE = re.compile(r"(?<=[.!?\n])\s+")


def parse() -> Any:
    parser = side_by_side.parser(
        __doc__, CONTENDERS, dataset="alpaca_en_demo", steps=2, results="encode.json"
    )
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    return side_by_side.parse(parser, CONTENDERS)


def conversations(file: Path, count: int, seed: int) -> Iterator[list[dict[str, str]]]:
    """Chats whose texts have as many sentences as real ones, each sentence from any of them."""
    rng = random.Random(seed)
    rows = json.loads(file.read_text(encoding="utf-8"))
    asked = [f"{row['instruction']}\n{row.get('input', '')}".strip() for row in rows]
    said = [row["output"] for row in rows if row["output"].strip()]
    pools = [[part for text in texts for part in _SENTENCE.split(text) if part] for texts in (asked, said)]

    def like(texts: Sequence[str], pool: Sequence[str]) -> str:
        return " ".join(rng.choices(pool, k=len(_SENTENCE.split(rng.choice(texts)))))

    for _ in range(count):
        messages = []
        if rng.random() < 0.2:
            messages.append({"role": "system", "content": like(asked, pools[0])})
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            messages.append({"role": "user", "content": like(asked, pools[0])})
            messages.append({"role": "assistant", "content": like(said, pools[1])})
        yield messages


def source_of(options: Any) -> Path:
    """The file whose sentences are used."""
    info = json.loads((options.data / "dataset_info.json").read_text(encoding="utf-8"))
    return Path(options.data / info[options.dataset]["file_name"])


def write_rows(source: Path, file: Path, count: int, seed: int) -> None:
    with file.open("w", encoding="utf-8") as stream:
        for messages in conversations(source, count, seed):
            stream.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")


def summarised(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Of each contender and number of processes the rows per second, and how many times Luthier's speed that is."""
    table: dict[str, Any] = {}
    for name, line in rounds[0].items():
        speeds = [measured[name]["rows"] / measured[name]["seconds"] for measured in rounds]
        cpu = [1e6 * measured[name]["cpu_seconds"] / measured[name]["rows"] for measured in rounds]
        table[name] = {
            "rows_per_second": round(statistics.median(speeds)),
            "cpu_microseconds_per_row": round(statistics.median(cpu)),
        } | {key: line[key] for key in ("tokens", "targets", "peak_mib", "second_start_seconds")}
    faster: dict[str, Any] = {"seconds": {}, "cpu_seconds": {}}
    for name in rounds[0]:
        contender, processes = name.rsplit(" ", 1)
        for measure, ratios in faster.items():
            if contender != "luthier":
                values = [m[name][measure] / m[f"luthier {processes}"][measure] for m in rounds]
                ratios[name] = {
                    "median": round(statistics.median(values), 2),
                    "min": round(min(values), 2),
                    "max": round(max(values), 2),
                }
    return {"contenders": table, "luthier_times_faster_than": faster}


def main() -> None:
    options = parse()
    rounds: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.jsonl"
        write_rows(source_of(options), file, options.rows, seed=0)
        job = side_by_side.job_settings(options) | {"rows": str(file)}
        for number in range(options.rounds):
            measured: dict[str, Any] = {}
            for processes in options.processes:
                turn = number % len(options.contenders)
                for name in [*options.contenders[turn:], *options.contenders[:turn]]:
                    line = side_by_side.run(options, job | {"processes": processes}, name, CONTENDERS[name])
                    measured[f"{name} {processes}"] = line
                    speed = line["rows"] / line["seconds"]
                    print(
                        f"round {number + 1}: {name}, {processes} processes: {speed:.0f} rows/s", flush=True
                    )
            rounds.append(measured)
            size = file.stat().st_size
            settings = {"rows": options.rows, "bytes": size, "threads": options.threads}
            result = {"settings": settings, "rounds": len(rounds), **summarised(rounds)}
            side_by_side.write(result, Path(options.results))
    print(json.dumps(result["luthier_times_faster_than"], indent=1))


if __name__ == "__main__":
    main()
