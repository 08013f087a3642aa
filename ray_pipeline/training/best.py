"""Which evaluation of a stage was the best, and by what it is judged."""

from __future__ import annotations

import math
from dataclasses import dataclass

FIGURES = ("preference_accuracy", "accuracy", "validation_loss")  # the first that is measured tells the best checkpoint
TIES = ("preference_loss", "validation_loss")  # and of equal accuracies the lower of the first of these


@dataclass(frozen=True)
class Best:
    """The best evaluation so far: of preferences or of answers where they are measured, else of the validation loss.

    Attributes:
        loss: held-out, which decides between equal accuracies; None where none is measured.
    """

    step: int
    figure: str
    value: float
    loss: float | None = None

    @classmethod
    def of(cls, step: int, figures: dict[str, float]) -> Best | None:
        """From an evaluation's figures; None where there is nothing to compare."""
        figure = next((name for name in FIGURES if name in figures), None)
        if figure is None or math.isnan(figures[figure]):
            return None
        return cls(step, figure, figures[figure], next((figures[name] for name in TIES if name in figures), None))

    def beats(self, other: Best | None) -> bool:
        """Whether it is truly better; the earlier of equals stays."""
        if other is None or other.figure != self.figure:
            return True
        if self.figure == "validation_loss":
            return self.value < other.value
        if self.value != other.value or self.loss is None or other.loss is None:
            return self.value > other.value
        return self.loss < other.loss
