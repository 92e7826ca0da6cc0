"""BAdam (Luo et al., 2024, arXiv:2404.02827): Adam on one block of the parameters at a time.

Layer mode: a block is a layer, the others are frozen, so backward ends at the block and only it has gradients and
moments. Ratio mode: a block is a part of the entries of every tensor.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from luthier.optim.parameterwise import ExactState, Groups, ParameterWise, adam_direction
from luthier.optim.roles import Place, places
from luthier.types import RecipeError

_SEEDS_APART = 1_000_003


def layer_blocks(
    model: nn.Module, groups: Groups, *, include_embedding: bool, include_head: bool
) -> tuple[list[list[Tensor]], list[Tensor]]:
    """The blocks of the parameters in `groups`, and those that always train: the head of a reward model.

    Order: embeddings, layers by their number, what stands outside layers. Raises RecipeError where there is no block.
    """
    found = places(model)
    grouped = {id(parameter) for group in groups for parameter in group["params"]}
    blocks: dict[str, list[Tensor]] = {"embedding": []} if include_embedding else {}
    outside: list[Tensor] = []
    always: list[Tensor] = []
    for parameter in model.parameters():
        place = found[id(parameter)]
        if id(parameter) not in grouped:
            continue
        if place.role == "score":
            always.append(parameter)
        elif place.layer is not None:
            blocks.setdefault(place.layer, []).append(parameter)
        elif place.role == "embedding":
            if include_embedding:
                blocks["embedding"].append(parameter)
        elif include_head:
            outside.append(parameter)
    kept = [block for block in (*blocks.values(), outside) if block]
    if not kept:
        raise RecipeError("optim.type=badam: no parameter of a layer trains, so there is no block")
    return kept, always


def trains_in_ratio(place: Place, *, include_embedding: bool, include_head: bool) -> bool:
    """Whether ratio mode changes a parameter."""
    excluded = {"embedding"} - ({"embedding"} if include_embedding else set())
    excluded |= {"head"} - ({"head"} if include_head else set())
    return place.role not in excluded


class BlockAdam(ExactState):
    """AdamW on the active block; when the block changes its moments are forgotten, as in the paper.

    Groups have lr, weight_decay, betas and eps. State of the active block: the moments, in float32 with a float32
    `master` copy where the parameter has another type. Which block is active follows from the number of steps taken,
    which is in the first group as `num_steps`.
    """

    def __init__(
        self,
        groups: Groups,
        defaults: dict[str, Any],
        blocks: list[list[Tensor]],
        always: list[Tensor],
        *,
        switch_every: int,
        order: str,
        start: int | None,
        seed: int,
    ) -> None:
        super().__init__(groups, defaults)
        self.param_groups[0]["num_steps"] = 0
        self._blocks, self._always = blocks, {id(parameter) for parameter in always}
        self._switch_every, self._order, self._seed = switch_every, order, seed
        last = len(blocks) - 1
        if start is not None and start > last:
            raise RecipeError(f"optim.start_block={start}: the blocks are 0 to {last}")
        self._start = start if start is not None else last if order == "descending" else 0
        self._activate()

    @property
    def active_block(self) -> int:
        """The number of the block that trains now."""
        steps: int = self.param_groups[0]["num_steps"]
        turn, count = steps // self._switch_every, len(self._blocks)
        if self._order == "fixed":
            return self._start
        if self._order == "random":
            cycle, index = divmod(turn, count)
            generator = torch.Generator().manual_seed(self._seed + _SEEDS_APART * cycle)
            return int(torch.randperm(count, generator=generator)[index])
        return (self._start + (turn if self._order == "ascending" else -turn)) % count

    def _activate(self) -> None:
        active = {id(parameter) for parameter in self._blocks[self.active_block]} | self._always
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.requires_grad_(id(parameter) in active)
                if id(parameter) not in active:
                    parameter.grad = None
                    self.state.pop(parameter, None)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, self.state[parameter], group)
        before = self.active_block
        self.param_groups[0]["num_steps"] += 1
        if self.active_block != before:
            self._activate()

    def _update(self, parameter: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        assert parameter.grad is not None
        value = parameter
        if parameter.dtype != torch.float32:
            value = state.setdefault("master", parameter.float())
        direction = adam_direction(state, parameter.grad.to(value.dtype), group["betas"], group["eps"])
        value.mul_(1 - group["lr"] * group["weight_decay"]).add_(direction, alpha=-group["lr"])
        if value is not parameter:
            parameter.copy_(value)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._activate()

    def release(self) -> None:
        """Let all blocks train again; another optimizer may come."""
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.requires_grad_(True)


class RatioAdam(ParameterWise):
    """AdamW on `ratio` of the entries of every tensor; after `switch_every` steps on the next ones, with new moments.

    Gradients of other entries are zero from backward on, so the norm that clipping sees is that of what is updated.
    Groups have lr, weight_decay, betas, eps and ratio, switch_every, mask, seed. Weight decay is of those entries too.
    State: moments of those entries, and with `scatter` their positions (int64).
    """

    def __init__(self, groups: Groups, defaults: dict[str, Any], frozen: list[Tensor]) -> None:
        super().__init__(groups, defaults)
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        self._number = {id(parameter): number for number, parameter in enumerate(parameters)}
        self._frozen = frozen
        for parameter in frozen:
            parameter.requires_grad_(False)
        self._hooks += [parameter.register_post_accumulate_grad_hook(self._mask) for parameter in parameters]

    def _entries(self, parameter: Tensor, group: dict[str, Any]) -> Tensor:
        """Positions of the entries that train now, (k,), in the flat tensor."""
        state = self.state[parameter]
        turn = state.get("num_steps", 0) // group["switch_every"]
        if "entries" in state:
            entries: Tensor = state["entries"]
            return entries
        size = parameter.numel()
        count = max(1, int(size * group["ratio"]))
        entries = (torch.arange(count, device=parameter.device) + turn * count) % size
        if group["mask"] == "scatter":
            # The part moves on in one order of all entries, which is the parameter's own.
            generator = torch.Generator().manual_seed(
                group["seed"] + _SEEDS_APART * self._number[id(parameter)]
            )
            order = torch.randperm(size, generator=generator).to(parameter.device)
            entries = state["entries"] = order[entries]
        return entries

    @torch.no_grad()
    def _mask(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        entries = self._entries(parameter, self.param_groups[self._group_of[id(parameter)]])
        flat = parameter.grad.view(-1)
        kept = flat[entries]
        flat.zero_()
        flat[entries] = kept

    def update(self, parameter: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        entries = self._entries(parameter, group)
        direction = adam_direction(state, grad.reshape(-1)[entries], group["betas"], group["eps"])
        flat = parameter.view(-1)
        flat[entries] = flat[entries] * (1 - group["lr"] * group["weight_decay"]) - group["lr"] * direction
        state["num_steps"] = state.get("num_steps", 0) + 1
        if state["num_steps"] % group["switch_every"] == 0:
            for name in ("step", "exp_avg", "exp_avg_sq", "entries"):
                state.pop(name, None)

    def release(self) -> None:
        super().release()
        for parameter in self._frozen:
            parameter.requires_grad_(True)
