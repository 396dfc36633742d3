"""Selection on shards is selection on the whole, bit for bit, on every number of processes."""

import os
import random
import socket
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist

from hftcore import HftcoreError, NonFiniteError, Pattern, ops
from hftcore.distributed import Shard, sharded_mask, sharded_masks
from hftcore.selection import Part, find_cut

RANKS = 4
PATTERNS = [
    "50%",
    "0.1 row highest",
    "0 row",
    "1 row",
    "0.3 matrix",
    "0.9 matrix highest",
    "0 matrix",
    "1 matrix",
    "2:4",
]


def cuts(draw, size, parts, multiple=1):
    """Edges of `parts` stretches of random length, some of them empty."""
    inner = sorted(draw.randint(0, size // multiple) * multiple for _ in range(parts - 1))
    return [0, *inner, size]


def matrices(draw, dtype):
    """A random matrix with many ties, its energy and, half of the time, a reference."""
    seed = torch.Generator().manual_seed(draw.randrange(1 << 30))
    rows, columns = draw.randint(1, 40), 4 * draw.randint(1, 20)
    levels = draw.choice([2, 7, 10_000])
    weight = (torch.randint(-levels, levels, (rows, columns), generator=seed) / levels).to(dtype)
    energy = torch.randint(0, 3, (columns,), generator=seed).float()
    reference = (torch.randint(-2, 3, (rows, columns), generator=seed) / 2).to(dtype) if draw.random() < 0.5 else None
    return weight, energy, reference


def shard_of(draw, whole, rank, ranks):
    """What a rank holds of a whole; returns (shard, rows, columns) with the slices it was cut by."""
    weight, energy, reference = whole
    cut = draw.choice(["rows", "columns"])
    edges = cuts(draw, weight.shape[cut == "columns"], ranks, 4 if cut == "columns" else 1)
    mine = slice(edges[rank], edges[rank + 1])
    rows, columns = (mine, slice(None)) if cut == "rows" else (slice(None), mine)
    other = None if reference is None else reference[rows, columns]
    return Shard(weight[rows, columns], energy[columns], cut, other), rows, columns


def check_matrix(seed, pattern, rank, group):
    draw = random.Random(seed)
    dtype = draw.choice([torch.float32, torch.bfloat16, torch.float16])
    whole = matrices(draw, dtype)
    wanted = ops.unpack_mask(ops.prune_mask(whole[0], whole[1], pattern, whole[2]), whole[0].shape[1])
    shard, rows, columns = shard_of(draw, whole, rank, dist.get_world_size(group))
    found = ops.unpack_mask(sharded_mask(shard, pattern, group), shard.weight.shape[1])
    assert torch.equal(found, wanted[rows, columns]), (seed, pattern, shard.cut, rank)


def check_model(seed, pattern, rank, group):
    draw = random.Random(seed)
    wholes = [matrices(draw, torch.bfloat16) for _ in range(3)]
    sizes = [tuple(weight.shape) for weight, _, _ in wholes]
    makers = [lambda whole=whole: Part(whole[0], whole[1].sqrt(), whole[2]) for whole in wholes]
    count, invert = Pattern.parse(pattern).low_count(sum(rows * columns for rows, columns in sizes))
    cut = find_cut(makers, sizes, count)
    held = [shard_of(draw, whole, rank, dist.get_world_size(group)) for whole in wholes]
    masks = sharded_masks([shard for shard, _, _ in held], pattern, group)
    for maker, size, quota, (shard, rows, columns), mask in zip(makers, sizes, cut.quotas, held, masks, strict=True):
        wanted = torch.zeros(size[0], -(-size[1] // 8), dtype=torch.uint8)
        maker().call("cut", cut.key, quota, invert, wanted)
        found = ops.unpack_mask(mask, shard.weight.shape[1])
        assert torch.equal(found, ops.unpack_mask(wanted, size[1])[rows, columns]), (seed, pattern, shard.cut, rank)


def check_refusals(rank, group):
    weight = torch.ones(4, 8)
    weight[2, 3] = float("nan") if rank == 1 else 1
    for pattern in ("50%", "0.5 matrix"):
        for cut in ("rows", "columns"):
            with pytest.raises(NonFiniteError):
                sharded_mask(Shard(weight, torch.ones(8), cut), pattern, group)
    uneven = torch.ones(4 + rank, 8)
    for arguments, message in [
        ((Shard(uneven, torch.ones(8), "columns"), "50%"), "same number of rows"),
        ((Shard(torch.ones(4, 6), torch.ones(6), "columns"), "2:4"), "groups of 4 on every process"),
        ((Shard(weight, torch.ones(8), "rows"), Pattern("50%", block=(2, 2))), "block is not there"),
        ((Shard(weight, torch.ones(8), "rows"), "0.5 model"), "sharded_masks"),
        ((Shard(weight, torch.ones(8), "diagonal"), "50%"), "'rows' or 'columns'"),
    ]:
        with pytest.raises(HftcoreError, match=message):
            sharded_mask(*arguments, group)
    with pytest.raises(HftcoreError, match='needs scope "model"'):
        sharded_masks([], "50%", group)


def work(rank, port):
    """What each process does."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=RANKS)
    groups = {ranks: dist.new_group(range(ranks)) for ranks in range(1, RANKS + 1)}
    for ranks, group in groups.items():
        if rank < ranks:
            for seed in range(36):
                check_matrix(seed * 10 + ranks, PATTERNS[seed % len(PATTERNS)], rank, group)
            for seed, pattern in enumerate(["0.3 model", "0.05 model highest", "0 model", "1 model", "0.5 model"]):
                check_model(seed, pattern, rank, group)
    check_refusals(rank, groups[RANKS])
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available(), reason="PyTorch was built without distributed")
def test_selection_on_shards_is_selection_on_the_whole():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(port)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment,
        )
        for rank in range(RANKS)
    ]
    try:
        said = [process.communicate(timeout=200)[1].decode() for process in started]
    finally:
        for process in started:
            process.kill()
            process.wait()
    for process, errors in zip(started, said, strict=True):
        assert process.returncode == 0, errors[-3000:]


if __name__ == "__main__":
    work(int(sys.argv[1]), int(sys.argv[2]))
