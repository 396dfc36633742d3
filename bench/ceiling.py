"""What the memory of this machine allows: passes over the same buffer that no kernel can beat by much."""

from collections.abc import Callable

from torch import Tensor

IN_PLACE, READ, COPY = "in place mul_(1)", "read sum()", "copy_"


def ceilings(buffer: Tensor, source: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Calls to time beside a kernel, in the same rounds and on the same buffer.

    Args:
        buffer: what the kernel works on; its values are kept.
        source: the same values elsewhere, copied from.

    Returns:
        `mul_(1)` (one read, one write of each byte), `sum()` (one read), `copy_` (one read, one write elsewhere).
    """
    return {
        IN_PLACE: lambda: buffer.mul_(1),
        READ: lambda: buffer.sum(),
        COPY: lambda: buffer.copy_(source),
    }
