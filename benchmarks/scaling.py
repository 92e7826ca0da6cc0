"""The tables of docs/scaling.md, from `luthier.parallel.cost`: what each process holds and sends on 8, 64 and 512 GPUs.

    python benchmarks/scaling.py          prints them
    python benchmarks/scaling.py --write  puts them into docs/scaling.md

Nothing is measured here. Weights that train are float32 under bfloat16 autocast, as in recipes on GPUs, with float32
gradients and AdamW's two float32 moments; the base below adapters is bfloat16. Activations are those of a pass with
every layer checkpointed: its input (2 bytes a number) for each layer, and one layer computed again (34 bytes a number:
Korthikanti et al., 2022, arXiv:2205.05198, without scores, which no kernel here keeps). Compute takes 6 operations a
token and parameter, 8 with checkpointing, 4 and 6 where only adapters train (no gradients of the weights), at 40 % of
an H100's 989 Tflop/s in bfloat16; bytes travel at 450 GB/s in a machine of 8 and at 50 GB/s (400 Gbit/s for each GPU)
between machines.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from luthier.parallel.cost import Whole, held, sent
from luthier.recipe.schema import DdpSpec, DeepSpeedSpec, Fsdp2Spec, ParallelSpec

DOC = Path(__file__).parents[1] / "docs" / "scaling.md"
BEGIN, END = "<!-- tables: benchmarks/scaling.py --write -->", "<!-- end of tables -->"
GIB, GB = 2**30, 10**9
TOKENS = 8192
"""Of one pass of one GPU, the default there; a step is one pass on each."""
FLOPS, INSIDE, BETWEEN, MACHINE = 0.4 * 989e12, 450 * GB, 50 * GB, 8
GPU = 80
"""GiB of the GPU that a process is said to fit on or not."""


@dataclass(frozen=True)
class Model:
    """Of the published configs: parameters in all, of a layer, of the embeddings (input and output), hidden size."""

    name: str
    layers: int
    hidden: int
    layer: int
    embeddings: int

    @property
    def parameters(self) -> int:
        return self.layers * self.layer + self.embeddings


def _llama(
    name: str, layers: int, hidden: int, inner: int, heads: tuple[int, int, int], vocabulary: int
) -> Model:
    """`heads`: of queries, of keys and values, numbers of each. Norms are left out: less than a thousandth."""
    queries, keys, size = heads
    attention = hidden * size * (2 * queries + 2 * keys)
    return Model(name, layers, hidden, attention + 3 * hidden * inner, 2 * vocabulary * hidden)


MODELS = (
    _llama("Llama-3.1-8B", 32, 4096, 14336, (32, 8, 128), 128256),
    _llama("Qwen3-32B", 64, 5120, 25600, (64, 8, 128), 151936),
    _llama("Llama-3.1-70B", 80, 8192, 28672, (64, 8, 128), 128256),
)
STRATEGIES: dict[str, ParallelSpec] = {
    "ddp": DdpSpec(),
    "deepspeed, zero: 1": DeepSpeedSpec(zero=1),
    "deepspeed, zero: 2": DeepSpeedSpec(zero=2),
    "fsdp2 (zero: 3)": Fsdp2Spec(),
    "fsdp2, cpu_offload": Fsdp2Spec(cpu_offload=True),
}
COUNTS = (8, 64, 512)


def whole(model: Model, *, adapters: bool) -> Whole:
    """Bytes of full fine-tuning, or of LoRA of rank 16 on all linear layers (about 16 (in + out) numbers for each)."""
    group = max(model.layer, model.embeddings // 2)
    if not adapters:
        count = model.parameters
        return Whole(4 * count, 4 * count, 8 * count, 4 * group, 4 * count)
    trained = model.layers * 16 * 24 * model.hidden  # seven matrices, inner sizes 3.5 times the hidden one
    return Whole(2 * model.parameters + 4 * trained, 4 * trained, 8 * trained, 2 * group, 4 * trained)


def activations(model: Model) -> int:
    return TOKENS * model.hidden * (2 * model.layers + 34)


def seconds(model: Model, spec: ParallelSpec, processes: int, *, adapters: bool) -> tuple[float, float]:
    """Of computing, and of sending, in one step."""
    operations = (6 if adapters else 8) * model.parameters * TOKENS
    speed = INSIDE if processes <= MACHINE else BETWEEN
    return operations / FLOPS, sent(spec, processes, whole(model, adapters=adapters)) / speed


def tables() -> str:
    return "\n\n".join(_table(model, adapters=adapters) for model in MODELS for adapters in (False, True))


def _table(model: Model, *, adapters: bool) -> str:
    what = "LoRA, rank 16" if adapters else "full"
    compute, _ = seconds(model, DdpSpec(), MACHINE, adapters=adapters)
    head = [
        f"**{model.name}** ({model.parameters / 1e9:.1f} billion parameters), {what}; activations "
        f"{activations(model) / GIB:.1f} GiB, computing {compute:.2f} s a step\n",
        f"| strategy | {' | '.join(f'{count} GPUs' for count in COUNTS)} |",
        f"|---|{'---|' * len(COUNTS)}",
    ]
    return "\n".join([*head, *_rows(model, adapters)])


def _rows(model: Model, adapters: bool) -> Iterator[str]:
    for name, spec in STRATEGIES.items():
        cells = []
        for count in COUNTS:
            size = held(spec, count, whole(model, adapters=adapters)).total + activations(model)
            text = f"{size / GIB:.0f} GiB, {seconds(model, spec, count, adapters=adapters)[1]:.2f} s"
            cells.append(f"**{text}**" if size <= GPU * GIB else text)
        yield f"| `{name}` | {' | '.join(cells)} |"


def main() -> None:
    if "--write" in sys.argv:
        text = DOC.read_text(encoding="utf-8")
        before, rest = text.split(BEGIN)
        DOC.write_text(f"{before}{BEGIN}\n\n{tables()}\n\n{END}{rest.split(END)[1]}", encoding="utf-8")
    else:
        print(tables())


if __name__ == "__main__":
    main()
