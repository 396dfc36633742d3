"""In memory, on files and on several processes: one mask, bit for bit, however the model is cut."""

import copy
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import traceback
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from tied_models import energy_of, save_in, with_ties
from tiny_models import tiny_model
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Replicate, distribute_tensor
from torch.distributed.tensor import Shard as Cut

import hftcore
from hftcore import Pattern, ops
from hftcore.bindings.checkpoints.prune import prune_folder
from hftcore.distributed import Shard, sharded_mask, sharded_masks
from hftcore.dtensors import prune_sharded
from hftcore.edit import matrices
from hftcore.layers import find_layers

RANKS = 4
MODELS = ["llama", "llama-tied", "gpt2", "mixtral", "qwen3-moe", "gpt-oss"]
PATTERNS = [
    *("50%", "0.1 row highest", "0.97 row", "1 row", "0 row highest", "2:4", "4:8 row highest"),
    *("0.3 matrix", "0.7 matrix highest", "0 matrix", "0.3 model", "0.02 model highest", "0.9 model", "1 model"),
]


def models_of(case):
    """(model, its energies, the reference or None)."""
    dtype = getattr(torch, case["dtype"])
    model = with_ties(tiny_model(case["name"], dtype), case["seed"])
    reference = with_ties(tiny_model(case["name"], dtype), case["seed"] + 1) if case["reference"] else None
    return model, energy_of(model, case["seed"]), reference


