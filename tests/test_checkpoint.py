"""Edits on checkpoint folders: exact, complete or absent, and careful with damaged files."""

import errno
import hashlib
import json
import os
import re
import shutil
import struct
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from tied_models import energy_of
from tiny_models import tiny_model, with_lora
from transformers import AutoModelForCausalLM

from hftcore import Edit, Energy, FingerprintError, HftcoreError, Pattern, prune
from hftcore.bindings import output
from hftcore.bindings.checkpoints import edits, rewrite
from hftcore.bindings.checkpoints.edits import apply_edit, names_on_disk, revert_edit
from hftcore.bindings.checkpoints.manifest import MANIFEST
from hftcore.bindings.checkpoints.prune import prune_folder
from hftcore.bindings.checkpoints.stored import list_tensors, read_header
from hftcore.bindings.checkpoints.verify import verify_folder
from hftcore.bindings.output import check_output
from hftcore.layers import find_layers


def pruned(model, targets="all-linear", reference=None):
    """Prune 30 % of each row by magnitude, in place."""
    layers = find_layers(model, targets)
    energy = Energy({layer.name: torch.ones_like(layer.weight[..., 0, :], dtype=torch.float32) for layer in layers})
    return prune(model, energy, Pattern("30%"), reference=reference)


def digests(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def saved(model, folder, **options):
    model.save_pretrained(folder, **options)
    (folder / "notes").mkdir()
    (folder / "notes" / "readme.txt").write_text("kept byte for byte")
    return folder


def raw(header: bytes, data: bytes = b"", length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + data


@pytest.fixture
def made(tmp_path):
    """(original folder, edit on it)."""
    model = tiny_model("llama", torch.bfloat16)
    folder = saved(model, tmp_path / "model")
    return folder, pruned(model)


@pytest.mark.parametrize(
    ("name", "dtype", "options"),
    [
        ("llama", torch.bfloat16, {}),
        ("llama", torch.float16, {"max_shard_size": "20KB"}),
        ("llama-tied", torch.float32, {}),
        ("gpt2", torch.float32, {}),
        ("gpt-oss", torch.bfloat16, {}),
        ("mixtral", torch.float32, {}),
        ("qwen3-moe", torch.bfloat16, {"max_shard_size": "20KB"}),
    ],
)
def test_a_checkpoint_edited_on_disk_is_the_model_edited_in_memory(tmp_path, name, dtype, options):
    model = tiny_model(name, dtype)
    folder = saved(model, tmp_path / "model", **options)
    assert not options or len(list(folder.glob("*.safetensors"))) > 1
    edit = pruned(model)
    model.save_pretrained(tmp_path / "expected", **options)
    before = digests(folder)

    apply_edit(edit, folder, tmp_path / "applied")
    for file in (tmp_path / "expected").glob("*.safetensors"):
        found, wanted = load_file(tmp_path / "applied" / file.name), load_file(file)
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[key], wanted[key]) for key in wanted)

    revert_edit(edit, tmp_path / "applied", tmp_path / "reverted")
    assert digests(tmp_path / "reverted") == before
    assert digests(folder) == before
    changed = {key for key, value in digests(tmp_path / "applied").items() if value != before[key]}
    assert changed
    assert all(key.endswith(".safetensors") for key in changed)


def test_an_edit_towards_a_reference_writes_its_values(tmp_path):
    model, reference = tiny_model("llama"), tiny_model("llama", seed=1)
    folder = saved(model, tmp_path / "model")
    edit = pruned(model, reference=reference)
    apply_edit(edit, folder, tmp_path / "applied")
    stored = load_file(tmp_path / "applied" / "model.safetensors")
    assert all(torch.equal(stored[name], model.state_dict()[name]) for name in edit.tensors)


def test_an_adapter_keeps_its_names_on_disk(tmp_path):
    model = with_lora(tiny_model("llama"), ["q_proj", "down_proj"])
    folder = saved(model, tmp_path / "adapter")
    edit = pruned(model, "lora")
    assert all(".default." in name for name in edit.tensors)
    apply_edit(edit, folder, tmp_path / "applied")
    model.save_pretrained(tmp_path / "expected")
    found = load_file(tmp_path / "applied" / "adapter_model.safetensors")
    wanted = load_file(tmp_path / "expected" / "adapter_model.safetensors")
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    revert_edit(edit, tmp_path / "applied", tmp_path / "reverted")
    assert digests(tmp_path / "reverted") == digests(folder)


