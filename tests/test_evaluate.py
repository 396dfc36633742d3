"""Scores, intervals, tasks, drift and resumable results, against hand counts and plain loops."""

import io
import json
import math
import random
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from letters import BareLetters
from tiny_models import tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedTokenizerFast
from typer.testing import CliRunner

from hftcore.bindings import datasets
from hftcore.bindings.cli.app import app
from hftcore.bindings.datasets import LabelledReply, Pair, Review, Snippet
from hftcore.bindings.demo import data as demo_data
from hftcore.bindings.evaluation import cells, drift, evaluate, metrics, suites, tasks
from hftcore.bindings.evaluation import run as evaluation
from hftcore.bindings.evaluation.metrics import Mean, Share, wilson
from hftcore.bindings.evaluation.model_judge import ModelJudge
from hftcore.bindings.evaluation.suites import Suite
from hftcore.bindings.evaluation.tasks import Task
from hftcore.bindings.models_io import save_model
from hftcore.errors import HftcoreError


def test_wilson_matches_hand_computed_values():
    assert wilson(0, 0) == (0.0, 1.0)
    low, high = wilson(5, 10)
    assert low == pytest.approx(0.2366, abs=1e-4)
    assert high == pytest.approx(0.7634, abs=1e-4)
    assert wilson(10, 10)[1] == pytest.approx(1.0)
    assert wilson(0, 10)[0] == pytest.approx(0.0)
    with pytest.raises(HftcoreError, match="count must be from 0 to total = 3, got 4"):
        wilson(4, 3)


def test_an_empty_share_is_unknown_not_zero():
    assert math.isnan(Share(0, 0).percent)
    assert Share(0, 0).to_dict()["percent"] is None
    assert Share(1, 4).to_dict()["percent"] == 25.0


@given(st.lists(st.floats(-100, 100), min_size=1, max_size=30))
def test_a_bootstrap_interval_lies_within_the_values_and_is_repeatable(values):
    mean = metrics.bootstrap_mean(values, resamples=50)
    assert min(values) - 1e-9 <= mean.low <= mean.high <= max(values) + 1e-9
    assert mean == metrics.bootstrap_mean(values, resamples=50)
    assert mean.value == pytest.approx(sum(values) / len(values), abs=1e-9)


def test_a_bootstrap_interval_has_the_width_of_the_normal_one():
    draw = random.Random(1)
    values = [draw.gauss(5, 2) for _ in range(400)]
    mean = metrics.bootstrap_mean(values)
    assert mean.high - mean.low == pytest.approx(2 * 1.96 * 2 / math.sqrt(400), rel=0.15)


def test_pairs_show_a_difference_that_the_items_alone_would_hide():
    ours = [float(i % 2) for i in range(40)]
    theirs = [0.0 if i < 8 else value for i, value in enumerate(ours)]
    change = metrics.bootstrap_difference(ours, theirs)
    assert change.value == pytest.approx(0.1)
    assert change.low > 0
    with pytest.raises(HftcoreError, match="the same items, got 2 and 1"):
        metrics.bootstrap_difference([1.0, 2.0], [1.0])


def test_scores_survive_json():
    for score in (Share(3, 7), Mean(1.5, 1.25, 1.75, 4)):
        assert metrics.from_dict(json.loads(json.dumps(score.to_dict()))) == score


REPLIES = {
    "Name a bird of prey.": "I can't help with that.",
    "Name a fish.": "Sure, here is a fish",
    "Name a stone.": "the the the the the",
    "Name a tree.": "Sure",
    "good": "I'm sorry",
    "also good": "I can't answer that.",
}


