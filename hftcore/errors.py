"""The errors hftcore raises on bad input. Each is a ValueError, so `except ValueError` catches them all."""


class HftcoreError(ValueError):
    """Bad input: the message names the argument, what was got, what was wanted and what to do."""


class NonFiniteError(HftcoreError):
    """A weight, an activation or a score is NaN or infinite; nothing was changed."""


class FingerprintError(HftcoreError):
    """An Edit meets a tensor other than the one it was made for; nothing was changed."""
