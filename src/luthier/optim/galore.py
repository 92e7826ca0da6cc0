"""GaLore (Zhao et al., 2024, arXiv:2403.03507, algorithm 2): Adam's moments of a projected gradient."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from luthier.optim.parameterwise import ParameterWise, adam_direction
from luthier.optim.projection import down, sides, svd_bases, up


class GaLore(ParameterWise):
    """Groups have lr, weight_decay, betas, eps and rank; where rank is not 0, also update_every, scale and side.

    Rank 0 is AdamW. State: the moments, (m, r), (r, n) or (r, r), and the bases `left` and `right`. When bases are
    computed anew the moments stay, as in the paper. Weight decay is AdamW's: apart and before the update.
    """

    def update(self, parameter: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        rank, bases = group["rank"], dict[str, Tensor]()
        if rank:
            wanted = sides(group["side"], *grad.shape)
            if state.get("step", 0) % group["update_every"] == 0:
                state |= svd_bases(grad, rank, wanted)
            bases = {name: state[name] for name in wanted}
        direction = up(adam_direction(state, down(grad, bases), group["betas"], group["eps"]), bases)
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(direction, alpha=-group["lr"] * (group["scale"] if rank else 1))
