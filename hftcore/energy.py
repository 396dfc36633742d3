"""Energies: what calibration leaves behind, one small vector for each layer."""

import json
import os
from collections.abc import Iterator, Mapping

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hftcore.errors import HftcoreError
from hftcore.files import whole_file

FORMAT = "hftcore-energy-1"


class Energy(Mapping[str, Tensor]):
    """Layer name -> sum over counted tokens of the squared inputs, [N] float32 (fused experts: parameter name -> [E,
    N]).

    Sums, not means: the energy of two data sets is the sum of theirs, so shards and ranks merge by `a + b`.

    Args:
        values: name -> [N] or [E, N]; converted to float32 if it is not, never shared with the caller.
        tokens: how many tokens were counted.
        samples: how many samples had a counted token.
        expert_tokens: parameter name of fused experts -> [E] int64, tokens routed to each expert.
        average: "sum", or "sample-norm" when a value is the square of the mean of per-sample norms (see
            `capture_energy`).

    Raises:
        HftcoreError: a value that is neither a vector nor a matrix.

    >>> energy = Energy({"fc": torch.tensor([9.0, 4.0])}, tokens=2, samples=1)
    >>> (energy + energy)["fc"], energy.norm("fc")
    (tensor([18.,  8.]), tensor([3., 2.]))
    """

    def __init__(
        self,
        values: Mapping[str, Tensor] | None = None,
        tokens: int = 0,
        samples: int = 0,
        expert_tokens: Mapping[str, Tensor] | None = None,
        average: str = "sum",
    ):
        check_average(average)
        self._values: dict[str, Tensor] = {}
        self.tokens = int(tokens)
        self.samples = int(samples)
        self.expert_tokens = {name: count.detach().clone().long() for name, count in (expert_tokens or {}).items()}
        self.average = average
        for name, value in (values or {}).items():
            self.add_(name, value)

    def __getitem__(self, name: str) -> Tensor:
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        average = "" if self.average == "sum" else f", average={self.average!r}"
        return f"Energy({len(self)} layers, {self.tokens:,} tokens, {self.samples:,} samples{average})"

    def norm(self, name: str) -> Tensor:
        """[N] (or [E, N]) float32: the root of the energy, rounded once."""
        return self[name].sqrt()

    def idle(self, name: str) -> dict[int, str]:
        """Number -> label of the matrices of `name` that no token reached: their energy is zero throughout.

        >>> Energy({"experts": torch.tensor([[1.0, 0.0], [0.0, 0.0]])}).idle("experts")
        {1: 'experts[1]'}
        """
        value = self[name]
        numbers = (~value.any(dim=-1)).reshape(-1).nonzero().flatten().tolist()
        return {number: f"{name}[{number}]" if value.dim() > 1 else name for number in numbers}

    def add_(self, name: str, value: Tensor) -> "Energy":
        """Add `value` to the energy of `name`, which starts at zero; returns self."""
        have = self._values.get(name)
        if value.dim() not in (1, 2) or not value.is_floating_point():
            raise HftcoreError(
                f"the energy of {name!r} must be [N] or [E, N] floats, got {value.dtype} {tuple(value.shape)}"
            )
        if have is None:
            self._values[name] = value.detach().to(torch.float32, copy=True).contiguous()
        elif have.shape != value.shape:
            raise HftcoreError(
                f"the energy of {name!r} has shape {tuple(have.shape)}, cannot add {tuple(value.shape)} to it"
            )
        else:
            have += value.detach().to(have.device)
        return self

    def __add__(self, other: "Energy") -> "Energy":
        if not isinstance(other, Energy):
            return NotImplemented
        for energy in (self, other):
            if energy.average != "sum":
                raise HftcoreError(
                    f"only sums can be added, got an Energy with average={energy.average!r}; calibrate once"
                )
        if self.keys() != other.keys():
            odd = sorted(self.keys() ^ other.keys())
            raise HftcoreError(f"the two energies must hold the same layers; only one of them has {', '.join(odd[:3])}")
        total = Energy(self, self.tokens + other.tokens, self.samples + other.samples, self.expert_tokens)
        for name, value in other.items():
            total.add_(name, value)
        for name, count in other.expert_tokens.items():
            total._count(name, count)
        return total

    def _count(self, name: str, count: Tensor) -> None:
        have = self.expert_tokens.get(name)
        self.expert_tokens[name] = count.clone() if have is None else have + count.to(have.device)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file; `path` is whole or, after a failure, as it was."""
        metadata = {
            "format": FORMAT,
            "tokens": str(self.tokens),
            "samples": str(self.samples),
            "average": self.average,
            "expert_tokens": json.dumps({name: count.tolist() for name, count in self.expert_tokens.items()}),
        }
        with whole_file(path) as file:
            save_file({name: value.cpu() for name, value in self.items()}, file, metadata)

    @classmethod
    def load(cls, path: str | os.PathLike[str], device: str | torch.device = "cpu") -> "Energy":
        """Read what `save` wrote.

        Raises:
            HftcoreError: not an energy file, or one of another version, or a damaged one.
            FileNotFoundError: no such file.
        """
        if os.path.isdir(path):
            raise HftcoreError(f"{path} must be an energy file, got a folder; give the file that was saved")
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                values = {name: file.get_tensor(name).to(device) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        except SafetensorError as error:
            raise HftcoreError(f"{path} is not a safetensors file or is damaged: {error}") from error
        if metadata.get("format") != FORMAT:
            raise HftcoreError(
                f"{path} must be an energy file of format {FORMAT}, got {metadata.get('format')}; calibrate again"
            )
        try:
            counts = {name: torch.tensor(count) for name, count in json.loads(metadata["expert_tokens"]).items()}
            return cls(values, int(metadata["tokens"]), int(metadata["samples"]), counts, metadata["average"])
        except (KeyError, ValueError) as error:
            raise HftcoreError(f"{path} has broken metadata ({error}); calibrate again") from error


def check_average(average: str) -> None:
    if average not in ("sum", "sample-norm"):
        raise HftcoreError(f'average must be "sum" or "sample-norm", got {average!r}')