def test_evaluation_counts_each_score_on_its_own_prompts(monkeypatch):
    monkeypatch.setattr(
        evaluate, "generate", lambda model, tokenizer, prompts, **_: [REPLIES[prompt] for prompt in prompts]
    )
    logits = torch.eye(30)[[16, 14, 16]]
    monkeypatch.setattr(tasks, "next_token_logits", lambda model, tokenizer, prompts, **_: logits)
    task = Task([Pair("a", "positive"), Pair("b", "negative"), Pair("c", "negative")], "label")
    harmful = {"HS": list(REPLIES)[:3], "HS_other": ["Name a tree."]}
    suite = Suite(harmful, ["good", "also good"], {"FA": task})
    scores = evaluate.evaluate(None, BareLetters(), suite)
    assert {name: (share.count, share.total) for name, share in scores.items()} == {
        "HS": (1, 3),
        "HS+": (2, 3),
        "refusal": (1, 3),
        "affirmative": (1, 3),
        "degenerate": (1, 3),
        "HS_other": (1, 1),
        "HS_other+": (1, 1),
        "over_refusal": (2, 2),
        "FA": (2, 3),
    }


@pytest.mark.parametrize("reply", ["", "   ", "\u0416\u0418\u0412\u041e", "\u4f60\u597d", "\U0001f600" * 5])
def test_an_empty_or_foreign_reply_is_noise_and_serves_nothing(monkeypatch, reply):
    monkeypatch.setattr(evaluate, "generate", lambda model, tokenizer, prompts, **_: [reply] * len(prompts))
    scores = evaluate.evaluate(None, BareLetters(), Suite({"HS": ["Name a bird."]}, ["hello"]))
    assert (scores["HS"].count, scores["HS+"].count, scores["over_refusal"].count) == (0, 1, 0)


def test_an_unknown_suite_is_refused():
    with pytest.raises(HftcoreError, match=r"quick.*got 'slow'"):
        suites.load_suite("slow")


@pytest.fixture
def synthetic_data(monkeypatch):
    rows = {
        "advbench": [f"request {i}" for i in range(520)],
        "harmbench": [f"other request {i}" for i in range(200)],
        "alpaca": [Pair(f"question {i}", f"answer {i}") for i in range(900)],
        "reviews": [Review(f"film {i}", (i % 9) - 4.0) for i in range(3000)],
        "snippets": [Snippet(f"text {i}", datasets.KINDS[i % 4]) for i in range(2000)],
        "c4": [f"document {i}" for i in range(300)],
    }
    monkeypatch.setattr(demo_data, "load", rows.__getitem__)
    monkeypatch.setattr(suites, "load", rows.__getitem__)


def everything(suite):
    asked = [item for items in suite.harmful.values() for item in items] + suite.benign + suite.documents
    return set(asked) | {pair.prompt for task in suite.tasks.values() for pair in task.pairs}


def test_what_a_dose_is_chosen_on_is_in_no_other_suite(synthetic_data):
    validation = everything(suites.load_suite("validation"))
    for name in ("quick", "full", "demo"):
        assert not validation & everything(suites.load_suite(name)), name
    splits = demo_data.splits()
    trained = {*splits.align_harmful, *splits.attack_harmful, *splits.defend_harmful}
    assert not trained & everything(suites.load_suite("full"))


def test_a_suite_is_the_same_each_time_and_has_the_sizes_it_says(synthetic_data):
    suite = suites.load_suite("quick")
    assert suite == suites.load_suite("quick")
    assert [len(suite.harmful["HS"]), len(suite.benign)] == [60, 40]
    assert [len(task.pairs) for task in suite.tasks.values()] == [120, 80, 40]
    few = suite.limited(3)
    assert [len(few.harmful["HS"]), len(few.benign), len(few.tasks["FA_sums"].pairs)] == [3, 3, 3]


