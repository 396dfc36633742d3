"""Selection and calibration on several processes are those on one, bit for bit; one that fails or dies ends all."""

import copy
import os
import random
import signal
import socket
import subprocess
import sys
import time
import warnings
from datetime import timedelta
from itertools import product

import pytest
import torch
import torch.distributed as dist
from torch import nn

import hftcore.ranks
from hftcore import Energy, HftcoreError, NonFiniteError, Pattern, collected, cut_rows, distributed, ops, selection
from hftcore.distributed import Shard, sharded_mask, sharded_masks
from hftcore.parts import Part
from hftcore.ranks import add_up_
from hftcore.selection import find_cut

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


def shard_of(draw, whole, rank, ranks, is_row=False):
    """What a rank holds of a whole; returns (shard, rows, columns) with the slices it was cut by."""
    weight, energy, reference = whole
    cut = draw.choice(["rows", "columns", "copies"] + ["both"] * (not is_row))
    holder = rank
    if cut == "copies":
        # the last rank repeats what another one holds
        ranks = max(1, ranks - 1)
        repeated = draw.randrange(ranks)
        holder = rank if rank < ranks else repeated
    is_across = cut == "columns" or (cut == "copies" and draw.random() < 0.5)
    bands = {"both": 2}.get(cut, 1 if is_across else ranks)
    homes = (
        sorted(draw.randrange(bands) for _ in range(ranks))
        if cut == "both"
        else [0 if is_across else r for r in range(ranks)]
    )
    tops, lefts = cuts(draw, weight.shape[0], bands), {}
    for band in range(bands):
        lefts[band] = cuts(draw, weight.shape[1], max(1, homes.count(band)), 4)
    if cut == "both" and not homes.count(0):
        tops[1] = 0
    if cut == "both" and not homes.count(1):
        tops[1] = tops[2]
    band = homes[holder]
    place = sum(homes[r] == band for r in range(holder))
    rows, columns = slice(tops[band], tops[band + 1]), slice(lefts[band][place], lefts[band][place + 1])
    other = None if reference is None else reference[rows, columns]
    whole = tuple(weight.shape)
    shard = Shard(weight[rows, columns], energy[columns], whole, rows.start, columns.start, other, holder == rank)
    return shard, rows, columns


def draw_passes(draw):
    """A sample that tells much or little; room for all keys in its window, for few, or for those of some processes only; keys that
    travel, and keys that are counted."""
    selection.SAMPLE, selection.LARGEST_SAMPLE = draw.choice([(8, 16), (100, 0), (1 << 16, 1 << 20)])
    selection.ROOM = draw.choice([1, 30, 100, 3 << 18])
    selection.ONE_IN = draw.choice([2, 20, 200])
    selection.SMALL = draw.choice([0, 1 << 17])
    collected.LISTED = draw.choice([0, 30, 1 << 14])


def check_matrix(seed, pattern, rank, group):
    draw = random.Random(seed)
    distributed.ROWS = draw.choice([1, 5, 1 << 14])  # rows one by one or a few at a time, and all of them
    cut_rows.ROOM = draw.choice([1, 5, 256])
    draw_passes(draw)
    dtype = draw.choice([torch.float32, torch.bfloat16, torch.float16])
    whole = matrices(draw, dtype)
    wanted = ops.unpack_mask(ops.prune_mask(whole[0], whole[1], pattern, whole[2]), whole[0].shape[1])
    shard, rows, columns = shard_of(draw, whole, rank, dist.get_world_size(group), "matrix" not in pattern)
    found = ops.unpack_mask(sharded_mask(shard, pattern, group), shard.weight.shape[1])
    assert torch.equal(found, wanted[rows, columns]), (seed, pattern, rows, columns, rank)


def check_model(seed, pattern, rank, group):
    draw = random.Random(seed)
    draw_passes(draw)
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
        assert torch.equal(found, ops.unpack_mask(wanted, size[1])[rows, columns]), (seed, pattern, rows, columns, rank)


