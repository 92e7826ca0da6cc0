"""`samples.jsonl`: answers of rollouts for a person to read, one JSON object a line."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from luthier.experience import Rollout
from luthier.files import write_whole
from luthier.trainer.callbacks import kept_lines

SAMPLES_NAME = "samples.jsonl"


class SampleRecord:
    """Writes the first `most` answers of every `every`-th rollout into the run directory.

    Each line has `current_steps`, the optimizer step that the rollout begins, the rollout's number, where the prompt is
    in the data, the texts of prompt and completion (special tokens shown in the prompt), the rewards by name, their
    weighted sum, why the answer ended and its tokens.
    """

    def __init__(self, run_dir: Path, every: int, most: int, decode: Callable[[Sequence[int]], str]) -> None:
        self.path = run_dir / SAMPLES_NAME
        self._every, self._most, self._decode = every, most, decode

    def begin(self, step: int) -> None:
        """A new run begins a new file; one that goes on after `step` keeps what was written until then."""
        if not step:
            self.path.unlink(missing_ok=True)
        elif self.path.exists():
            write_whole(self.path, "".join(line + "\n" for line in kept_lines(self.path, step)))

    def add(self, step: int, number: int, rollout: Rollout, names: Sequence[str]) -> None:
        """Note the rollout of this number, sampled in optimizer step `step` (from 1), where its turn has come."""
        if number % self._every:
            return
        lines = []
        for k, completion in enumerate(rollout.completions[: self._most]):
            prompt = completion.prompt
            entry = {
                "current_steps": step,
                "rollout": number,
                "dataset": prompt.source,
                "row": prompt.index,
                "prompt": self._decode(prompt.ids),
                "completion": completion.text,
                "rewards": {
                    name: float(value) for name, value in zip(names, rollout.rewards[k], strict=True)
                },
                "reward": float(rollout.totals[k]),
                "finish": completion.finish,
                "tokens": len(completion),
            }
            lines.append(json.dumps(entry, ensure_ascii=False, allow_nan=False) + "\n")
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write("".join(lines))
