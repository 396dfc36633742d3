"""Pruning on files is pruning in memory, bit for bit, whatever the files look like and whenever it is killed."""

import ctypes
import errno
import fcntl
import json
import mmap
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tied_models import energy_of, save_in, with_ties
from tiny_models import tiny_model
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import hftcore
from hftcore import Edit, Energy, HftcoreError, NonFiniteError, direct
from hftcore.bindings import jobs, models_io
from hftcore.bindings.checkpoints import blocks, keys, rewrite, threshold
from hftcore.bindings.checkpoints.edits import apply_edit, revert_edit
from hftcore.bindings.checkpoints.manifest import MANIFEST
from hftcore.bindings.checkpoints.pieces import find_pieces
from hftcore.bindings.checkpoints.prune import prune_folder
from hftcore.bindings.checkpoints.skeleton import load_skeleton
from hftcore.bindings.checkpoints.stored import list_tensors
from hftcore.bindings.checkpoints.verify import verify_folder
from hftcore.bindings.cli.app import app
from hftcore.edit_writer import EditWriter, Slot
from hftcore.kernels.reference import FINITE
from hftcore.layers import find_layers
from hftcore.ops.fingerprints import fingerprint_sum, fingerprint_text
from hftcore.resumable import resumable_folder

PATTERNS = [
    *("50%", "0.1 row highest", "1 row", "0 row highest", "2:4", "4:8 row highest"),
    *("0.3 matrix", "0.7 matrix highest", "0 matrix", "0.3 model", "0.01 model highest", "1 model"),
    *("0.5 row lowest 2x4", "0.5 row highest 4x2"),
]


def contents(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != MANIFEST
    }


