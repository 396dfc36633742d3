"""Weights and norms that are hard to rank: the inputs every backend must agree on."""

import torch

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def weights(kind: str, rows: int, columns: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    normal = torch.randn(rows, columns, generator=draw)
    made = {
        "normal": lambda: normal,
        "equal": lambda: torch.full((rows, columns), 0.5),
        "zeros": lambda: torch.zeros(rows, columns),
        "half_zeros": lambda: normal * (torch.rand(rows, columns, generator=draw) < 0.5),
        "negative_zeros": lambda: torch.where(normal > 0, torch.tensor(-0.0), torch.tensor(0.0)),
        "few_values": lambda: torch.randint(-2, 3, (rows, columns), generator=draw).float(),
        "two_values": lambda: torch.randint(1, 3, (rows, columns), generator=draw).float(),
        "denormal": lambda: normal * {torch.float32: 1e-41, torch.bfloat16: 1e-39, torch.float16: 1e-7}[dtype],
        "outlier": lambda: (
            normal.index_put((torch.tensor([0]), torch.tensor([0])), torch.tensor(3e4)) if rows and columns else normal
        ),
        "heavy_tails": lambda: normal / torch.rand(rows, columns, generator=draw).clamp(1e-3),
        "scales": lambda: normal * torch.logspace(-3, 3, rows)[:, None],
    }[kind]()
    return made.to(dtype)


KINDS = (
    "normal",
    "equal",
    "zeros",
    "half_zeros",
    "negative_zeros",
    "few_values",
    "two_values",
    "denormal",
    "outlier",
    "heavy_tails",
    "scales",
)


def energies(columns: int, seed: int = 1) -> torch.Tensor:
    """Some features dead, some alike, some large."""
    draw = torch.Generator().manual_seed(seed)
    energy = torch.rand(columns, generator=draw) * 4
    energy[torch.rand(columns, generator=draw) < 0.1] = 0
    energy[torch.rand(columns, generator=draw) < 0.2] = 1
    return energy
