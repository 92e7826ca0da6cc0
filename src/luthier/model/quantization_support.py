"""Ways of quantizing: what installs each, and whether it works on this machine, by running a small layer."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import importlib.util
import json
import logging
import platform
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn

from luthier.files import write_whole
from luthier.model.quantized_layers import looked_up

INSTALL = {name: f"pip install 'luthier[{name}]'" for name in ("bitsandbytes", "torchao", "hqq")}
"""What installs the library of each kind of `model.quantization`."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A way in which the files of a model can be quantized. `modules` are what loading imports, `install` brings them.

    tested: whether the project's own tests load and train it. dequantized: its quantized form has no backward pass, so
    transformers expands it while loading.
    """

    modules: tuple[str, ...] = ()
    install: str = ""
    tested: bool = False
    dequantized: bool = False


CHECKPOINTS = {
    "bitsandbytes": Checkpoint(("bitsandbytes",), "pip install 'luthier[bitsandbytes]'", tested=True),
    "torchao": Checkpoint(("torchao",), "pip install 'luthier[torchao]'"),
    "gptq": Checkpoint(("optimum", "gptqmodel"), "pip install optimum gptqmodel"),
    "awq": Checkpoint(("gptqmodel",), "pip install gptqmodel"),
    "aqlm": Checkpoint(("aqlm",), "pip install 'aqlm[gpu,cpu]'"),
    "compressed-tensors": Checkpoint(("compressed_tensors",), "pip install compressed-tensors"),
    "quanto": Checkpoint(("optimum.quanto",), "pip install optimum-quanto"),
    "fp8": Checkpoint(dequantized=True),
    "mxfp4": Checkpoint(dequantized=True),
}
"""By the `quant_method` of config.json."""


def is_installed(module: str) -> bool:
    """Whether a module can be imported; only its parent package is."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the parent
        return False


def quiet() -> None:
    """Leave out what the libraries say on import of kernels that they lack, and bitsandbytes on every 8-bit product."""
    for name in ("bitsandbytes", "torchao"):
        logging.getLogger(name).setLevel(logging.ERROR)


# --------------------------------------------------------------------------------------------------
# Trying

SIZE = 64
"""Inputs and outputs of the layers that are tried: one block of weights in each row."""


def _four_bits(kind: str) -> Callable[[torch.device], nn.Module]:
    def build(device: torch.device) -> nn.Module:
        import bitsandbytes.nn

        layer: nn.Module = bitsandbytes.nn.Linear4bit(
            SIZE, SIZE, bias=False, compute_dtype=torch.float32, quant_type=kind
        )
        layer = layer.to(device)
        layer.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
        if not torch.allclose(layer(torch.eye(SIZE, device=device)).T, looked_up(layer), atol=1e-6):
            raise RuntimeError("it computes with other weights than it stores")
        return layer

    return build


def _eight_bits(device: torch.device) -> nn.Module:
    import bitsandbytes.nn

    layer: nn.Module = bitsandbytes.nn.Linear8bitLt(SIZE, SIZE, bias=False, has_fp16_weights=False)
    return layer.to(device)


def _torchao(name: str) -> Callable[[torch.device], nn.Module]:
    def build(device: torch.device) -> nn.Module:
        import torchao.quantization

        layer = nn.Linear(SIZE, SIZE, bias=False, device=device).requires_grad_(False)
        torchao.quantization.quantize_(layer, getattr(torchao.quantization, name)())
        return layer

    return build


def _hqq(device: torch.device) -> nn.Module:
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    layer: nn.Module = HQQLinear(
        nn.Linear(SIZE, SIZE, bias=False),
        BaseQuantizeConfig(nbits=4, group_size=SIZE),
        compute_dtype=torch.float32,
        device=str(device),
    )
    return layer


TRIED: dict[str, tuple[str, Callable[[torch.device], nn.Module]]] = {
    "bitsandbytes, 4 bits nf4": ("bitsandbytes", _four_bits("nf4")),
    "bitsandbytes, 4 bits fp4": ("bitsandbytes", _four_bits("fp4")),
    "bitsandbytes, 8 bits": ("bitsandbytes", _eight_bits),
    "torchao, int8_weight_only": ("torchao", _torchao("Int8WeightOnlyConfig")),
    "torchao, float8_weight_only": ("torchao", _torchao("Float8WeightOnlyConfig")),
    "hqq, 4 bits": ("hqq", _hqq),
}
"""By what a recipe asks for: the library, and a layer of it."""


def tried(device: torch.device) -> dict[str, str]:
    """What each way of quantizing says on this machine: `works`, the line that installs it, or why it does not work."""
    quiet()
    return {name: _try(library, build, device) for name, (library, build) in TRIED.items()}


def recalled(device: torch.device, file: Path) -> tuple[dict[str, str], str | None]:
    """As `tried`, but what worked with these versions on this device is not run again: importing the libraries takes
    seconds. With the day on which it was run, where something was recalled.

    `file` keeps it. What did not work is always tried again: it may have been mended outside of what has a version.
    """
    key, kept = _circumstances(device), _read(file)
    known = kept.get("works", {}) if kept.get("key") == key else {}
    found = {
        name: "works" if name in known and is_installed(library) else _try(library, build, device)
        for name, (library, build) in TRIED.items()
    }
    today = datetime.date.today().isoformat()
    works = {name: known.get(name, today) for name, state in found.items() if state == "works"}
    if works != known:
        _write(file, {"key": key, "works": works})
    return found, min((known[name] for name in works if name in known), default=None)


def _circumstances(device: torch.device) -> str:
    """What may change whether a layer works: versions, this file, and the machine."""
    packages = ("torch", *INSTALL)
    versions = [metadata.version(name) if is_installed(name) else None for name in packages]
    where = [str(device), torch.version.cuda, platform.platform(), platform.processor()]
    if device.type == "cuda":
        where.append(torch.cuda.get_device_name(device))
    source = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    return json.dumps([platform.python_version(), *versions, *where, source])


def _read(file: Path) -> dict[str, Any]:
    try:
        kept = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # none yet, or damaged: everything is tried
        return {}
    return kept if isinstance(kept, dict) and isinstance(kept.get("works"), dict) else {}


def _write(file: Path, kept: dict[str, Any]) -> None:
    with contextlib.suppress(OSError):  # a folder that cannot be written costs time, and nothing else
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, json.dumps(kept))


def _try(library: str, build: Callable[[torch.device], nn.Module], device: torch.device) -> str:
    if not is_installed(library):
        return INSTALL[library]
    try:
        inputs = torch.randn(2, SIZE, device=device, requires_grad=True)
        answer: Any = build(device)(inputs)
        if not answer.requires_grad:
            return "no gradient passes through it here"
        answer.sum().backward()
    except (ImportError, RuntimeError, TypeError, ValueError, AssertionError) as error:
        said = str(error).strip() or type(error).__name__
        return f"does not work here: {said.splitlines()[0]}"
    return (
        "works"
        if inputs.grad is not None and inputs.grad.isfinite().all()
        else "its gradient is no number here"
    )


def files() -> dict[str, str]:
    """What each kind of quantized files needs: nothing, the line that installs it, or `installed`."""
    found = {}
    for name, known in CHECKPOINTS.items():
        missing = [module for module in known.modules if not is_installed(module)]
        state = known.install if missing else "expanded while loading" if known.dequantized else "installed"
        found[name] = state if known.tested or missing else f"{state}; no test here has trained on them"
    return found
