"""What a client says of itself beside its message: weight, steps, loss. Each number has bounds known beforehand.

They follow from the client's number of examples, the recipe, and what the strategy declares. A client checks its
own update, so that a strategy is told where it gives more than it declares. A server checks what comes from other
machines, because it need not be true.
"""

from collections.abc import Iterable, Mapping
from numbers import Integral, Real
from typing import Literal, NamedTuple

import numpy as np
import torch

from fedsim.data import FederatedData
from fedsim.errors import ConfigError, WrongReturnError, one_line
from fedsim.federated.aggregate import WEIGHTS
from fedsim.federated.strategy import Strategy
from fedsim.training.recipe import Recipe
from fedsim.training.small_batches import named
from fedsim.types import MAX_METRIC, TRAINED

StepsMethod = Literal["max_steps", "survey_steps"]  # of a strategy
MAX_EXAMPLES = 2**40  # of a client
MAX_LOSS = MAX_METRIC  # of the sum over a client's examples
ROUNDING = 2.0**-16  # a strategy may compute its weight in float32


class Claim(NamedTuple):
    """A number, and the range in which it should be."""

    name: str
    value: float
    least: float
    most: float
    whole: bool = False

    @property
    def holds(self) -> bool:
        """Whether the number is in its range; NaN is in none."""
        if self.whole:
            return self.least <= self.value <= self.most and self.value == int(self.value)
        return self.least * (1 + ROUNDING) <= self.value <= self.most * (1 + ROUNDING)

    def __str__(self) -> str:
        kind = "a whole number " if self.whole else ""
        return f"{self.name} {self.value:.10g}; it should be {kind}from {self.least:.10g} to {self.most:.10g}"


class Bounds(NamedTuple):
    """The largest numbers that a client may give for one training."""

    weight: float
    steps: int
    examples: int  # in the mini-batches of all steps
    loss: float  # the magnitude of the sum over these examples


def training_bounds(
    strategy: Strategy,
    recipe: Recipe,
    num_examples: int,
    dtype: torch.dtype,
    most: StepsMethod = "max_steps",
) -> Bounds:
    """For a client with so many examples, and losses of that dtype; raises WrongReturnError.

    `most` is the method of the strategy that says how many steps there are at most.
    """
    num_steps = recipe.num_steps(num_examples)
    epoch_steps, largest_batch = recipe.with_all_examples.epoch_of(num_examples)
    weight = strategy.max_weight(num_examples, num_steps)
    if not (isinstance(weight, Real) and 0 <= weight <= WEIGHTS[1]):
        right = f"it should give a number from 0 to {WEIGHTS[1]:.2g}"
        raise WrongReturnError(f"max_weight gave {one_line(repr(weight))} for {num_examples} examples; {right}")
    steps = getattr(strategy, most)(num_steps, epoch_steps)
    if not (isinstance(steps, Integral) and steps >= 0):
        made = f"{one_line(repr(steps))} for {num_steps} steps and {epoch_steps} of an epoch"
        raise WrongReturnError(f"{most} gave {made}; it should give a whole number >= 0")
    examples = int(steps) * largest_batch
    return Bounds(float(weight), int(steps), examples, _largest_loss(examples, dtype))


def training_claims(weight: float, sums: Mapping[str, float], bounds: Bounds) -> list[Claim]:
    """The numbers of a training; `sums` has those that the client tells, and the strategy's own."""
    claims = [Claim("weight", weight, 0, bounds.weight)]
    claims += [Claim(n, value, -MAX_METRIC, MAX_METRIC) for n, value in sums.items() if n not in TRAINED]
    if "steps" in sums:
        claims.append(Claim("steps", sums["steps"], 0, bounds.steps, whole=True))
    if "examples" in sums:
        claims.append(Claim("examples", sums["examples"], 1, bounds.examples, whole=True))
    if "loss" in sums:
        claims.append(Claim("loss", sums["loss"], -bounds.loss, bounds.loss))
    return claims


def evaluation_claims(sums: Mapping[str, float], num_examples: int, dtype: torch.dtype) -> list[Claim]:
    """The numbers of an evaluation on so many examples."""
    loss = _largest_loss(num_examples, dtype)
    return [
        Claim("correct", sums["correct"], 0, num_examples, whole=True),
        Claim("loss", sums["loss"], -loss, loss),
    ]


def first_wrong(claims: Iterable[Claim]) -> Claim | None:
    """The first number that is not in its range."""
    return next((claim for claim in claims if not claim.holds), None)


def clients_above(most: int | None, data: FederatedData, *, drop: bool) -> dict[int, str]:
    """The clients of more than `most` examples and why they are left out, with `drop`; else raises ConfigError."""
    above = [] if most is None else np.flatnonzero(data.sizes > most).tolist()
    if above and not drop:
        raise ConfigError(
            f"failures.max_examples: {most}, but {named(above)} {'have' if above[1:] else 'has'} more, up to "
            f"{data.sizes.max()}; raise it, or leave such clients out by failures.policy=drop"
        )
    return {k: f"has {data.sizes[k]} examples, and failures.max_examples is {most}" for k in above}


def _largest_loss(examples: int, dtype: torch.dtype) -> float:
    return min(torch.finfo(dtype).max * examples, MAX_LOSS)
