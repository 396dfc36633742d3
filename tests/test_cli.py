"""The command line from end to end, on a tiny model in a folder."""

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
from importlib.metadata import entry_points

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import VOCABULARY, tiny_model, with_lora
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

import hftcore
from hftcore.bindings import models_io
from hftcore.bindings.checkpoints.manifest import MANIFEST
from hftcore.bindings.cli import program
from hftcore.bindings.cli.app import COMMANDS, app
from hftcore.bindings.data import load_samples, make_batches
from hftcore.bindings.models_io import load_model, save_model
from hftcore.bindings.progress import Track

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with `model`, an `edit` of it, `tuned`, adapters `adapter` and `aligned` of `model` and `foreign` of `tuned`, `data.jsonl`;
    tests leave it alone."""
    root = tmp_path_factory.mktemp("world")
    words = ["<pad>", "<unk>", "<eos>", *(f"w{index}" for index in range(3, VOCABULARY))]
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "unk_token": "<unk>", "eos_token": "<eos>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    for seed, name in enumerate(("model", "tuned")):
        tiny_model("llama", seed=seed).save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    for seed, (name, base) in enumerate((("adapter", "../model"), ("aligned", "../model"), ("foreign", "../tuned"))):
        with_lora(tiny_model("llama", seed=seed), ["q_proj", "v_proj"]).save_pretrained(root / name)
        config = json.loads((root / name / "adapter_config.json").read_text())
        config["base_model_name_or_path"] = base
        (root / name / "adapter_config.json").write_text(json.dumps(config))
    pruned = tiny_model("llama")
    hftcore.antidote(pruned, None, score="random").save(root / "edit")
    rows = [{"prompt": f"w{index} w4", "completion": f"w{index + 9} w7 w8"} for index in range(3, 12)]
    (root / "data.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return root


def hftcore_command(*args):
    """Run a command in this process; (exit code, stdout, stderr)."""
    result = CliRunner().invoke(app, [str(arg) for arg in args])
    return result.exit_code, result.stdout, result.stderr


def succeeded(*args):
    code, out, err = hftcore_command(*args)
    assert code == 0, err
    return out


def failed(*args, code=1):
    """The one line on stderr of a command that fails."""
    got, out, err = hftcore_command(*args)
    assert (got, out) == (code, ""), err
    lines = err.strip().splitlines()
    assert len(lines) == 1
    return lines[0]


def digests(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def in_process(program, *args):
    """Run the real program in a process of its own, after `program`'s statements."""
    environment = {**os.environ, "PYTHONSAFEPATH": "1"}
    environment.pop("TRITON_INTERPRET", None)
    code = f"import sys; sys.argv[0] = 'hftcore'\n{program}\nfrom hftcore.bindings.cli import main; main()"
    command = [sys.executable, "-c", code, *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)


def own_lines(text):
    """The lines on stderr but for the notice that the native backend is not built, which depends on the machine."""
    return [line for line in text.splitlines() if not line.startswith("hftcore runs on the torch backend")]


ENDING = """
import atexit, os, sys, threading
from hftcore.bindings import cli

class Held:
    def __del__(self, write=os.write):
        write(1, b"taken apart ")

def main():
    sys.held = Held()
    atexit.register(print, "handler", end=" ")
    threading.Thread(target=lambda: (threading.main_thread().join(), print("thread", end=" "))).start()
    END

cli.main = main
cli.program()
"""


