"""Many adapters on one base: each result is that of the single command, and one broken adapter costs only itself."""

import inspect
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from contextlib import suppress
from dataclasses import replace

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import VOCABULARY, tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from hftcore import HftcoreError
from hftcore.bindings import commands
from hftcore.bindings.adapters import ray_crew
from hftcore.bindings.adapters.base import Base, restored
from hftcore.bindings.adapters.crews import LOST, processes
from hftcore.bindings.adapters.folders import REPORT, find_adapters, reserved
from hftcore.bindings.adapters.ray_crew import actors
from hftcore.bindings.adapters.workshop import Task, Work
from hftcore.bindings.checkpoints.manifest import MANIFEST
from hftcore.bindings.cli.app import app
from hftcore.bindings.jobs import Job

# one of each kind of thing that PEFT changes in the base model
KINDS = {
    "a-plain": {"target_modules": ["q_proj", "v_proj"]},
    "b-biased": {"target_modules": ["q_proj", "down_proj"], "bias": "all"},
    "c-saved": {"target_modules": ["k_proj"], "modules_to_save": ["lm_head"]},
    "d-dora": {"target_modules": ["up_proj"], "use_dora": True},
    "e-worded": {"target_modules": ["q_proj", "v_proj"], "r": 2},
}
ANSWERED = "adapter_model.safetensors"


