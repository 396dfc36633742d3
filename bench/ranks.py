"""What several processes gain and what they pay: calibration on their batches, and exact selection on weights that they share.

Started by `hftcore-bench ranks`; each process of the group runs this file. Calibration on all batches is compared with that of one
process while the others wait; selection with what one process does on the same part of the weights where nobody holds more, all
processes at the same time, so that they share the memory's bandwidth either way.

A time ends when the last process is done, with or without the others: taken on one process alone, selection together would have in it
the wait for whichever process the machine slowed down in that round, and selection by itself would not.
"""

import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import hftcore
from hftcore.backend import backend_for
from hftcore.bench.measure import OURS, timed
from hftcore.bench.models import model_of
from hftcore.bench.report import table
from hftcore.bench.results import Measurement
from hftcore.bench.scaling import ALONE, BY_COLUMNS, CALIBRATED, ONE, PATTERNS, SIDE, selected
from hftcore.bench.timing import Neighbours, is_noisy, paired_ratio
from hftcore.distributed import Shard, sharded_masks
from hftcore.errors import HftcoreError
from hftcore.ops import prune_mask
from hftcore.pattern import Pattern
from hftcore.ranks import gather, summed
from hftcore.selection import find_cut

RANKS = (1, 2, 4)
SELECTIONS = 9  # times as many rounds of selection, which are short
BATCHES, SAMPLES, TOKENS = 8, 2, 128


