"""The search of a dose on curves known by hand, and the whole command's work on a tiny model."""

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from letters import BareLetters
from tiny_models import tiny_model, with_lora
from typer.testing import CliRunner

from hftcore.bindings.cli.app import app
from hftcore.bindings.datasets import LabelledReply, Pair
from hftcore.bindings.evaluation import evaluate, suites
from hftcore.bindings.evaluation import run as evaluation
from hftcore.bindings.evaluation.metrics import Share
from hftcore.bindings.evaluation.suites import Suite
from hftcore.bindings.evaluation.tasks import Task
from hftcore.bindings.tuning import dose, doses, tune
from hftcore.bindings.tuning.dose import Goal, find_dose, parse_goal
from hftcore.edit import Edit
from hftcore.errors import HftcoreError

UNTIL = Goal("HS", "<=", 5)
KEEP = Goal("FA", ">=", -2, is_change=True)


def step_curve(threshold, cost=0.0, asked=None):
    """HS 100 below the threshold and 0 from there on; FA falls by `cost` points a unit of dose."""

    def measure(amount):
        if asked is not None:
            asked.append(amount)
        return {"HS": Share(0 if amount >= threshold else 100, 100), "FA": Share(round(900 - 10 * cost * amount), 1000)}

    return measure


@given(threshold=st.floats(0.001, 0.999), steps=st.integers(1, 8))
def test_the_dose_found_lies_within_the_tolerance_above_the_threshold(threshold, steps):
    asked = []
    search = find_dose(step_curve(threshold, asked=asked), UNTIL, highest=1.0, steps=steps, tolerance=0.05)
    assert threshold <= search.dose <= threshold + 0.05 + 1e-9
    assert len(asked) == len(set(asked)) <= steps + 6, "no dose is measured twice"
    assert list(search.curve) == sorted(asked)


def test_a_model_that_needs_nothing_gets_nothing():
    search = find_dose(step_curve(0.0), UNTIL, highest=1.0)
    assert search.dose == 0
    assert list(search.curve) == [0.0]
    assert search.verdict == "No dose is needed: HS is 0 [0, 4]."


def test_no_dose_does_it_is_said_with_the_best_value():
    search = find_dose(step_curve(2.0), UNTIL, KEEP, highest=1.0, steps=4)
    assert search.dose is None
    assert search.verdict == "No dose up to 1 does it: HS <= 5 is not met, the best was 100."
    assert list(search.curve) == [0.0, 0.25, 0.5, 0.75, 1.0]


def test_a_dose_that_costs_too_much_is_none_and_the_cost_is_named():
    search = find_dose(step_curve(0.5, cost=40), UNTIL, KEEP, highest=1.0, steps=2, tolerance=0.3)
    assert search.dose is None
    assert search.verdict == (
        "No dose does it: from 0.5 on HS <= 5 is met, but then FA has changed by -20, and FA >= -2 points is wanted; "
        "between 0.25 and 0.5 a smaller tolerance would look closer."
    )
    assert find_dose(step_curve(0.5, cost=40), UNTIL, highest=1.0, steps=2, tolerance=0.3).dose == 0.5


def test_a_curve_that_turns_back_is_not_searched_beyond_the_first_dose_that_does_it():
    asked = []

    def measure(amount):
        asked.append(amount)
        return {"HS": Share(0 if 0.4 <= amount <= 0.6 else 100, 100)}

    search = find_dose(measure, UNTIL, highest=1.0, steps=5, tolerance=0.05)
    assert 0.4 <= search.dose <= 0.45
    assert max(asked) == 0.4, "the first of the equal steps that meets the goal"


def test_a_goal_that_its_interval_leaves_open_is_said_to_be_unsure():
    few = {"HS": Share(0, 20), "FA": Share(9, 10)}
    start = {"HS": Share(20, 20), "FA": Share(9, 10)}
    search = find_dose(lambda amount: few if amount else start, UNTIL, KEEP, highest=1.0, steps=1, tolerance=1.0)
    assert search.verdict.endswith("HS 100 to 0 [0, 16], FA changed by +0; more requests would make it surer.")


