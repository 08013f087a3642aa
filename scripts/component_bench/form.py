"""One way to compute a component, and what it is held against: the same values, the same gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

BATCH, TOKENS, WIDTH = 4, 64, 512
TOLERANCE = 2e-5  # of the largest entry; fp32 sums in another order

Named = dict[str, Tensor]


def _as_they_are(gradients: Named) -> Named:
    return gradients


@dataclass(frozen=True)
class Form:
    """A function of x and weights.

    Attributes:
        function: x [4, 64, 512] -> the same shape, or a scalar loss.
        weights: what gradients are computed of besides x, under this form's own names.
        as_ours: gradients under its names, in its layout -> under ours.
    """

    function: Callable[[Tensor], Tensor]
    weights: Named
    as_ours: Callable[[Named], Named] = _as_they_are

    def run(self, x: Tensor, upstream: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Forward and backward: the output, and gradients of x and of the weights.

        Args:
            upstream: gradient of the output, of the output's shape.
        """
        out = self.function(x)
        return out.detach(), torch.autograd.grad(out, (x, *self.weights.values()), upstream)


@dataclass(frozen=True)
class Component:
    """Ours beside others.

    Attributes:
        source: of the plain formula.
        x: [4, 64, 512], gradients wanted.
        forms: `ours`, `plain`, and libraries.
    """

    source: str
    x: Tensor
    forms: dict[str, Form]

    def upstream(self) -> Tensor:
        """A gradient that tells every output apart; 1 for a loss."""
        with torch.no_grad():
            shape = self.forms["ours"].function(self.x).shape
        return torch.randn(shape, generator=torch.Generator().manual_seed(1)) if shape else torch.ones(())

    def differences(self) -> dict[str, dict[str, float]]:
        """Of every other form: how far its output, and each gradient, is from ours, over ours' largest entry."""
        upstream, ours = self.upstream(), self.forms["ours"]
        value, gradients = ours.run(self.x, upstream)
        want = {"output": value, "x": gradients[0], **ours.as_ours(dict(zip(ours.weights, gradients[1:], strict=True)))}
        found: dict[str, dict[str, float]] = {}
        for name, form in self.forms.items():
            if name == "ours":
                continue
            value, gradients = form.run(self.x, upstream)
            named = form.as_ours(dict(zip(form.weights, gradients[1:], strict=True)))
            have = {"output": value, "x": gradients[0], **named}
            assert have.keys() == want.keys(), f"{name} has gradients of {sorted(have)}, ours of {sorted(want)}"
            found[name] = {key: float((have[key] - want[key]).abs().max() / want[key].abs().max()) for key in want}
        return found


def check(name: str, component: Component) -> dict[str, dict[str, float]]:
    """`Component.differences`, all of them rounding.

    Raises:
        AssertionError: a form computes something else; nothing is to be timed then.
    """
    found = component.differences()
    for form, differences in found.items():
        for what, difference in differences.items():
            if not difference <= TOLERANCE:  # NaN is no rounding either
                raise AssertionError(
                    f"{name}: {form} differs from ours by {difference:.1e} in {what}; nothing is timed"
                )
    return found
