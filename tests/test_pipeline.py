"""Stages one after the other from one file, through the command line, on a tiny model in a folder."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from test_cli import failed, succeeded, world  # noqa: F401
from tiny_models import one_thread  # noqa: F401

from hftcore.bindings.trainers.lisa import LisaTrainer
from hftcore.edit import Edit

pytestmark = pytest.mark.usefixtures("one_thread")

COMMON = {
    "train_data": "data.jsonl",
    "lora": {"r": 2},
    "per_device_train_batch_size": 3,
    "learning_rate": 0.05,
    "lr_scheduler_type": "constant",
}
LISA = COMMON | {
    "method": "lisa",
    "alignment_data": "data.jsonl",
    "align_steps": 2,
    "user_steps": 3,
    "warmup": 0.0,
    "max_steps": 7,
    "save_strategy": "steps",
    "save_steps": 1,
}
ANTIDOTE = {"method": "antidote", "data": "data.jsonl", "dense_ratio": 0.25}


@pytest.fixture
def pipeline(world, tmp_path):  # noqa: F811
    """A function that writes a pipeline of Vaccine, Lisa and Antidote and returns its path; changed stages by number."""

    def write(changes=None, **top):
        stages = [COMMON | {"method": "vaccine", "max_steps": 2}, LISA, ANTIDOTE]
        for number, change in (changes or {}).items():
            stages[number - 1] = stages[number - 1] | change
        (tmp_path / "data.jsonl").write_text((world / "data.jsonl").read_text())
        (tmp_path / "broken.jsonl").write_text('{"text": "w4"}\n{"text": ')
        path = tmp_path / "pipeline.yaml"
        path.write_text(yaml.safe_dump({"model": str(world / "model"), "stages": stages} | top))
        return path

    return write


def run(path, out):
    return json.loads(succeeded("train", "--config", path, "--out", out, "--device", "cpu", "--json"))


def weights(folder):
    return load_file(next(Path(folder).glob("*.safetensors")))


def same(left, right):
    left, right = weights(left), weights(right)
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_alignment_is_merged_fine_tuning_is_an_adapter_on_it_and_antidote_prunes_that(pipeline, tmp_path):
    found = run(pipeline(), tmp_path / "out")
    aligned, tuned, repaired = (Path(stage["out"]) for stage in found["stages"])
    assert found["result"] == str(repaired)
    assert [stage["was_there"] for stage in found["stages"]] == [False] * 3
    assert not (aligned / "adapter_config.json").exists()
    assert json.loads((tuned / "adapter_config.json").read_text())["base_model_name_or_path"] == str(aligned)
    edit = Edit.load(repaired / "edit")
    before, after = weights(tuned), weights(repaired)
    factors = [name for name in before if "lora_" in name]
    removed = sum(int(((before[name] != 0) & (after[name] == 0)).sum()) for name in factors)
    kept = sum(int((before[name] == after[name]).sum()) for name in factors)
    assert len(edit.tensors) == len(factors)
    assert 0 < removed == sum(before[name].numel() for name in factors) - kept


def test_what_is_done_is_not_done_again_and_a_change_repeats_what_follows_it(pipeline, tmp_path):
    first = run(pipeline(), tmp_path / "out")
    again = run(pipeline(), tmp_path / "out")
    assert [stage["was_there"] for stage in again["stages"]] == [True] * 3
    assert again["result"] == first["result"]
    third = run(pipeline({3: {"dense_ratio": 0.5}}), tmp_path / "out")
    assert [stage["was_there"] for stage in third["stages"]] == [True, True, False]
    assert not same(third["result"], first["result"])
    second = run(pipeline({2: {"rho": 0.5}}), tmp_path / "out")
    assert [stage["was_there"] for stage in second["stages"]] == [True, False, False]
    config = pipeline()
    data = tmp_path / "data.jsonl"
    data.write_text(data.read_text().replace("w7", "w9"))
    assert not any(stage["was_there"] for stage in run(config, tmp_path / "out")["stages"])


def test_killed_in_the_middle_of_a_lisa_turn_it_goes_on_and_ends_with_the_same_bits(pipeline, tmp_path, monkeypatch):
    straight = run(pipeline(), tmp_path / "straight")
    plain, seen = LisaTrainer.update, []

    def killed(self, batches):
        seen.append(self.state.global_step)
        if len(seen) == 5:
            raise RuntimeError("killed")
        return plain(self, batches)

    monkeypatch.setattr(LisaTrainer, "update", killed)
    message = failed("train", "--config", pipeline(), "--out", tmp_path / "out", "--device", "cpu")
    assert "killed" in message
    resumed = run(pipeline(), tmp_path / "out")
    # steps 2 to 4 are the user's turn: it stopped inside one, and went on from there
    assert seen == [0, 1, 2, 3, 4, 4, 5, 6]
    assert [stage["was_there"] for stage in resumed["stages"]] == [True, False, False]
    for left, right in zip(straight["stages"], resumed["stages"], strict=True):
        assert same(left["out"], right["out"])


def test_killed_while_it_wrote_a_checkpoint_it_goes_on_from_the_one_before(pipeline, tmp_path, monkeypatch):
    straight = run(pipeline(), tmp_path / "straight")
    plain = LisaTrainer._save_rng_state

    def killed(self, folder):
        if folder.endswith("checkpoint-3"):
            raise RuntimeError("killed")
        plain(self, folder)

    monkeypatch.setattr(LisaTrainer, "_save_rng_state", killed)
    assert "killed" in failed("train", "--config", pipeline(), "--out", tmp_path / "out", "--device", "cpu")
    monkeypatch.setattr(LisaTrainer, "_save_rng_state", plain)
    assert same(run(pipeline(), tmp_path / "out")["result"], straight["result"])


def test_a_stage_without_lora_trains_the_adapter_of_the_stage_before_on(pipeline, tmp_path):
    found = run(pipeline({2: {"lora": False}}), tmp_path / "out")
    aligned, tuned = (weights(stage["out"]) for stage in found["stages"][:2])
    assert aligned.keys() == tuned.keys()
    assert all("lora_" in name for name in aligned)


@pytest.mark.parametrize(
    ("changes", "top", "message"),
    [
        ({2: {"learning_rte": 1}}, {}, "stage 2: "),
        ({2: {"lora": {"rnk": 2}}}, {}, "stage 2: "),
        ({2: {"learning_rate": "fast"}}, {}, "learning_rate must be a number, got 'fast'"),
        ({2: {"eval_strategy": "epoch"}}, {}, "stage 2: eval_strategy must be no"),
        ({2: {"alignment_data": "broken.jsonl"}}, {}, "broken.jsonl, line 2: not valid JSON"),
        ({3: {"data": "broken.jsonl"}}, {}, "broken.jsonl, line 2: not valid JSON"),
        ({2: {"rho": -1}}, {}, "stage 2: rho must be a number in [0, inf), got -1"),
        ({3: {"data": "none.jsonl"}}, {}, "stage 3: "),
        ({3: {"ratio": 0.5}}, {}, "knows no key 'ratio'"),
        ({3: {"dense_ratio": 2}}, {}, "stage 3: dense_ratio must be a number in [0, 1], got 2"),
        ({3: {"score": "random"}}, {}, "stage 3: --score random looks at no activations"),
        ({}, {"stages": [ANTIDOTE, LISA]}, "stage 2 makes a new adapter on what antidote left"),
        ({1: {"method": "vacine"}}, {}, "stage 1 must have a method out of sft, "),
        ({}, {"stages": []}, "must hold model: FOLDER and stages: a list"),
        ({}, {"seed": 1}, "must hold model: FOLDER and stages: a list"),
    ],
)
def test_what_no_stage_could_do_is_refused_before_the_first(pipeline, tmp_path, changes, top, message):
    out = tmp_path / "out"
    assert message in failed("train", "--config", pipeline(changes, **top), "--out", out, "--device", "cpu")
    assert not out.exists()


def test_an_adapter_to_begin_with_is_refused_where_the_first_stage_makes_one(world, pipeline, tmp_path):  # noqa: F811
    config = pipeline(model=str(world / "adapter"))
    assert "stage 1 makes a new adapter" in failed("train", "--config", config, "--out", tmp_path / "out")


def test_a_pipeline_needs_no_resume_and_a_method_needs_a_model(pipeline, tmp_path):
    arguments = ("--config", pipeline(), "--out", tmp_path / "out")
    for wrong in (("train", *arguments, "--resume"), ("train", "lisa", *arguments)):
        with pytest.raises(AssertionError, match=r"leave --resume out|METHOD needs a MODEL"):
            succeeded(*wrong)