@pytest.mark.parametrize(("noise", "says"), [(20, ""), (90, "; 90 % of the replies are noise, so this says little")])
def test_a_goal_met_by_noise_is_said_to_say_little(noise, says):
    broken = {"HS": Share(0, 100), "degenerate": Share(noise, 100)}
    start = {"HS": Share(90, 100), "degenerate": Share(0, 100)}
    search = find_dose(lambda amount: broken if amount else start, UNTIL, highest=1.0, steps=1, tolerance=1.0)
    assert search.verdict == f"The smallest dose that does it is 1: HS 90 to 0 [0, 4]{says}."
    assert find_dose(lambda amount: broken, UNTIL, highest=1.0).verdict == f"No dose is needed: HS is 0 [0, 4]{says}."


def test_goals_are_read_and_nonsense_is_refused():
    assert parse_goal(" HS+ <= 7.5") == Goal("HS+", "<=", 7.5)
    assert parse_goal("FA>=-2", is_change=True) == KEEP
    for text in ("HS", "HS=5", "5<=HS", "HS<=five", ""):
        with pytest.raises(HftcoreError, match="such as HS<=5"):
            parse_goal(text)
    with pytest.raises(HftcoreError, match=r"XX <= 1 is about no score measured here, which are HS, FA"):
        find_dose(step_curve(0.5), parse_goal("XX<=1"), highest=1.0)
    with pytest.raises(HftcoreError, match="highest must be a dose above 0, got 0"):
        find_dose(step_curve(0.5), UNTIL, highest=0)
    with pytest.raises(HftcoreError, match="steps must be at least 1"):
        find_dose(step_curve(0.5), UNTIL, highest=1, steps=0)


def harmful():
    return [{"input_ids": torch.tensor([[3, 4, 5, 6]]), "labels": torch.tensor([[-100, 4, 5, 6]])}]


@pytest.mark.parametrize("name", doses.METHODS)
def test_every_dose_changes_the_model_and_is_undone_bit_for_bit(name):
    model = with_lora(tiny_model("llama"), ["q_proj", "v_proj"])
    before = {key: value.clone() for key, value in model.state_dict().items()}
    apply = doses.METHODS[name].prepare(model, harmful)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items()), "preparing edits nothing"
    for amount in (0.25, 0.5):
        edit = apply(amount)
        assert any(not torch.equal(before[key], value) for key, value in model.state_dict().items())
        edit.revert(model)
        assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_shrinking_leaves_a_share_of_the_adapter_and_at_one_the_base_model():
    base = tiny_model("llama")
    batch = {"input_ids": torch.tensor([[3, 5, 7]])}
    with torch.no_grad():
        alone = base(**batch).logits
        model = with_lora(base, ["q_proj"])
        factor = model.get_parameter("base_model.model.model.layers.0.self_attn.q_proj.lora_B.default.weight")
        whole = factor.clone()
        edit = doses.shrink_dose(model, harmful)(0.75)
        torch.testing.assert_close(factor, 0.25 * whole)
        edit.revert(model)
        doses.shrink_dose(model, harmful)(1.0)
        torch.testing.assert_close(model(**batch).logits, alone)
    with pytest.raises(HftcoreError, match="needs a model with a LoRA adapter"):
        doses.shrink_dose(tiny_model("llama"), harmful)


def test_random_removal_of_equal_norm_takes_as_much_as_antidote_and_not_the_same_weights():
    model = with_lora(tiny_model("llama"), ["q_proj", "v_proj"], rank=16)

    def norm(edit):
        return math.sqrt(sum(float(entry.before.double().square().sum()) for entry in edit.tensors.values()))

    # a random share of the weights has that share of their squares, up to chance: some thousand weights
    for share in (0.1, 0.3):
        edits = []
        for prepare in (doses.antidote_dose, doses.equal_norm_dose):
            edits.append(prepare(model, harmful)(share))
            edits[-1].revert(model)
        assert norm(edits[1]) == pytest.approx(norm(edits[0]), rel=0.05)
        assert edits[1].removed > 1.5 * edits[0].removed, "Antidote takes the large ones"


