"""The losses of pairs by their papers' formulas, in float64 and numpy: what the product's are compared with.

Each takes the numbers of all pairs of a step and gives its total loss. `fixed` are the same numbers again, for what a
paper holds constant, so that finite differences of the others are the gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True, slots=True)
class Numbers:
    """Of the chosen (c) and rejected (r) answers: log-probabilities, by the reference, and lengths."""

    c: Array
    r: Array
    c_ref: Array
    r_ref: Array
    c_len: Array
    r_len: Array

    @property
    def u(self) -> Array:
        return self.c - self.c_ref

    @property
    def v(self) -> Array:
        return self.r - self.r_ref


@dataclass(frozen=True, slots=True)
class Options:
    beta: float = 0.3
    eps: float = 0.0
    gamma: float = 0.4
    tau: float = 0.05
    divergence: str = "reverse_kl"
    alpha: float = 0.5
    shift: bool = True


def sg(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def logsg(x: Array) -> Array:
    return -np.log1p(np.exp(-x))


def fprime(log_t: Array, o: Options) -> Array:
    """The derivatives f' of the divergences' generators f, by the table of arXiv:2309.16240."""
    t = np.exp(log_t)
    return {
        "reverse_kl": lambda: np.log(t),
        "forward_kl": lambda: -1 / t,
        "js": lambda: np.log(2 * t / (1 + t)),
        "alpha": lambda: (1 - t**-o.alpha) / o.alpha,
    }[o.divergence]()


def margin(n: Numbers, o: Options) -> Array:
    return o.beta * (fprime(n.u, o) - fprime(n.v, o))


def mean_margin(n: Numbers, o: Options) -> Array:
    return fprime_mean(n.u, n.c_len, o) - fprime_mean(n.v, n.r_len, o)


def fprime_mean(log_t: Array, length: Array, o: Options) -> Array:
    shift = 1.0 if o.divergence == "forward_kl" else 0.0  # f'(1) = 0, which matters once lengths divide it
    return (fprime(log_t, o) + shift) / length


def cdpo(m: Array, o: Options) -> Array:
    return -(1 - o.eps) * np.log(sg(m)) - o.eps * np.log(1 - sg(m))


def robust(n: Numbers, fixed: Numbers, o: Options) -> Array:
    m = margin(n, o)
    right, wrong = -np.log(sg(m)), -np.log(sg(-m))
    return ((1 - o.eps) * right - o.eps * wrong) / (1 - 2 * o.eps)


def exo(n: Numbers, fixed: Numbers, o: Options) -> Array:
    """KL of softmax(beta u) from the labels (1 - eps, eps)."""
    scores = o.beta * np.stack([fprime(n.u, o), fprime(n.v, o)])
    p = np.exp(scores) / np.exp(scores).sum(0)
    return (p * np.log(p / np.array([[1 - o.eps], [o.eps]]))).sum(0)


def discopop(n: Numbers, fixed: Numbers, o: Options) -> Array:
    m = margin(n, o)
    share = sg(m / o.tau)
    return (1 - share) * -logsg(m) + share * np.exp(-m)


def kto_pair(n: Numbers, fixed: Numbers, o: Options) -> Array:
    z_c, z_r = max(fixed.u.mean(), 0.0), max(fixed.v.mean(), 0.0)
    return ((1 - sg(o.beta * (n.u - z_r))) + (1 - sg(o.beta * (z_c - n.v)))) / 2


def bco(n: Numbers, fixed: Numbers, o: Options) -> Array:
    delta = o.beta * np.concatenate([fixed.u, fixed.v]).mean() if o.shift else 0.0
    return -np.log(sg(o.beta * n.u - delta)) - np.log(sg(-(o.beta * n.v - delta)))


def aot(n: Numbers, fixed: Numbers, o: Options) -> Array:
    return cdpo(o.beta * (np.sort(n.c - n.r) - np.sort(n.c_ref - n.r_ref)), o)


def aot_unpaired(n: Numbers, fixed: Numbers, o: Options) -> Array:
    return cdpo(o.beta * (np.sort(n.u) - np.sort(n.v)), o)


def nca(n: Numbers, fixed: Numbers, o: Options) -> Array:
    a, b = o.beta * n.u, o.beta * n.v
    return -(logsg(a) + 0.5 * logsg(-a) + 0.5 * logsg(-b))


def sppo(n: Numbers, fixed: Numbers, o: Options) -> Array:
    return (n.u - 1 / (2 * o.beta)) ** 2 + (n.v + 1 / (2 * o.beta)) ** 2


def apo_zero(n: Numbers, fixed: Numbers, o: Options) -> Array:
    return (1 - sg(o.beta * n.u)) + sg(o.beta * n.v)


def apo_down(n: Numbers, fixed: Numbers, o: Options) -> Array:
    return sg(o.beta * n.u) + 1 - sg(o.beta * (n.u - n.v))


def orpo(n: Numbers, fixed: Numbers, o: Options) -> Array:
    p, q = np.exp(n.c / n.c_len), np.exp(n.r / n.r_len)
    odds_ratio = (p / (1 - p)) / (q / (1 - q))
    return -n.c / n.c_len - o.beta * np.log(sg(np.log(odds_ratio)))


def simpo(n: Numbers, fixed: Numbers, o: Options) -> Array:
    return cdpo(o.beta / n.c_len * n.c - o.beta / n.r_len * n.r - o.gamma, o)


def cpo(n: Numbers, fixed: Numbers, o: Options) -> Array:
    return cdpo(o.beta * n.c - o.beta * n.r, o) - n.c / n.c_len


FORMULAS: dict[str, Callable[[Numbers, Numbers, Options], Array]] = {
    "sigmoid": lambda n, fixed, o: cdpo(margin(n, o), o),
    "robust": robust,
    "hinge": lambda n, fixed, o: np.maximum(0, 1 - margin(n, o)),
    "ipo": lambda n, fixed, o: (mean_margin(n, o) - 1 / (2 * o.beta)) ** 2,
    "sigmoid_norm": lambda n, fixed, o: -logsg(o.beta * mean_margin(n, o)),
    "exo_pair": exo,
    "discopop": discopop,
    "kto_pair": kto_pair,
    "bco_pair": bco,
    "aot": aot,
    "aot_unpaired": aot_unpaired,
    "nca_pair": nca,
    "sppo_hard": sppo,
    "apo_zero": apo_zero,
    "apo_down": apo_down,
    "orpo": orpo,
    "simpo": simpo,
    "cpo": cpo,
}


def total(name: str, n: Numbers, fixed: Numbers, o: Options) -> float:
    return float(FORMULAS[name](n, fixed, o).sum())


def slopes(name: str, n: Numbers, o: Options, step: float = 1e-5) -> tuple[Array, Array]:
    """Central differences of the total by every log-probability of the policy, chosen and rejected."""
    found = []
    for field in ("c", "r"):
        values = getattr(n, field)
        column = np.zeros_like(values)
        for i in range(len(values)):
            ends = []
            for sign in (1, -1):
                moved = values.copy()
                moved[i] += sign * step
                ends.append(total(name, replace(n, **{field: moved}), n, o))
            column[i] = (ends[0] - ends[1]) / (2 * step)
        found.append(column)
    return found[0], found[1]