def tensors_in(folder):
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@settings(max_examples=16)
@given(
    name=st.sampled_from(["llama", "llama-tied", "gpt2", "mixtral", "qwen3-moe", "gpt-oss"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    files=st.integers(1, 7),
    pattern=st.sampled_from(PATTERNS),
    with_reference=st.booleans(),
    block=st.sampled_from([1, 1024, 1 << 24]),
    seed=st.integers(0, 1000),
)
@pytest.mark.filterwarnings("ignore:what no token reached")
def test_pruning_on_files_is_pruning_in_memory_bit_for_bit(name, dtype, files, pattern, with_reference, block, seed):
    model = with_ties(tiny_model(name, dtype), seed)
    reference = with_ties(tiny_model(name, dtype), seed + 1) if with_reference else None
    energy = energy_of(model, seed)
    before = blocks.BLOCK
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        folder = save_in(model, root / "model", files, seed)
        other = None if reference is None else save_in(reference, root / "reference", max(1, files - 1), seed)
        source = contents(folder)
        edit = hftcore.prune(model, energy, pattern, reference=reference)
        try:
            blocks.BLOCK = block
            found = prune_folder(folder, energy, pattern, root / "out", reference=other)
            prune_folder(folder, energy, pattern, root / "only", reference=other, edit_only=True)
        finally:
            blocks.BLOCK = before
        edit.save(root / "edit")
        assert contents(root / "out" / "edit") == contents(root / "edit") == contents(root / "only")
        assert repr(found) == repr(edit)
        model.save_pretrained(root / "expected")
        wanted, written = tensors_in(root / "expected"), tensors_in(root / "out")
        assert written.keys() == wanted.keys()
        assert all(torch.equal(written[key].view(torch.uint8), wanted[key].view(torch.uint8)) for key in wanted)
        unchanged = {key for key in source if not key.endswith(".safetensors")}
        assert all((root / "out" / key).read_bytes() == source[key] for key in unchanged)
        assert contents(folder) == source
        assert verify_folder(root / "out")["problems"] == []


@pytest.mark.filterwarnings("ignore:what no token reached")
def test_what_is_written_loads_and_the_edit_in_it_leads_back(tmp_path):
    model = tiny_model("mixtral", torch.bfloat16)
    folder = save_in(model, tmp_path / "model", 3, 0)
    edit = prune_folder(folder, energy_of(model), "50%", tmp_path / "out", targets="all-linear", exclude=["q_proj"])
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert not any("q_proj" in name for name in edit.tensors)
    edit.revert(loaded)
    for (name, mine), (_, other) in zip(model.named_parameters(), loaded.named_parameters(), strict=True):
        assert torch.equal(mine, other), name


def test_magnitude_needs_no_energy(tmp_path):
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "model")
    edit = hftcore.prune(model, None, "20%", score="magnitude", targets=["q_proj"])
    found = prune_folder(tmp_path / "model", None, "20%", tmp_path / "out", score="magnitude", targets=["q_proj"])
    assert found.recipe == edit.recipe
    assert found.tensors.keys() == edit.tensors.keys()
    assert all(torch.equal(found.tensors[name].mask, entry.mask) for name, entry in edit.tensors.items())


def test_blocks_across_a_matrix_are_found_unless_it_is_split(tmp_path):
    model = tiny_model("gpt2")
    model.save_pretrained(tmp_path / "model")
    energy = energy_of(model)
    edit = hftcore.prune(model, energy, "0.5 matrix lowest 4x4")
    edit.save(tmp_path / "edit")
    prune_folder(tmp_path / "model", energy, "0.5 matrix lowest 4x4", tmp_path / "out")
    assert contents(tmp_path / "out" / "edit") == contents(tmp_path / "edit")
    moe = tiny_model("mixtral")
    moe.save_pretrained(tmp_path / "moe")
    with pytest.raises(HftcoreError, match="stored in 2 tensors"):
        prune_folder(tmp_path / "moe", energy_of(moe), "0.5 matrix lowest 4x4", tmp_path / "out2")


def test_experts_that_no_token_reached_are_named_as_in_memory(tmp_path):
    model = tiny_model("qwen3-moe")
    model.save_pretrained(tmp_path / "model")
    energy = energy_of(model)
    with pytest.warns(UserWarning, match=r"no token reached was left as it was: .*experts.*\[1\]"):
        found = prune_folder(tmp_path / "model", energy, "0.1 row highest", tmp_path / "out")
    with pytest.warns(UserWarning, match="no token reached"):
        assert found.recipe == hftcore.prune(model, energy, "0.1 row highest").recipe


@pytest.mark.parametrize("pattern", ["50%", "0.5 matrix", "0.5 model", "2:4"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_weight_is_named_and_nothing_is_left(tmp_path, pattern, bad):
    model = tiny_model("llama")
    model.model.layers[1].mlp.up_proj.weight.data[40, 3] = bad
    model.save_pretrained(tmp_path / "model")
    energy = Energy({layer.name: torch.ones(layer.weight.shape[1]) for layer in find_layers(model)})
    with pytest.raises(NonFiniteError, match=r"^model\.layers\.1\.mlp\.up_proj\.weight: weight\[40, 3\]"):
        prune_folder(tmp_path / "model", energy, pattern, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_what_cannot_be_done_is_said_in_one_line_before_anything_is_written(tmp_path):
    model = tiny_model("llama")
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    energy = energy_of(model)
    narrow = Energy({"model.layers.0.mlp.up_proj": torch.ones(31)})
    for arguments, options, message in [
        ((folder, energy, "50%", folder), {}, "must lie outside"),
        ((folder, energy, "50%", folder / "inside"), {}, "must lie outside"),
        ((folder, energy, "3:7", tmp_path / "out"), {}, r"needs columns in groups of 7"),
        ((folder, energy, "0.5 row lowest 5x5", tmp_path / "out"), {}, "does not divide"),
        ((folder, narrow, "50%", tmp_path / "out"), {}, "must be of shape"),
        ((folder, Energy({"other": torch.ones(3)}), "50%", tmp_path / "out"), {}, "no layer in this model"),
        ((folder, None, "50%", tmp_path / "out"), {}, "energy must be an Energy"),
        ((folder, None, "50%", tmp_path / "out"), {"score": "random"}, "'wanda' or 'magnitude'"),
        ((tmp_path / "absent", energy, "50%", tmp_path / "out"), {}, "not a folder"),
    ]:
        with pytest.raises(HftcoreError, match=message) as caught:
            prune_folder(*arguments, **options)
        assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


GONE = "model.norm.weight", "model.layers.1.input_layernorm.weight"  # which no command changes


def broken(folder, kind):
    file = folder / "part-1.safetensors"
    index = folder / "model.safetensors.index.json"
    config = json.loads((folder / "config.json").read_text())
    if kind == "truncated":
        file.write_bytes(file.read_bytes()[:-8])
    elif kind == "header":
        file.write_bytes((1 << 60).to_bytes(8, "little") + file.read_bytes()[8:])
    elif kind == "pickle":
        file.write_bytes(b"\x80\x04cposix\nsystem\n.")
    elif kind == "missing tensor":
        tensors = load_file(file)
        name = next(name for name in tensors if "norm" in name)
        del tensors[name]
        save_file(tensors, file)
    elif kind == "missing file":
        (folder / "part-2.safetensors").unlink()
    elif kind == "gone":
        where = {key: name for key, name in json.loads(index.read_text())["weight_map"].items() if key not in GONE}
        index.write_text(json.dumps({"metadata": {}, "weight_map": where}))
        for part in folder.glob("*.safetensors"):
            save_file({key: value for key, value in load_file(part).items() if key in where}, part)
    elif kind == "twice":
        save_file(load_file(file) | load_file(folder / "part-0.safetensors"), file)
    elif kind == "shape":
        tensors = load_file(file)
        name = next(name for name in tensors if "proj" in name)
        save_file(tensors | {name: tensors[name][:-1].clone()}, file)
    elif kind == "integers":
        tensors = load_file(file)
        name = next(name for name in tensors if "proj" in name)
        save_file(tensors | {name: tensors[name].to(torch.int8)}, file)
    elif kind == "config":
        (folder / "config.json").write_text("{")
    elif kind == "unknown model":
        (folder / "config.json").write_text(json.dumps(config | {"model_type": "nothing-like-it"}))
    elif kind == "quantised":
        (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "fp8"}}))


DAMAGES = [
    ("truncated", "cut off or has bytes left over"),
    ("header", "cut off or not a safetensors file"),
    ("pickle", "cut off or not a safetensors file"),
    ("missing tensor", "which does not hold it"),
    ("missing file", r"part-2\.safetensors is missing"),
    ("gone", r"lacks 2 of the model's tensors, such as 'model\.layers\.1\.input_layernorm\.weight'"),
    ("twice", "is in both"),
    ("shape", "its config.json wants"),
    ("integers", "dequantise the checkpoint first"),
    ("config", "cannot read from"),
    ("unknown model", "cannot read from"),
    ("quantised", "is quantised"),
]


@pytest.mark.parametrize(("kind", "message"), DAMAGES)
def test_a_damaged_checkpoint_is_refused_in_one_line_and_left_alone(tmp_path, kind, message):
    model = tiny_model("llama")
    folder = save_in(model, tmp_path / "model", 3, 0)
    broken(folder, kind)
    before = contents(folder)
    with pytest.raises(HftcoreError, match=message) as caught:
        prune_folder(folder, energy_of(model), "50%", tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert contents(folder) == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        *[case for case in DAMAGES if case[0] not in ("integers", "config", "unknown model", "quantised")],
        ("only a pickle", r"model\.bin, a pickle, which could run anything and is not opened"),
        ("a pickle beside", r"cannot load a causal model"),
    ],
)
def test_what_is_refused_on_files_is_not_loaded_either(tmp_path, monkeypatch, caplog, kind, message):
    monkeypatch.setattr(models_io, "load_tokenizer", lambda _: None)
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("unpickled"))
    folder = save_in(tiny_model("llama"), tmp_path / "model", 3, 0)
    if "a pickle" in kind:
        for file in folder.glob("*.safetensors*"):
            file.unlink()
        (folder / "pytorch_model.bin").write_bytes(b"cbuiltins\neval\n.")
    if kind == "a pickle beside":
        save_file({"lm_head.weight": torch.ones(1)}, folder / "other.safetensors")
    broken(folder, kind)
    with pytest.raises(HftcoreError, match=message) as caught:
        models_io.load_model(folder, "cpu")
    assert "\n" not in str(caught.value)
    assert not [record for record in caplog.records if "\n" in record.getMessage()]


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("2.w3", r"the parts of a fused tensor .* are not all there"),
        ("3.w2", r"down_proj' as \[3, 32, 48\], its config"),
    ],
)
def test_parts_of_experts_that_are_missing_are_refused(tmp_path, monkeypatch, part, message):
    monkeypatch.setattr(models_io, "load_tokenizer", lambda _: None)
    model = tiny_model("mixtral")
    energy = energy_of(model)
    model.save_pretrained(tmp_path / "model")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    del tensors[f"model.layers.1.block_sparse_moe.experts.{part}.weight"]
    save_file(tensors, tmp_path / "model" / "model.safetensors")
    attention = Energy({name: energy[name] for name in energy if "q_proj" in name})
    for run in (
        lambda: models_io.load_model(tmp_path / "model", "cpu"),
        lambda: prune_folder(tmp_path / "model", attention, "50%", tmp_path / "out"),
    ):
        with pytest.raises(HftcoreError, match=message) as caught:
            run()
        assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def unnamed_in(folder):
    """The index no longer names two tensors of its files."""
    index = folder / "model.safetensors.index.json"
    where = json.loads(index.read_text())["weight_map"]
    where = {key: name for key, name in where.items() if "up_proj" not in key}
    index.write_text(json.dumps({"metadata": {}, "weight_map": where}))