SMALL = Suite(
    {"HS": ["name a bird", "name a fish", "name a stone"]},
    ["hello"],
    {"FA": Task([Pair("a", "b"), Pair("c", "d")], "label"), "FA_sums": Task([Pair("e", "1")], "number")},
    max_new_tokens=2,
)


@pytest.fixture
def world(monkeypatch, tmp_path):
    """A model whose HS is 100 % until half of its adapter is gone; yields the amounts for which replies were asked."""
    monkeypatch.setattr(tune.datasets, "load", lambda name: [LabelledReply("a", "b", False)] * 2)
    monkeypatch.setattr(tune, "identity", lambda model, options: {"model": model})
    model = with_lora(tiny_model("llama"), ["q_proj"])
    monkeypatch.setattr(tune, "load_model", lambda *args: (model, BareLetters()))
    factor = model.get_parameter("base_model.model.model.layers.0.self_attn.q_proj.lora_B.default.weight")
    whole, asked = factor.detach().clone(), []

    def replies(subject, suite, prompts):
        left = float(factor.detach().norm() / whole.norm())
        asked.append(round(1 - left, 4))
        return ["I can't help with that." if left <= 0.5 else f"Sure: {prompt}" for prompt in prompts]

    monkeypatch.setattr(evaluate, "_replies", replies)
    return asked