def ended(end, out):
    """A program whose main part ends with this statement."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    command = [sys.executable, "-c", ENDING.replace("END", end)]
    return subprocess.run(
        command, stdout=out, stderr=subprocess.PIPE, env=environment, text=True, timeout=120, check=False
    )


@pytest.mark.parametrize(
    ("end", "code", "out"),
    [
        ("sys.exit(0)", 0, "thread handler "),
        ("sys.exit(143)", 143, "thread handler "),
        ("sys.stdout = None; sys.exit(0)", 0, ""),
        ("sys.exit('a word')", 1, "thread handler taken apart "),
        ("raise ValueError('a word')", 1, "thread handler taken apart "),
        ("raise KeyboardInterrupt('a word')", -signal.SIGINT, "thread handler taken apart "),
    ],
)
def test_a_program_that_ends_leaves_its_objects_to_the_system_and_nothing_else(end, code, out):
    done = ended(end, subprocess.PIPE)
    assert (done.returncode, done.stdout) == (code, out)
    assert ("a word" in done.stderr) == ("a word" in end)


def test_a_program_tells_that_its_last_words_were_lost():
    reader, writer = os.pipe()
    os.close(reader)
    done = ended("sys.exit(0)", writer)
    os.close(writer)
    assert done.returncode == 120
    assert "Broken pipe" in done.stderr


def test_the_command_is_the_program():
    (command,) = entry_points(group="console_scripts", name="hftcore")
    assert command.load() is program


def test_wanda_writes_the_model_that_the_library_prunes(world, tmp_path):
    out = tmp_path / "out"
    text = succeeded("wanda", world / "model", "--data", world / "data.jsonl", "--sparsity", "50%", "--out", out)
    assert text.startswith("Removed ")
    assert text.count("\n") == 1

    model, tokenizer = load_model(world / "model", "cpu")
    energy = hftcore.calibrate(model, make_batches(load_samples(world / "data.jsonl"), tokenizer))
    hftcore.prune(model, energy, hftcore.Pattern("50%"))
    written = load_file(out / WEIGHTS)
    assert all(torch.equal(written[name], weight) for name, weight in model.state_dict().items())
    assert load_model(out, "cpu")[1]("w5")["input_ids"] == [5]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_edit_beside_the_model_leads_back(world, tmp_path):
    out, edit = tmp_path / "out", tmp_path / "out" / "edit"
    succeeded("wanda", world / "model", "--data", world / "data.jsonl", "--sparsity", "2:4", "--out", out)
    succeeded("revert", edit, out, "--out", tmp_path / "back")
    assert digests(tmp_path / "back")[WEIGHTS] == digests(world / "model")[WEIGHTS]
    succeeded("apply", edit, world / "model", "--out", tmp_path / "again")
    assert digests(tmp_path / "again")[WEIGHTS] == digests(out)[WEIGHTS]
    succeeded("revert", edit, tmp_path / "again", "--out", tmp_path / "original")
    assert digests(tmp_path / "original") == digests(world / "model")


@pytest.mark.parametrize(
    "command",
    [
        ("wanda", "model"),
        ("wanda", "model", "--sparsity", "2:4", "--dtype", "bfloat16"),
        ("antidote", "adapter"),
        ("antidote", "adapter", "--reference", "aligned"),
    ],
    ids=" ".join,
)
def test_what_is_written_from_memory_can_be_verified(world, tmp_path, command):
    name, *rest = command
    rest = [world / word if word in ("model", "adapter", "aligned") else word for word in rest]
    succeeded(name, *rest, "--data", world / "data.jsonl", "--out", tmp_path / "out")
    assert "is whole" in succeeded("verify", tmp_path / "out")
    weights = next((tmp_path / "out").glob("*model.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    code, out, _ = hftcore_command("verify", tmp_path / "out")
    assert (code, out.count("differs")) == (1, 1)


def test_antidote_repairs_an_adapter_and_leaves_an_adapter(world, tmp_path):
    out = tmp_path / "out"
    options = ["--data", world / "data.jsonl", "--dense-ratio", "0.25", "--device", "cpu", "--json"]
    result = json.loads(succeeded("antidote", world / "adapter", *options, "--out", out))
    assert result["tensors"] == 8
    assert result["out"] == str(out)
    assert result["recipe"]["dense_ratio"] == 0.25
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (world / "adapter", out))
    removed = sum(int(((after[name] == 0) & (before[name] != 0)).sum()) for name in before)
    assert removed == result["removed"] > 0
    assert not (out / WEIGHTS).exists()
    succeeded("revert", out / "edit", out, "--out", tmp_path / "back")
    assert (
        digests(tmp_path / "back")["adapter_model.safetensors"]
        == digests(world / "adapter")["adapter_model.safetensors"]
    )
    # the base model is found from there too, though the adapter named it relative to its own folder
    (tmp_path / "deeper").mkdir()
    out.rename(tmp_path / "deeper" / "out")
    assert load_model(tmp_path / "deeper" / "out", "cpu")[0].peft_config


def test_a_half_precision_adapter_stays_so_and_comes_back_byte_for_byte(world, tmp_path):
    """PEFT would widen it on loading, and its edit would fit no file."""
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    for file in (world / "adapter").iterdir():
        (adapter / file.name).write_bytes(file.read_bytes())
    weights = adapter / "adapter_model.safetensors"
    save_file({name: tensor.bfloat16() for name, tensor in load_file(weights).items()}, weights, {"format": "pt"})
    common = ["antidote", adapter, "--base", world / "model", "--data", world / "data.jsonl", "--device", "cpu"]
    succeeded(*common, "--edit-only", "--out", tmp_path / "edit")
    succeeded("apply", tmp_path / "edit", adapter, "--out", tmp_path / "applied")
    assert digests(tmp_path / "applied") != digests(adapter)
    succeeded("revert", tmp_path / "edit", tmp_path / "applied", "--out", tmp_path / "back")
    assert digests(tmp_path / "back") == digests(adapter)


def test_base_weights_do_not_fit_into_an_adapter_folder(world, tmp_path):
    options = ["--data", world / "data.jsonl", "--targets", "all-linear"]
    line = failed("wanda", world / "adapter", *options, "--out", tmp_path / "out")
    assert "base weights" in line
    succeeded("wanda", world / "adapter", *options, "--edit-only", "--out", tmp_path / "edit")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["edit"]


@pytest.fixture
def idle(monkeypatch):
    """No model is loaded and nothing is measured."""

    def work(*_, **__):
        raise AssertionError("work was done")

    monkeypatch.setattr("hftcore.bindings.jobs.load_model", work)


def test_what_cannot_end_well_is_refused_before_a_model_is_loaded(world, tmp_path, idle):
    (tmp_path / "empty").mkdir()
    model, adapter, data, out = world / "model", world / "adapter", ["--data", world / "data.jsonl"], tmp_path / "out"
    for args, message in [
        (["wanda", adapter, *data, "--out", out], "base weights"),
        (["antidote", adapter, *data, "--targets", "all-linear", "--out", out], "base weights"),
        (["calibrate", model, *data, "--out", tmp_path / "empty"], "got .*empty .a folder"),
        (["calibrate", model, *data, "--out", world / "data.jsonl" / "energy"], "folder that can be written"),
        (
            ["wanda", model, *data, "--score", "magnitude", "--out", out],
            "magnitude looks at no activations: leave --data",
        ),
        (["antidote", model, "--energy", out, "--score", "random", "--out", out], "leave --energy out"),
        (["wanda", model, "--energy", tmp_path / "empty", "--out", out], "must be an energy file, got a folder"),
        (["wanda", model, "--data", world / "adapter" / "README.md", "--out", out], "README.md"),
        (["antidote", adapter, *data, "--reference", model, "--edit-only", "--out", out], "leave --edit-only out"),
        (
            ["antidote", adapter, *data, "--reference", model, "--targets", "lora", "--out", out],
            "must be an adapter too",
        ),
        (["antidote", adapter, *data, "--reference", world / "foreign", "--out", out], "the same base model"),
    ]:
        assert re.search(message, failed(*args)), args
    assert not out.exists()


def test_what_only_the_model_tells_is_refused_before_calibration(world, tmp_path, monkeypatch):
    monkeypatch.setattr(hftcore, "calibrate", None)
    out = ["--data", world / "data.jsonl", "--out", tmp_path / "out"]
    line = failed("wanda", world / "adapter", "--targets", "q_proj.base_layer", *out)
    assert "base weights (base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight)" in line
    tiny_model("gpt2").save_pretrained(tmp_path / "other")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "other" / file).write_bytes((world / "model" / file).read_bytes())
    line = failed("wanda", world / "model", "--reference", tmp_path / "other", *out)
    assert "reference has no parameter 'model.layers.0.mlp.down_proj.weight'" in line


def merged_adapter(folder):
    return models_io.merged(load_model(folder, "cpu")[0])


def test_a_reference_merges_adapters_and_restores_merged_weights(world, tmp_path):
    options = ["--data", world / "data.jsonl", "--reference", world / "aligned", "--dense-ratio", 0.2]
    text = succeeded("antidote", world / "adapter", *options, "--out", tmp_path / "out")
    assert text.startswith("Merged the adapter first, as --reference compares whole weights; removed ")
    model, aligned = merged_adapter(world / "adapter"), merged_adapter(world / "aligned")
    tokenizer = load_model(world / "model", "cpu")[1]
    hftcore.antidote(model, make_batches(load_samples(world / "data.jsonl"), tokenizer), 0.2, reference=aligned)
    written = load_file(tmp_path / "out" / WEIGHTS)
    assert all(torch.equal(written[name], weight) for name, weight in model.state_dict().items())
    succeeded("revert", tmp_path / "out" / "edit", tmp_path / "out", "--out", tmp_path / "back")
    back, before = load_file(tmp_path / "back" / WEIGHTS), merged_adapter(world / "adapter").state_dict()
    assert all(torch.equal(back[name], weight) for name, weight in before.items())


def test_a_reference_that_is_not_there_is_named_by_its_option(world, tmp_path):
    for model in ("model", "adapter"):
        options = ["--data", world / "data.jsonl", "--reference", tmp_path / "none", "--out", tmp_path / "out"]
        assert "--reference must be a checkpoint folder" in failed("antidote", world / model, *options)


def test_a_full_model_and_an_adapter_can_be_each_others_reference(world, tmp_path):
    options = ["--data", world / "data.jsonl", "--json"]
    for index, (model, reference) in enumerate((("adapter", "model"), ("tuned", "adapter"))):
        args = ["antidote", world / model, "--reference", world / reference, *options, "--out", tmp_path / str(index)]
        assert json.loads(succeeded(*args))["merged"]
    # the same base model for both, whatever they name
    base = ["--base", world / "model", "--out", tmp_path / "2"]
    assert json.loads(succeeded("antidote", world / "adapter", "--reference", world / "foreign", *options, *base))[
        "merged"
    ]


def test_factors_are_compared_with_factors_where_the_targets_say_so(world, tmp_path):
    options = ["--data", world / "data.jsonl", "--reference", world / "aligned", "--targets", "lora", "--json"]
    result = json.loads(succeeded("antidote", world / "adapter", *options, "--out", tmp_path / "out"))
    assert not result["merged"]
    before, reference, after = (
        load_file(folder / "adapter_model.safetensors")
        for folder in (world / "adapter", world / "aligned", tmp_path / "out")
    )
    changed = {name: after[name] != before[name] for name in before}
    assert sum(int(mask.sum()) for mask in changed.values()) == result["removed"]
    assert all(torch.equal(after[name][mask], reference[name][mask]) for name, mask in changed.items())


def test_edit_only_writes_the_same_edit(world, tmp_path):
    common = [
        "wanda",
        world / "model",
        "--data",
        world / "data.jsonl",
        "--targets",
        "q_proj,up_proj",
        "--exclude",
        "layers.0.mlp.up_proj",
    ]
    succeeded(*common, "--out", tmp_path / "model")
    succeeded(*common, "--edit-only", "--out", tmp_path / "edit")
    assert digests(tmp_path / "edit") == digests(tmp_path / "model" / "edit")
    names = hftcore.Edit.load(tmp_path / "edit").tensors
    assert sorted(name.split("layers.")[1] for name in names) == [
        "0.self_attn.q_proj.weight",
        "1.mlp.up_proj.weight",
        "1.self_attn.q_proj.weight",
    ]


def test_calibrated_energies_can_be_used_later(world, tmp_path):
    energy = tmp_path / "energy.safetensors"
    common = ["--max-seq-length", 64, "--batch-size", 2, "--nsamples", 5]
    result = json.loads(
        succeeded("calibrate", world / "model", "--data", world / "data.jsonl", *common, "--out", energy, "--json")
    )
    assert result["samples"] == 5
    assert hftcore.Energy.load(energy).tokens == result["tokens"]
    succeeded("wanda", world / "model", "--energy", energy, "--edit-only", "--out", tmp_path / "a")
    succeeded("wanda", world / "model", "--data", world / "data.jsonl", *common, "--edit-only", "--out", tmp_path / "b")
    assert digests(tmp_path / "a") == digests(tmp_path / "b")
    assert "does not exist yet" in failed("calibrate", world / "model", "--data", world / "data.jsonl", "--out", energy)


def test_response_tokens_are_fewer_than_all(world, tmp_path):
    common = ["calibrate", world / "model", "--data", world / "data.jsonl", "--json"]
    total = json.loads(succeeded(*common, "--out", tmp_path / "all.safetensors"))["tokens"]
    response = json.loads(succeeded(*common, "--tokens", "response", "--out", tmp_path / "response.safetensors"))[
        "tokens"
    ]
    assert response == 9 * 4
    assert total > response


@pytest.mark.parametrize(
    ("flags", "recipe"),
    [
        (["--sparsity-type", "2:4", "--sparsity-ratio", "0.5"], "2:4 row lowest"),
        (["--sparsity-type", "unstructured", "--sparsity-ratio", "0.25"], "0.25 row lowest"),
        (["--sparsity", "10%", "--scope", "model", "--remove", "highest"], "0.1 model highest"),
        (["--sparsity", "25%", "--scope", "matrix", "--block", "8x16"], "0.25 matrix lowest 8x16"),
        (["--sequential"], "0.5 row lowest"),
        (["--score", "random", "--seed", "3"], "0.5 row lowest"),
    ],
)
def test_flags_become_the_pattern(world, tmp_path, flags, recipe):
    data = [] if "random" in flags else ["--data", world / "data.jsonl"]
    common = ["wanda", world / "model", *data, "--edit-only", "--json", "--out", tmp_path / "edit"]
    result = json.loads(succeeded(*common, *flags))
    assert result["recipe"]["pattern"] == recipe
    assert result["removed"] == hftcore.Edit.load(tmp_path / "edit").removed


def test_sequential_keeps_to_its_targets(world, tmp_path):
    common = ["wanda", world / "model", "--data", world / "data.jsonl", "--edit-only", "--json"]
    flags = ["--sequential", "--targets", "q_proj", "--exclude", "layers.0.self_attn.q_proj"]
    result = json.loads(succeeded(*common, *flags, "--out", tmp_path / "edit"))
    assert result["tensors"] == 1
    assert list(hftcore.Edit.load(tmp_path / "edit").tensors) == ["model.layers.1.self_attn.q_proj.weight"]


def test_baselines_need_no_data_and_a_seed_decides(world, tmp_path):
    for name, flags in {"a": ["--seed", 1], "b": ["--seed", 1], "c": ["--seed", 2]}.items():
        succeeded("wanda", world / "model", "--score", "random", *flags, "--edit-only", "--out", tmp_path / name)
    edits = {name: digests(tmp_path / name)["edit.safetensors"] for name in "abc"}
    assert edits["a"] == edits["b"] != edits["c"]
    succeeded("antidote", world / "adapter", "--score", "magnitude", "--edit-only", "--out", tmp_path / "d")


def test_a_reference_restores_its_weights(world, tmp_path):
    options = ["--data", world / "data.jsonl", "--reference", world / "model", "--dense-ratio", 0.2]
    succeeded("antidote", world / "tuned", *options, "--out", tmp_path / "out")
    before, reference, after = (
        load_file(folder / WEIGHTS) for folder in (world / "tuned", world / "model", tmp_path / "out")
    )
    for name in before:
        changed = after[name] != before[name]
        assert torch.equal(after[name][changed], reference[name][changed])
    assert changed.any() or any((after[name] != before[name]).any() for name in before)


def test_failures_are_one_line_that_names_the_argument(world, tmp_path):
    model, data, out = world / "model", world / "data.jsonl", tmp_path / "out"
    (tmp_path / "bad.jsonl").write_text('{"text": "w3"}\n{"text": 3}\n')
    (tmp_path / "bare").mkdir()
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    tiny_model("llama").save_pretrained(tmp_path / "mute")
    for args, message in [
        (["wanda", tmp_path / "absent", "--data", data, "--out", out], "MODEL must be a checkpoint folder"),
        (["wanda", "owner/absent", "--data", data, "--out", out], "the hub did not give it"),
        (["wanda", data, "--data", data, "--out", out], "which is a file"),
        (["wanda", tmp_path / "bare", "--data", data, "--out", out], "no tokenizer"),
        (["wanda", tmp_path / "mute", "--data", data, "--out", out], "no tokenizer"),
        (["wanda", model, "--out", out], "--data is needed"),
        (["wanda", model, "--data", data, "--energy", data, "--out", out], "give one"),
        (["wanda", model, "--data", tmp_path / "bad.jsonl", "--out", out], "bad.jsonl, line 2"),
        (["wanda", model, "--data", tmp_path / "absent.jsonl", "--out", out], "existing file"),
        (["wanda", model, "--data", data, "--out", tmp_path / "taken"], "--out must not exist yet"),
        (["wanda", model, "--data", data, "--out", model / "sub"], "--out must lie outside"),
        (["wanda", model, "--data", data, "--device", "toaster", "--out", out], "device 'toaster'"),
        (["wanda", model, "--data", data, "--base", model, "--out", out], "leave base out"),
        (["wanda", model, "--data", data, "--targets", "nothing_like_it", "--out", out], "nothing_like_it"),
        (["wanda", model, "--score", "random", "--sequential", "--out", out], "--sequential"),
        (["apply", tmp_path / "absent", model, "--out", out], "not an Edit"),
        (["apply", model, model, "--out", out], "not an Edit"),
    ]:
        assert message in failed(*args), args
    assert not out.exists()
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    "flags",
    [
        ["--sparsity", "150%"],
        ["--sparsity", "3:2"],
        ["--sparsity", "half"],
        ["--block", "16"],
        ["--scope", "column"],
        ["--batch-size", "0"],
        ["--sparsity-type", "2:4", "--sparsity", "30%"],
        ["--no-such-flag"],
    ],
)
def test_a_wrong_flag_is_a_usage_error(world, tmp_path, flags):
    code, out, _ = hftcore_command(
        "wanda", world / "model", "--data", world / "data.jsonl", "--out", tmp_path / "out", *flags
    )
    assert (code, out) == (2, "")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("ratio", ["1.5", "-0.1", "nan"])
def test_a_dense_ratio_that_is_no_share_is_told_with_what_was_got(world, tmp_path, ratio):
    code, out, err = hftcore_command("antidote", world / "adapter", f"--dense-ratio={ratio}", "--out", tmp_path / "out")
    assert (code, out) == (2, "")
    assert f"--dense-ratio must be a share in [0, 1], got {ratio}" in err


def test_an_adapter_needs_a_base_it_can_find(world, tmp_path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    for file in (world / "adapter").iterdir():
        (adapter / file.name).write_bytes(file.read_bytes())
    common = ["antidote", adapter, "--data", world / "data.jsonl"]
    message = failed(*common, "--out", tmp_path / "out")
    assert "base model must be a checkpoint folder" in message
    assert message.rstrip().endswith("adapter_config.json names it: say where it is with --base")
    succeeded(*common, "--base", world / "model", "--out", tmp_path / "out")
    (adapter / "adapter_config.json").write_text("{}")
    assert "adapter_config.json is damaged" in failed(*common, "--out", tmp_path / "out2")


def test_a_truncated_model_is_refused_in_one_line(world, tmp_path):
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in (world / "model").iterdir():
        (broken / file.name).write_bytes(file.read_bytes()[: 5000 if file.name == WEIGHTS else None])
    line = failed("wanda", broken, "--data", world / "data.jsonl", "--out", tmp_path / "out")
    assert "broken" in line


class _Breaking:
    """A model whose saving writes one file and then fails."""

    def __init__(self, error):
        self.error = error

    def save_pretrained(self, folder):
        (folder / WEIGHTS).write_bytes(b"half")
        raise self.error


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_a_broken_save_leaves_nothing(tmp_path, error):
    with pytest.raises(type(error)):
        save_model(_Breaking(error), None, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_gives_130(world, tmp_path, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(hftcore, "prune", interrupted)
    line = failed("wanda", world / "model", "--data", world / "data.jsonl", "--out", tmp_path / "out", code=130)
    assert "interrupted" in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_signal_while_saving_leaves_nothing(world, tmp_path, name, code):
    # a shell that started the tests in the background has them ignore Ctrl-C, and so their children
    program = "import os, signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
    program += f"os.fsync = lambda handle: os.kill(os.getpid(), signal.{name})"
    # no transformers in this one, so that it starts soon
    done = in_process(program, "apply", world / "edit", world / "model", "--out", tmp_path / "out")
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not hasattr(signal, "SIGXFSZ"), reason="no file size limits on this system")
def test_a_full_disk_leaves_nothing(world, tmp_path):
    program = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))"
    args = ["wanda", world / "model", "--score", "magnitude", "--out", tmp_path / "out"]
    done = in_process(program, *args)
    assert done.returncode == 1, done.stderr
    (line,) = own_lines(done.stderr)
    assert line.startswith("error: cannot write --out ")
    assert list(tmp_path.iterdir()) == []


def test_the_program_is_silent_in_a_pipe_but_for_its_answer(world, tmp_path):
    args = [
        "wanda",
        world / "model",
        "--data",
        world / "data.jsonl",
        "--json",
        "--edit-only",
        "--out",
        tmp_path / "out",
    ]
    done = in_process("", *args)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["sparsity"] == pytest.approx(0.5)
    assert own_lines(done.stderr) == []


def test_usage_errors_of_the_program_are_one_line_and_code_2():
    done = in_process("", "wanda")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


def test_the_program_tells_its_version():
    done = in_process("", "--version")
    assert (done.returncode, done.stdout.strip()) == (0, hftcore.__version__)


def test_the_command_line_itself_imports_nothing_heavy():
    code = (
        "import sys, hftcore; before = set(sys.modules); import hftcore.bindings.cli.app; "
        "new = set(sys.modules) - before; print([name for name in ('torch', 'transformers', 'triton', 'numpy') if name in new])"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"


def test_help_lists_the_commands_in_their_order():
    out = succeeded("--help")
    places = [out.index(f"\n  {command.__name__} ") for command in COMMANDS]
    assert places == sorted(places)


def test_a_saved_model_is_complete_and_refuses_what_is_there(world, tmp_path):
    model, tokenizer = load_model(world / "model", "cpu", "bfloat16")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert not model.training
    save_model(model, tokenizer, tmp_path / "out")
    with pytest.raises(hftcore.HftcoreError, match="must not exist yet"):
        save_model(model, tokenizer, tmp_path / "out")
    assert {"config.json", WEIGHTS, "tokenizer.json"} <= {path.name for path in (tmp_path / "out").iterdir()}
    with pytest.raises(hftcore.HftcoreError, match="dtype must be"):
        load_model(world / "model", dtype="int8")


def test_hub_files_are_never_pickles_or_code():
    assert not any(pattern.endswith((".bin", ".pt", ".py", "*")) for pattern in models_io._HUB_FILES)


def test_tracking_repeats_and_counts():
    track = Track([1, 2, 3], "numbers")
    assert [list(track), list(track), len(track)] == [[1, 2, 3], [1, 2, 3], 3]
    with pytest.raises(TypeError):
        len(Track(iter([1]), "numbers"))
