"""What strategies cost: the sums of the published tables, and tensors that are really divided."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from luthier.parallel.cost import Held, Whole, held, sent
from luthier.recipe.schema import DdpSpec, DeepSpeedSpec, Fsdp2Spec, ParallelSpec

ROOT = Path(__file__).parents[2]
# The example of ZeRO's paper (Figure 1): 7.5 billion parameters, 2 + 2 + 12 bytes each, 64 GPUs.
PAPER = Whole(15_000_000_000, 15_000_000_000, 90_000_000_000, 0, 15_000_000_000)


@pytest.mark.parametrize(
    ("spec", "gigabytes"),
    [(DdpSpec(), 120.0), (DeepSpeedSpec(zero=1), 31.4), (DeepSpeedSpec(zero=2), 16.6), (Fsdp2Spec(), 1.9)],
)
def test_the_figure_of_zero(spec: ParallelSpec, gigabytes: float) -> None:
    size = held(spec, 64, PAPER)
    assert round((size.total - size.exchanged) / 1e9, 1) == gigabytes


def test_one_process_divides_nothing() -> None:
    for spec in (DdpSpec(), DeepSpeedSpec(zero=3), Fsdp2Spec()):
        assert held(spec, 1, PAPER) == Held(PAPER.weights, PAPER.gradients, PAPER.optimizer)
        assert sent(spec, 1, PAPER) == 0


def test_what_zero_sends() -> None:
    """Section 7 of the paper: as much as data parallelism with stage 2, half as much again with stage 3."""
    plain = sent(DdpSpec(), 64, PAPER)
    assert plain == round(2 * 15e9 * 63 / 64)
    assert sent(DeepSpeedSpec(zero=2), 64, PAPER) == plain
    assert sent(Fsdp2Spec(), 64, PAPER) == pytest.approx(1.5 * plain)
    assert sent(Fsdp2Spec(reshard_after_forward=False), 64, PAPER) == plain
    assert sent(Fsdp2Spec(), 64, PAPER, passes=4) == pytest.approx(6 * plain)
    assert sent(DdpSpec(), 64, PAPER, passes=4) == plain


def test_what_is_kept_on_the_host_is_not_on_the_device() -> None:
    whole = Whole(100, 40, 80, 10, 40)
    assert held(Fsdp2Spec(cpu_offload=True), 4, whole) == Held(0, 0, 0, 20, 4)
    assert held(Fsdp2Spec(), 4, whole) == Held(25, 10, 20, 20, 4)
    assert held(Fsdp2Spec(reshard_after_forward=False), 4, whole) == Held(25, 10, 20, 100, 4)
    assert held(DeepSpeedSpec(zero=2, offload_optimizer=True), 4, whole) == Held(100, 10, 0, 0, 40)


def test_the_page_has_the_tables_of_the_formulae(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import scaling

    try:
        assert scaling.tables() in (ROOT / "docs/scaling.md").read_text(encoding="utf-8")
        # The published sizes of the models (in billions), from their layers.
        assert [round(model.parameters / 1e9, 1) for model in scaling.MODELS] == [8.0, 32.8, 70.6]
    finally:
        del sys.modules["scaling"]