def tokenizer(first=3):
    words = ["<pad>", "<unk>", "<eos>", *(f"w{index}" for index in range(first, VOCABULARY - 3 + first))]
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "unk_token": "<unk>", "eos_token": "<eos>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def make_adapter(folder, seed, **settings):
    """An adapter whose every trained value is random."""
    model = peft.get_peft_model(tiny_model("qwen2"), peft.LoraConfig(**{"r": 4, "task_type": "CAUSAL_LM"} | settings))
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.3 * torch.randn(parameter.shape).abs())
    model.save_pretrained(folder)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    tiny_model("qwen2").save_pretrained(root / "base")
    tokenizer().save_pretrained(root / "base")
    for seed, (name, settings) in enumerate(KINDS.items()):
        make_adapter(root / "adapters" / name, seed, **settings)
    tokenizer(first=8).save_pretrained(root / "adapters" / "e-worded")
    make_adapter(root / "plain" / "f", 7, target_modules=["q_proj"])
    make_adapter(root / "plain" / "g", 8, target_modules=["q_proj"])
    rows = [{"prompt": f"w{index} w4", "completion": f"w{index + 9} w7 w8"} for index in range(3, 12)]
    (root / "data.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return root


def hftcore_command(*args):
    """Run a command in this process; (exit code, stdout, stderr)."""
    result = CliRunner().invoke(app, [str(arg) for arg in args])
    return result.exit_code, result.stdout, result.stderr


def repair(world, out, *args, adapters=("plain",), code=0, data="data.jsonl"):
    """What the command says on stdout as JSON, and its stderr."""
    chosen = [part for name in adapters for part in ("--adapters", world / name)]
    got, text, errors = hftcore_command(
        "antidote", world / "base", "--data", world / data, "--device", "cpu", "--out", out, "--json", *chosen, *args
    )
    assert got == code, errors
    return (json.loads(text) if text else None), errors


def single(world, adapter, out, *args):
    code, _, errors = hftcore_command(
        "antidote",
        adapter,
        "--base",
        world / "base",
        "--data",
        world / "data.jsonl",
        "--device",
        "cpu",
        "--out",
        out,
        *args,
    )
    assert code == 0, errors


def report(out):
    lines = [json.loads(line) for line in (out / REPORT).read_text().splitlines()]
    return {line["name"]: line for line in lines}


def contents(folder):
    """Relative path -> bytes; PEFT writes sets of names in an order that changes from process to process, and so do their digests."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    found = {str(path.relative_to(folder)): path.read_bytes() for path in files}
    if "adapter_config.json" in found:
        config = json.loads(found["adapter_config.json"])
        found["adapter_config.json"] = {
            key: sorted(value) if key.endswith("modules") and value else value for key, value in config.items()
        }
    return found


def damaged(world, folder):
    """Three whole adapters, and one of each kind of broken ones between them."""
    for name in ("a", "d", "i"):
        shutil.copytree(world / "plain" / "f", folder / name)
    for name in ("b-cut", "c-shape", "e-unnamed", "f-nan", "g-garbled"):
        shutil.copytree(world / "plain" / "g", folder / name)
    cut = folder / "b-cut" / ANSWERED
    cut.write_bytes(cut.read_bytes()[:-10])
    wide = load_file(folder / "c-shape" / ANSWERED)
    save_file({name: torch.cat([value, value], 1) for name, value in wide.items()}, folder / "c-shape" / ANSWERED)
    (folder / "e-unnamed" / "adapter_config.json").unlink()
    wild = load_file(folder / "f-nan" / ANSWERED)
    next(iter(wild.values()))[0, 0] = float("nan")
    save_file(wild, folder / "f-nan" / ANSWERED)
    (folder / "g-garbled" / "adapter_config.json").write_text("{")
    (folder / "h-empty").mkdir()
    return {"b-cut", "c-shape", "e-unnamed", "f-nan", "g-garbled", "h-empty"}


def test_each_result_is_that_of_the_single_command(world, tmp_path):
    told, errors = repair(world, tmp_path / "out", adapters=["adapters"])
    assert errors == ""
    assert (told["adapters"], told["repaired"], told["failed"]) == (5, 5, [])
    for name in KINDS:
        single(world, world / "adapters" / name, tmp_path / name)
        assert contents(tmp_path / "out" / name) == contents(tmp_path / name), name
        line = report(tmp_path / "out")[name]
        edit = json.loads((tmp_path / name / "edit" / "edit_config.json").read_text())
        assert line["status"] == "repaired"
        assert 0.1 < line["sparsity"] == line["removed"] / line["size"] < 0.6
        assert line["seconds"] > 0
        assert edit["recipe"]["dense_ratio"] == 0.1
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted([*KINDS, ".journal", REPORT])


def test_choices_reach_every_adapter(world, tmp_path):
    options = ["--dense-ratio", "0.3", "--tokens", "response", "--num-calibration-samples", "4", "--edit-only"]
    repair(world, tmp_path / "out", *options)
    for name in ("f", "g"):
        single(world, world / "plain" / name, tmp_path / name, *options)
        assert contents(tmp_path / "out" / name) == contents(tmp_path / name)


def test_the_base_is_what_it_was_whatever_an_adapter_did(world):
    base = Base(world / "base", "cpu")
    before = {name: value.clone() for name, value in base.model.state_dict().items()}
    attributes = [sorted(vars(module)) for module in base.model.modules()]
    shape = str(base.model)
    for name in KINDS:
        with base.adapted(world / "adapters" / name) as model:
            assert "lora" in str(model)
        assert str(base.model) == shape, name
        assert [sorted(vars(module)) for module in base.model.modules()] == attributes
        assert all(torch.equal(value, before[key]) for key, value in base.model.state_dict().items()), name


def test_a_model_is_loaded_again_only_where_its_weights_were_changed(world):
    base = Base(world / "base", "cpu")
    first = base.model
    for name in ("a-plain", "c-saved", "d-dora"):
        with base.adapted(world / "adapters" / name):
            pass
        assert base.model is first, name
    with base.adapted(world / "adapters" / "b-biased"):
        pass
    assert base.model is not first


def test_modules_are_restored_after_an_error_half_way():
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    handle = model[0].register_forward_hook(lambda *_: None)
    first, weight = model[0], model[0].weight

    def change():
        with restored(model):
            model[0].weight = nn.Parameter(torch.zeros(2, 2))
            model[0].extra = 1
            model[0].register_forward_hook(lambda *_: None)
            model[0] = nn.Identity()
            model.add_module("more", nn.Identity())
            raise KeyError

    with pytest.raises(KeyError):
        change()
    assert list(model.children()) == [first, model[1]]
    assert model[0].weight is weight
    assert not hasattr(model[0], "extra")
    assert len(model[0]._forward_hooks) == 1
    handle.remove()
    assert not model[0]._forward_hooks


def test_broken_adapters_are_reported_and_the_others_repaired(world, tmp_path):
    bad = damaged(world, tmp_path / "adapters")
    code, text, errors = hftcore_command(
        "antidote",
        world / "base",
        "--data",
        world / "data.jsonl",
        "--adapters",
        tmp_path / "adapters",
        "--out",
        tmp_path / "out",
    )
    assert code == 1
    assert text.startswith("Repaired 3 of 9 adapters")
    assert errors.strip().startswith("error: 6 of 9 adapters failed (b-cut, c-shape, ")
    assert len(errors.strip().splitlines()) == 1
    lines = report(tmp_path / "out")
    assert {name for name, line in lines.items() if line["status"] == "failed"} == bad
    assert all("\n" not in lines[name]["error"] and len(lines[name]["error"]) > 20 for name in bad)
    assert "size mismatch" in lines["c-shape"]["error"]
    assert "no adapter_config.json" in lines["e-unnamed"]["error"]
    assert "NaN" in lines["f-nan"]["error"]
    single(world, world / "plain" / "f", tmp_path / "alone")
    for name in ("a", "d", "i"):
        assert contents(tmp_path / "out" / name) == contents(tmp_path / "alone"), name
    assert not any((tmp_path / "out" / name).exists() for name in bad)


def test_an_adapter_that_lacks_factors_is_marked(world, tmp_path):
    shutil.copytree(world / "plain" / "f", tmp_path / "adapters" / "f")
    held = load_file(tmp_path / "adapters" / "f" / ANSWERED)
    held.pop(min(held))
    save_file(held, tmp_path / "adapters" / "f" / ANSWERED)
    told, _ = repair(world, tmp_path / "out", adapters=[tmp_path / "adapters"])
    assert told["warned"] == ["f"]
    assert "missing adapter keys" in report(tmp_path / "out")["f"]["warnings"][0]


def test_no_hub_is_asked_about_an_adapter_that_names_its_base_there(world, tmp_path, monkeypatch):
    adapter = tmp_path / "adapters" / "f"
    shutil.copytree(world / "plain" / "f", adapter)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "owner/name"}))
    asked = []
    monkeypatch.setattr(peft.utils.save_and_load, "check_file_exists_on_hf_hub", lambda *names: asked.append(names))
    told, _ = repair(world, tmp_path / "out", adapters=[tmp_path / "adapters"])
    single(world, adapter, tmp_path / "one")
    assert not asked
    assert not told["warned"]
    assert contents(tmp_path / "out" / "f") == contents(tmp_path / "one")
    assert load_file(tmp_path / "one" / ANSWERED).keys() == load_file(adapter / ANSWERED).keys()


def test_embeddings_with_factors_are_saved_as_peft_saves_them(world, tmp_path):
    make_adapter(tmp_path / "adapters" / "e", 3, target_modules=["embed_tokens", "q_proj"])
    repair(world, tmp_path / "out", adapters=[tmp_path / "adapters"])
    assert (
        load_file(tmp_path / "out" / "e" / ANSWERED).keys() == load_file(tmp_path / "adapters" / "e" / ANSWERED).keys()
    )


def test_resuming_keeps_what_the_same_recipe_made(world, tmp_path):
    out = tmp_path / "out"
    repair(world, out, adapters=["plain"])
    times = (out / "f" / ANSWERED).stat().st_mtime_ns
    lines = report(out)
    shutil.rmtree(out / "g")
    told, _ = repair(world, out, "--resume", adapters=["plain", "adapters/a-plain"])
    assert (told["kept"], told["repaired"]) == (1, 2)
    assert (out / "f" / ANSWERED).stat().st_mtime_ns == times
    assert report(out)["f"] == lines["f"]
    assert len((out / REPORT).read_text().splitlines()) == 3
    single(world, world / "plain" / "g", tmp_path / "g")
    assert contents(out / "g") == contents(tmp_path / "g")


def test_a_lost_or_cut_off_line_is_made_anew_from_the_result(world, tmp_path):
    repair(world, tmp_path / "out")
    whole = report(tmp_path / "out")
    (tmp_path / "out" / REPORT).write_text('{"name": "f", "status": "rep')
    repair(world, tmp_path / "out", "--resume")
    assert report(tmp_path / "out") == {name: line | {"seconds": None} for name, line in whole.items()}


@pytest.mark.parametrize("changed", ["data", "adapter", "base", "ratio"])
def test_a_result_of_another_recipe_is_neither_kept_nor_replaced(world, tmp_path, changed):
    mine = tmp_path / "world"
    shutil.copytree(world, mine)
    repair(mine, tmp_path / "out")
    held = contents(tmp_path / "out" / "f")
    if changed == "data":
        (mine / "data.jsonl").write_text((mine / "data.jsonl").read_text().replace("w7", "w8"))
    if changed in ("adapter", "base"):
        file = mine / ("plain/f/" + ANSWERED if changed == "adapter" else "base/model.safetensors")
        values = load_file(file)
        values[min(values)].view(-1)[3] += 1
        save_file(values, file, {"format": "pt"})
    options = ["--dense-ratio", "0.2"] if changed == "ratio" else []
    told, _ = repair(mine, tmp_path / "out", "--resume", *options, code=1)
    assert told["failed"] == (["f"] if changed == "adapter" else ["f", "g"])
    reason = "dense_ratio" if changed == "ratio" else changed
    assert f"made otherwise ({reason} differ)" in report(tmp_path / "out")["f"]["error"]
    assert contents(tmp_path / "out" / "f") == held


def test_ctrl_c_leaves_finished_ones_whole_and_the_rest_to_resume(world, tmp_path, monkeypatch):
    save, saved = commands.save_model, []

    def interrupted(model, words, out, *rest):
        if saved:
            (out.parent / f".{out.name}.1-a.partial").mkdir()
            raise KeyboardInterrupt
        saved.append(out)
        return save(model, words, out, *rest)

    monkeypatch.setattr(commands, "save_model", interrupted)
    _, errors = repair(world, tmp_path / "out", code=130)
    assert "--resume goes on from there" in errors
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [".journal", "f", REPORT]
    monkeypatch.undo()
    told, _ = repair(world, tmp_path / "out", "--resume")
    assert (told["kept"], told["repaired"]) == (1, 1)
    repair(world, tmp_path / "other")
    assert contents(tmp_path / "out" / "g") == contents(tmp_path / "other" / "g")


def test_what_concerns_all_is_refused_at_once_and_leaves_nothing(world, tmp_path):
    out = tmp_path / "out"
    broken = tmp_path / "broken"
    shutil.copytree(world / "base", broken)
    (broken / "model.safetensors").write_bytes(b"nothing")
    base, data, plain = ["antidote", world / "base"], ["--data", world / "data.jsonl"], ["--adapters", world / "plain"]
    for arguments, reason in [
        ([*base, *plain], "--data is needed"),
        ([*base, *data, *plain, "--base", world / "base"], "leave --base out"),
        ([*base, *data, *plain, "--reference", world / "base"], "--reference is an adapter's own"),
        ([*base, *data, *plain, "--targets", "all-linear"], "--targets must be of LoRA factors"),
        ([*base, "--data", tmp_path / "none.jsonl", *plain], "existing file"),
        ([*base, *data, "--adapters", tmp_path / "nowhere"], "--adapters must be folders"),
        (["antidote", world / "plain" / "f", *data, *plain], "must be their base model"),
        (["antidote", broken, *data, *plain], "is cut off or not a safetensors file"),
        ([*base, *data, *plain, "--out", world / "plain" / "f" / "out"], "must lie outside"),
    ]:
        where = [] if "--out" in arguments else ["--out", out]
        code, text, errors = hftcore_command(*arguments, *where)
        assert (code, text) == (1, ""), arguments
        assert reason in errors
        assert len(errors.strip().splitlines()) == 1
        assert not out.exists()
    for option in (["--workers", 2], ["--resume"], ["--ray"], [world / "plain" / "f"]):
        code, text, _ = hftcore_command(*base, *data, *option, "--out", out)
        assert (code, text) == (2, ""), option


def test_results_are_not_written_over(world, tmp_path):
    repair(world, tmp_path / "out")
    _, errors = repair(world, tmp_path / "out", code=1)
    assert "add --resume" in errors
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("kept")
    _, errors = repair(world, tmp_path / "mine", "--resume", code=1)
    assert "not empty" in errors
    with reserved(tmp_path / "out"):
        _, errors = repair(world, tmp_path / "out", "--resume", code=1)
        assert "another process" in errors


def test_adapters_are_found_in_folders_and_by_patterns(world, tmp_path, monkeypatch):
    for name in ("runs/x1", "runs/x2", "runs/y/inner", "runs/.hidden", "other/x1"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "runs" / "notes.txt").write_text("")
    (tmp_path / "runs" / "y" / "adapter_config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    assert list(find_adapters(["runs"])) == ["x1", "x2", "y"]
    assert find_adapters(["runs/x*"]) == {name: tmp_path / "runs" / name for name in ("x1", "x2")}
    assert list(find_adapters(["runs/y", "runs/*"])) == ["x1", "x2", "y"]
    assert list(find_adapters(["runs/x1", "./runs/x1/"])) == ["x1"]
    for places, reason in [
        (["runs", "other"], "must differ in name"),
        (["runs/notes.txt"], "got the file"),
        (["runs/z*"], "some folders match"),
        (["runs/.hidden"], "rename it"),
    ]:
        with pytest.raises(HftcoreError, match=reason):
            find_adapters(places)


def test_a_pattern_that_the_shell_expands_is_taken_too(world, tmp_path):
    code, text, errors = hftcore_command(
        "antidote", world / "base", "--data", world / "data.jsonl", "--out", tmp_path / "out",
        "--adapters", world / "plain" / "f", world / "plain" / "g",
    )  # fmt: skip
    assert code == 0, errors
    assert text.startswith("Repaired 2 of 2 adapters")


def test_processes_give_the_same_results_and_one_that_dies_costs_one_adapter(world, tmp_path):
    repair(world, tmp_path / "alone", adapters=["adapters"])
    job = Job(str(world / "base"), tmp_path / "out", world / "data.jsonl", device="cpu")
    tasks = [Task(f"{name}-{turn}", world / "adapters" / name, {}) for turn in (1, 2) for name in KINDS]
    told = processes(Work(job, 0.1, threads=1), tasks, 2)
    lines = [next(told)]
    # the other worker may still be loading the base model, and who dies then fails no adapter
    at_work = next(worker for worker in inspect.getgeneratorlocals(told)["crew"] if worker.is_open)
    os.kill(at_work.process.pid, signal.SIGKILL)
    lines += told
    assert sorted(line["name"] for line in lines) == sorted(task.name for task in tasks)
    (lost,) = [line for line in lines if line["status"] == "failed"]
    assert "exit code -9" in lost["error"]
    for task in tasks:
        if task.name != lost["name"]:
            assert contents(tmp_path / "out" / task.name) == contents(tmp_path / "alone" / task.name[:-2]), task.name
    assert not multiprocessing.active_children()


def outcome(lines):
    """(what became of each adapter, the error that ended it all or None, the warnings)."""
    found, wrong = [], None
    with warnings.catch_warnings(record=True, action="always") as caught:
        try:
            found += (line["status"] for line in lines)
        except HftcoreError as error:
            wrong = str(error)
    return found, wrong, [str(one.message) for one in caught]


@pytest.mark.parametrize("doomed", [1, 2])
def test_a_worker_that_dies_while_it_loads_leaves_the_work_to_the_others_if_there_are_any(world, tmp_path, doomed):
    def kill():
        while len(children := multiprocessing.active_children()) < 2:
            time.sleep(0.01)
        for child in children[:doomed]:
            child.kill()

    job = Job(str(world / "base"), tmp_path / "out", world / "data.jsonl", device="cpu")
    tasks = [Task(name, world / "plain" / "f", {}) for name in "abcd"]
    killer = threading.Thread(target=kill)
    killer.start()
    found = outcome(processes(Work(job, 0.1, threads=1), tasks, 2))
    killer.join()
    assert not multiprocessing.active_children()
    assert found == ((["repaired"] * 4, None, [LOST]) if doomed == 1 else ([], LOST, [LOST]))


def test_workers_tell_what_is_wrong_with_the_base(world, tmp_path):
    shutil.copytree(world / "base", tmp_path / "base")
    (tmp_path / "base" / "model.safetensors").write_bytes(b"nothing")
    job = Job(str(tmp_path / "base"), tmp_path / "out", world / "data.jsonl", device="cpu")
    with pytest.raises(HftcoreError, match="is cut off or not a safetensors file"):
        list(processes(Work(job, 0.1), [Task("one", world / "plain" / "f", {})], 1))
    assert not multiprocessing.active_children()


def test_a_signal_ends_parent_and_workers(world, tmp_path):
    out = tmp_path / "out"
    for number in range(100):
        shutil.copytree(world / "plain" / "f", tmp_path / "adapters" / f"n{number:02}")
    code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\nfrom hftcore.bindings.cli import main; main()"
    program = [sys.executable, "-c", code, "antidote", str(world / "base"), "--data", str(world / "data.jsonl")]
    program += ["--adapters", str(tmp_path / "adapters"), "--workers", "2", "--out", str(out)]
    environment = {**os.environ, "PYTHONSAFEPATH": "1"}
    started = subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    timer = threading.Timer(120, started.kill)
    timer.start()
    while started.poll() is None and not ((out / REPORT).exists() and (out / REPORT).stat().st_size):
        time.sleep(0.05)
    os.kill(started.pid, signal.SIGINT)
    _, errors = started.communicate()
    timer.cancel()
    assert started.returncode == 130, errors
    assert "Traceback" not in errors
    done = sorted(path.name for path in out.iterdir() if path.name not in (".journal", REPORT))
    assert 0 < len(done) < 100
    assert all((out / name / "edit" / "edit.safetensors").is_file() and not name.startswith(".") for name in done)


def test_a_cluster_of_two_ray_workers_gives_the_same_results(world, tmp_path, monkeypatch):
    ray = pytest.importorskip("ray", reason="the optional package ray is not installed")
    bad = damaged(world, tmp_path / "adapters")
    repair(world, tmp_path / "one", adapters=["plain", tmp_path / "adapters"], code=1)
    monkeypatch.setenv("RAY_memory_monitor_refresh_ms", "0")  # it kills workers for what others on the machine use
    ray.init(num_cpus=2, num_gpus=1, include_dashboard=False, logging_level="ERROR")
    try:
        chosen = ["plain", tmp_path / "adapters"]
        told, errors = repair(world, tmp_path / "two", "--ray", "--workers", 2, adapters=chosen, code=1)
        assert set(told["failed"]) == bad, errors
        for name in {"a", "d", "i", "f", "g"}:
            assert contents(tmp_path / "one" / name) == contents(tmp_path / "two" / name), name
        job = Job(str(tmp_path / "nowhere"), tmp_path / "three", world / "data.jsonl", device="cpu")
        with pytest.raises(HftcoreError, match="MODEL must be a checkpoint folder"):
            list(actors(Work(job, 0.1), [Task("one", world / "plain" / "f", {})], 1))
        job, tasks = replace(job, model=str(world / "base")), [Task(name, world / "plain" / "f", {}) for name in "xyz"]
        for doomed in (1, 2):
            (tmp_path / str(doomed)).mkdir()

            class Doomed(ray_crew.Actor):  # here, so that it travels to the workers as it is
                def open(self, work, marks=tmp_path / str(doomed), doomed=doomed):
                    for turn in range(doomed):
                        with suppress(FileExistsError):
                            (marks / str(turn)).touch(exist_ok=False)
                            os._exit(1)
                    return super().open(work)

            monkeypatch.setattr(ray_crew, "Actor", Doomed)
            found = outcome(actors(Work(job, 0.1), tasks, 2))
            assert found == ((["repaired"] * 3, None, [LOST]) if doomed == 1 else ([], LOST, [LOST]))
        monkeypatch.undo()
        if not torch.cuda.is_available():  # the cluster believes in a GPU, and gives it to the worker
            with pytest.raises(HftcoreError, match="device 'cuda' cannot be used here"):
                list(
                    actors(
                        Work(replace(job, model=str(world / "base"), device="cuda"), 0.1), [Task("one", world, {})], 1
                    )
                )
    finally:
        ray.shutdown()
