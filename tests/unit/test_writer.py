"""One checkpoint in flight, errors in the loop's thread, copies that later steps cannot change."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from torch import nn

from luthier.trainer.snapshot import HostCopies, model_state, num_bytes, training_state
from luthier.trainer.writer import CheckpointWriter


def test_in_the_foreground_a_job_runs_at_once() -> None:
    done: list[str] = []
    writer = CheckpointWriter(asynchronous=False)
    writer.submit(lambda: done.append(threading.current_thread().name))
    assert done == [threading.current_thread().name]


def test_at_most_one_job_is_in_flight_and_the_next_waits() -> None:
    writer, release, order = CheckpointWriter(asynchronous=True), threading.Event(), list[str]()

    def slow() -> None:
        release.wait(10)
        order.append("first")

    writer.submit(slow)
    writer.check()  # does not wait
    assert order == []
    threading.Timer(0.05, release.set).start()
    writer.submit(lambda: order.append("second"))
    writer.wait()
    assert order == ["first", "second"]


@pytest.mark.parametrize("call", ["submit", "check", "wait"])
def test_what_went_wrong_is_raised_in_the_loop_once(call: str) -> None:
    writer = CheckpointWriter(asynchronous=True)

    def failing() -> None:
        raise OSError(28, "No space left on device")

    writer.submit(failing)
    assert writer._thread is not None
    writer._thread.join()
    with pytest.raises(OSError, match="No space left"):
        writer.submit(lambda: None) if call == "submit" else getattr(writer, call)()
    writer.wait()


class _Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.frozen = nn.Linear(3, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight
        self.frozen.requires_grad_(False)
        self.register_buffer("count", torch.tensor([1]))


def test_a_snapshot_keeps_its_values_while_training_goes_on() -> None:
    model = _Tied()
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    copies = HostCopies()
    state = model_state(model, copies).tensors
    assert state["head.weight"] is state["embed.weight"]  # tied stays tied, and is written once
    assert state["frozen.weight"].data_ptr() == model.frozen.weight.data_ptr()  # what is frozen is not copied
    with torch.no_grad():
        model.embed.weight.add_(1)
        model.count.add_(1)
    for name, tensor in state.items():
        assert torch.equal(tensor, expected[name]), name
    first = state["embed.weight"].data_ptr()
    again = model_state(model, copies).tensors
    assert model_state(model, copies).trained == {"embed.weight", "head.weight"}
    assert again["embed.weight"].data_ptr() == first  # the buffer is used again
    assert torch.equal(again["embed.weight"], model.embed.weight)
    assert num_bytes(state) == 4 * (5 * 3 + 3 * 3 + 3) + 8


def test_optimizer_state_is_copied_and_written_as_torch_would(tmp_path: Path) -> None:
    model = _Tied()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    model.head(model.embed(torch.tensor([1, 2]))).sum().backward()
    optimizer.step()
    schedule.step()
    torch.save(optimizer.state_dict(), tmp_path / "expected.pt")
    state = training_state(HostCopies().tree("optimizer", optimizer.state_dict()), schedule, None)
    model.head(model.embed(torch.tensor([1, 2]))).sum().backward()
    optimizer.step()
    schedule.step()
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    state.write(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["optimizer.pt", "rng_state.pth", "scheduler.pt"]
    written = torch.load(folder / "optimizer.pt", weights_only=True)
    expected = torch.load(tmp_path / "expected.pt", weights_only=True)
    assert written["param_groups"] == expected["param_groups"]
    for name, value in expected["state"][0].items():
        assert torch.equal(written["state"][0][name], value), name
    assert torch.load(folder / "scheduler.pt", weights_only=True)["last_epoch"] == 1