def check_rounds(rank, group):
    """Matrices share their rounds."""
    calls, all_reduce = [], dist.all_reduce
    weight = torch.randn(40, 64, generator=torch.Generator().manual_seed(rank))
    shard = Shard(weight, torch.ones(64), (40 * RANKS, 64), row=40 * rank)
    dist.all_reduce = lambda *args, **options: (calls.append(1), all_reduce(*args, **options))[1]
    for number in (1, 5):
        calls.clear()
        sharded_masks([shard] * number, "0.3 matrix", group)
        assert len(calls) <= 7, number
    dist.all_reduce = all_reduce


def check_refusals(rank, group):
    weight = torch.ones(4, 8)
    weight[2, 3] = float("nan") if rank == 1 else 1
    ones, all_rows, all_columns = torch.ones(8), (4 * RANKS, 8), (4, 8 * RANKS)
    for pattern in ("50%", "0.5 matrix"):
        for shard in (Shard(weight, ones, all_rows, row=4 * rank), Shard(weight, ones, all_columns, column=8 * rank)):
            with pytest.raises(NonFiniteError):
                sharded_mask(shard, pattern, group)
    with pytest.raises(NonFiniteError):
        sharded_mask(Shard(weight, ones, (4, 8), is_counted=rank == 0), "0.5 matrix", group)
    good = torch.ones(4, 8)
    for arguments, message in [
        ((Shard(torch.ones(4 + rank, 8), ones, (7, 8 * RANKS), column=8 * rank), "50%"), "the same rows on each"),
        ((Shard(good, ones, all_columns, column=8 * rank, is_counted=rank > 0), "50%"), "the same rows on each"),
        ((Shard(good, ones, all_columns, column=8 * (rank % 2)), "50%"), "side by side"),
        (
            (Shard(good, ones, all_rows, row=4 * rank, is_counted=rank > 0), "0.5 matrix"),
            "hold 96 weights, the whole has 128",
        ),
        (
            (Shard(good[:, : 4 + rank], ones[: 4 + rank], (4, 44), column=8 * rank), "2:4"),
            "groups of 4 on every process",
        ),
        ((Shard(good, ones, all_columns, column=8 * rank + 2 * (rank == 2)), "2:4"), "groups of 4 on every process"),
        ((Shard(good, ones, all_rows, row=4 * rank), Pattern("50%", block=(2, 2))), "block is not there"),
        ((Shard(good, ones, all_rows, row=4 * rank), "0.5 model"), "sharded_masks"),
        ((Shard(good, ones, all_rows, row=5 * rank), "50%"), "must lie in the whole"),
        ((Shard(good, torch.ones(8 - (rank == 2)), all_rows, row=4 * rank), "50%"), "energy must be"),
        ((Shard(good, ones, (4 * RANKS + rank, 8), row=4 * rank), "50%"), r"same call; process . gave \(1., 8\)"),
        ((Shard(good, ones, all_rows, row=4 * rank), "50%" if rank else "40%"), "same call; process . gave 0..? row"),
    ]:
        with pytest.raises(HftcoreError, match=message):
            sharded_mask(*arguments, group)
    with pytest.raises(HftcoreError, match=r"same call; process . gave (None|\(16, 8\)), this one"):
        sharded_masks([Shard(good, ones, all_rows, row=4 * rank)] * (1 + (rank == 2)), "50%", group)


def network():
    """The same on every process, with matrices that are cut evenly, unevenly and into fewer pieces than ranks."""
    torch.manual_seed(0)
    layers = nn.Linear(16, 10), nn.ReLU(), nn.Linear(10, 3, bias=False), nn.ReLU(), nn.Linear(3, 16)
    model = nn.Sequential(*layers).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_((parameter * 20).round() / 10)  # many ties
    return model


def batches_of(rank, count=3):
    seed = torch.Generator().manual_seed(rank)
    return [{"input": torch.randn(2, 5, 16, generator=seed)} for _ in range(count)]


def same_bits(one, other):
    return dict.keys(dict(one)) == dict.keys(dict(other)) and all(torch.equal(one[name], other[name]) for name in one)


