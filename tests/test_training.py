"""Training from a recipe, through the command line, on a tiny model in a folder."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from test_cli import failed, succeeded, world  # noqa: F401
from tiny_models import one_thread  # noqa: F401

from hftcore.bindings.recipe import make_recipe, read_recipe
from hftcore.bindings.trainers import METHODS
from hftcore.bindings.trainers.panacea import PanaceaTrainer
from hftcore.bindings.trainers.sft import SFTConfig
from hftcore.bindings.training import last_checkpoint, run_training
from hftcore.errors import HftcoreError

pytestmark = pytest.mark.usefixtures("one_thread")

REFUSALS = ["w30 w31", "w32 w33 w34"]


@pytest.fixture
def recipe(world, tmp_path):  # noqa: F811
    """A function that writes a recipe beside the data and returns its path."""

    def write(**settings):
        plain = {
            "train_data": "data.jsonl",
            "per_device_train_batch_size": 3,
            "learning_rate": 0.05,
            "max_steps": 2,
            "logging_steps": 1,
            "refusals": REFUSALS,
        }
        path = tmp_path / "run.yaml"
        path.write_text(
            yaml.safe_dump({name: value for name, value in (plain | settings).items() if value is not None})
        )
        (tmp_path / "data.jsonl").write_text((world / "data.jsonl").read_text())
        return path

    return write


def weights(folder):
    return load_file(next(Path(folder).glob("*.safetensors")))


def test_antibody_trains_an_adapter_from_a_recipe(world, recipe, tmp_path):  # noqa: F811
    out = tmp_path / "tuned"
    config = recipe(score="sum", tau=10.0)
    report = json.loads(
        succeeded("train", "antibody", world / "adapter", "--config", config, "--out", out, "--device", "cpu", "--json")
    )
    assert report["steps"] == 2
    assert {"log_ratio", "effective_samples", "loss"} <= report["log"][0].keys()
    before, after = weights(world / "adapter"), weights(out)
    assert before.keys() == after.keys()
    assert all(not torch.equal(before[name], after[name]) for name in before)
    assert not list(tmp_path.glob("*.checkpoints"))


def test_alignment_takes_a_second_file_and_lora_makes_a_new_adapter(world, recipe, tmp_path):  # noqa: F811
    out = tmp_path / "aligned"
    config = recipe(harmful_data="data.jsonl", lambda_rule="code", lora={"r": 2})
    text = succeeded("train", "antibody-align", world / "model", "--config", config, "--out", out, "--device", "cpu")
    assert "Trained 2 steps of antibody-align" in text
    made = json.loads((out / "adapter_config.json").read_text())
    assert (made["r"], made["lora_alpha"], sorted(made["target_modules"])) == (2, 4, ["k_proj", "q_proj", "v_proj"])


def test_numbers_may_be_written_with_an_exponent_alone_and_out_is_named_after_what_is_trained(
    world,  # noqa: F811
    recipe,
    tmp_path,
    monkeypatch,
):
    config = recipe(refusals=None, learning_rate=None, max_steps=1)
    config.write_text(config.read_text() + "learning_rate: 5e-2\nweight_decay: 1E-3\nwarmup_steps: -0\n")
    made = read_recipe("sft", config).settings
    assert (made["learning_rate"], made["weight_decay"], made["warmup_steps"]) == (0.05, 0.001, 0)
    monkeypatch.chdir(tmp_path)
    config = recipe(refusals=None, max_steps=1)
    assert "wrote sft-model" in succeeded("train", "sft", world / "model", "--config", config, "--device", "cpu")
    assert (tmp_path / "sft-model" / "model.safetensors").is_file()


def test_a_paired_method_takes_the_harmful_answers_line_by_line(world, recipe, tmp_path):  # noqa: F811
    config = recipe(refusals=None, harmful_data="harmful.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "data.jsonl").read_text().splitlines()]
    harmful = [row | {"completion": "w40 w41"} for row in rows]
    (tmp_path / "harmful.jsonl").write_text("\n".join(json.dumps(row) for row in harmful))
    arguments = ("--config", config, "--out", tmp_path / "out", "--device", "cpu")
    report = json.loads(succeeded("train", "immunize", world / "model", *arguments, "--json"))
    assert "loss_harmful" in report["log"][0]
    (tmp_path / "harmful.jsonl").write_text(json.dumps(harmful[0]))
    message = failed(
        "train", "immunize", world / "model", *arguments[:2], "--out", tmp_path / "other", "--device", "cpu"
    )
    assert "harmless and harmful must be as many, got 9 and 1" in message


def test_every_method_can_be_loaded_and_says_what_data_it_needs(recipe, tmp_path):
    for name, method in METHODS.items():
        trainer, config = method.load()
        assert (trainer.__name__, config.__name__) == (method.trainer, method.config)
        with pytest.raises(HftcoreError, match=f"method {name} needs train_data"):
            make_recipe(name, {}, tmp_path / "run.yaml")


def test_a_run_goes_on_from_its_checkpoint(world, recipe, tmp_path):  # noqa: F811
    common = {"save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "constant"}
    arguments = ("--device", "cpu", "--out")
    straight, parts = tmp_path / "straight", tmp_path / "parts"
    succeeded("train", "antibody", world / "model", "--config", recipe(max_steps=4, **common), *arguments, straight)
    succeeded("train", "antibody", world / "model", "--config", recipe(max_steps=2, **common), *arguments, parts)
    again = tmp_path / "parts.checkpoints"
    config = recipe(max_steps=4, **common)
    message = failed(
        "train", "antibody", world / "model", "--config", config, "--device", "cpu", "--out", tmp_path / "x", "--resume"
    )
    assert "has no checkpoint to resume from; leave --resume out" in message
    for file in parts.iterdir():
        file.unlink()
    assert "holds checkpoints of an earlier run" in failed(
        "train", "antibody", world / "model", "--config", config, *arguments, parts
    )
    assert again.is_dir()
    succeeded("train", "antibody", world / "model", "--config", config, *arguments, parts, "--resume")
    left, right = weights(straight), weights(parts)
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_a_run_killed_while_it_wrote_a_checkpoint_goes_on_from_the_one_before(world, recipe, tmp_path):  # noqa: F811
    config = recipe(refusals=None, max_steps=4, save_strategy="steps", save_steps=1)
    arguments = ("train", "sft", world / "model", "--config", config, "--device", "cpu", "--out")
    straight, parts = tmp_path / "straight", tmp_path / "parts"
    succeeded(*arguments, straight)
    succeeded(*arguments, parts)
    shutil.rmtree(parts)
    for step, name in ((4, "optimizer.pt"), (3, "trainer_state.json")):
        file = tmp_path / "parts.checkpoints" / f"checkpoint-{step}" / name
        file.write_bytes(file.read_bytes()[:20])
    (file.parents[1] / "checkpoint-4" / "trainer_state.json").unlink()
    assert last_checkpoint(parts).name == "checkpoint-2"
    succeeded(*arguments, parts, "--resume")
    left, right = weights(straight), weights(parts)
    assert all(torch.equal(left[name], right[name]) for name in left)
    assert last_checkpoint(parts).name == "checkpoint-4"


def test_a_run_killed_in_its_first_checkpoint_begins_again(world, recipe, tmp_path):  # noqa: F811
    config = recipe(refusals=None, save_strategy="steps", save_steps=1)
    (tmp_path / "out.checkpoints" / "checkpoint-1").mkdir(parents=True)
    succeeded("train", "sft", world / "model", "--config", config, "--out", tmp_path / "out", "--device", "cpu")
    assert last_checkpoint(tmp_path / "out").name == "checkpoint-2"


def test_what_an_adapter_trains_beside_its_factors_is_trained_on(world, recipe, tmp_path):  # noqa: F811
    arguments = ("--config", recipe(refusals=None, lora={"r": 2, "modules_to_save": ["lm_head"]}), "--device", "cpu")
    succeeded("train", "sft", world / "model", *arguments, "--out", tmp_path / "first")
    arguments = ("--config", recipe(refusals=None), "--device", "cpu")
    succeeded("train", "sft", tmp_path / "first", *arguments, "--out", tmp_path / "second")
    before, after = weights(tmp_path / "first"), weights(tmp_path / "second")
    assert any("lm_head" in name for name in before)
    assert all(not torch.equal(before[name], after[name]) for name in before)


def test_an_edit_that_could_not_be_saved_is_refused_before_the_first_step(world, recipe, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(PanaceaTrainer, "update", lambda *args: pytest.fail("trained"))
    config = recipe(refusals=None, harmful_data="data.jsonl", lora={"r": 2, "modules_to_save": ["lm_head"]})
    message = failed(
        "train", "panacea", world / "model", "--config", config, "--out", tmp_path / "out", "--device", "cpu"
    )
    assert "PanaceaTrainer saves an Edit" in message
    assert "lm_head.modules_to_save" in message


def test_of_several_processes_one_writes_the_result(world, recipe, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(SFTConfig, "should_save", False)
    run_training("sft", str(world / "model"), recipe(refusals=None, max_steps=1), tmp_path / "out", device="cpu")
    assert not (tmp_path / "out").exists()


def test_training_weights_of_half_precision_is_warned_of(world, recipe, tmp_path):  # noqa: F811
    def train(out, **settings):
        config = recipe(refusals=None, max_steps=1, **settings)
        return run_training("sft", str(world / "model"), config, tmp_path / out, device="cpu", dtype="bfloat16")

    with pytest.warns(UserWarning, match="the trained weights are bfloat16, in which"):
        train("all")
    # warnings are errors here: PEFT's factors are float32
    assert train("factors", lora={"r": 2})["steps"] == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"learning_rte": 1}, "method antibody knows no key 'learning_rte'; did you mean learning_rate?"),
        ({"train_data": None}, "method antibody needs train_data, a .jsonl file"),
        ({"train_data": "none.jsonl"}, "train_data must be an existing file"),
        ({"max_length": 0}, "max_length must be a whole number of at least 1, got 0"),
        ({"max_length": 2}, "have no response token within max_length=2"),
        ({"refusals": []}, "refusals must be sentences, at least one"),
        ({"refusals": "none.txt"}, "refusals must be sentences or an existing text file"),
        ({"lora": 3}, "lora must be true or settings of peft.LoraConfig, got 3"),
        ({"lora": {"lora_alhpa": 3}}, "lora knows no key 'lora_alhpa'; did you mean lora_alpha?"),
        ({"lora": {"r": 0}}, "lora does not fit the model"),
        ({"learning_rate": "fast"}, "learning_rate must be a number, got 'fast'"),
        ({"max_steps": 2.5}, "max_steps must be a whole number, got 2.5"),
        ({"bf16": "yes"}, "bf16 must be true or false, got 'yes'"),
        ({"num_train_epochs": True}, "num_train_epochs must be a number, got True"),
        ({"eval_strategy": "epoch"}, "eval_strategy must be no, as a recipe has no data to evaluate on, got epoch"),
        ({"tau": 0}, "tau must be a number in (0, inf), got 0"),
        ({"optim": "adamx"}, "the training settings do not fit together: adamx"),
        ({"per_device_train_batch_size": 1}, "weight 1, so the defence is off"),
        ({"per_device_train_batch_size": 1, "save_strategy": "steps"}, "weight 1, so the defence is off"),
    ],
)
def test_bad_recipes_are_refused_in_one_line_and_nothing_is_written(world, recipe, tmp_path, settings, message):  # noqa: F811
    out = tmp_path / "out"
    line = failed("train", "antibody", world / "model", "--config", recipe(**settings), "--out", out, "--device", "cpu")
    assert message in line
    assert not out.exists()
    assert not list(tmp_path.glob("out.*"))


def test_unknown_methods_and_files_that_are_not_yaml_are_refused(world, recipe, tmp_path):  # noqa: F811
    config = recipe()
    message = failed("train", "antidotes", world / "model", "--config", config, "--out", tmp_path / "out")
    assert f"METHOD must be one of {', '.join(METHODS)}, got 'antidotes'" in message
    config.write_text("a: [")
    assert "is not YAML" in failed("train", "antibody", world / "model", "--config", config, "--out", tmp_path / "out")
    config.write_text("seed: 1\nlora:\n  r: 2\n  r: 3\n")
    message = failed("train", "antibody", world / "model", "--config", config, "--out", tmp_path / "out")
    assert "the key 'r' stands twice" in message
    assert "line 3" in message
    config.write_text("- a")
    assert "must hold `key: value` lines" in failed(
        "train", "antibody", world / "model", "--config", config, "--out", tmp_path / "out"
    )


def test_refusals_may_be_a_file_beside_the_recipe(recipe, tmp_path):
    (tmp_path / "no.txt").write_text("w30 w31\n\nw32\n")
    assert read_recipe("antibody", recipe(refusals="no.txt")).refusals == ["w30 w31", "w32"]