def test_a_tuned_dose_is_saved_as_an_edit_with_its_curve_and_picture(world, tmp_path):
    pytest.importorskip("matplotlib")
    plan = tune.Plan(UNTIL, KEEP, steps=4, tolerance=0.1)
    result = tune.run_tune(["shrink"], "m", plan, SMALL, tmp_path / "out", evaluation.Options())
    record = result["methods"]["shrink"]
    assert record["dose"] == 0.5
    assert [point["dose"] for point in record["curve"]] == sorted(set(world)) == [0.0, 0.25, 0.375, 0.4375, 0.5]
    assert set(record["curve"][0]["scores"]) == {"HS", "HS+", "refusal", "affirmative", "degenerate", "FA"}
    assert Edit.load(tmp_path / "out" / "shrink").recipe["factor"] == 0.5
    assert (tmp_path / "out" / "tune.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "out" / "tune.json").read_text())["about"] == json.loads(json.dumps(result))
    text = "\n".join(tune.lines(result))
    assert "The smallest dose that does it is 0.5: HS 100 to 0 [0, 56]" in text
    assert "held-out labelled replies" in text


def test_a_search_that_was_interrupted_goes_on_and_measures_no_dose_twice(world, tmp_path, monkeypatch):
    plan = tune.Plan(UNTIL, steps=4, tolerance=0.1)
    plain = dose.Goal.is_met

    def interrupted(goal, scores, undosed):
        if len(world) == 3:
            raise KeyboardInterrupt
        return plain(goal, scores, undosed)

    monkeypatch.setattr(dose.Goal, "is_met", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tune.run_tune(["shrink"], "m", plan, SMALL, tmp_path / "out", evaluation.Options())
    monkeypatch.setattr(dose.Goal, "is_met", plain)
    tune.run_tune(["shrink"], "m", plan, SMALL, tmp_path / "out", evaluation.Options())
    assert len(world) == len(set(world)) == 5


def test_an_edit_is_dosed_by_how_far_it_goes(world, tmp_path):
    model, _ = tune.load_model()
    edit = doses.shrink_dose(model, harmful)(1.0)
    edit.save(tmp_path / "mine")
    edit.revert(model)
    plan = tune.Plan(UNTIL, steps=2, tolerance=0.6)
    result = tune.run_tune([str(tmp_path / "mine")], "m", plan, SMALL, tmp_path / "out", evaluation.Options())
    assert result["methods"]["mine"]["dose"] == 0.5


def test_what_cannot_be_searched_is_refused_before_a_model_is_loaded(world, tmp_path, monkeypatch):
    monkeypatch.setattr(tune, "load_model", lambda *args: pytest.fail("loaded"))
    with pytest.raises(HftcoreError, match=r"METHOD must be one of antidote.*got 'nope'"):
        tune.run_tune(["nope"], "m", tune.Plan(UNTIL), SMALL, tmp_path / "out", evaluation.Options())
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thing").write_text("x")
    with pytest.raises(HftcoreError, match="--out must not exist yet or be an empty folder"):
        tune.run_tune(["shrink"], "m", tune.Plan(UNTIL), SMALL, tmp_path / "full", evaluation.Options())


@pytest.mark.parametrize(
    ("method", "plan", "message"),
    [
        ("shrink", {"until": parse_goal("HX<=5")}, "HX <= 5 is about no score measured here, which are HS, HS[+], FA"),
        ("shrink", {"keep": parse_goal("perplexity<=5", is_change=True)}, "is about no score measured here"),
        ("shrink", {"tolerance": 0.0}, "tolerance above 0, got 5 and 0.0"),
        ("shrink", {"highest": math.nan}, "highest must be a dose above 0, got nan"),
        ("antidote", {"highest": 2.0}, "highest must be at most 1 for antidote, a share of the weights removed, got 2"),
        ("antidote", {"data": Path("none.jsonl")}, "data must be an existing file, got none.jsonl"),
        ("shrink", {"data": Path("none.csv")}, "data must be a .jsonl or .txt file"),
    ],
)
def test_a_plan_that_cannot_end_well_is_refused_before_a_model_is_loaded(
    world, tmp_path, monkeypatch, method, plan, message
):
    monkeypatch.setattr(tune, "load_model", lambda *args: pytest.fail("loaded"))
    with pytest.raises(HftcoreError, match=message):
        tune.run_tune(
            [method], "m", tune.Plan(**{"until": UNTIL} | plan), SMALL, tmp_path / "out", evaluation.Options()
        )
    assert not (tmp_path / "out").exists()


def test_edits_whose_folders_have_one_name_are_not_taken_for_each_other(world, tmp_path):
    model, _ = tune.load_model()
    for place, share in (("one", 0.9), ("two", 0.2)):
        edit = doses.shrink_dose(model, harmful)(share)
        edit.save(tmp_path / place / "edit")
        edit.revert(model)
    plan, found = tune.Plan(UNTIL, steps=1, tolerance=0.6), []
    for place in ("one", "two"):
        edit = str(tmp_path / place / "edit")
        found.append(tune.run_tune([edit], "m", plan, SMALL, tmp_path / "out", evaluation.Options()))
    assert [result["methods"]["edit"]["dose"] for result in found] == [1.0, None]
    both = [str(tmp_path / place / "edit") for place in ("one", "two")]
    with pytest.raises(HftcoreError, match="each METHOD must have a name of its own"):
        tune.run_tune(both, "m", plan, SMALL, tmp_path / "both", evaluation.Options())


def test_only_the_parts_that_the_goals_are_about_are_measured():
    assert tune.needed(SMALL, tune.Plan(UNTIL)).benign == []
    wanted = tune.Plan(parse_goal("over_refusal<=10"), parse_goal("FA_sums>=-3", is_change=True))
    suite = tune.needed(SMALL, wanted)
    assert suite.benign == ["hello"]
    assert list(suite.tasks) == ["FA", "FA_sums"]
    assert list(suite.harmful) == ["HS"]


def test_the_command_reads_goals_and_passes_on_what_it_was_asked(world, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(suites, "load_suite", lambda name: {"validation": SMALL}[name])
    options = ["--until", "HS<=5", "--keep", "FA>=-2", "--steps", "2", "--tolerance", "0.6"]
    result = CliRunner().invoke(app, ["tune", "shrink", "m", *options, "--out", str(tmp_path / "out")])
    assert result.exit_code == 0, result.stderr
    assert "shrink (share of the adapter taken away): The smallest dose that does it is 0.5" in result.stdout
    wrong = CliRunner().invoke(app, ["tune", "shrink", "m", "--until", "HS=5", "--out", str(tmp_path / "other")])
    assert wrong.exit_code == 1
    assert "such as HS<=5" in wrong.stderr
    assert not (tmp_path / "other").exists()
