"""Pruning each block once it is measured gives what measuring all and then pruning gives, byte for byte, and reads weights once."""

import os
import signal
import warnings
from collections import Counter
from pathlib import Path

import pytest
import torch
from tiny_models import batch, one_thread, tiny_model  # noqa: F401 (one is a fixture)

from hftcore import HftcoreError, NonFiniteError, direct
from hftcore.bindings.checkpoints import weights
from hftcore.bindings.checkpoints.offload import Offloaded, calibrate_folder
from hftcore.bindings.checkpoints.one_pass import prune_measuring
from hftcore.bindings.checkpoints.prune import prune_folder
from hftcore.bindings.checkpoints.stored import list_tensors
from hftcore.block_runs import BlockRuns

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:saw no token", "ignore:what no token reached"),
]
BATCHES = [batch(), batch((3, 6), "left", 1), batch((5, 5, 5), seed=2)]


def saved(name, folder, dtype=torch.bfloat16, seed=0):
    tiny_model(name, dtype, seed).save_pretrained(folder, max_shard_size="30KB")
    assert len([*folder.glob("*.safetensors")]) > 1
    return folder


def contents(folder):
    """Every file, the manifest too."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def in_two_passes(model, pattern, out, batches=BATCHES, reference=None, edit_only=False, **options):
    energy = calibrate_folder(model, batches, **options)
    prune_folder(model, energy, pattern, out, reference=reference, edit_only=edit_only)
    return contents(out)


@pytest.mark.parametrize(
    ("name", "dtype", "pattern", "options"),
    [
        ("llama", torch.bfloat16, "50%", {}),
        ("llama-tied", torch.float32, "2:4", {"tokens": "response"}),
        ("gpt2", torch.bfloat16, "0.2 row highest", {}),
        ("gpt2", torch.float16, "0.5 row lowest 2x4", {"edit_only": True}),
        ("mixtral", torch.bfloat16, "50%", {}),
        ("qwen3-moe", torch.float32, "4:8 row highest", {}),
        ("gpt-oss", torch.bfloat16, "0.3", {}),
        ("llama", torch.bfloat16, "0.4", {"targets": ["lm_head", "up_proj", "q_proj"], "exclude": ["layers.0.mlp"]}),
        ("llama", torch.bfloat16, "0.4", {"targets": r".*layers\.0\..*"}),
        ("llama", torch.bfloat16, "0.4", {"targets": ["lm_head"], "edit_only": True}),
        ("mixtral", torch.bfloat16, "0.3 matrix", {}),
        ("llama", torch.bfloat16, "0.2 model highest", {"edit_only": True}),
    ],
)
def test_one_pass_writes_what_two_write_byte_for_byte(tmp_path, name, dtype, pattern, options):
    model = saved(name, tmp_path / "model", dtype)
    want = in_two_passes(model, pattern, tmp_path / "two", **options)
    edit = prune_measuring(model, BATCHES, pattern, tmp_path / "one", **options)
    assert contents(tmp_path / "one") == want
    assert edit.removed > 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "one", "two"]


@pytest.mark.parametrize(("name", "pattern"), [("llama", "0.2 row highest"), ("gpt2", "50%"), ("mixtral", "50%")])
def test_a_reference_gives_its_values_in_one_pass_too(tmp_path, name, pattern):
    model, reference = saved(name, tmp_path / "model"), saved(name, tmp_path / "reference", seed=1)
    want = in_two_passes(model, pattern, tmp_path / "two", reference=reference)
    prune_measuring(model, BATCHES, pattern, tmp_path / "one", reference=reference)
    assert contents(tmp_path / "one") == want


@pytest.fixture
def readings(monkeypatch):
    """How often each byte of each file is read: (file, place) -> count."""
    counts = Counter()
    plain, straight = weights._read_bytes, direct.DirectReader.read

    def count(file, start, stop):
        counts.update((Path(file).name, place) for place in range(start, stop))

    def read(self, start, stop, room, then=None):
        count(self.file, start, stop)
        straight(self, start, stop, room, then)

    monkeypatch.setattr(
        weights, "_read_bytes", lambda piece, rows: (count(piece.file, piece.start, piece.stop), plain(piece, rows))
    )
    monkeypatch.setattr(direct.DirectReader, "read", read)
    return counts


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llama", {}),
        ("llama", {"edit_only": True}),
        ("llama", {"targets": r".*layers\.1\..*k_proj"}),
        ("gpt2", {}),
        ("mixtral", {}),
    ],
)
def test_each_weight_of_the_blocks_is_read_once(tmp_path, readings, name, options):
    model = saved(name, tmp_path / "model")
    inside = {
        (place.file.name, byte)
        for tensor, place in list_tensors(model).items()
        if ".layers." in tensor or tensor.startswith("transformer.h.")
        for byte in range(place.start, place.stop)
    }
    in_two_passes(model, "50%", tmp_path / "two", **options)
    assert max(readings[byte] for byte in inside) == 2
    readings.clear()
    prune_measuring(model, BATCHES, "50%", tmp_path / "one", **options)
    assert {readings[byte] for byte in inside} == {1}
    assert "edit_only" in options or set(readings.values()) == {1}


def test_what_does_not_lie_in_the_files_as_in_memory_is_read_again(tmp_path):
    model = saved("llama", tmp_path / "model")
    config = (model / "config.json").read_text()
    (model / "config.json").write_text(config.replace('"bfloat16"', '"float32"'))
    want = in_two_passes(model, "50%", tmp_path / "two")
    prune_measuring(model, BATCHES, "50%", tmp_path / "one")
    assert contents(tmp_path / "one") == want


def stop_before(turn, stop, monkeypatch):
    plain = BlockRuns.run

    def run(self, now, *args):
        if now == turn:
            stop()
        plain(self, now, *args)

    monkeypatch.setattr(BlockRuns, "run", run)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("edit_only", [False, True])
def test_a_run_killed_between_blocks_is_continued_and_repeats_no_finished_file(tmp_path, monkeypatch, edit_only):
    model, out, partial = saved("qwen3-moe", tmp_path / "model"), tmp_path / "one", tmp_path / ".one.partial"
    want = in_two_passes(model, "50%", tmp_path / "two", edit_only=edit_only)

    def finished():
        journal = tmp_path / ".one.journal"
        return {line for line in journal.read_text().splitlines() if line.startswith('["file')}

    seen = {}
    for turn in (1, 2):
        child = os.fork()
        if child == 0:
            stop_before(turn, lambda: os.kill(os.getpid(), signal.SIGKILL), monkeypatch)
            prune_measuring(model, BATCHES, "50%", out, edit_only=edit_only)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL
        assert not out.exists()
        assert len(finished()) > len(seen)
        for name, stamp in seen.items():
            assert (partial / name).stat().st_mtime_ns == stamp
        seen = {path.name: path.stat().st_mtime_ns for path in partial.glob("model-*") if path.name in str(finished())}
        assert edit_only or seen
    prune_measuring(model, BATCHES, "50%", out, edit_only=edit_only)
    assert contents(out) == want
    assert all((out / name).stat().st_mtime_ns == stamp for name, stamp in seen.items())
    assert not partial.exists()


def interrupted(model, out, monkeypatch):
    """A run that ends before its third block."""

    def interrupt():
        raise KeyboardInterrupt  # the signal itself is ignored where tests run in the background

    with monkeypatch.context() as patched:
        stop_before(2, interrupt, patched)
        with pytest.raises(KeyboardInterrupt):
            prune_measuring(model, BATCHES, "50%", out)


def test_a_file_finished_with_other_energies_is_made_again(tmp_path, monkeypatch):
    """As when the first run had another number of threads."""
    model, out, journal = saved("llama", tmp_path / "model"), tmp_path / "one", tmp_path / ".one.journal"
    want = in_two_passes(model, "50%", tmp_path / "two")
    interrupted(model, out, monkeypatch)
    lines = journal.read_text().splitlines(keepends=True)
    changed = next(index for index, line in enumerate(lines) if "energies model-00002" in line)
    name = lines[changed].split('"')[1].removeprefix("energies ")
    lines[changed] = f'["energies {name}", "others"]\n'
    journal.write_text("".join(lines))
    (tmp_path / ".one.partial" / name).write_bytes(b"of other energies")
    prune_measuring(model, BATCHES, "50%", out)
    assert contents(out) == want


def test_other_batches_do_not_continue_an_unfinished_run(tmp_path, monkeypatch):
    model, out = saved("llama", tmp_path / "model"), tmp_path / "one"
    want = in_two_passes(model, "50%", tmp_path / "two", BATCHES[:2])
    interrupted(model, out, monkeypatch)
    with pytest.warns(UserWarning, match="made anew"):
        prune_measuring(model, BATCHES[:2], "50%", out)
    assert contents(out) == want


@pytest.mark.parametrize("pattern", ["50%", "0.3 row highest"])
def test_experts_that_no_token_reached_are_treated_and_told_as_in_two_passes(tmp_path, pattern):
    model, few = saved("mixtral", tmp_path / "model"), [{"input_ids": torch.tensor([[3]])}]
    with warnings.catch_warnings(record=True) as wanted:
        warnings.simplefilter("always")
        want = in_two_passes(model, pattern, tmp_path / "two", few)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        prune_measuring(model, few, pattern, tmp_path / "one")
    assert contents(tmp_path / "one") == want
    assert [str(warning.message) for warning in told] == [str(warning.message) for warning in wanted]
    assert "no token reached" in str(told[-1].message)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "one", "two"]


def test_bad_weights_and_bad_calls_leave_nothing(tmp_path, monkeypatch):
    broken = tiny_model("llama", torch.bfloat16)
    broken.model.layers[1].self_attn.q_proj.weight.data[2, 3] = torch.nan
    broken.save_pretrained(tmp_path / "model", max_shard_size="30KB")
    with pytest.raises(NonFiniteError):
        prune_measuring(tmp_path / "model", BATCHES, "50%", tmp_path / "out")
    with monkeypatch.context() as patched:
        patched.setattr(Offloaded, "measure", None)  # nothing is measured
        with pytest.raises(HftcoreError, match="groups of 7"):
            prune_measuring(tmp_path / "model", BATCHES, "3:7", tmp_path / "out")
        with pytest.raises(HftcoreError, match="dicts of tensors, got list"):
            prune_measuring(tmp_path / "model", [[1, 2]], "50%", tmp_path / "out")
        (tmp_path / "taken").mkdir()
        (tmp_path / "taken" / "file").touch()
        with pytest.raises(HftcoreError, match="must not exist yet"):
            prune_measuring(tmp_path / "model", BATCHES, "50%", tmp_path / "taken")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "taken"]
