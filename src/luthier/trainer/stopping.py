"""Early stopping that a resumed run remembers."""

from __future__ import annotations

from typing import Any

from transformers import EarlyStoppingCallback, TrainerControl, TrainerState, TrainingArguments


class EarlyStopping(EarlyStoppingCallback):
    """transformers' early stopping; a run that had stopped does not go on when it is resumed.

    It stops at the `patience`-th evaluation in a row whose best metric is not better than the best so far by more
    than `threshold`. The count is part of every checkpoint, patience and threshold are the recipe's: a run that
    had stopped goes on when it is resumed with more patience.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        super().on_train_begin(args, state, control, **kwargs)  # type: ignore[no-untyped-call]
        if self.early_stopping_patience_counter >= self.early_stopping_patience:
            control.should_training_stop = True
        return control