def check_calibration(rank, group):
    ranks = dist.get_world_size(group)
    counts = {other: 0 if ranks > 1 and other == 1 else 3 - other % 2 for other in range(ranks)}
    whole, *others = [hftcore.calibrate(network(), batches_of(other, n)) for other, n in counts.items() if n]
    for other in others:
        whole = whole + other
    found = hftcore.calibrate(network(), batches_of(rank, counts[rank]), group=group)
    assert same_bits(found, whole)
    assert (found.tokens, found.samples) == (whole.tokens, whole.samples)
    # means over samples are no sums of means: they come from the sums of all
    together = [one for other in range(ranks) for one in batches_of(other, counts[other])]
    mean = hftcore.calibrate(network(), together, average="sample-norm")
    found = hftcore.calibrate(network(), batches_of(rank, counts[rank]), average="sample-norm", group=group)
    assert all(torch.allclose(found[name], mean[name], rtol=1e-5) for name in mean)


def check_adding(rank, group):
    ranks = dist.get_world_size(group)
    each = [Energy({"e": torch.full((2, 3), 0.1 + r)}, r, 1, {"e": torch.tensor([r, 1])}) for r in range(ranks)]
    whole = each[0]
    for other in each[1:]:
        whole = whole + other
    add_up_(each[rank], group)
    assert same_bits(each[rank], whole)
    assert (each[rank].tokens, each[rank].samples) == (whole.tokens, whole.samples)
    assert torch.equal(each[rank].expert_tokens["e"], whole.expert_tokens["e"])


def check_calibration_failures(rank, group):
    """What is wrong on one process is raised on all, and they can go on."""

    def breaking():
        yield from batches_of(rank)
        raise KeyError("no such row")

    spoiled = batches_of(rank)
    if rank == 2:
        spoiled[1]["input"][0, 0, 3] = float("nan")
    told = "the input of layer '0'" if rank == 2 else "process 2 of the group failed: the input of layer '0'"
    with pytest.raises(NonFiniteError, match=told):
        hftcore.calibrate(network(), spoiled, group=group)
    kind, told = (
        (KeyError, "row") if rank == 1 else (HftcoreError, "process 1 of the group failed: KeyError: 'no such row'")
    )
    with pytest.raises(kind, match=told):
        hftcore.calibrate(network(), breaking() if rank == 1 else batches_of(rank), group=group)
    with pytest.raises(HftcoreError, match="hold no token"):
        hftcore.calibrate(network(), [], group=group)
    targets = ["0"] if rank == 3 else ["0", "2"]
    with pytest.raises(HftcoreError, match=r"same layers; process [03] differs in \['2'\]"):
        hftcore.calibrate(network(), batches_of(rank), targets, group=group)
    check_calibration(rank, group)


def placed(whole, mesh, placements):
    """A DTensor; where a placement is strided, the second dimension of the mesh cuts first."""
    from torch.distributed.tensor import DTensor, distribute_tensor
    from torch.distributed.tensor import Shard as Cut

    if all(type(placement) is Cut or placement.is_replicate() for placement in placements):
        return distribute_tensor(whole, mesh, placements)
    local, axis = whole, placements[0].dim
    for line in (1, 0):
        pieces, place = local.chunk(mesh.size(line), axis), mesh.get_local_rank(line)
        local = pieces[place] if place < len(pieces) else local.narrow(axis, 0, 0)
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=whole.shape, stride=whole.stride())