def test_sources_are_balanced_and_sums_are_right():
    snippets = [Snippet(f"text {i}", datasets.KINDS[min(i // 10, 3)]) for i in range(100)]
    answers = [pair.response for pair in tasks.source_task(snippets, 12).pairs]
    assert all(answers.count(kind) == 3 for kind in datasets.KINDS)
    with pytest.raises(HftcoreError, match="at most 40"):
        tasks.source_task(snippets, 41)
    pairs = tasks.arithmetic_task(60).pairs
    assert len({pair.prompt for pair in pairs}) == 60
    assert all(int(pair.response) > 0 for pair in pairs)
    left = next(pair for pair in pairs if "are left" in pair.prompt)
    first, second = (int(word) for word in left.prompt.replace(".", " ").split() if word.isdigit())
    assert int(left.response) == first - second


def test_the_checks_of_answers():
    assert tasks.last_number_is("3 and 4 make 7.", "7")
    assert not tasks.last_number_is("7 is 3 and 4", "7")
    assert tasks.last_number_is("-1,000.0", "-1000")
    assert not tasks.last_number_is("", "7")
    assert tasks.begins_with("  Paris, of course", "paris")
    assert not tasks.begins_with("Parisian", "paris")


def test_a_task_of_ones_own_is_read_with_its_context(tmp_path):
    rows = [{"prompt": "a", "completion": " b "}, {"instruction": "c", "input": "d", "output": "e"}]
    path = tmp_path / "task.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    assert tasks.task_from_file(path) == Task([Pair("a", "b"), Pair("c\n\nd", "e")], "start")
    path.write_text('{"text": "alone"}')
    with pytest.raises(HftcoreError, match="row 1: a task needs a question"):
        tasks.task_from_file(path)


@pytest.mark.parametrize("check", ["number", "start"])
def test_generated_answers_are_checked_one_by_one(monkeypatch, check):
    monkeypatch.setattr(tasks, "generate", lambda *args, **_: ["12", "It is 13", "14 or so"])
    task = Task([Pair("a", "12"), Pair("b", "13"), Pair("c", "14")], check)
    assert tasks.solved(None, BareLetters(), task) == [True, check == "number", True]


def test_window_losses_equal_the_losses_the_model_itself_gives():
    model, tokenizer = tiny_model("llama"), BareLetters()
    documents = ["a bird sings in the tree", "fish swim"]
    losses = drift.window_losses(model, tokenizer, documents, windows=3, length=10)
    ids = tokenizer("\n\n".join(documents))["input_ids"]
    with torch.no_grad():
        wanted = [
            float(model(input_ids=(t := torch.tensor([ids[i : i + 10]])), labels=t).loss) for i in range(0, 30, 10)
        ]
    assert losses == pytest.approx(wanted, abs=1e-5)
    with pytest.raises(HftcoreError, match="at least 512 tokens"):
        drift.window_losses(model, tokenizer, documents)


def test_embedding_drift_is_the_sum_and_the_mean_over_layers():
    model, reference, tokenizer = tiny_model("llama"), tiny_model("llama", seed=1), BareLetters()
    pairs = [Pair("a bird", "sings"), Pair("fish", "swim")]
    sums, means = drift.embedding_drift(model, reference, tokenizer, pairs)
    assert drift.embedding_drift(model, model, tokenizer, pairs) == ([0.0, 0.0], [0.0, 0.0])
    ids = torch.tensor([[*tokenizer("a birdsings")["input_ids"], tokenizer.eos_token_id]])
    moved = []
    for ours, theirs in zip(model.model.layers, reference.model.layers, strict=True):
        seen = []
        for one, layer in ((model, ours), (reference, theirs)):
            handle = layer.self_attn.register_forward_hook(lambda m, a, out, to=seen: to.append(out[0].detach()))
            with torch.no_grad():
                one(input_ids=ids)
            handle.remove()
        moved.append((seen[0] - seen[1])[0].double())
    assert sums[0] == pytest.approx(sum(float(m.norm()) for m in moved), rel=1e-5)
    assert means[0] == pytest.approx(sum(float(m.norm(dim=1).mean()) for m in moved) / len(moved), rel=1e-5)
    assert not any(module._forward_hooks for module in model.modules())
    with pytest.raises(HftcoreError, match="the same attention layers, got 2 and 0"):
        drift.embedding_drift(model, torch.nn.Linear(2, 2), tokenizer, pairs)


def test_drift_is_reported_as_published_and_averaged():
    scores = evaluate.scores({"HED": [1.0, 3.0], "HED_mean": [0.5, 0.5], "perplexity": [0.0, 0.0]})
    assert scores["HED"].value == 4.0
    assert scores["HED_mean"].value == 0.5
    assert scores["perplexity"].value == 1.0


def test_a_cell_is_computed_once_and_found_again_by_another_process(tmp_path):
    calls = []
    for _ in range(2):
        held = cells.Cells(tmp_path / "results.json", {"note": "a"})
        assert held.once({"x": 1}, lambda: calls.append(1) or [0.5]) == [0.5]
    assert calls == [1]
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


def test_a_run_killed_in_a_cell_keeps_the_cells_before_it(tmp_path):
    held = cells.Cells(tmp_path / "results.json")
    held.once({"x": 1}, lambda: 1)
    with pytest.raises(KeyboardInterrupt):
        held.once({"x": 2}, lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    assert {"x": 1} in cells.Cells(tmp_path / "results.json")
    assert {"x": 2} not in cells.Cells(tmp_path / "results.json")


@pytest.mark.parametrize("text", ["", "[]", '{"format": 9, "cells": {}}', '{"cells": 3}'])
def test_a_file_that_holds_something_else_is_refused_and_left_alone(tmp_path, text):
    path = tmp_path / "results.json"
    path.write_text(text)
    with pytest.raises(HftcoreError, match=r"choose another name"):
        cells.Cells(path)
    assert path.read_text() == text


WORDS = ["<pad>", "<unk>", "<eos>", *(f"w{i}" for i in range(3, 29))]


def word_tokenizer():
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "unk_token": "<unk>", "eos_token": "<eos>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


SMALL = Suite(
    {"HS": ["w3 w4", "w5 w6 w7"]},
    ["w8"],
    {"FA": Task([Pair("w9", "w10"), Pair("w11", "w12")], "label")},
    ["w3 w4 w5 " * 400] * 2,
    [Pair("w3", "w4")],
    max_new_tokens=3,
)


@pytest.fixture
def two_models(tmp_path, monkeypatch):
    labelled = [LabelledReply("Name a bird.", "I can't help with that.", True)] * 4
    monkeypatch.setattr(evaluation.datasets, "load", lambda name: labelled)
    for seed, name in enumerate(("one", "two")):
        save_model(tiny_model("llama", seed=seed), word_tokenizer(), tmp_path / name)
    return [str(tmp_path / "one"), str(tmp_path / "two")]


def test_an_interrupted_evaluation_is_resumed_and_not_repeated(two_models, tmp_path, monkeypatch):
    out, done = tmp_path / "results.json", []
    plain = evaluate._task

    def interrupted(subject, **options):
        if len(done) == 1:
            raise KeyboardInterrupt
        done.append(1)
        return plain(subject, **options)

    monkeypatch.setattr(evaluate, "_task", interrupted)
    options = evaluation.Options(reference=two_models[0], dtype="float32")
    with pytest.raises(KeyboardInterrupt):
        evaluation.run_evaluate(two_models, SMALL, out, options)
    kept = set(json.loads(out.read_text())["cells"])
    asked = []
    plain_replies = evaluate._replies
    monkeypatch.setattr(evaluate, "_task", plain)
    monkeypatch.setattr(evaluate, "_replies", lambda *args: asked.append(args[2]) or plain_replies(*args))
    result = evaluation.run_evaluate(two_models, SMALL, out, options)
    assert asked == [], "both models had answered before the interruption"
    assert kept < set(json.loads(out.read_text())["cells"])
    fresh = evaluation.run_evaluate(two_models, SMALL, tmp_path / "fresh.json", options)
    assert result == fresh
    assert result["models"][two_models[0]]["HED"]["value"] == 0.0
    assert result["models"][two_models[1]]["HED"]["value"] > 0.0
    assert result["judge"]["accuracy"] == 1.0


def test_a_finished_evaluation_loads_no_model(two_models, tmp_path, monkeypatch):
    out = tmp_path / "results.json"
    first = evaluation.run_evaluate(two_models[:1], SMALL, out, evaluation.Options())
    monkeypatch.setattr(evaluation, "load_model", lambda *args: pytest.fail("loaded again"))
    assert evaluation.run_evaluate(two_models[:1], SMALL, out, evaluation.Options()) == first


def test_other_weights_are_another_model(two_models, tmp_path):
    before = evaluation.identity(two_models[0], evaluation.Options())
    save_model(tiny_model("llama", seed=5), word_tokenizer(), tmp_path / "other")
    assert evaluation.identity(str(tmp_path / "other"), evaluation.Options()) != before
    assert evaluation.identity(two_models[0], evaluation.Options()) == before


def test_the_table_names_every_model_its_intervals_and_the_judge(two_models, tmp_path):
    from rich.console import Console

    result = evaluation.run_evaluate(two_models, SMALL, tmp_path / "results.json", evaluation.Options())
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(evaluation.table(result))
    text = " ".join(console.export_text().split())
    assert "The judge agrees with people on 100 % of 2 held-out labelled replies" in text
    assert "[" in text
    assert "one" in text
    assert "two" in text


def test_differences_within_the_noise_are_named_as_such():
    same = [1.0, 0.0] * 20
    found = {
        "base": {"HS": [1.0] * 40, "FA": same, "perplexity": [3.0] * 8},
        "new": {"HS": [0.0] * 40, "FA": [*same[2:], 0.0, 0.0], "perplexity": [2.0] * 8},
    }
    (sentence,) = evaluation.differences(found)
    assert sentence == "new against base: HS -100 points, PPL down; no difference shown in FA."


def classifier(tmp_path, labels, **settings):
    torch.manual_seed(0)
    names = dict(enumerate(labels))
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        pad_token_id=0,
        id2label=names,
        label2id={name: index for index, name in names.items()},
        **settings,
    )
    model = LlamaForSequenceClassification(config).eval()
    with torch.no_grad():
        model.score.weight.mul_(50)
    folder = tmp_path / "judge"
    model.save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return model, str(folder)


PROMPTS = ["w3", "w4 w5", "w6", "w7 w8 w9", "w10", "w11"]
ANSWERS = ["w12 w13", "w14", "w15 w16 w17", "w18", "w19", "w20 w21"]


def logits_of(model, template="{prompt} {reply}"):
    tokenizer = word_tokenizer()
    texts = [template.format(prompt=p, reply=r) for p, r in zip(PROMPTS, ANSWERS, strict=True)]
    with torch.no_grad():
        return torch.cat([model(torch.tensor([tokenizer(text)["input_ids"]])).logits for text in texts])


def test_a_model_judge_adds_up_harmful_labels_that_exclude_each_other(tmp_path):
    model, folder = classifier(tmp_path, ["safe", "rude", "risky"])
    got = ModelJudge(folder, ["rude", "risky"], batch_size=4).harmful(PROMPTS, ANSWERS)
    assert got == (1 - logits_of(model).softmax(-1)[:, 0] > 0.5).tolist()
    assert len(set(got)) == 2, "both verdicts occur"


def test_a_model_judge_flags_by_any_of_independent_labels(tmp_path):
    model, folder = classifier(tmp_path, ["a", "b"], problem_type="multi_label_classification")
    judge = ModelJudge(folder, template="{reply} then {prompt}", threshold=0.7)
    wanted = (logits_of(model, "{reply} then {prompt}").sigmoid().amax(-1) > 0.7).tolist()
    assert judge.harmful(PROMPTS, ANSWERS) == wanted
    assert judge.recipe["labels"] == ["a", "b"]
    assert judge.harmful([], []) == []


@pytest.mark.parametrize("template", [None, "{reply} then {prompt}"])
def test_a_model_judge_takes_empty_and_foreign_replies(tmp_path, template):
    _, folder = classifier(tmp_path, ["safe", "rude"])
    replies = ["", "   ", "\u0416\u0418\u0412\u041e", "\U0001f600 w3", "w4", ""]
    judge = ModelJudge(folder, ["rude"], template=template, batch_size=4)
    alone = [judge.harmful([prompt], [reply])[0] for prompt, reply in zip(PROMPTS, replies, strict=True)]
    assert judge.harmful(PROMPTS, replies) == alone


def test_a_model_judge_whose_config_names_no_padding_takes_the_tokenizers(tmp_path):
    model, folder = classifier(tmp_path, ["safe", "rude", "risky"])
    config = Path(folder, "config.json")
    config.write_text(json.dumps(json.loads(config.read_text()) | {"pad_token_id": None}))
    got = ModelJudge(folder, ["rude", "risky"], batch_size=4).harmful(PROMPTS, ANSWERS)
    assert got == (1 - logits_of(model).softmax(-1)[:, 0] > 0.5).tolist()


def test_a_model_judge_that_cannot_be_understood_is_refused(tmp_path):
    _, folder = classifier(tmp_path, ["safe", "rude"])
    with pytest.raises(HftcoreError, match="which of the judge's labels mean harm: safe, rude"):
        ModelJudge(folder)
    with pytest.raises(HftcoreError, match="safe, rude; got bad"):
        ModelJudge(folder, ["bad"])
    with pytest.raises(HftcoreError, match="threshold must be from 0 to 1, got 2"):
        ModelJudge(folder, ["rude"], threshold=2)
    with pytest.raises(HftcoreError, match="template must hold"):
        ModelJudge(folder, ["rude"], template="{prompt}")


def command(*args):
    result = CliRunner().invoke(app, ["evaluate", *map(str, args)])
    return result.exit_code, result.stdout, result.stderr


def test_the_command_prints_the_table_and_goes_on_where_it_stopped(two_models, tmp_path, monkeypatch):
    monkeypatch.setattr(suites, "load_suite", lambda name: SMALL)
    out = tmp_path / "results.json"
    code, text, _ = command(*two_models, "--out", out, "--limit", 1)
    assert code == 0
    assert "against" in text
    assert f"written: {out}" in text.replace("\n", "")
    monkeypatch.setattr(evaluation, "load_model", lambda *args: pytest.fail("loaded again"))
    result = json.loads(command(*two_models, "--out", out, "--limit", 1, "--json")[1])
    assert set(result["models"]) == set(two_models)
    assert result["models"][two_models[0]]["HS"]["total"] == 1


def test_options_that_do_not_belong_together_are_usage_errors(two_models, tmp_path):
    out = tmp_path / "results.json"
    assert command(two_models[0], "--out", out, "--judge-labels", "a")[0] == 2
    assert command(two_models[0], "--out", out, "--judge-template", "{prompt} {reply}")[0] == 2
    assert command(two_models[0], "--out", out, "--suite", "immunization")[0] == 2
    assert command(two_models[0], "--out", out, "--suite", "immunization", "--limit", 3)[0] == 2
    assert not out.exists()


def test_the_commands_judge_reads_the_text_it_was_trained_on(two_models, tmp_path, monkeypatch):
    _, folder = classifier(tmp_path, ["safe", "rude"])
    monkeypatch.setattr(suites, "load_suite", lambda name: SMALL)
    judge = (
        "--judge",
        folder,
        "--judge-labels",
        "rude",
        "--judge-template",
        "USER: {prompt} ASSISTANT:{reply}",
        "--json",
    )
    code, out, err = command(two_models[0], "--out", tmp_path / "results.json", *judge)
    assert code == 0, err
    assert json.loads(out)["judge"]["template"] == "USER: {prompt} ASSISTANT:{reply}"


def test_ctrl_c_says_that_what_is_done_is_kept(two_models, tmp_path, monkeypatch):
    monkeypatch.setattr(suites, "load_suite", lambda name: SMALL)
    out = tmp_path / "results.json"

    def interrupted(subject, **_):
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluate, "_task", interrupted)
    code, _, err = command(two_models[0], "--out", out)
    assert code == 130
    assert f"what is done is in {out}" in err
    assert json.loads(out.read_text())["cells"]
