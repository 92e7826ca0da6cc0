"""Peak memory of reading and tokenizing a stream, for files of several sizes: it should not depend on the size.

    python benchmarks/stream_memory.py                  # 100 MB and 400 MB
    python benchmarks/stream_memory.py --sizes 5 20     # quick
    python benchmarks/stream_memory.py --results benchmarks/results/stream_memory.json

Each file is read once, in a process of its own, with the tokenizer named by --tokenizer (a folder or a name; a
byte-level one made here by default), and the peak of its resident memory is asked of the operating system. `base` is
the peak of a file of 1 MB: interpreter, libraries, and one buffer that is not full.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

MIB = 2**20


def write_rows(file: Path, megabytes: int) -> int:
    """Documents of 100 to 4000 characters; returns how many."""
    rng, rows = np.random.default_rng(0), 0
    words = ["".join(chr(97 + c) for c in rng.integers(0, 26, rng.integers(2, 10))) for _ in range(5000)]
    with file.open("w", encoding="utf-8") as stream:
        while stream.tell() < megabytes * 10**6:
            count = int(rng.integers(15, 600))
            text = " ".join(words[i] for i in rng.integers(0, len(words), count))
            stream.write(json.dumps({"text": text}) + "\n")
            rows += 1
    return rows


def byte_tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = ["<|end|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>", pad_token="<|end|>")


def read_once(file: Path, tokenizer: str | None, buffer: int, packing: bool) -> dict[str, float]:
    """Read one epoch of the file as pt does; returns what this process took."""
    from transformers import AutoTokenizer

    from luthier.data.stream_preview import prepare_stream
    from luthier.data.streaming import Windows
    from luthier.data.template import load_template
    from luthier.material import preparation
    from luthier.recipe.schema import Recipe

    recipe = Recipe.model_validate(
        {
            "model": {"path": "none"},
            "stage": {"type": "pt"},
            "data": {
                "train": [{"file_name": str(file), "columns": {"prompt": "text"}}],
                "stream": {"buffer": buffer},
                "packing": packing,
                "template": "default",  # plain text is trained without it
            },
            "train": {"max_steps": 1, "rows_per_device": 1},
        }
    )
    chosen = byte_tokenizer() if tokenizer is None else AutoTokenizer.from_pretrained(tokenizer)
    _, how = preparation(recipe, load_template(chosen, recipe.data))
    windows = Windows(prepare_stream(recipe.data, how, seed=0, packed=packing).stream)
    started, tokens, rows = time.monotonic(), 0, 0
    for window in windows:
        tokens += sum(len(sample) for unit in window.units for sample in unit)
        rows += len(window.rows)
        if window.ends_epoch:
            break
    windows.close()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {"peak_mib": peak / MIB, "rows": rows, "tokens": tokens, "seconds": time.monotonic() - started}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", type=int, nargs="+", default=[100, 400], help="megabytes of each file")
    parser.add_argument("--tokenizer")
    parser.add_argument("--buffer", type=int, default=16384)
    parser.add_argument("--packing", action="store_true")
    parser.add_argument("--results", type=Path)
    parser.add_argument("--read", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.read is not None:
        print(json.dumps(read_once(options.read, options.tokenizer, options.buffer, options.packing)))
        return
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for megabytes in (1, *options.sizes):
            file = Path(folder) / "rows.jsonl"
            write_rows(file, megabytes)
            command = [sys.executable, __file__, "--read", str(file), "--buffer", str(options.buffer)]
            command += ["--tokenizer", options.tokenizer] if options.tokenizer else []
            command += ["--packing"] if options.packing else []
            done = subprocess.run(command, check=True, capture_output=True, text=True, env=dict(os.environ))
            name = "base" if megabytes == 1 else f"{megabytes} MB"
            found[name] = json.loads(done.stdout.splitlines()[-1])
            print(
                f"{name}: {found[name]['peak_mib']:.0f} MiB at most, {found[name]['rows']:,} rows", flush=True
            )
    if options.results is not None:
        options.results.write_text(json.dumps({"buffer": options.buffer, "files": found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
