"""The smallest dose that reaches a goal: any function from a dose to an applied, reversible Edit, searched by bisection.

Which dose repairs a model depends on the attack, and the threshold is steep, so a default serves nobody.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from hftcore.bindings.evaluation.metrics import Score
from hftcore.bindings.evaluation.run import BROKEN_PERCENT
from hftcore.errors import HftcoreError

Measure = Callable[[float], Mapping[str, Score]]

_GOAL = re.compile(r"\s*([A-Za-z][\w+]*)\s*(<=|>=)\s*(-?\d+(?:\.\d+)?)\s*")


@dataclass(frozen=True)
class Goal:
    """A bound on a score: of the score itself, or (`is_change`) of its change since dose 0."""

    score: str
    relation: Literal["<=", ">="]
    bound: float
    is_change: bool = False

    def is_met(self, scores: Mapping[str, Score], undosed: Mapping[str, Score]) -> bool:
        """By the score's value; an unknown one (NaN) meets nothing."""
        value = self.value(scores, undosed)
        return value <= self.bound if self.relation == "<=" else value >= self.bound

    def value(self, scores: Mapping[str, Score], undosed: Mapping[str, Score]) -> float:
        """What the bound is for."""
        value = scores[self.score].value
        return value - undosed[self.score].value if self.is_change else value

    def __str__(self) -> str:
        change = f"{self.bound:+g} points" if self.is_change else f"{self.bound:g}"
        return f"{self.score} {self.relation} {change}"


def parse_goal(text: str, is_change: bool = False) -> Goal:
    """The goal that a text such as `HS<=5` asks for.

    >>> str(parse_goal("HS<=5")), str(parse_goal("FA >= -2", is_change=True))
    ('HS <= 5', 'FA >= -2 points')
    """
    match = _GOAL.fullmatch(text)
    if not match:
        raise HftcoreError(f"a goal must be a score, <= or >=, and a number, such as HS<=5; got {text!r}")
    relation: Literal["<=", ">="] = "<=" if match[2] == "<=" else ">="
    return Goal(match[1], relation, float(match[3]), is_change)


@dataclass(frozen=True)
class Search:
    """What a search found.

    Fields:
        dose: the smallest measured dose that meets every goal; None when no measured one does.
        curve: dose -> scores, in ascending order, dose 0 (the model as it is) first.
        verdict: a sentence.
    """

    dose: float | None
    curve: dict[float, Mapping[str, Score]] = field(default_factory=dict)
    verdict: str = ""


def check_search(highest: float, steps: int, tolerance: float) -> None:
    """Refuse numbers that `find_dose` cannot search by."""
    if not (math.isfinite(highest) and highest > 0):
        raise HftcoreError(f"highest must be a dose above 0, got {highest}")
    if steps < 1 or not tolerance > 0:
        raise HftcoreError(f"steps must be at least 1 and tolerance above 0, got {steps} and {tolerance}")


def find_dose(
    measure: Measure, until: Goal, keep: Goal | None = None, *, highest: float, steps: int = 5, tolerance: float = 0.05
) -> Search:
    """The smallest dose that meets `until`, and whether it keeps what `keep` asks for.

    Equal steps upwards from 0 find the first dose that meets `until`; what lies between it and the step before is halved until it is
    narrower than the tolerance. Larger doses are not tried: they cost more, and a broken model may meet a goal for the wrong reason. The
    threshold found is the first one if `until` is met from there on up to that step.

    Args:
        measure: dose -> scores.
        until: the goal of the dose.
        keep: what it may not cost, or None.
        highest: the largest dose tried, > 0.
        steps: number of equal steps up to it, >= 1.
        tolerance: width of the last interval as a share of `highest`, > 0.

    Returns:
        A `Search`; its dose is None where no dose meets `until`, or where the doses that do break `keep`.
    """
    check_search(highest, steps, tolerance)
    curve = {0.0: measure(0.0)}
    for goal in (until, *([keep] if keep else [])):
        if goal.score not in curve[0.0]:
            raise HftcoreError(f"{goal} is about no score measured here, which are {', '.join(curve[0.0])}")

    def meets(dose: float) -> bool:
        if dose not in curve:
            curve[dose] = measure(dose)
        return until.is_met(curve[dose], curve[0.0])

    low, high = 0.0, None
    for dose in (highest * step / steps for step in range(steps + 1)):
        if meets(dose):
            high = dose
            break
        low = dose
    while high is not None and high > 0 and high - low > tolerance * highest:
        middle = (low + high) / 2
        low, high = (low, middle) if meets(middle) else (middle, high)
    curve = dict(sorted(curve.items()))
    return _judged(curve, high, until, keep, highest)


def _judged(
    curve: dict[float, Mapping[str, Score]], first: float | None, until: Goal, keep: Goal | None, highest: float
) -> Search:
    undosed = curve[0.0]
    if first is None:
        bound = min if until.relation == "<=" else max
        best = bound(scores[until.score].value for scores in curve.values())
        return Search(None, curve, f"No dose up to {highest:g} does it: {until} is not met, the best was {best:.0f}.")
    reaching = [dose for dose, scores in curve.items() if until.is_met(scores, undosed)]
    kept = [dose for dose in reaching if keep is None or keep.is_met(curve[dose], undosed)]
    if not kept and keep is not None:
        lost = keep.value(curve[first], undosed)
        below = max(dose for dose in curve if dose < first) if first else 0.0
        return Search(
            None,
            curve,
            f"No dose does it: from {first:.3g} on {until} is met, but then {keep.score} has changed by {lost:+.0f}, and {keep} is wanted; "
            f"between {below:.3g} and {first:.3g} a smaller tolerance would look closer.",
        )
    dose = min(kept)
    score = curve[dose][until.score]
    low, high = score.interval
    doubt = "" if until.bound >= high or until.bound <= low else "; more requests would make it surer"
    cost = "" if keep is None else f", {keep.score} changed by {keep.value(curve[dose], undosed):+.0f}"
    noise = curve[dose].get("degenerate")
    if noise is not None and noise.value > BROKEN_PERCENT:
        doubt += f"; {noise.value:.0f} % of the replies are noise, so this says little"
    if dose == 0:
        found = f"{until.score} is {score.value:.0f} [{low:.0f}, {high:.0f}]"
        return Search(dose, curve, f"No dose is needed: {found}{doubt}.")
    found = f"{until.score} {undosed[until.score].value:.0f} to {score.value:.0f} [{low:.0f}, {high:.0f}]"
    return Search(dose, curve, f"The smallest dose that does it is {dose:.3g}: {found}{cost}{doubt}.")
