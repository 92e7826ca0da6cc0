"""Which values come next: a list that is known beforehand, or optuna's estimator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from luthier.environment import require
from luthier.recipe.sweep import OptunaSpec, Sweep
from luthier.sweep.space import Choice, Dimension, Params

if TYPE_CHECKING:
    import optuna


class Search(Protocol):
    """Proposes trials one after another. Told the same outcomes in the same order, it proposes the same again."""

    num_trials: int

    def propose(self) -> Params:
        """The values of the next trial."""
        ...

    def hopeless(self, step: int, value: float) -> bool:
        """Whether the trial proposed last, with this value of the metric at this step, should stop."""
        ...

    def finished(self, status: str, value: float | None) -> None:
        """The trial proposed last ended as `done` with a value, `failed` or `pruned`."""
        ...


class ListedSearch:
    """A grid, or draws that no outcome changes."""

    def __init__(self, trials: Sequence[Params]) -> None:
        self.num_trials = len(trials)
        self._rest = iter(trials)

    def propose(self) -> Params:
        return next(self._rest)

    def hopeless(self, step: int, value: float) -> bool:
        return False

    def finished(self, status: str, value: float | None) -> None:
        pass


class OptunaSearch:
    """optuna's TPE sampler and median pruner on a study in memory, asked and told.

    Its random state is a function of the seed and of what it was asked and told, so telling it the recorded
    outcomes again is the same as never having stopped; no database is needed.
    """

    def __init__(self, spec: OptunaSpec, space: tuple[Dimension, ...], *, minimizes: bool) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.num_trials = spec.trials
        self._space = space
        self._distributions = {dimension.key: self._distribution(dimension) for dimension in space}
        pruner: optuna.pruners.BasePruner = optuna.pruners.NopPruner()
        if spec.pruner is not None:
            pruner = optuna.pruners.MedianPruner(
                n_startup_trials=spec.prune_after_trials, n_warmup_steps=spec.prune_after_steps
            )
        self._study = optuna.create_study(
            sampler=optuna.samplers.TPESampler(seed=spec.seed, n_startup_trials=spec.startup_trials),
            pruner=pruner,
            direction="minimize" if minimizes else "maximize",
        )
        self._trial: optuna.Trial | None = None

    def propose(self) -> Params:
        self._trial = self._study.ask(self._distributions)
        values = self._trial.params
        return {
            # The estimator sees values of a list as their numbers in it: they may be mappings.
            dimension.key: dimension.at(values[dimension.key])
            if isinstance(dimension, Choice)
            else dimension.nearest(values[dimension.key])
            for dimension in self._space
        }

    def hopeless(self, step: int, value: float) -> bool:
        trial = self._asked()
        trial.report(value, step)
        return bool(trial.should_prune())

    def finished(self, status: str, value: float | None) -> None:
        from optuna.trial import TrialState as states

        if status == "done":
            self._study.tell(self._asked(), value)
        else:
            self._study.tell(self._asked(), state=states.PRUNED if status == "pruned" else states.FAIL)
        self._trial = None

    def _asked(self) -> optuna.Trial:
        if self._trial is None:
            raise RuntimeError("no trial was proposed")
        return self._trial

    def _distribution(self, dimension: Dimension) -> optuna.distributions.BaseDistribution:
        from optuna import distributions as kinds

        if isinstance(dimension, Choice):
            return kinds.CategoricalDistribution(range(dimension.count))
        low, high = dimension.ends()
        if dimension.whole:
            return kinds.IntDistribution(
                int(low), int(high), log=dimension.log, step=int(dimension.step or 1)
            )
        return kinds.FloatDistribution(low, high, log=dimension.log, step=dimension.step)


def build_search(sweep: Sweep, space: tuple[Dimension, ...], trials: list[Params] | None) -> Search:
    """The search of a sweep. Raises RecipeError where its library is missing."""
    search = sweep.spec.search
    if trials is not None:
        return ListedSearch(trials)
    assert isinstance(search, OptunaSpec)
    require("optuna", "search.type: optuna")
    return OptunaSearch(search, space, minimizes=sweep.spec.minimizes)
