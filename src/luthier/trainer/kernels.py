"""Which kernels torch may choose while a run lasts: TensorFloat-32, and deterministic ones only."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from luthier.types import ModelError

_NO_DETERMINISTIC_KERNEL = re.compile(r"^(\S+) does not have a deterministic implementation")


@contextmanager
def kernel_rules(*, deterministic: bool, tf32: bool | None) -> Iterator[None]:
    """Set torch's switches for the block and put them back after it.

    `tf32` None leaves torch's own setting. With `deterministic`, an operation that has no deterministic kernel on
    this device raises ModelError with its name. Enter the block before anything runs on a GPU: cuBLAS reads its
    setting once.
    """
    matmul, convolution = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    cudnn = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    algorithms = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    try:
        if tf32 is not None:
            # Not `torch.backends.fp32_precision`: after it, asking for the older setting (torch.compile does) raises.
            torch.set_float32_matmul_precision("high" if tf32 else "highest")
            torch.backends.cudnn.allow_tf32 = tf32
        if deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)
            torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
        yield
    except RuntimeError as error:
        found = _NO_DETERMINISTIC_KERNEL.match(str(error))
        if found is None or not deterministic:
            raise
        raise ModelError(
            f"train.deterministic=true: torch has no deterministic kernel for {found[1]} on this device, and the model "
            "needs it; give train.deterministic=false, or choose another model.attention if that is what calls it"
        ) from error
    finally:
        torch.set_float32_matmul_precision(matmul)
        torch.backends.cudnn.allow_tf32 = convolution
        torch.use_deterministic_algorithms(algorithms, warn_only=warn_only)
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = cudnn