def test_tensors_that_an_index_forgets_are_told_and_pruned_as_in_memory(tmp_path):
    model = tiny_model("llama")
    energy = energy_of(model)
    folder = save_in(model, tmp_path / "model", 3, 0)
    unnamed_in(folder)
    with pytest.warns(UserWarning, match=r"does not name 2 of the tensors in its files, such as .*0\.mlp\.up_proj"):
        prune_folder(folder, energy, "50%", tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    hftcore.prune(loaded, energy, "50%")
    loaded.save_pretrained(tmp_path / "expected")
    wanted, written = tensors_in(tmp_path / "expected"), tensors_in(tmp_path / "out")
    assert written.keys() == wanted.keys()
    assert all(torch.equal(written[key], wanted[key]) for key in wanted)


@pytest.mark.parametrize("kind", ["missing tensor", "missing file", "truncated", "twice"])
@pytest.mark.parametrize("action", ["apply", "revert"])
def test_edits_are_not_written_onto_a_checkpoint_that_lacks_what_they_leave_alone(tmp_path, action, kind):
    model = tiny_model("llama")
    folder = save_in(model, tmp_path / "model", 3, 0)
    edit = hftcore.prune(model, energy_of(model), "50%", targets=["q_proj"])
    if action == "revert":
        apply_edit(edit, folder, tmp_path / "pruned")
        folder = tmp_path / "pruned"
    broken(folder, kind)
    there, before = {path.name for path in tmp_path.iterdir()}, contents(folder)
    with pytest.raises(HftcoreError, match=dict(DAMAGES)[kind]) as caught:
        (apply_edit if action == "apply" else revert_edit)(edit, folder, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert contents(folder) == before
    assert {path.name for path in tmp_path.iterdir()} == there


def test_tensors_beside_the_models_are_told_and_not_lost(tmp_path, monkeypatch):
    monkeypatch.setattr(models_io, "load_tokenizer", lambda _: None)
    tiny_model("llama").save_pretrained(tmp_path / "model")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    save_file(tensors | {"extra": torch.ones(2)}, tmp_path / "model" / "model.safetensors")
    with pytest.warns(UserWarning, match=r"holds tensors that the model has not \(1\), such as 'extra'"):
        models_io.load_model(tmp_path / "model", "cpu")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_what_is_no_file_is_refused_before_anything_is_written(tmp_path):
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "model")
    os.mkfifo(tmp_path / "model" / "pipe")
    with pytest.raises(HftcoreError, match="model/pipe is no file that can be copied"):
        prune_folder(tmp_path / "model", energy_of(model), "50%", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_running_out_of_memory_is_said_in_one_line(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise MemoryError

    monkeypatch.setattr(jobs, "check_output", fail)
    code, _, err = command(
        "calibrate", tmp_path, "--data", tmp_path / "data.jsonl", "--out", tmp_path / "energy", "--no-offload"
    )
    assert (code, err.count("\n")) == (1, 1)
    assert err.startswith("error: out of memory; free some")


@pytest.mark.parametrize("share", ["0.5", "0.02", "0.97"])
@pytest.mark.parametrize("spread", ["alike", "by row", "by matrix", "two values"])
@pytest.mark.parametrize("held", [1 << 23, 300])
def test_a_threshold_is_exact_however_the_sample_misleads(tmp_path, monkeypatch, share, spread, held):
    """Stretches that tell little of the rest, windows that lack the wanted key, and more keys than there is room for."""
    monkeypatch.setattr(threshold, "HELD", held)
    monkeypatch.setattr(keys, "HELD", held)
    monkeypatch.setattr(keys, "LOOKED_AT", 100)
    monkeypatch.setattr(threshold, "LENGTH", 64)
    monkeypatch.setattr(threshold, "FEWEST", 20)
    draw = torch.Generator().manual_seed(0)
    model = tiny_model("llama")
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            if parameter.dim() == 2:
                parameter.normal_(generator=draw)
                if spread == "by row":
                    parameter *= torch.logspace(-4, 4, len(parameter))[:, None]
                elif spread == "by matrix":
                    parameter *= 10.0**number
                elif spread == "two values":
                    parameter.copy_(parameter.sign())
    save_in(model, tmp_path / "model", 2, 0)
    energy = energy_of(model)
    found = prune_folder(tmp_path / "model", energy, f"{share} model", tmp_path / "out", edit_only=True)
    edit = hftcore.prune(model, energy, f"{share} model")
    assert all(torch.equal(found.tensors[name].mask, entry.mask) for name, entry in edit.tensors.items())


@settings(max_examples=100, deadline=None)
@given(data=st.data(), sizes=st.lists(st.integers(0, 9), max_size=9), top=st.sampled_from([1, 2, 300, 70_000, FINITE]))
def test_keys_beyond_memory_are_found_again_in_their_order(data, sizes, top):
    wanted, lengths = [], []
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patched:
        patched.setattr(keys, "HELD", 8)
        patched.setattr(keys, "LOOKED_AT", 5)
        patched.setattr(tempfile, "TemporaryFile", lambda **how: Narrow(TEMPORARY_FILE(**how), 10**9))
        with keys.Keys(Path(folder)) as found:
            for size in sizes:
                room = found.room(size)
                assert len(room) >= min(size, 8)
                some = data.draw(st.lists(st.integers(0, top - 1), max_size=min(size, 8)))
                room[: len(some)] = torch.tensor(some, dtype=torch.int32)
                found.took(len(some))
                wanted += some
                lengths.append(len(some))
            assert os.listdir(folder) == []
            for need, key in enumerate(sorted(wanted), 1):
                assert found.nth((0, top), need) == key
            for key in {0, *wanted}:
                parts = [wanted[sum(lengths[:i]) :][:length] for i, length in enumerate(lengths)]
                want = [sum(one < key for one in part) for part in parts], [part.count(key) for part in parts]
                assert found.counts(key, lengths) == want


TEMPORARY_FILE = tempfile.TemporaryFile


class Narrow:
    """A file that takes seven bytes at a time, and `room` in all."""

    def __init__(self, file, room):
        self.file, self.left = file, room

    def write(self, data):
        if not self.left:
            raise OSError(errno.ENOSPC, "No space left on device")
        taken = self.file.write(data[: min(7, self.left)])
        self.left -= taken
        return taken

    def __getattr__(self, name):
        return getattr(self.file, name)


@pytest.mark.parametrize("room", [0, 7, 9])
def test_a_disk_without_room_for_keys_is_named(tmp_path, monkeypatch, room):
    monkeypatch.setattr(keys, "HELD", 4)
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda **how: Narrow(TEMPORARY_FILE(**how), room))
    with keys.Keys(tmp_path) as found:
        found.room(4)
        found.took(4)
        with pytest.raises(HftcoreError, match=f"cannot keep .* in {tmp_path}: .*No space left"):
            found.room(1)


def test_a_file_of_keys_that_lost_some_is_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr(keys, "HELD", 4)
    with keys.Keys(tmp_path) as found:
        found.room(4)[:] = torch.arange(4)
        found.took(4)
        found.room(1)
        os.ftruncate(found._file.fileno(), 12)
        with pytest.raises(HftcoreError, match="cannot read back the keys"):
            found.nth((0, 4), 1)


@pytest.mark.parametrize("collected", [1, 32])
@pytest.mark.parametrize("window", [(0, FINITE), (0, 1), (FINITE - 1, FINITE)])
def test_a_window_that_holds_all_or_nothing_costs_a_reading_and_no_bit(tmp_path, monkeypatch, window, collected):
    """With `collected` 1 that many keys may be collected, but not all of one piece at a time."""
    monkeypatch.setattr(threshold, "HELD", 300)
    monkeypatch.setattr(keys, "HELD", 300)
    monkeypatch.setattr(threshold, "COLLECTED", collected)
    monkeypatch.setattr(threshold, "_propose", lambda *_: (window, 1))
    model = tiny_model("llama")
    save_in(model, tmp_path / "model", 2, 0)
    found = prune_folder(tmp_path / "model", energy_of(model), "0.4 model", tmp_path / "out", edit_only=True)
    edit = hftcore.prune(model, energy_of(model), "0.4 model")
    assert all(torch.equal(found.tensors[name].mask, entry.mask) for name, entry in edit.tensors.items())


@pytest.fixture
def searched(tmp_path, monkeypatch):
    """Prune a model by one threshold: (readings of all weights to find it, keys that were put into a file)."""
    readings, stored, of_all, store = [], [], threshold._blocks, keys.Keys._store

    def note(self):
        assert self._folder == tmp_path
        stored.append(self._filled)
        store(self)

    monkeypatch.setattr(keys, "HELD", 300)
    monkeypatch.setattr(threshold, "HELD", 300)
    monkeypatch.setattr(blocks, "BLOCK", 1 << 9)
    monkeypatch.setattr(keys.Keys, "_store", note)
    monkeypatch.setattr(threshold, "_blocks", lambda sources: readings.append(1) or of_all(sources))

    def run(model, share):
        save_in(model, tmp_path / "model", 2, 0)
        found = prune_folder(tmp_path / "model", energy_of(model), share, tmp_path / "out", edit_only=True)
        edit = hftcore.prune(model, energy_of(model), share)
        assert all(torch.equal(found.tensors[name].mask, entry.mask) for name, entry in edit.tensors.items())
        return len(readings), sum(stored)

    return run


def keys_around(model, share, width):
    """A window of `width` keys about the end of the low set."""
    scores = [
        (layer.weight.detach().abs() * energy_of(model)[layer.name].sqrt()).flatten() for layer in find_layers(model)
    ]
    found = np.sort(torch.cat(scores).float().numpy().view(np.int32))
    place = int(share * len(found))
    return (int(found[place - width // 2]), int(found[place + width // 2])), len(found)


def test_keys_that_are_too_many_for_memory_still_take_one_reading(searched, monkeypatch):
    model = tiny_model("llama")
    window, total = keys_around(model, 0.4, 400)
    assert 300 < 400 < total // threshold.COLLECTED
    monkeypatch.setattr(threshold, "_propose", lambda *_: (window, 400))
    readings, stored = searched(model, "0.4 model")
    assert readings == 1
    assert 300 < stored <= 400


def test_a_window_that_holds_more_than_was_expected_is_left_before_it_fills_the_disk(searched, monkeypatch):
    model = tiny_model("llama")
    most = keys_around(model, 0.4, 2)[1] // threshold.COLLECTED
    monkeypatch.setattr(threshold, "_propose", lambda *_: ((0, FINITE), 1))
    readings, stored = searched(model, "0.4 model")
    assert readings > 2
    # and up to 300 of the window that is narrow enough
    assert most < stored <= 2 * most + 300


def test_weights_that_equal_the_end_of_a_window_are_expected_in_it(tmp_path):
    model = tiny_model("llama")
    with torch.no_grad():
        for layer in find_layers(model):
            # every stretch tells the same, so the window would be narrow but for the ties
            half = layer.weight.shape[1] // 2
            layer.weight[:, :half] = 0
            layer.weight[:, half:] = torch.arange(1, half + 1)
    folder = save_in(model, tmp_path / "model", 1, 0)
    pieces = [
        find_pieces(layer.tensor, layer.weight.shape, False, list_tensors(folder))[0] for layer in find_layers(model)
    ]
    sources = [threshold.Source(piece, torch.ones(piece.columns)) for piece in pieces]
    total = sum(layer.weight.numel() for layer in find_layers(model))
    (low, high), expected = threshold._propose(sources, 0.501, total)
    assert low == 0 < high < torch.tensor(float(half)).view(torch.int32)
    assert total / 2 < expected < total


def test_other_copies_of_the_weights_and_an_older_edit_are_left_behind(tmp_path):
    model = tiny_model("llama")
    energy = energy_of(model)
    model.save_pretrained(tmp_path / "model")
    first = prune_folder(tmp_path / "model", energy, "10%", tmp_path / "first")
    (tmp_path / "first" / "pytorch_model.bin").write_bytes(b"the weights as they were")
    with pytest.warns(UserWarning, match=r"not copied, as they may hold the weights as they were: pytorch_model\.bin"):
        second = prune_folder(tmp_path / "first", energy, "50%", tmp_path / "second")
    assert not (tmp_path / "second" / "pytorch_model.bin").exists()
    assert (first.sparsity, second.sparsity) == (pytest.approx(0.1, abs=0.01), 0.5)
    assert Edit.load(tmp_path / "second" / "edit").recipe == second.recipe
    assert verify_folder(tmp_path / "second")["problems"] == []


@pytest.fixture
def written(tmp_path):
    model = tiny_model("llama")
    folder = save_in(model, tmp_path / "model", 2, 0)
    prune_folder(folder, energy_of(model), "50%", tmp_path / "out")
    return tmp_path / "out"


def flip(file, place):
    data = bytearray(file.read_bytes())
    data[place] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize(
    ("file", "place", "message"),
    [
        ("part-0.safetensors", -1, r"part-0\.safetensors: tensor '.*' differs"),
        ("part-1.safetensors", 20, r"damaged header|its header differs|tensor .* differs"),
        ("config.json", 5, "config.json: its sha256 differs"),
        ("edit/edit.safetensors", -1, "the edit of|does not lead back|not those that the Edit leaves"),
        ("edit/edit.safetensors", 30_000, "not those that the Edit leaves|does not lead back"),
        ("edit/edit_config.json", -5, "edit/edit_config.json: its sha256 differs"),
    ],
)
def test_verify_finds_a_changed_bit_anywhere(written, file, place, message):
    assert verify_folder(written)["problems"] == []
    flip(written / file, place)
    problems = verify_folder(written)["problems"]
    assert problems
    assert re.search(message, problems[0]), problems
    assert not any("\n" in problem for problem in problems)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "adapter_model.safetensors", "notes.txt"])
def test_verify_tells_of_weights_that_came_later_and_not_of_other_files(written, name):
    (written / name).write_bytes(b"8")
    found = [f"{name} is not of this checkpoint; what loads the folder might take it"]
    assert verify_folder(written)["problems"] == ([] if name == "notes.txt" else found)


def test_verify_tells_what_is_missing_cut_off_or_not_finished(written):
    (written / "generation_config.json").unlink()
    with (written / "part-0.safetensors").open("ab") as file:
        file.write(b"0")
    problems = verify_folder(written)["problems"]
    assert [problem.split()[0] for problem in problems] == ["generation_config.json", "part-0.safetensors"]
    (written / MANIFEST).write_text("{")
    with pytest.raises(HftcoreError, match="is damaged"):
        verify_folder(written)
    (written / MANIFEST).unlink()
    with pytest.raises(HftcoreError, match="nothing to compare it with"):
        verify_folder(written)
    (written.parent / ".later.journal").touch()
    with pytest.raises(HftcoreError, match="not finished"):
        verify_folder(written.parent / "later")


def command(*args):
    """Run a command in this process; (exit code, stdout, stderr)."""
    result = CliRunner().invoke(app, [str(arg) for arg in args])
    return result.exit_code, result.stdout, result.stderr


@pytest.mark.filterwarnings("default:removing the highest")
def test_commands_that_measure_nothing_load_no_model(tmp_path, monkeypatch):
    model = tiny_model("llama")
    save_in(model, tmp_path / "model", 2, 0)
    save_in(tiny_model("llama", seed=1), tmp_path / "before", 3, 1)
    energy_of(model).save(tmp_path / "energy")
    monkeypatch.setattr(jobs, "load_model", lambda *_: pytest.fail("a model was loaded"))
    common = [tmp_path / "model", "--energy", tmp_path / "energy", "--json", "--out"]
    code, out, err = command("antidote", *common, tmp_path / "repaired", "--reference", tmp_path / "before")
    assert code == 0, err
    reference = tiny_model("llama", seed=1)
    edit = hftcore.antidote(model, energy_of(model), reference=reference)
    result = json.loads(out)
    assert (result["removed"], result["size"], result["recipe"]) == (edit.removed, edit.size, edit.recipe)
    edit.save(tmp_path / "edit")
    assert contents(tmp_path / "repaired" / "edit") == contents(tmp_path / "edit")
    code, _, err = command("antidote", *common, tmp_path / "harsh")
    assert code == 0
    assert err.startswith("warning: removing the highest-scored weights of full or merged matrices")
    assert command("wanda", *common, tmp_path / "sparse", "--scope", "model", "--sparsity", "2%")[0] == 0
    assert command("wanda", tmp_path / "model", "--score", "magnitude", "--out", tmp_path / "small")[0] == 0
    missing = [tmp_path / "model", "--energy", tmp_path / "nothing", "--out", tmp_path / "more"]
    for arguments, message in [
        ([*common, tmp_path / "sparse"], "--out must not exist yet"),
        (missing, "--energy must be a file that `hftcore calibrate` wrote, got .*nothing, which does not exist"),
    ]:
        code, _, err = command("wanda", *arguments)
        assert (code, err.count("\n")) == (1, 1)
        assert re.search(message, err)
    assert not (tmp_path / "more").exists()


def test_verify_says_whether_a_folder_is_whole(written):
    code, out, err = command("verify", written)
    assert (code, err) == (0, "")
    assert "is whole: 21 tensors in" in out
    flip(written / "part-0.safetensors", -1)
    code, out, _ = command("verify", written, "--json")
    assert code == 1
    assert len(json.loads(out)["problems"]) == 1
    code, _, err = command("verify", written.parent)
    assert (code, err.count("\n")) == (1, 1)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("pattern", ["50%", "0.3 model highest"])
def test_a_run_killed_at_any_moment_is_continued_by_the_next(pattern):
    environment = {**os.environ, "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "hftcore.bench.kills", pattern, "10"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(done.stdout)
    assert report["killed"] >= 10
    assert report["resumed"]


def test_another_call_does_not_continue_an_unfinished_one(tmp_path):
    def start(job):
        with resumable_folder(tmp_path / "out", job) as work:
            (work.folder / "file").write_text(job)
            work.finish("file", {}, [work.folder / "file"])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        start("one")
    with resumable_folder(tmp_path / "out", "one") as work:
        assert work.done == {"file": {}}
    shutil.rmtree(tmp_path / "out")
    with pytest.raises(KeyboardInterrupt):
        start("one")
    with pytest.warns(UserWarning, match="made anew"), pytest.raises(KeyboardInterrupt):
        start("two")
    with resumable_folder(tmp_path / "out", "two") as work:
        assert (work.folder / "file").read_text() == "two"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_noise_at_the_end_of_a_journal_is_not_believed(tmp_path):
    for noise in (b'["file", {}', b"\0\0\0\n", b"[1]\n", b'["file"]\n'):
        with suppress(OSError), resumable_folder(tmp_path / "out", "job") as work:
            work.finish("step", 1)
            raise OSError(28, "the disk is full")
        with (tmp_path / ".out.journal").open("ab") as journal:
            journal.write(noise)
        with resumable_folder(tmp_path / "out", "job") as work:
            assert work.done == {"step": 1}
            work.finish("next", 2)
        shutil.rmtree(tmp_path / "out")


def test_two_processes_do_not_write_one_folder(tmp_path):
    with (
        resumable_folder(tmp_path / "out", "one"),
        pytest.raises(HftcoreError, match="being written by another process"),
        resumable_folder(tmp_path / "out", "one"),
    ):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_full_disk_says_so_and_the_same_call_continues(tmp_path, monkeypatch):
    model = tiny_model("llama")
    folder = save_in(model, tmp_path / "model", 3, 0)
    energy = energy_of(model)
    calls = []

    def fail(source, target):
        calls.append(target)
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(rewrite.shutil, "copyfile", fail)
        with pytest.raises(OSError, match=r"No space left on device; what is finished is kept in .*partial"):
            prune_folder(folder, energy, "50%", tmp_path / "out")
    assert len(calls) == 1
    kept = {path.name: path.stat().st_ino for path in (tmp_path / ".out.partial").glob("part-*")}
    assert len(kept) == 3
    prune_folder(folder, energy, "50%", tmp_path / "out")
    assert {path.name: path.stat().st_ino for path in (tmp_path / "out").glob("part-*")} == kept


MEMORY = r"""
import re, sys, threading, time
from pathlib import Path
from hftcore import Edit, Energy
from hftcore.bindings.checkpoints.edits import revert_edit
from hftcore.bindings.checkpoints.prune import prune_folder
from hftcore.bindings.checkpoints.skeleton import load_skeleton
from hftcore.bindings.checkpoints.verify import verify_folder
root, peak = Path(sys.argv[1]), [0]

def watch():
    while True:
        # what is mapped without a file counts as shared
        kilobytes = re.findall(r"Rss(?:Anon|Shmem):\s+(\d+)", Path("/proc/self/status").read_text())
        peak[0] = max(peak[0], sum(map(int, kilobytes)) * 1024)
        time.sleep(0.002)

load_skeleton(root / "model")
threading.Thread(target=watch, daemon=True).start()
time.sleep(0.1)
start = peak[0]
prune_folder(root / "model", Energy.load(root / "energy"), "0.3 model", root / "out")
revert_edit(Edit.load(root / "out" / "edit"), root / "out", root / "back")
assert not verify_folder(root / "out")["problems"]
print(start, peak[0])
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's memory counters")
def test_memory_stays_small_beside_a_large_model(tmp_path):
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config |= {"hidden_size": 1024, "intermediate_size": 1 << 15, "num_hidden_layers": 1, "dtype": "bfloat16"}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    wide, tall = (1 << 15, 1024), (1024, 1 << 15)
    noise = torch.randn(wide).bfloat16()
    mlp = {"up_proj": noise, "gate_proj": noise.clone(), "down_proj": noise.reshape(tall).clone()}
    mlp = {f"model.layers.0.mlp.{name}.weight": tensor for name, tensor in mlp.items()}
    rest = {name: torch.zeros_like(value) for name, value in load_skeleton(tmp_path / "model").named_parameters()}
    save_file(rest | mlp, tmp_path / "model" / "model.safetensors")
    energies = {name.removesuffix(".weight"): torch.ones(tensor.shape[1]) for name, tensor in mlp.items()}
    Energy(energies).save(tmp_path / "energy")
    environment = {**os.environ, "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", MEMORY, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    start, peak = map(int, done.stdout.split())
    assert (tmp_path / "model" / "model.safetensors").stat().st_size > 200e6
    # eight blocks of 4 MiB, the edit's values that wait for the disk, and what malloc keeps of those before
    assert peak - start < 100e6
    assert peak < 512e6
    original, back = ((tmp_path / place / "model.safetensors").read_bytes() for place in ("model", "back"))
    assert original == back


@settings(max_examples=40)
@given(
    runs=st.lists(
        st.tuples(st.integers(0, 1), st.integers(0, 40_000), st.lists(st.integers(0, 9000), max_size=6)), max_size=6
    ),
    refusal=st.sampled_from([None, "open", "write"]),
    limit=st.sampled_from([1 << 30, 5000, 4096]),
)
def test_what_is_written_past_the_page_cache_is_what_was_given(runs, refusal, limit):
    pwrite, openat = os.pwrite, os.open
    flag = getattr(os, "O_DIRECT", 0)
    past = set()

    def open_or_refuse(path, flags, *rest):
        if flag and flags & flag and refusal == "open":
            raise OSError(errno.EINVAL, "no such flag here")
        handle = openat(path, flags, *rest)
        past.discard(handle)
        if flags & flag:
            past.add(handle)
        return handle

    def write_some(handle, data, offset):
        if handle in past:
            assert offset % direct.PAGE == len(data) % direct.PAGE == 0
            if refusal == "write":
                raise OSError(errno.EINVAL, "not here")
        return pwrite(handle, data[:limit], offset)

    wanted = bytearray(100_000)
    with tempfile.TemporaryDirectory() as place, pytest.MonkeyPatch.context() as patched:
        patched.setattr(direct, "ROOM", 4 * direct.PAGE)
        patched.setattr(direct, "STRAIGHT", direct.PAGE)
        patched.setattr(os, "open", open_or_refuse)
        patched.setattr(os, "pwrite", write_some)
        file = Path(place) / "file"
        file.write_bytes(wanted)
        with direct.DirectWriter(file) as one, direct.DirectWriter(file) as two:
            for which, offset, sizes in runs:
                for size in sizes:
                    # now and then as it will lie in the file
                    room = torch.frombuffer(mmap.mmap(-1, size + 2 * direct.PAGE), dtype=torch.uint8)
                    data = room[(offset + which * size % 2) % direct.PAGE :][:size].random_(0, 256)
                    # another writer may come to the same page at any time, to the same bytes only after a flush
                    (two, one)[which].flush()
                    (one, two)[which].write(offset, data)
                    wanted[offset : offset + size] = data.numpy().tobytes()
                    offset += size
            one.flush()
            two.flush()
        assert file.read_bytes() == bytes(wanted)


@pytest.mark.parametrize("refusal", [None, "open", "read", "held"])
def test_what_is_read_past_the_page_cache_is_what_the_file_holds(tmp_path, monkeypatch, refusal):
    preadv, openat = os.preadv, os.open
    flag, past = getattr(os, "O_DIRECT", 0), set()
    content = os.urandom(70_001)
    file = tmp_path / "file"
    file.write_bytes(content)

    def open_or_refuse(path, flags, *rest):
        if flag and flags & flag and refusal == "open":
            raise OSError(errno.EINVAL, "no such flag here")
        handle = openat(path, flags, *rest)
        past.discard(handle)
        if flags & flag:
            past.add(handle)
        return handle

    def read_some(handle, buffers, offset):
        if handle in past:
            assert refusal != "held"
            assert offset % direct.PAGE == len(buffers[0]) % direct.PAGE == 0
            if refusal == "read":
                raise OSError(errno.EINVAL, "not here")
        return preadv(handle, [buffers[0][:8192]], offset)

    monkeypatch.setattr(os, "open", open_or_refuse)
    monkeypatch.setattr(os, "preadv", read_some)
    if refusal != "held":
        monkeypatch.setattr(direct.DirectReader, "_is_held", lambda *_: False)
    room = mmap.mmap(-1, 80_000)
    with direct.DirectReader(file) as source:
        for start, stop in [(0, 70_001), (5, 6), (4096, 8192), (4095, 4097), (69_999, 70_001), (9000, 9000)]:
            source.read(start, stop, memoryview(room))
            first = start % direct.PAGE
            assert room[first : first + stop - start] == content[start:stop]
        with pytest.raises(HftcoreError, match="ended 1 bytes early"):
            source.read(60_000, 70_002, memoryview(room))


class PartlyHeld:
    """A file of 256 pages, the first 32 of which the page cache holds, and what its reader asks the system for.

    What is asked for ahead does not come, so that it is reading that comes to the gaps.
    """

    def __init__(self, file, patched):
        self.through, self.advised, self.order = [], [], []
        self.content = os.urandom(256 * direct.PAGE)
        self._room, self._file, self._advise = mmap.mmap(-1, 257 * direct.PAGE), file, os.posix_fadvise
        file.write_bytes(self.content)
        patched.setattr(os, "posix_fadvise", self._note_advice)
        self.source = direct.DirectReader(file)
        if self.source._direct == self.source._cached:
            pytest.skip("a file system without a way past the page cache")
        with file.open("rb", buffering=0) as other:
            os.fsync(other.fileno())
        self.hold(0)
        if self.held(0, 256):
            pytest.skip("a file system whose page cache cannot be emptied")
        self.hold(32)
        preadv = os.preadv

        def read(handle, *rest):
            self.through.append(not fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_DIRECT)
            self.order.append("read")
            return preadv(handle, *rest)

        patched.setattr(os, "preadv", read)

    def hold(self, pages):
        """Have so many of the first pages in the page cache, and no other."""
        with self._file.open("rb", buffering=0) as other:
            self._advise(other.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            self._advise(other.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
            os.pread(other.fileno(), pages * direct.PAGE, 0)

    def held(self, first, last):
        """How many of these pages are there."""
        pages = np.zeros(last - first, np.uint8)
        mapped = np.memmap(self._file, np.uint8, "r")[first * direct.PAGE : last * direct.PAGE]
        assert not direct._C.mincore(ctypes.c_void_p(mapped.ctypes.data), ctypes.c_size_t(len(mapped)), pages.ctypes)
        return int((pages & 1).sum())

    def read(self, start, stop, then=None):
        self.source.read(start, stop, memoryview(self._room), then)
        first = start % direct.PAGE
        assert self._room[first : first + stop - start] == self.content[start:stop]

    def _note_advice(self, handle, first, length, advice):
        self.advised.append((first, length, advice))
        self.order.append("ask")
        if advice != os.POSIX_FADV_WILLNEED:
            self._advise(handle, first, length, advice)


@pytest.fixture
def partly_held(tmp_path, monkeypatch):
    if not hasattr(os, "O_DIRECT"):
        pytest.skip("no reading past the page cache here")
    monkeypatch.setattr(direct, "ADVISED", 30 * direct.PAGE)
    file = PartlyHeld(tmp_path / "file", monkeypatch)
    with file.source:
        yield file


@pytest.mark.parametrize(
    ("start", "stop", "is_cached"),
    [(0, 64, [True]), (1, 64, [False]), (16, 48, [True]), (40, 64, [False]), (5, 5, []), (0.01, 40.01, [True])],
)
def test_a_part_is_read_through_the_page_cache_if_that_holds_half_of_it(partly_held, start, stop, is_cached):
    page = direct.PAGE
    start, stop = int(start * page), int(stop * page)
    partly_held.read(start, stop)
    assert partly_held.through == is_cached
    wanted = range(start, stop, 30 * page) if is_cached == [True] else ()
    # nothing is read on, or the next part would seem to be held
    assert partly_held.advised == [
        (0, 0, os.POSIX_FADV_RANDOM),
        *((at, min(30 * page, stop - at), os.POSIX_FADV_WILLNEED) for at in wanted),
    ]
    assert partly_held.held(64, 256) == 0


def test_the_gaps_of_a_part_are_asked_for_while_another_one_is_read(partly_held):
    page, needed = direct.PAGE, os.POSIX_FADV_WILLNEED
    coming, cold = (16 * page, 48 * page), (48 * page, 64 * page)
    partly_held.read(0, 8 * page, then=coming)
    partly_held.read(8 * page, 16 * page, then=cold)
    asked = [(0, 8 * page), coming, (8 * page, 16 * page)]
    told = [(at, min(30 * page, stop - at), needed) for start, stop in asked for at in range(start, stop, 30 * page)]
    assert partly_held.advised == [(0, 0, os.POSIX_FADV_RANDOM), *told]
    assert partly_held.order == ["ask", "ask", "ask", "ask", "read", "ask", "read"]
    # each is read as was settled when it was asked for, whatever the page cache holds by then, and not asked for again
    partly_held.hold(0)
    partly_held.read(*coming)
    partly_held.hold(64)
    partly_held.read(*cold)
    assert partly_held.through == [True, True, True, False]
    assert partly_held.advised == [(0, 0, os.POSIX_FADV_RANDOM), *told]
    partly_held.read(*cold)
    assert partly_held.through[-1]


def test_of_each_block_what_the_page_cache_lacks_is_asked_for_two_blocks_before(tmp_path, monkeypatch):
    one, two = tmp_path / "one", tmp_path / "two"
    for file in (one, two):
        file.write_bytes(bytes(50))
    spans = [(one, 0, 10), (one, 10, 20), (one, 20, 30), (one, 30, 40), (two, 0, 10), (two, 10, 20), (two, 20, 30)]
    asked, read = [], direct.DirectReader.read

    def note(self, start, stop, room, then):
        asked.append((self.file, start, stop, then))
        read(self, start, stop, room, then)

    monkeypatch.setattr(direct.DirectReader, "read", note)
    assert [len(data) for data in blocks.Blocks(2).read(iter(spans))] == [10] * 7
    ahead = [(20, 30), (30, 40), None, None, (20, 30), None, None]
    assert asked == [(*span, then) for span, then in zip(spans, ahead, strict=True)]


def test_memory_is_used_again_only_when_nothing_needs_it(tmp_path):
    file = tmp_path / "file"
    content = os.urandom(10 * blocks.BLOCK + 5)
    file.write_bytes(content)
    memory, late, seen = blocks.Blocks(3), threading.Event(), []

    def look(data):
        late.wait(0.2)
        seen.append(data.numpy().tobytes())

    places = set()
    with ThreadPoolExecutor(1) as reader:
        for data in memory.read(blocks.spans_of(file, 3, len(content))):
            places.add(data.data_ptr())
            memory.jobs(reader.submit(look, data))
            if len(seen) > 5:
                late.set()
        memory.settle()
    assert b"".join(seen) == content[3:]
    assert len(places) == 3
    with pytest.raises(HftcoreError, match="ended 1 bytes early"):
        list(memory.read(blocks.spans_of(file, 0, len(content) + 1)))


def test_what_fails_beside_the_main_work_is_raised_there(tmp_path):
    slots = {"w": Slot((2, 8), torch.float32, False, 2, 1, 16, False)}
    with EditWriter(tmp_path / "edit", slots) as writer, pytest.MonkeyPatch.context() as patched:
        patched.setattr(direct.DirectWriter, "flush", lambda _: os.write(-1, b""))
        writer.write("w", "before", 0, torch.ones(8))
        with pytest.raises(OSError, match="Bad file descriptor"):
            writer.settle()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8, torch.int64])
@pytest.mark.parametrize("backend", [None, "torch"])
def test_the_fingerprint_of_a_tensor_is_the_sum_of_those_of_its_parts(dtype, backend):
    whole = torch.randint(0, 100, (70_001,)).to(dtype)
    copy = whole.clone()
    wanted = hftcore.ops.fingerprint(whole)
    for cuts in ([], [1], [16384, 16385], [5, 40_000, 70_000]):
        edges = [0, *cuts, len(whole)]
        with hftcore.use_backend(backend) if backend else nullcontext():
            sums = [fingerprint_sum(whole[a:b], a) for a, b in pairwise(edges)]
        assert fingerprint_text(dtype, whole.shape, sum(sums)) == wanted
    assert torch.equal(whole, copy)