def edges(draw, size, multiple):
    """Of one stretch for each rank, some of them empty."""
    return [0, *sorted(draw.randint(0, size // multiple) * multiple for _ in range(RANKS - 1)), size]


def masks_here(case, rank, groups):
    """[tensor, first row, last row, first column, last column, bits]: what this rank holds of each matrix, and its part of the mask."""
    model, energy, reference = models_of(case)
    pattern, group, draw = Pattern.of(case["pattern"]), groups[case["ranks"]], random.Random(case["seed"])
    others = dict(reference.named_parameters()) if reference is not None else {}
    held = []
    for layer in sorted(find_layers(model), key=lambda layer: layer.tensor):
        views = matrices(getattr(layer.module, layer.parameter).detach(), layer.transposed)
        other = matrices(others[layer.tensor].detach(), layer.transposed) if others else [None] * len(views)
        idle = energy.idle(layer.name) if pattern.invert else ()
        norms = energy[layer.name].view(len(views), -1)
        homes = draw.choices(range(case["ranks"]), k=len(views))
        by_expert = len(views) > 1 and draw.random() < 0.5
        for number, view in enumerate(views):
            rows, columns = view.shape
            cut = "rows" if by_expert else draw.choice(["rows", "columns"])
            if cut == "rows":
                ends = [0] * (homes[number] + 1) + [rows] * (RANKS - homes[number])  # an expert lies on one rank
                ends = ends if by_expert else edges(draw, rows, 1)
                ends[case["ranks"] :] = [rows] * (RANKS + 1 - case["ranks"])
                place = slice(ends[rank], ends[rank + 1]), slice(0, columns)
            else:
                ends = edges(draw, columns, 8)
                ends[case["ranks"] :] = [columns] * (RANKS + 1 - case["ranks"])
                place = slice(0, rows), slice(ends[rank], ends[rank + 1])
            if number in idle:
                continue
            mine = None if other[number] is None else other[number][place]
            where = layer.tensor, number * rows + place[0].start, number * rows + place[0].stop, place[1].start
            first = place[0].start, place[1].start
            held.append((where, Shard(view[place], norms[number][place[1]], (rows, columns), *first, mine)))
    shards = [shard for _, shard in held]
    by_one = pattern.scope != "model" and draw.random() < 0.5
    masks = [sharded_mask(one, pattern, group) for one in shards] if by_one else sharded_masks(shards, pattern, group)
    said = []
    for (where, shard), mask in zip(held, masks, strict=True):
        tensor, top, bottom, left = where
        bits = ops.unpack_mask(mask, shard.weight.shape[1]).to(torch.uint8).numpy().tobytes().hex()
        said.append([tensor, top, bottom, left, left + shard.weight.shape[1], bits])
    return said


def check_in_place(case, rank, groups):
    """A model of DTensors, cut by rows, columns or experts over one or two dimensions of a mesh, is pruned in place to what one process
    makes of the whole."""
    model, energy, _ = models_of(case)
    draw = random.Random(case["seed"])
    shape = draw.choice([(4,), (2, 2)]) if case["ranks"] == 4 else (case["ranks"],)
    mesh = groups["meshes"][shape]
    wanted = copy.deepcopy(model)
    for layer in find_layers(model):
        *experts, _, columns = layer.weight.shape
        axes = [*range(len(experts) + 1)] + [len(experts) + 1] * (columns % (8 * case["ranks"]) == 0)
        placements = []
        for axis in draw.choices(axes, k=len(shape)):
            stored = 2 * len(experts) + 1 - axis if layer.transposed and axis >= len(experts) else axis
            placements.append(Replicate() if len(shape) > 1 and draw.random() < 0.2 else Cut(stored))
        placed = distribute_tensor(getattr(layer.module, layer.parameter).detach(), mesh, placements)
        setattr(layer.module, layer.parameter, nn.Parameter(placed))
    hftcore.prune(wanted, energy, case["pattern"])
    masks = prune_sharded(model, energy, case["pattern"])
    for (name, found), (_, whole) in zip(model.named_parameters(), wanted.named_parameters(), strict=True):
        assert torch.equal(found.full_tensor() if name in masks else found, whole), (name, rank)


def serve(rank, port):
    """What each process does: answer cases until there are no more."""
    torch.set_num_threads(1)
    patience = timedelta(seconds=60)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=RANKS, timeout=patience)
    groups = {ranks: dist.new_group(range(ranks), timeout=patience) for ranks in range(1, RANKS + 1)}
    groups["meshes"] = {
        (ranks,): DeviceMesh.from_group(group, "cpu", mesh=torch.arange(ranks))
        for ranks, group in groups.items()
        if rank < ranks
    } | {(2, 2): init_device_mesh("cpu", (2, 2))}
    for line in sys.stdin:
        case = json.loads(line)
        try:
            said = masks_here(case, rank, groups) if rank < case["ranks"] else []
            if rank < case["ranks"]:
                check_in_place(case, rank, groups)
        except Exception:
            said = traceback.format_exc()
        print(json.dumps(said), flush=True)


@pytest.fixture(scope="module")
def ranks():
    """Processes that give their parts of the masks of a case."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", __file__, str(rank), str(port)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            text=True,
        )
        for rank in range(RANKS)
    ]

    def ask(case):
        for process in started:
            print(json.dumps(case), file=process.stdin, flush=True)
        said = [json.loads(process.stdout.readline()) for process in started]
        assert not any(isinstance(one, str) for one in said), "\n".join(map(str, said))[-3000:]
        return [part for one in said for part in one]

    yield ask
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.skipif(not dist.is_available(), reason="PyTorch was built without distributed")
@pytest.mark.filterwarnings("ignore:what no token reached")
@settings(max_examples=15)
@given(
    case=st.fixed_dictionaries(
        {
            "name": st.sampled_from(MODELS),
            "dtype": st.sampled_from(["float32", "bfloat16", "float16"]),
            "pattern": st.sampled_from(PATTERNS),
            "reference": st.booleans(),
            "ranks": st.integers(1, RANKS),
            "seed": st.integers(0, 1000),
        }
    ),
    files=st.integers(1, 7),
)
def test_files_and_processes_give_the_mask_of_memory_bit_for_bit(ranks, case, files):
    model, energy, reference = models_of(case)
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        folder = save_in(model, root / "model", files, case["seed"])
        other = None if reference is None else save_in(reference, root / "reference", 8 - files, case["seed"])
        streamed = prune_folder(folder, energy, case["pattern"], root / "edit", reference=other, edit_only=True)
        edit = hftcore.prune(model, energy, case["pattern"], reference=reference)
        assert streamed.tensors.keys() == edit.tensors.keys()
        assert all(torch.equal(streamed.tensors[name].mask, entry.mask) for name, entry in edit.tensors.items())
    columns = {layer.tensor: layer.weight.shape[-1] for layer in find_layers(model)}
    wanted = {name: ops.unpack_mask(entry.mask, columns[name]) for name, entry in edit.tensors.items()}
    found = {name: torch.zeros_like(mask) for name, mask in wanted.items()}
    for name, top, bottom, left, right, bits in ranks(case):
        part = torch.frombuffer(bytearray.fromhex(bits), dtype=torch.uint8) if bits else torch.empty(0)
        found[name][top:bottom, left:right] = part.view(bottom - top, right - left).bool()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


if __name__ == "__main__":
    serve(int(sys.argv[1]), int(sys.argv[2]))
