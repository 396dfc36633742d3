"""Checks of a defence's settings."""

import math

from hftcore.errors import HftcoreError


def check_number(
    name: str, value: object, low: float = -math.inf, high: float = math.inf, is_open: bool = False
) -> None:
    """Refuse what is not a finite number in [low, high]; in (low, high] if `is_open`.

    >>> check_number("momentum", 2, 0, 1)
    Traceback (most recent call last):
    hftcore.errors.HftcoreError: momentum must be a number in [0, 1], got 2
    """
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if is_number and low <= value <= high and not (is_open and value == low):  # type: ignore[operator]
        return
    left = "(" if is_open or low == -math.inf else "["
    right = ")" if high == math.inf else "]"
    raise HftcoreError(f"{name} must be a number in {left}{low}, {high}{right}, got {value!r}")


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Refuse what is not one of `choices`."""
    if value not in choices:
        raise HftcoreError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