def check_dtensors(rank, group):
    from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
    from torch.distributed.tensor import DTensor, Partial, Replicate, distribute_tensor
    from torch.distributed.tensor import Shard as Cut
    from torch.distributed.tensor.placement_types import _StridedShard as Strided

    from hftcore.dtensors import shard_of

    line, plane = init_device_mesh("cpu", (RANKS,)), init_device_mesh("cpu", (2, 2))
    turned = DeviceMesh("cpu", [[1, 0], [3, 2]])
    placings = [(line, [Cut(0)]), (line, [Cut(1)]), (line, [Replicate()])]
    placings += [(plane, [Replicate(), Cut(0)]), (plane, [Cut(1), Replicate()]), (plane, [Replicate(), Replicate()])]
    placings += [
        (plane, [Cut(0), Cut(1)]),
        (plane, [Cut(0), Cut(0)]),
        (plane, [Cut(1), Cut(1)]),
    ]
    placings += [(plane, [Strided(0, split_factor=2), Cut(0)]), (plane, [Strided(1, split_factor=2), Cut(1)])]
    for seed, pattern in enumerate(["50%", "0.1 row highest", "0.3 matrix", "0.9 matrix highest", "2:4"]):
        whole, energy, reference = matrices(random.Random(seed), torch.bfloat16)
        if pattern == "2:4":
            whole, energy, reference = torch.cat([whole] * 4, 1), energy.repeat(4), None
        wanted = ops.unpack_mask(ops.prune_mask(whole, energy, pattern, reference), whole.shape[1])
        for mesh, placements in placings:
            weight = placed(whole, mesh, placements)
            other = None if reference is None else placed(reference, mesh, placements)
            shard, over = shard_of(weight, energy, other, "matrix" if "matrix" in pattern else "row")
            assert shard.weight.data_ptr() == weight.to_local().data_ptr()
            found = ops.unpack_mask(sharded_mask(shard, pattern, over), shard.weight.shape[1])
            mine = placed(wanted.to(torch.uint8), mesh, placements).to_local().bool()
            assert torch.equal(found, mine), (pattern, placements, rank)
    square = torch.ones(8, 8)
    odd = [
        (line, [Partial()]),
        (plane, [Strided(0, split_factor=2), Cut(1)]),
        (plane, [Strided(0, split_factor=4), Cut(0)]),
    ]
    for mesh, placements in odd:
        weight = DTensor.from_local(square, mesh, placements, run_check=False, shape=(8, 8), stride=(8, 1))
        with pytest.raises(HftcoreError, match=r"replicated or cut over each dimension of its mesh, got \["):
            shard_of(weight, torch.ones(8))
    with pytest.raises(HftcoreError, match=f"must ascend where weight is cut, got place {1 - rank % 2} of dimension"):
        shard_of(distribute_tensor(square, turned, [Replicate(), Cut(1)]), torch.ones(8))
    uneven = DTensor.from_local(torch.ones(rank, 8), line, [Cut(0)], run_check=False, shape=(6, 8), stride=(8, 1))
    if rank != 2:
        with pytest.raises(HftcoreError, match=r"not cut as torch.chunk cuts: \(., 8\) here"):
            shard_of(uneven, torch.ones(8))
    weight = distribute_tensor(square, line, [Cut(0)])
    with pytest.raises(HftcoreError, match="reference must be placed as weight"):
        shard_of(weight, torch.ones(8), square)
    with pytest.raises(HftcoreError, match="each of the 8 columns"):
        shard_of(weight, torch.ones(2))
    with pytest.raises(HftcoreError, match="must be a matrix"):
        shard_of(torch.ones(2, 8, 8), torch.ones(8))
    with pytest.raises(HftcoreError, match="DTensor"):
        sharded_mask(Shard(weight, torch.ones(8), (8, 8)), "50%", group)