def measure(count: int, sizes: Sequence[int], rounds: int, calibrates: bool) -> dict[str, Any]:
    """What process 0 of a group of `count` found.

    Returns:
        {"ranks", "round_us": of a small all-reduce, "calibration": times by round, "selection": one dict for each size
        and pattern, "neighbours": cores that other processes kept busy}.

    Raises:
        HftcoreError: a process failed, with its last words.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    order = json.dumps({"count": count, "port": port, "sizes": list(sizes), "rounds": rounds, "calibrates": calibrates})
    neighbours = Neighbours()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "hftcore.bench.ranks", str(rank), order],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for rank in range(count)
    ]
    try:
        said = [process.communicate() for process in started]
    finally:
        for process in started:
            process.kill()
    for process, (_, errors) in zip(started, said, strict=True):
        if process.returncode:
            raise HftcoreError(f"a process of {count} ended with {process.returncode}: {errors.strip()[-400:]}")
    return {**json.loads(said[0][0]), "neighbours": neighbours.cores()}


def lines(found: dict[str, Any]) -> list[Measurement]:
    """What `measure` found as lines of a result file, for its curves and targets."""
    others = found["neighbours"]
    common: dict[str, Any] = {
        "shape": str(found["ranks"]),
        "size": [],
        "device": "cpu",
        "backend": backend_for("cpu"),
        "threads": 1,
        "bytes_moved": None,
        "products": None,
        "canary": 1.0,
        "neighbours": None if others is None else round(others, 2),
        "noisy": is_noisy(1.0, others),
    }
    measured = [(CALIBRATED, "float32", ONE, found["calibration"])] if "calibration" in found else []
    measured += [(selected(each["pattern"], each["matrices"]), "bfloat16", ALONE, each) for each in found["selection"]]
    return [
        timed(common | {"case": case, "dtype": dtype}, variant, kind, [1e3 * one for one in times[name]], None)
        for case, dtype, other, times in measured
        for variant, kind, name in ((OURS, "ours", "shared_s"), (other, "ceiling", "alone_s"))
    ]


def in_turns(
    variants: dict[str, Callable[[], object]], rounds: int, cpu: Callable[[list[float]], float]
) -> dict[str, list[float]]:
    """NAME_s and NAME_cpu_s by round: seconds until all processes are done, and `cpu` of the CPU seconds that each of them took.

    All processes begin a variant together, and each variant is the first of every second round.
    """
    times: dict[str, list[float]] = {f"{name}_{kind}": [] for name in variants for kind in ("s", "cpu_s")}
    for turn in range(rounds + 1):
        for name in list(variants) if turn % 2 else reversed(variants):
            dist.barrier()
            start, spent = time.perf_counter(), time.process_time()
            variants[name]()
            took = torch.tensor([time.perf_counter() - start, time.process_time() - spent], dtype=torch.float64)
            walls, spents = gather(took, dist.group.WORLD).t().tolist()
            if turn:  # the first only warms up
                times[f"{name}_s"].append(max(walls))
                times[f"{name}_cpu_s"].append(cpu(spents))
    return times


def calibration(rank: int, count: int, rounds: int) -> dict[str, list[float]]:
    """All batches on process 0 while the others wait, and each process its part of them."""
    model = model_of("small-llama T128", torch.float32, torch.device("cpu"))
    draw = torch.Generator().manual_seed(0)
    batches = [
        {"input_ids": torch.randint(0, model.config.vocab_size, (SAMPLES, TOKENS), generator=draw)}
        for _ in range(BATCHES)
    ]

    def shared() -> None:
        hftcore.calibrate(model, batches[rank::count], group=dist.group.WORLD)

    def alone() -> None:
        if rank == 0:
            hftcore.calibrate(model, batches)
        dist.barrier()

    return in_turns({"alone": alone, "shared": shared}, rounds, max)


@contextmanager
def counted() -> Iterator[dict[str, int]]:
    """Count the rounds of collectives, and the bytes that this process puts into them."""
    counts = {"rounds": 0, "bytes": 0}
    # name -> the argument that travels, and how many rounds a call takes: objects travel after their sizes
    kinds = {"all_reduce": (0, 1), "all_gather": (1, 1), "all_gather_object": (1, 2)}
    kept = {name: getattr(dist, name) for name in kinds}

    def counting(name: str, *args: Any, **options: Any) -> Any:
        place, rounds = kinds[name]
        counts["rounds"] += rounds
        counts["bytes"] += getattr(args[place], "nbytes", 0)
        return kept[name](*args, **options)

    try:
        for name in kinds:
            setattr(dist, name, partial(counting, name))
        yield counts
    finally:
        for name, call in kept.items():
            setattr(dist, name, call)


def masks_alone(shards: Sequence[Shard], pattern: Pattern) -> list[Tensor]:
    """The masks of what this process holds as if it were all there is, the way one process makes them."""
    if pattern.scope == "row":
        return [prune_mask(shard.weight, shard.energy, pattern) for shard in shards]
    sizes = [(shard.weight.shape[0], shard.weight.shape[1]) for shard in shards]
    count, invert = pattern.low_count(sum(rows * columns for rows, columns in sizes))
    cut = find_cut([shard.part for shard in shards], sizes, count)
    masks = [shard.empty_mask() for shard in shards]
    for shard, quota, mask in zip(shards, cut.quotas, masks, strict=True):
        shard.part().call("cut", cut.key, quota, invert, mask)
    return masks


def selection(rank: int, count: int, size: int, pattern: str, rounds: int) -> dict[str, Any]:
    """Masks of `size` matrices, of which each process holds its share of the rows or columns, against the same work without the others."""
    draw = torch.Generator().manual_seed(rank)
    share = SIDE // count
    if pattern == BY_COLUMNS:
        whole, size_here, row, column = (SIDE, share * count), (SIDE, share), 0, share * rank
    else:
        whole, size_here, row, column = (share * count, SIDE), (share, SIDE), share * rank, 0
    noise = torch.randn(size_here, generator=draw).bfloat16()
    energy = torch.rand(SIDE, generator=torch.Generator().manual_seed(9))[column : column + size_here[1]]
    shards = [Shard(noise * (1 + 0.01 * number), energy, whole, row, column) for number in range(size)]
    wanted = Pattern.of(pattern.removesuffix(" by columns"))
    times = in_turns(
        {
            "alone": lambda: masks_alone(shards, wanted),
            "shared": lambda: sharded_masks(shards, wanted, dist.group.WORLD),
        },
        rounds,
        sum,
    )
    with counted() as counts:
        sharded_masks(shards, wanted, dist.group.WORLD)
    return {"weights": size * whole[0] * whole[1], "matrices": size, "pattern": pattern, **counts, **times}


def take_part(rank: int, order: dict[str, Any]) -> dict[str, Any]:
    """What each process does."""
    torch.set_num_threads(1)
    count, rounds = order["count"], order["rounds"]
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{order['port']}", rank=rank, world_size=count)
    small = torch.zeros(4, dtype=torch.int64)
    latency = in_turns({"round": lambda: summed(small, dist.group.WORLD)}, 50, sum)["round_s"]
    found: dict[str, Any] = {"ranks": count, "round_us": 1e6 * statistics.median(latency)}
    if order["calibrates"]:
        found["calibration"] = calibration(rank, count, rounds)
    found["selection"] = [
        selection(rank, count, size, pattern, SELECTIONS * rounds) for size in order["sizes"] for pattern in PATTERNS
    ]
    dist.barrier()
    dist.destroy_process_group()
    return found


def tables(found: Sequence[dict[str, Any]]) -> str:
    """All measurements as Markdown."""
    calibrated = [
        [
            str(one["ranks"]),
            f"{statistics.median(one['calibration']['alone_s']):.2f}",
            f"{statistics.median(one['calibration']['shared_s']):.2f}",
            f"{paired_ratio(one['calibration']['alone_s'], one['calibration']['shared_s']):.2f}",
            f"{paired_ratio(one['calibration']['alone_cpu_s'], one['calibration']['shared_cpu_s']):.2f}",
        ]
        for one in found
        if "calibration" in one
    ]
    selected = []
    for one in found:
        for each in one["selection"]:
            alone, shared = (statistics.median(each[name]) for name in ("alone_s", "shared_s"))
            expected = each["rounds"] * one["round_us"] / 1e6
            selected.append(
                [
                    str(one["ranks"]),
                    f"{each['weights'] / 1e6:.0f} M",
                    each["pattern"],
                    str(each["rounds"]),
                    str(each["bytes"]),
                    f"{1000 * alone:.0f}",
                    f"{1000 * shared:.0f}",
                    f"{100 * (paired_ratio(each['shared_s'], each['alone_s']) - 1):.1f} %",
                    f"{100 * (paired_ratio(each['shared_cpu_s'], each['alone_cpu_s']) - 1):.1f} %",
                    f"{100 * expected / alone:.1f} %",
                ]
            )
    return "\n\n".join(
        [
            "Calibration, seconds: all batches on one process with one thread, and spread over all.",
            table(["ranks", "one", "all", "times faster", "in CPU time"], calibrated),
            "Exact selection, milliseconds until the last process is done: each on its part by itself, and all together.",
            table(
                [
                    "ranks",
                    "weights",
                    "pattern",
                    "rounds",
                    "bytes",
                    "alone",
                    "together",
                    "overhead",
                    "in CPU time",
                    "rounds x latency",
                ],
                selected,
            ),
        ]
    )


if __name__ == "__main__":
    answer = take_part(int(sys.argv[1]), json.loads(sys.argv[2]))
    if sys.argv[1] == "0":
        print(json.dumps(answer))
