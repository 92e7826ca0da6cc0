"""Train a recipe and print the most memory that the process had.

python benchmarks/workers/luthier_peak.py RECIPE
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "src"))

import luthier
from luthier.trainer.pace import peak_memory


def main() -> None:
    result = luthier.train(sys.argv[1], quiet=True)
    print(json.dumps({"peak": peak_memory(), "tokens": result.metrics["train_tokens"]}))


if __name__ == "__main__":
    main()