def sharded_network(kind="line"):
    """The network with its weights spread.

    "line": a layer under FSDP2, one cut by columns as tensor parallelism does, and one whole; "plane": tensor parallelism of two layers,
    all of it under FSDP2 across; "copies": FSDP2 over half of the processes, repeated by the others; "across": cuts over both
    dimensions of a mesh, over the first and over the second; "apart": no weight is cut over both.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Replicate, distribute_tensor
    from torch.distributed.tensor import Shard as Cut
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    model = network()
    if kind == "line":
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        fully_shard(model[0], mesh=mesh)
        model[2].weight = nn.Parameter(distribute_tensor(model[2].weight.detach(), mesh, [Cut(1)]))
        return model
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    if kind == "plane":
        parallelize_module(model, mesh["tensor"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
        return fully_shard(model, mesh=mesh["data"])
    if kind == "copies":
        return fully_shard(model, mesh=mesh)
    placings = {
        0: [Cut(1), Cut(1)] if kind == "across" else [Replicate(), Cut(0)],
        2: [Cut(1), Replicate()],
        4: [Replicate(), Cut(1)],
    }
    for number, placements in placings.items():
        model[number].weight = nn.Parameter(distribute_tensor(model[number].weight.detach(), mesh, placements))
    return model


def full(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def check_pruning(rank, group):
    from hftcore.dtensors import prune_sharded

    energy = hftcore.calibrate(network(), batches_of(0))
    patterns = ("50%", "0.2 matrix highest", "0.4 model", "0.05 model highest")
    for pattern, kind in product(patterns, ("line", "plane", "copies", "across", "apart")):
        plain, model = network(), sharded_network(kind)
        hftcore.prune(plain, energy, Pattern.of(pattern))
        masks = prune_sharded(model, energy, pattern)
        assert sorted(masks) == ["0.weight", "2.weight", "4.weight"]
        for (name, wanted), (_, found) in zip(plain.named_parameters(), model.named_parameters(), strict=True):
            assert torch.equal(full(found), wanted), (pattern, kind, name)
    model = fully_sharded()
    first, *others = [hftcore.calibrate(network(), batches_of(other)) for other in range(RANKS)]
    assert same_bits(hftcore.calibrate(model, batches_of(rank), group=group), sum(others, start=first))
    x = batches_of(0)[0]["input"]
    hftcore.prune(plain := network(), energy, Pattern("50%"))
    prune_sharded(model, energy, "50%")
    assert torch.equal(model(x), plain(x))
    for kind, pattern in product(("line", "plane", "across"), ("50%", "0.3 matrix")):
        model, spoiled = sharded_network(kind), copy.deepcopy(energy)
        before = [full(parameter).clone() for parameter in model.parameters()]
        if rank == 1:
            spoiled["4"].fill_(float("nan"))
        with pytest.raises(NonFiniteError):
            prune_sharded(model, spoiled, pattern)
        with pytest.raises(HftcoreError, match="^process 1 of the group failed: .*layer" if rank != 1 else "layer"):
            prune_sharded(model, Energy({"9": torch.ones(16)}) if rank == 1 else energy, pattern)
        assert all(torch.equal(full(now), then) for now, then in zip(model.parameters(), before, strict=True))


def check_like_layers(rank, group):
    """Layers of one size are told apart, what FSDP2 left gathered is not what is changed, and what no token reached is left alone."""
    from torch.distributed.fsdp import fully_shard

    from hftcore.dtensors import prune_sharded

    def alike():
        torch.manual_seed(1)
        return nn.Sequential(*(nn.Linear(8, 8) for _ in range(3))).eval()

    batches = [{"input": torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(rank))}]
    warnings.simplefilter("ignore")  # of the layer that no token reached
    for pattern in ("50%", "0.2 row highest", "0.3 matrix highest", "0.2 model highest"):
        plain, model = alike(), fully_shard(alike())
        energy = hftcore.calibrate(model, batches, group=group)
        assert same_bits(energy, hftcore.calibrate(plain, batches, group=group))
        energy["1"].zero_()
        hftcore.prune(plain, energy, pattern)
        assert len(prune_sharded(model, energy, pattern)) == 3
        model.reshard()
        for (name, wanted), (_, found) in zip(plain.named_parameters(), model.named_parameters(), strict=True):
            assert torch.equal(full(found), wanted), (pattern, name)
        # what is for models of one process does not reach into parts of weights
        edit = hftcore.prune(whole := alike(), energy, pattern)
        edit.revert(whole)
        for call in (lambda: hftcore.prune(model, energy, pattern), lambda: edit.apply(model)):  # noqa: B023
            with pytest.raises(HftcoreError, match="must be a plain tensor, got a DTensor; prune such models with"):
                call()


def fully_sharded():
    from torch.distributed.fsdp import fully_shard

    model = network()
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer)
    return fully_shard(model)


def work(rank, port):
    """What each process does."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=RANKS)
    groups = {ranks: dist.new_group(range(ranks)) for ranks in range(1, RANKS + 1)}
    usual = [(module, dict(vars(module))) for module in (collected, cut_rows, distributed, selection)]
    for ranks, group in groups.items():
        if rank < ranks:
            for seed in range(27):
                check_matrix(seed * 10 + ranks, PATTERNS[seed % len(PATTERNS)], rank, group)
            for seed, pattern in enumerate(
                ["0.3 model", "0.05 model highest", "0 model", "1 model", *["0.5 model"] * 8]
            ):
                check_model(seed, pattern, rank, group)
            check_calibration(rank, group)
            check_adding(rank, group)
    for module, values in usual:
        vars(module).update(values)
    for check in (
        check_rounds,
        check_refusals,
        check_calibration_failures,
        check_dtensors,
        check_pruning,
        check_like_layers,
    ):
        check(rank, groups[RANKS])
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available(), reason="PyTorch was built without distributed")
def test_the_rounds_of_a_selection_do_not_grow_with_the_model():
    from hftcore.bench.ranks import measure, tables

    found = measure(2, (1, 3), 1, calibrates=False)
    rows, columns, model = (
        [one for one in found["selection"] if one["pattern"] == f"0.5 {scope}"]
        for scope in ("row", "row by columns", "model")
    )
    assert [one["rounds"] for one in rows] == [1, 1]
    assert max(one["rounds"] for one in columns) <= 8
    assert max(one["rounds"] for one in model) <= 5
    # counts of a sample, twice, and of a pass, and a list of keys
    assert max(one["bytes"] for one in model) < 8 * (3 * 2048 + 16) + 8 * collected.LISTED
    assert sum(line.startswith("| 2 |") for line in tables([found]).splitlines()) == 6