def test_an_edit_of_the_base_inside_an_adapter_fits_the_base_folder(tmp_path):
    base = tiny_model("llama")
    folder = saved(base, tmp_path / "base")
    model = with_lora(base, ["q_proj"])
    edit = pruned(model, ["base_layer"])
    apply_edit(edit, folder, tmp_path / "applied")
    stored = load_file(tmp_path / "applied" / "model.safetensors")
    kept = dict(model.named_parameters())
    name = "base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight"
    assert torch.equal(stored["model.layers.0.self_attn.q_proj.weight"], kept[name])


def test_experts_that_are_not_all_in_the_files_are_refused(tmp_path):
    model = tiny_model("mixtral")
    folder = saved(model, tmp_path / "model")
    edit = pruned(model)
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.block_sparse_moe.experts.2.w3.weight"]
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(HftcoreError, match=r"no tensor 'model\.layers\.1\.mlp\.experts\.gate_up_proj'"):
        apply_edit(edit, folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_names_that_peft_shortens():
    assert "m.lora_embedding_A" in names_on_disk("m.lora_embedding_A.default")
    assert "m.lora_magnitude_vector.weight" in names_on_disk("m.lora_magnitude_vector.mine.weight")
    assert names_on_disk("transformer.h.0.attn.c_attn.weight")[-1] == "h.0.attn.c_attn.weight"


def test_an_edit_survives_its_own_folder(made, tmp_path):
    folder, edit = made
    edit.save(tmp_path / "edit")
    apply_edit(Edit.load(tmp_path / "edit"), folder, tmp_path / "a")
    apply_edit(edit, folder, tmp_path / "b")
    assert digests(tmp_path / "a") == digests(tmp_path / "b")


def test_a_model_that_was_reverted_has_no_edit_any_more_unless_it_is_another(tmp_path):
    model = tiny_model("llama")
    folder = saved(model, tmp_path / "model")
    prune_folder(folder, energy_of(model), "50%", tmp_path / "pruned")
    first = Edit.load(tmp_path / "pruned" / "edit")
    revert_edit(first, tmp_path / "pruned", tmp_path / "reverted")
    assert digests(tmp_path / "reverted") == digests(folder)
    second = prune_folder(tmp_path / "pruned", energy_of(model, 1), "60%", tmp_path / "edit", edit_only=True)
    apply_edit(second, tmp_path / "pruned", tmp_path / "twice")
    revert_edit(second, tmp_path / "twice", tmp_path / "once")
    assert digests(tmp_path / "once") == digests(tmp_path / "pruned")
    for damaged in ("{", "[]", '{"tensors": {"x": 1}}'):
        (tmp_path / "pruned" / "edit" / "edit_config.json").write_text(damaged)
        revert_edit(first, tmp_path / "pruned", tmp_path / f"beside {len(damaged)}")


def test_other_weights_are_refused_and_nothing_is_written(made, tmp_path):
    folder, edit = made
    apply_edit(edit, folder, tmp_path / "applied")
    cases = [
        (apply_edit, tmp_path / "applied", "already applied"),
        (revert_edit, folder, "not applied"),
        (apply_edit, saved(tiny_model("llama", torch.bfloat16, seed=1), tmp_path / "other"), "these are other weights"),
    ]
    for call, model, message in cases:
        with pytest.raises(FingerprintError, match=message):
            call(edit, model, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["applied", "model", "other"]


def test_a_model_of_other_make_is_refused(made, tmp_path):
    folder, edit = made
    with pytest.raises(HftcoreError, match=r"is float32 .*the edit was made on bfloat16"):
        apply_edit(edit, saved(tiny_model("llama"), tmp_path / "float32"), tmp_path / "out")
    with pytest.raises(HftcoreError, match="the checkpoint has no tensor"):
        apply_edit(edit, saved(tiny_model("gpt2", torch.bfloat16), tmp_path / "gpt2"), tmp_path / "out")
    name = "model.layers.0.mlp.up_proj.weight"
    entry = edit.tensors[name]
    for broken in (replace(entry, mask=entry.mask[1:]), replace(entry, transposed=True)):
        with pytest.raises(HftcoreError, match="does not fit"):
            apply_edit(Edit({name: broken}), folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_wrong_fingerprint_after_leaves_nothing(made, tmp_path):
    folder, edit = made
    name = next(iter(edit.tensors))
    edit.tensors[name] = replace(edit.tensors[name], fingerprint_after="0" * 16)
    with pytest.raises(FingerprintError):
        apply_edit(edit, folder, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
@pytest.mark.parametrize("place", ["copyfile", "write", "fsync", "rename"])
def test_an_interruption_at_any_step_leaves_no_output_and_the_next_call_completes_it(
    made, tmp_path, monkeypatch, place, error
):
    folder, edit = made
    apply_edit(edit, folder, tmp_path / "expected")
    before = digests(folder)

    def fail(*_):
        raise error

    owner, name = {
        "copyfile": (rewrite.shutil, "copyfile"),
        "write": (edits.ops, "masked_put_"),
        "fsync": (os, "fsync"),
        "rename": (os, "replace"),
    }[place]
    monkeypatch.setattr(owner, name, fail)
    with pytest.raises((KeyboardInterrupt, OSError)):
        apply_edit(edit, folder, tmp_path / "out")
    monkeypatch.undo()
    assert not (tmp_path / "out").exists()
    apply_edit(edit, folder, tmp_path / "out")
    assert digests(tmp_path / "out") == digests(tmp_path / "expected")
    assert not verify_folder(tmp_path / "out")["problems"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["expected", "model", "out"]
    assert digests(folder) == before


def test_files_that_may_not_be_written_are_still_patched_in_the_copy(made, tmp_path):
    folder, edit = made
    (folder / "model.safetensors").chmod(0o444)
    apply_edit(edit, folder, tmp_path / "out")
    assert os.access(tmp_path / "out" / "model.safetensors", os.W_OK)


def test_links_into_the_hubs_cache_are_followed_and_others_refused(made, tmp_path):
    model, edit = made
    folder, blobs = tmp_path / "cache" / "snapshots" / "revision", tmp_path / "cache" / "blobs"
    folder.parent.mkdir(parents=True)
    blobs.mkdir()
    model.rename(folder)
    (folder / "model.safetensors").rename(blobs / "1234")
    (folder / "model.safetensors").symlink_to("../../blobs/1234")
    before = (blobs / "1234").read_bytes()
    apply_edit(edit, folder, tmp_path / "out")
    assert not (tmp_path / "out" / "model.safetensors").is_symlink()
    assert (blobs / "1234").read_bytes() == before
    (folder / "linked").symlink_to(tmp_path / "out")
    with pytest.raises(HftcoreError, match="link to a folder"):
        apply_edit(edit, folder, tmp_path / "out2")
    (folder / "linked").unlink()
    (tmp_path / "secret").write_text("not of this model")
    for name in ("notes/other.txt", "model.safetensors"):
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(tmp_path / "secret")
        with pytest.raises(HftcoreError, match="link out of its folder"):
            apply_edit(edit, folder, tmp_path / "out2")
    assert not (tmp_path / "out2").exists()


def test_an_output_in_the_way_is_refused(made, tmp_path):
    folder, edit = made
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    for out, message in [
        (folder, "outside"),
        (folder / "sub", "outside"),
        (tmp_path / "taken", "not empty"),
        (tmp_path / "taken" / "file", "it exists"),
        (tmp_path / "dangling", "it exists"),
        (tmp_path / "link", "it exists"),
    ]:
        with pytest.raises(HftcoreError, match=message):
            apply_edit(edit, folder, out)
    (tmp_path / "free").mkdir()
    apply_edit(edit, folder, tmp_path / "free")
    assert (tmp_path / "free" / "config.json").is_file()
    assert check_output(tmp_path / "new", ["owner/hub-id"]) == tmp_path / "new"


ONTO_A_MOUNT = """
import sys
from hftcore import Edit, HftcoreError
from hftcore.bindings.checkpoints.edits import apply_edit
try:
    apply_edit(Edit.load(sys.argv[1]), sys.argv[2], sys.argv[3])
except HftcoreError as error:
    print(error)
"""


def in_namespace(program):
    """The output of a shell program that begins by mounting something, and must end well."""
    if not shutil.which("unshare") or subprocess.run(["unshare", "-rm", "true"], check=False).returncode:
        pytest.skip("needs a user namespace to mount in")
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", program],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"},
        check=False,
    )
    if done.stderr.startswith("mount:"):
        pytest.skip(f"cannot mount here: {done.stderr}")
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize("kind", ["-t tmpfs none", "--bind {other}"])
def test_a_mount_point_is_refused_before_anything_is_written(made, tmp_path, kind):
    folder, edit = made
    edit.save(tmp_path / "edit")
    out, other = tmp_path / "out", tmp_path / "other"
    out.mkdir()
    other.mkdir()
    there, before = {path.name for path in tmp_path.iterdir()}, digests(folder)
    apply = f"{sys.executable} -c '{ONTO_A_MOUNT}' {tmp_path / 'edit'} {folder} {out}"
    said = in_namespace(f"mount {kind.format(other=other)} {out} && {apply}")
    assert re.search(r"^OUT must .* got .*out \(a mount point, which cannot be replaced\); choose another name", said)
    assert said.count("\n") == 1
    assert {path.name for path in tmp_path.iterdir()} == there
    assert digests(folder) == before
    assert not [*out.iterdir(), *other.iterdir()]


INTO_AN_IMAGE = """
import sys
from hftcore.bindings.output import check_output
from hftcore.files import whole_folder
with whole_folder(check_output(sys.argv[1])) as work:
    (work / "file").write_text("written")
print(*[path.name for path in check_output(sys.argv[1] + "-other").parent.iterdir()])
"""


def test_an_empty_folder_of_a_containers_image_gives_way_to_the_result(tmp_path):
    """Such a folder lies in a lower layer, from where it cannot be moved."""
    for name in ("lower/out", "upper", "work", "merged"):
        (tmp_path / name).mkdir(parents=True)
    layers = ",".join(f"{layer}dir={tmp_path / layer}" for layer in ("lower", "upper", "work"))
    said = in_namespace(
        f"mount -t overlay overlay -o userxattr,{layers} {tmp_path / 'merged'} && "
        f"{sys.executable} -c '{INTO_AN_IMAGE}' {tmp_path / 'merged' / 'out'}"
    )
    assert said.split() == ["out"]
    assert (tmp_path / "upper" / "out" / "file").read_text() == "written"


def test_an_empty_folder_is_left_as_it_is_by_the_check_and_others_are_refused(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir(mode=0o750)
    before = (tmp_path / "out").stat()
    assert check_output(tmp_path / "out") == tmp_path / "out"
    after = (tmp_path / "out").stat()
    assert (after.st_ino, after.st_mode, [*(tmp_path / "out").iterdir()]) == (before.st_ino, before.st_mode, [])

    remove = os.rmdir

    def refuse(path, **options):
        if path == tmp_path / "out":
            raise PermissionError(errno.EPERM, "Operation not permitted", path)
        remove(path, **options)

    with monkeypatch.context() as patched:
        patched.setattr(output.os, "rmdir", refuse)
        with pytest.raises(HftcoreError, match=r"can be replaced, got .*out \(Operation not permitted\); choose"):
            check_output(tmp_path / "out")
    assert not [*(tmp_path / "out").iterdir()]


def entry(start=0, stop=4, dtype="F32", shape=(1,)):
    return json.dumps({"x": {"dtype": dtype, "shape": list(shape), "data_offsets": [start, stop]}}).encode()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cut off"),
        (b"\x01\x02", "cut off"),
        (raw(b"{}", length=2**63), "cut off"),
        (raw(b"{}", length=200_000_000), "cut off"),
        (raw(b"{]"), "damaged header"),
        (raw(b"\xff\xff"), "damaged header"),
        (raw(b"[" * 50_000), "damaged header"),
        (raw(b"[]"), "damaged header"),
        (raw(b'{"x": 3}'), "damaged header"),
        (raw(entry()[:-1] + b", " + entry()[1:], bytes(4)), "'x' is there twice"),
        (raw(b'{"x": {"dtype": "F32", "shape": [1]}}'), "damaged header"),
        (raw(entry(shape=(2,)), bytes(4)), "does not fill"),
        (raw(entry(shape=(-1,)), bytes(4)), "whole numbers"),
        (raw(entry(shape=(True,)), bytes(4)), "whole numbers"),
        (raw(entry(0, -4), bytes(4)), "whole numbers"),
        (raw(entry(4, 0, "X"), bytes(4)), "offsets 4 to 0"),
        (raw(entry(4, 8), bytes(8)), "overlap or leave gaps"),
        (raw(entry(), bytes(3)), "cut off or has bytes left over"),
        (raw(entry(), bytes(5)), "cut off or has bytes left over"),
    ],
)
def test_a_damaged_file_is_refused_in_one_line(tmp_path, content, message):
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)
    with pytest.raises(HftcoreError, match=message) as caught:
        read_header(file)
    assert "model.safetensors" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_header_says_what_safetensors_reads(tmp_path):
    tensors = {"b": torch.arange(6, dtype=torch.int16).reshape(2, 3), "a": torch.zeros(0, 4), "c": torch.ones(())}
    save_file(tensors, tmp_path / "x.safetensors", {"format": "pt"})
    found = read_header(tmp_path / "x.safetensors")
    assert {name: place.shape for name, place in found.items()} == {"a": (0, 4), "b": (2, 3), "c": ()}
    place = found["b"]
    assert (tmp_path / "x.safetensors").read_bytes()[place.start : place.stop] == tensors["b"].numpy().tobytes()


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"weight_map": {"x": "../model.safetensors"}}, "same folder"),
        ({"weight_map": {"x": "/etc/passwd"}}, "same folder"),
        ({"weight_map": {"x": ".."}}, "same folder"),
        ({"weight_map": {"x": "..\\model.safetensors"}}, "same folder"),
        ({"weight_map": {"x": 3}}, "weight_map"),
        ({"weight_map": ["x"]}, "weight_map"),
        ({"weight_map": {}}, "weight_map"),
        ([], "weight_map"),
        ({"weight_map": {"x": "absent.safetensors"}}, "is missing"),
        ({"weight_map": {"y": "part.safetensors"}}, "does not hold it"),
        ({"weight_map": {"x": "part.safetensors", "z": "more.safetensors"}}, "is in both"),
    ],
)
def test_an_index_that_lies_is_refused(tmp_path, index, message):
    save_file({"x": torch.ones(1)}, tmp_path / "part.safetensors")
    save_file({"x": torch.ones(1), "z": torch.ones(1)}, tmp_path / "more.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(HftcoreError, match=message):
        list_tensors(tmp_path)


def test_files_are_chosen_as_transformers_chooses_them(tmp_path):
    index = {"metadata": {}, "weight_map": {"x": "part.safetensors"}}
    for number, name in enumerate(["part", "adapter_model", "consolidated"]):
        save_file({"x": torch.full((1,), number)}, tmp_path / f"{name}.safetensors")
    (tmp_path / "consolidated.safetensors.index.json").write_text("{")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert list_tensors(tmp_path)["x"].file.name == "part.safetensors"
    tiny_model("llama").save_pretrained(tmp_path)
    assert list_tensors(tmp_path).keys() == load_file(tmp_path / "model.safetensors").keys()
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    assert {place.file.name for place in list_tensors(tmp_path).values()} == {"model.safetensors"}
    assert torch.equal(loaded["lm_head.weight"], tiny_model("llama").lm_head.weight)


def test_links_that_lead_in_a_circle_are_refused_and_nothing_is_left(made, tmp_path):
    folder, edit = made
    (folder / "notes.txt").symlink_to("notes.txt")
    with pytest.raises(HftcoreError, match=r"notes\.txt is a link out of its folder"):
        apply_edit(edit, folder, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_folders_without_tensors_are_refused(tmp_path):
    with pytest.raises(HftcoreError, match="not a folder"):
        list_tensors(tmp_path / "absent")
    with pytest.raises(HftcoreError, match=r"no \.safetensors files"):
        list_tensors(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"cbuiltins\neval\n.")
    with pytest.raises(
        HftcoreError, match=r"but pytorch_model\.bin, a pickle, which could run anything and is not opened"
    ):
        list_tensors(tmp_path)
    save_file({"x": torch.ones(1)}, tmp_path / "one.safetensors")
    save_file({"x": torch.ones(1)}, tmp_path / "two.safetensors")
    with pytest.raises(HftcoreError, match="in both"):
        list_tensors(tmp_path)
