"""What the estimate counts of a forward pass is what the pass leaves alive, whatever the adapter and the base."""

from __future__ import annotations

import gc
import weakref
from importlib import util
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from luthier.check import saved
from luthier.check.memory import measure_activations, weight_bytes
from luthier.data.collate import flat_batch
from luthier.methods import build_method
from luthier.model.load import load_model, locate
from luthier.model.logprobs import ModelPolicy, install_target_forward
from luthier.model.quantized_layers import num_weights, plain_parts, quantized_layers
from luthier.recipe.schema import MethodSpec, ModelSpec
from luthier.types import IGNORE_INDEX
from tests.tiny import chat_model, random_samples

LENGTHS = (40, 61, 23)
METHODS: dict[str, dict[str, Any]] = {
    "full": {"type": "full"},
    "freeze": {"type": "freeze", "layers": 1},
    "llama_pro": {"type": "llama_pro", "blocks": 1},
    "lora": {"type": "lora", "rank": 4},
    "lora-dropout": {"type": "lora", "rank": 4, "dropout": 0.1},
    "lora-fa": {"type": "lora", "rank": 4, "freeze_a": True},
    "dora": {"type": "lora", "rank": 4, "dora": True},
    "pissa": {"type": "lora", "rank": 4, "init": "pissa"},
    "olora": {"type": "lora", "rank": 4, "init": "olora"},
    "oft": {"type": "oft", "block_size": 16},
    "vera": {"type": "vera", "rank": 8},
    "ia3": {"type": "ia3"},
    "miss": {"type": "miss", "rank": 8},
    "loha": {"type": "peft", "config": {"peft_type": "LOHA", "r": 4}},
    "lokr": {"type": "peft", "config": {"peft_type": "LOKR", "r": 4}},
}
ON_QUANTIZED = ("lora", "lora-fa", "oft")


def needs(library: str, **spec: object) -> Any:
    mark = pytest.mark.skipif(util.find_spec(library) is None, reason=f"{library} is not installed")
    return pytest.param(spec, marks=mark, id="-".join(map(str, spec.values())))


BASES = [
    pytest.param({"type": "bitsandbytes", "bits": 4}, id="nf4"),
    pytest.param({"type": "bitsandbytes", "bits": 8}, id="int8"),
    needs("torchao", type="torchao", name="int8_weight_only"),
    needs("torchao", type="torchao", name="float8_weight_only"),
    needs("hqq", type="hqq", bits=4, group_size=16),
]


class Alive(TorchDispatchMode):
    """Follows every piece of memory that an operation makes inside the block, until it is given back."""

    def __init__(self) -> None:
        super().__init__()
        self._alive: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        answer = func(*args, **(kwargs or {}))
        given = {piece._cdata for piece in _pieces((args, kwargs))}
        for piece in _pieces(answer):
            key = piece._cdata
            if key not in given and key not in self._alive:
                self._alive[key] = piece.nbytes()
                weakref.finalize(piece, self._alive.pop, key, None)
        return answer

    @property
    def nbytes(self) -> int:
        gc.collect()
        return sum(self._alive.values())


def _pieces(tree: Any) -> list[Any]:
    tensors = [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
    return [part.untyped_storage() for tensor in tensors for part in plain_parts(tensor)]


def prepared(folder: Path, method: str, **settings: Any) -> nn.Module:
    given = {"path": str(folder), "dtype": "float32", "attention": "sdpa", **settings}
    spec = ModelSpec.model_validate(given)
    model = load_model(spec, locate(spec), torch.device("cpu"))
    chosen: Any = TypeAdapter(MethodSpec).validate_python(METHODS[method])
    built: Any = build_method(chosen).apply(model)
    install_target_forward(built.get_base_model() if hasattr(built, "get_base_model") else built)
    return built.train()  # type: ignore[no-any-return]


def left_alive(model: nn.Module, times: int = 2) -> int:
    """The bytes that a pass without targets keeps for backward; the last of `times`, as tables are made once."""
    batch = flat_batch(random_samples(LENGTHS))
    batch.targets.fill_(IGNORE_INDEX)
    for _ in range(times):
        alive = Alive()
        with alive:
            answers = ModelPolicy(model).logprobs(batch)
        kept = alive.nbytes
        del answers
    return kept


def foretold(model: nn.Module) -> int:
    growth = measure_activations(model, "language", None, longest=60).growth
    return growth(sum(LENGTHS), sum(length**2 for length in LENGTHS))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
    return chat_model(tmp_path_factory.mktemp("model"), "qwen2", **sizes)


# Segments of their own keep bounds of some bytes.
BOUND = 0.001


@pytest.mark.parametrize("method", METHODS)
def test_every_method(method: str, folder: Path) -> None:
    model = prepared(folder, method)
    assert foretold(model) == pytest.approx(left_alive(model), rel=BOUND)


@pytest.mark.parametrize("method", ON_QUANTIZED)
@pytest.mark.parametrize("base", BASES)
def test_every_quantized_base(base: dict[str, Any], method: str, folder: Path) -> None:
    model = prepared(folder, method, quantization=base)
    assert foretold(model) == pytest.approx(left_alive(model), rel=BOUND)


def test_int8_keeps_its_inputs_even_where_layers_are_computed_again(folder: Path) -> None:
    int8 = {"type": "bitsandbytes", "bits": 8}
    model = prepared(folder, "lora-fa", quantization=int8, gradient_checkpointing=True)
    # Not counted: the tables of positions, which each layer that is computed again is given. They are small.
    assert foretold(model) == pytest.approx(left_alive(model), rel=0.05)
    plain = prepared(folder, "lora-fa", gradient_checkpointing=True)
    assert left_alive(model) > 2 * left_alive(plain)


def test_inputs_that_nobody_asks_for_would_be_missed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison sees what autograd's hooks alone do not."""
    model = prepared(folder, "oft", quantization={"type": "bitsandbytes", "bits": 8})
    monkeypatch.setattr(saved, "is_int8", lambda layer: False)
    assert foretold(model) < 0.8 * left_alive(model)


@pytest.mark.skipif(util.find_spec("torchao") is None, reason="torchao is not installed")
def test_torchao_keeps_its_weights_expanded(folder: Path) -> None:
    """All but those that no gradient passes through: q, k and v of the first layer, whose inputs do not train."""
    model = prepared(folder, "lora", quantization={"type": "torchao"})
    plain = prepared(folder, "lora")
    more = measure_activations(model, "language", None, 60).growth.constant
    more -= measure_activations(plain, "language", None, 60).growth.constant
    weights = sum(layer.weight.numel() for layer in quantized_layers(model).values())  # type: ignore[operator, union-attr]
    first = (64 + 2 * 32) * 64
    assert more == pytest.approx(4 * (weights - first), rel=1e-3)
    again = prepared(folder, "lora", quantization={"type": "torchao"}, gradient_checkpointing=True)
    assert measure_activations(again, "language", None, 60).growth.constant < 0.1 * more
    assert num_weights(model) == num_weights(plain) and weight_bytes(model) < weight_bytes(plain)