TIMEOUT = 10.0  # seconds the processes wait for each other


def mourn(rank, port, stage):
    """What each process does while one of them ends or stops half way; the others must say so soon, and have changed nothing."""
    from hftcore.dtensors import prune_sharded

    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=3, timeout=timedelta(seconds=120))
    group = dist.new_group(range(3), timeout=timedelta(seconds=TIMEOUT))
    energy = hftcore.calibrate(network(), batches_of(0))
    model = sharded_network()
    before = copy.deepcopy({name: getattr(value, "_local_tensor", value) for name, value in model.named_parameters()})
    kind, victim = (signal.SIGSTOP if stage == "stops" else signal.SIGKILL), 0 if stage == "selection" else 1

    def fall(items, after):
        for number, item in enumerate(items):
            if rank == victim and number == after:
                os.kill(os.getpid(), kind)
            yield item

    began = time.monotonic()
    with pytest.raises(HftcoreError, match="another process of the group is gone, or did not answer"):  # noqa: PT012
        if stage == "selection":
            all_reduce, calls = dist.all_reduce, fall(iter(int, 1), 1)
            dist.all_reduce = lambda *args, **options: (next(calls), all_reduce(*args, **options))[1]
            prune_sharded(model, energy, "50%")
        else:
            hftcore.calibrate(network(), fall(batches_of(rank), 2), group=group)
    assert time.monotonic() - began < 6 * TIMEOUT
    assert all(
        torch.equal(getattr(value, "_local_tensor", value), before[name]) for name, value in model.named_parameters()
    )
    print("told", flush=True)
    os._exit(0)  # the group cannot be left in order without the one that is gone


def start(ranks, *arguments):
    """Run this file in so many processes; yields them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
    return [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(port), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment,
            text=True,
        )
        for rank in range(ranks)
    ]


def end(processes):
    for process in processes:
        process.kill()
        process.communicate()


@pytest.mark.skipif(not dist.is_available(), reason="PyTorch was built without distributed")
def test_several_processes_do_what_one_does():
    started = start(RANKS)
    try:
        said = [process.communicate(timeout=200)[1] for process in started]
    finally:
        end(started)
    for process, errors in zip(started, said, strict=True):
        assert process.returncode == 0, errors[-3000:]


@pytest.mark.skipif(not dist.is_available(), reason="PyTorch was built without distributed")
@pytest.mark.parametrize("stage", ["calibration", "selection", "stops"])
def test_a_process_that_dies_or_stops_ends_the_others_with_an_error(stage):
    started = start(3, stage)
    victim = 0 if stage == "selection" else 1
    try:
        for process in started[:victim] + started[victim + 1 :]:
            text, errors = process.communicate(timeout=200)
            assert (process.returncode, text.split()) == (0, ["told"]), errors[-3000:]
    finally:
        end(started)
    assert started[victim].returncode == -signal.SIGKILL


if __name__ == "__main__":
    if len(sys.argv) == 3:
        work(int(sys.argv[1]), int(sys.argv[2]))
    else:
        mourn(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
