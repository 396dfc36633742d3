"""Lisa: fine-tuning that goes back to alignment data again and again, and never far from where it came.

Huang et al., "Lisa: Lazy Safety Alignment for Large Language Models against Harmful Fine-tuning Attack", arXiv:2405.18641.
"""

from dataclasses import dataclass
from typing import NamedTuple

from hftcore.defenses.settings import check_number
from hftcore.errors import HftcoreError


@dataclass
class LisaSettings:
    """Settings of Lisa, with the published defaults.

    Attributes:
        align_steps: K1 >= 0 steps on alignment data, which come first; 0 is plain fine-tuning.
        user_steps: then K2 >= 0 steps on the user's data, and so on.
        rho: ρ >= 0 of the term ρ/2 ‖w − w'‖², w' being the weights at the last switch.
        warmup: share of all steps, in [0, 1], in which that term is left out, as in the published code.
    """

    align_steps: int = 100
    user_steps: int = 900
    rho: float = 1.0
    warmup: float = 0.1

    def check(self) -> None:
        """Refuse values out of range, by name."""
        for name in ("align_steps", "user_steps"):
            value = getattr(self, name)
            check_number(name, value, 0)
            if value != int(value):
                raise HftcoreError(f"{name} must be a whole number, got {value}")
        if self.align_steps + self.user_steps == 0:
            raise HftcoreError("align_steps and user_steps must not both be 0")
        check_number("rho", self.rho, 0)
        check_number("warmup", self.warmup, 0, 1)


class Turn(NamedTuple):
    """What a step is: on alignment data or the user's, the first since a switch, with the proximal term or without."""

    is_alignment: bool
    is_switch: bool
    is_pulled: bool


def lisa_turn(step: int, total: int, settings: LisaSettings) -> Turn:
    """What step number `step`, from 0, of `total` is. It depends on nothing else, so a run is resumed anywhere.

    With one of the two states only, there is no switch and no proximal term.

    Source: algorithm 1; the start and the warm-up from the published code.

    >>> [lisa_turn(step, 10, LisaSettings(2, 3, warmup=0.2))[:2] for step in (0, 1, 2, 4, 5)]
    [(True, True), (True, False), (False, True), (False, False), (True, True)]
    """
    position = step % (settings.align_steps + settings.user_steps)
    both = settings.align_steps > 0 and settings.user_steps > 0
    is_pulled = both and settings.rho > 0 and step >= settings.warmup * total
    return Turn(position < settings.align_steps, both and position in (0, settings.align_steps), is_pulled)
