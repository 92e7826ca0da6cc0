"""The GPU benchmark runs: the same program, small, on a CPU; what it writes, and when it refuses."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SMALL = ["--device=cpu", "--shapes=tiny", "--precisions=fp32", "--rows=4", "--rounds=2", "--steps=2"]


def run(*arguments: str, hide_gpus: bool = False) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment["OMP_NUM_THREADS"] = "1"
    if hide_gpus:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("gpu") / "deep" / "gpu.json"
    done = run(*SMALL, "--out", str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    assert [path.name for path in out.parent.iterdir()] == ["gpu.json"]
    loaded: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    return loaded


def test_every_equality_was_measured_and_holds(result: dict[str, Any]) -> None:
    checks = {check["check"]: check for check in result["equalities"]}
    assert set(checks) == {
        "padded eager = padded sdpa (noise floor)",
        "flat = padded sdpa",
        "flat = one segment at a time",
        "control: without bounds it differs",
        "leak forward",
        "leak backward",
        "self-test",
        "attention operators",
        "chunked = dense log-probs, head frozen",
        "chunked = dense log-probs, head trained",
        "fused LoRA = PEFT",
        "checkpointing = none",
        "reentrant checkpointing = none",
        "activation offload = none",
        "checkpointing with offload = none",
    }
    assert all(check["passed"] for check in checks.values())
    for name in ("flat = padded sdpa", "flat = one segment at a time", "fused LoRA = PEFT"):
        assert checks[name]["values"]["gradient"] < 1e-5
        assert checks[name]["values"]["loss"] < 1e-6
    assert checks["control: without bounds it differs"]["values"]["gradient"] > 0.1
    assert checks["leak backward"]["values"]["others"] == 0.0
    assert checks["fused LoRA = PEFT"]["values"]["layers"] == 2 * 7


def test_the_contenders_did_the_same_work(result: dict[str, Any]) -> None:
    methods = {(case["method"], case["weights"], case["checkpointing"]) for case in result["speed"]}
    expected = {("lora", "bfloat16", False), ("lora", "bfloat16", True), ("full", "float32", False)}
    assert methods == expected
    for case in result["speed"]:
        assert case["first_loss_difference"] < 5e-3
        assert len(case["rounds"]) == 2
        assert len({line["tokens"] for one in case["rounds"] for line in one.values()}) == 1
        for spread in (case["luthier"]["mfu"], case["luthier_over_padded"]["speed"]):
            assert 0 < spread["min"] <= spread["median"] <= spread["max"]
        assert "peak_gib" not in case["luthier"]  # a CPU's memory is not measured


def test_the_result_says_where_it_comes_from(result: dict[str, Any]) -> None:
    assert result["passed"] is True
    assert result["failed"] == []
    assert result["machine"]["device"] == "cpu"
    assert {"torch", "transformers", "peft"} <= set(result["machine"]["versions"])
    assert result["matmul_flops_per_second"] > 1e6
    assert result["known_peak_flops_per_second"] is None


def test_what_the_time_does_not_allow_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu_speed
    import torch
    from gpu_device import Machine

    over = gpu_speed.Budget(time.monotonic())
    meter = gpu_speed.Meter(Machine(torch.device("cpu")), over, peak=1e12, rounds=3, steps=2)
    cases = list(gpu_speed.run_speed(meter, gpu_speed.plan(["tiny", "8B"], [4, 8])))
    assert [case["rows"] for case in cases if case["method"] == "full"] == [4, 4]
    assert all(case["skipped"].startswith("time: one round would take") for case in cases)
    assert cases[-1]["case"] == "8B full (bfloat16, checkpointed), 4 rows a step"


def test_without_a_gpu_it_says_so_and_fails(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    done = run("--out", str(out), hide_gpus=True)
    assert done.returncode != 0
    assert "no CUDA device" in done.stderr
    assert "--device cpu --shapes tiny" in done.stderr
    assert "Traceback" not in done.stderr
    assert not out.exists()


def test_a_check_fails_on_nan_and_on_either_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from gpu_equalities import judge

    assert judge("x", "fp32", {"a": 1.0}, {"a": 1.0}, {"a": 1.0})["passed"]
    assert not judge("x", "fp32", {"a": 1.1}, {"a": 1.0})["passed"]
    assert not judge("x", "fp32", {"a": 0.9}, None, {"a": 1.0})["passed"]
    assert not judge("x", "fp32", {"a": math.nan}, {"a": 1.0})["passed"]


def test_operations_are_those_of_the_published_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu_speed
    from gpu_shapes import SHAPES, rows_of

    # Qwen3-0.6B has 0.6B parameters, 0.44B of them outside the embeddings; Qwen3-8B has 8.2B (their model cards).
    assert gpu_speed.num_parameters(SHAPES["0.6B"]) == pytest.approx(0.596e9, rel=1e-3)
    assert gpu_speed.num_parameters(SHAPES["8B"]) == pytest.approx(8.19e9, rel=1e-3)
    rows = rows_of([300, 200], SHAPES["8B"], seed=0)
    full = gpu_speed.step_flops(gpu_speed.Case("8B", "full", "bfloat16", True, 2), rows)
    tokens, targets = 500, 420
    six_n = 6 * (tokens * 36 * 192_937_984 + targets * 4096 * 151936)
    scores = 12 * (300 * 301 // 2 + 200 * 201 // 2) * 4096 * 36
    assert full == pytest.approx(six_n + scores, rel=1e-12)
