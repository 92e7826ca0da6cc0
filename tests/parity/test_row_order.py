"""The rows rule visits the rows that transformers' Trainer and accelerate visit, in the same steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard, SeedableRandomSampler
from torch import Tensor, nn
from torch.utils.data import BatchSampler, Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from luthier.data.batching import RowsRule, plan_epoch


class Numbers(Dataset[dict[str, int]]):
    def __init__(self, n: int) -> None:
        self.n = n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int) -> dict[str, int]:
        return {"row": i}


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, row: Tensor) -> dict[str, Tensor]:
        return {"loss": (self.weight * row.float()).mean()}


class Recorder(TrainerCallback):
    """Micro-batches, cut where the optimizer steps."""

    def __init__(self) -> None:
        self.steps: list[list[list[int]]] = []
        self.window: list[list[int]] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.steps.append(self.window)
        self.window = []


@pytest.mark.parametrize(
    ("n", "rows", "accumulation", "seed", "data_seed"),
    [(11, 2, 2, 42, None), (16, 4, 1, 7, None), (10, 3, 3, 42, 123), (9, 1, 4, 0, None)],
)
@pytest.mark.parametrize("shuffle", [True, False])
def test_two_epochs_of_a_real_trainer(
    tmp_path: Path, n: int, rows: int, accumulation: int, seed: int, data_seed: int | None, shuffle: bool
) -> None:
    recorder = Recorder()

    def collate(batch: list[dict[str, int]]) -> dict[str, Tensor]:
        return {"row": torch.tensor([item["row"] for item in batch])}

    class Recording(Trainer):
        def training_step(
            self, model: nn.Module, inputs: dict[str, Tensor], *args: Any, **kwargs: Any
        ) -> Tensor:
            recorder.window.append(inputs["row"].tolist())
            return super().training_step(model, inputs, *args, **kwargs)

    args = TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=accumulation,
        num_train_epochs=2,
        seed=seed,
        data_seed=data_seed,
        train_sampling_strategy="random" if shuffle else "sequential",
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        remove_unused_columns=False,
        use_cpu=True,
    )
    trainer = Recording(Scale(), args, data_collator=collate, train_dataset=Numbers(n), callbacks=[recorder])
    trainer.train()

    rule = RowsRule(rows, accumulation)
    planned = [
        step[0]
        for epoch in range(2)
        for step in plan_epoch(
            [1] * n, rule=rule, epoch=epoch, seed=seed if data_seed is None else data_seed, shuffle=shuffle
        )
    ]
    assert planned == recorder.steps


@pytest.mark.parametrize(("n", "rows", "world_size"), [(16, 2, 2), (24, 2, 3), (13, 2, 2), (11, 3, 2)])
def test_ranks_get_the_batches_of_accelerate(n: int, rows: int, world_size: int) -> None:
    """Without `even_batches`, which would visit rows twice to make the last batches equal."""
    for epoch in range(2):
        plan = plan_epoch([1] * n, rule=RowsRule(rows, 1), epoch=epoch, seed=5, world_size=world_size)
        for rank in range(world_size):
            ours = [batch for step in plan for batch in step[rank] if batch]
            assert ours == _shard(n, rows, world_size, rank, epoch, even_batches=False)
            if n % (rows * world_size) == 0:
                assert ours == _shard(n, rows, world_size, rank, epoch, even_batches=True)


def _shard(
    n: int, rows: int, world_size: int, rank: int, epoch: int, *, even_batches: bool
) -> list[list[int]]:
    sampler = SeedableRandomSampler(Numbers(n), generator=torch.Generator(), data_seed=5)
    sampler.set_epoch(epoch)
    batches = BatchSampler(sampler, rows, drop_last=False)
    return list(BatchSamplerShard(batches, world_size, rank, even_batches=even_batches))
