"""How far a step on LoRA factors moves the weights they are merged into."""

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from hftcore.defenses.perturbation import Gradients, Parameters, finite_norm
from hftcore.errors import HftcoreError
from hftcore.shards import is_sharded


class Factors(NamedTuple):
    """Names of the factors A [r, N] and B [M, r] of an adapter; merged, they add scaling · B A to a weight."""

    a: str
    b: str
    scaling: float


def lora_factors(model: nn.Module) -> list[Factors]:
    """The pairs of LoRA factors of a model, PEFT's or built alike: a module with `lora_A`, `lora_B` and `scaling`, by adapter."""
    found = []
    for name, module in model.named_modules():
        held: Any = module
        if not all(hasattr(module, part) for part in ("lora_A", "lora_B", "scaling")):
            continue
        for adapter in held.lora_A:
            a, b = (f"{name}.lora_{letter}.{adapter}.weight" for letter in "AB")
            found.append(Factors(a, b, float(held.scaling[adapter])))
    return found


def merged_length(parameters: Parameters, factors: Sequence[Factors], direction: Gradients, rho: float) -> float:
    """The t > 0 for which the step t·d/‖d‖ moves the merged weights by `rho`; 0 if the direction moves nothing.

    The merged change of a pair is s((B + t d_B)(A + t d_A) − B A); other parameters count as they are. Its norm over all of them is
    found from r × r products alone, in float64. Where several t fit, the smallest is taken.

    Args:
        parameters: what is moved.
        factors: as `lora_factors` gives them; pairs of which no factor is moved do not matter.
        direction: d.
        rho: >= 0.

    Raises:
        HftcoreError: a parameter belongs to a LoRA variant whose merged change is another one (by name), or is sharded.
        NonFiniteError: the direction holds NaN or infinity.

    >>> parameters = {"a": nn.Parameter(torch.zeros(1, 1)), "b": nn.Parameter(torch.full((1, 1), 2.0))}
    >>> merged_length(parameters, [Factors("a", "b", 0.5)], Gradients({"a": torch.ones(1, 1)}), rho=3.0)
    3.0
    """
    norm = finite_norm(direction, "the gradient to move along")
    if norm == 0 or rho == 0:
        return 0.0
    moved, seen = direction.tensors, set()
    if cut := next((name for name, tensor in moved.items() if is_sharded(tensor)), None):
        raise HftcoreError(f'space "merged" needs whole LoRA factors, got the DTensor {cut!r}; take space "trained"')
    # ‖t P + t² Q‖² = a t² + 2 b t³ + c t⁴
    a = b = c = 0.0
    for pair in factors:
        if pair.a not in moved and pair.b not in moved:
            continue
        seen |= {pair.a, pair.b}
        A, dA = _both(parameters, moved, pair.a, norm)
        B, dB = _both(parameters, moved, pair.b, norm)
        r, square = len(A), pair.scaling**2
        left, right = torch.cat([B, dB], dim=1), torch.cat([dA, A])
        G, H = left.T @ left, right @ right.T
        a += square * float((G * H).sum())
        b += square * float((G[:, r:] * H[:, :r]).sum())
        c += square * float((G[r:, r:] * H[:r, :r]).sum())
    check_merged(moved, factors)
    for name, tensor in moved.items():
        if name in seen:
            continue
        a += (Gradients({name: tensor}).norm() / norm) ** 2
    if max(a, c) == 0:
        return 0.0
    roots = np.roots([c, 2 * b, a, 0.0, -(rho**2)])
    return float(
        min(root.real for root in roots if root.real > 0 and math.isclose(root.imag, 0, abs_tol=1e-9 * abs(root)))
    )


def check_merged(names: Iterable[str], factors: Sequence[Factors]) -> None:
    """Refuse parameters of a LoRA variant whose merged change is another one than that of `Factors`, by name."""
    known = {name for pair in factors for name in (pair.a, pair.b)}
    for name in names:
        if "lora_" in name and name not in known:
            raise HftcoreError(
                f"the merged change of {name!r} is not scaling · B A (DoRA, embeddings or a convolution); use space='trained'"
            )


def _both(parameters: Parameters, moved: dict[str, Tensor], name: str, norm: float) -> tuple[Tensor, Tensor]:
    value = parameters[name].detach().double()
    return value, moved[name].double() / norm if name in moved else torch.zeros_like(value)
