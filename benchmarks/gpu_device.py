"""The machine under measurement: its clock, its memory and its rate of matrix products. Knows no model.

A CPU answers the same questions where it can, so that the whole benchmark runs on one, small; its memory
is not measured there.
"""

from __future__ import annotations

import gc
import platform
import time
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import torch

KNOWN_PEAKS = {
    "B200": 2250e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "RTX 4090": 165e12,
}
"""Dense bfloat16 operations per second (float32 sums) in data sheets; the first name that fits counts."""
PACKAGES = ("torch", "transformers", "peft", "accelerate", "numpy", "pydantic")
WARMUP, REPEATS = 3, 10


@dataclass(frozen=True, slots=True)
class Machine:
    """One device; all sizes in bytes, all times in seconds."""

    device: torch.device

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    def synchronize(self) -> None:
        """Wait until the device has done what it was asked to; without it a clock reads only the asking."""
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def release(self) -> None:
        """Give back the memory of models that are gone (they hold reference cycles)."""
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()

    def reset_peak(self) -> None:
        if self.cuda:
            torch.cuda.reset_peak_memory_stats(self.device)

    def peak(self) -> dict[str, int] | None:
        """High-water marks since `reset_peak`: of live tensors, and of what the allocator took for them."""
        if not self.cuda:
            return None
        return {
            "allocated": torch.cuda.max_memory_allocated(self.device),
            "reserved": torch.cuda.max_memory_reserved(self.device),
        }

    def free_memory(self) -> int | None:
        """Memory of the device that is free now, None where it does not limit us."""
        return torch.cuda.mem_get_info(self.device)[0] if self.cuda else None

    def matmul_rate(self) -> float:
        """Operations per second of one large bfloat16 product of random numbers, the mean of ten."""
        size = 8192 if self.cuda else 512
        left, right = (torch.randn(size, size, device=self.device, dtype=torch.bfloat16) for _ in range(2))
        for _ in range(WARMUP):
            left @ right
        self.synchronize()
        started = time.perf_counter()
        for _ in range(REPEATS):
            left @ right
        self.synchronize()
        return 2.0 * size**3 * REPEATS / (time.perf_counter() - started)

    def name(self) -> str:
        return (
            torch.cuda.get_device_name(self.device)
            if self.cuda
            else platform.processor() or platform.machine()
        )

    def known_peak(self) -> float | None:
        """The data sheet's bfloat16 rate, None for a device that is not in the table."""
        if not self.cuda:
            return None
        name = self.name()
        return next((rate for part, rate in KNOWN_PEAKS.items() if _is_model(part, name)), None)

    def describe(self) -> dict[str, Any]:
        """Names and versions that a result means nothing without."""
        about: dict[str, Any] = {
            "device": self.device.type,
            "name": self.name(),
            "python": platform.python_version(),
            "versions": {package: metadata.version(package) for package in PACKAGES},
        }
        if self.cuda:
            properties = torch.cuda.get_device_properties(self.device)
            about |= {
                "memory": properties.total_memory,
                "capability": f"{properties.major}.{properties.minor}",
                "cuda": torch.version.cuda,
            }
        return about


def _is_model(part: str, name: str) -> bool:
    """`L4` is in "NVIDIA L4", not in "NVIDIA L40S"; `A100` is in "NVIDIA A100-SXM4-80GB"."""
    words = name.replace("-", " ").split()
    wanted = part.split()
    return any(words[start : start + len(wanted)] == wanted for start in range(len(words))) or (
        len(wanted) > 1 and all(word in words for word in wanted)
    )


def open_machine(kind: str) -> Machine:
    """The device to measure. Raises SystemExit, saying why, where there is no usable CUDA GPU."""
    torch.set_float32_matmul_precision("highest")  # TF32 would hide what the float32 equalities look for
    if kind == "cpu":
        return Machine(torch.device("cpu"))
    hint = "; `--device cpu --shapes tiny` tries the program itself"
    if not torch.cuda.is_available():
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
        raise SystemExit(f"no CUDA device: torch {torch.__version__} ({built}) finds no GPU{hint}")
    device = torch.device("cuda", torch.cuda.current_device())
    if torch.cuda.get_device_capability(device) < (8, 0):
        name = torch.cuda.get_device_name(device)
        raise SystemExit(
            f"no usable CUDA device: {name} does not compute bfloat16 (needs capability 8.0){hint}"
        )
    return Machine(device)
