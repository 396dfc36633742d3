"""What the trainers of all defences share: streams, collation, accumulation, checkpoints, several processes."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import VOCABULARY, one_thread, tiny_model  # noqa: F401
from transformers import Trainer, TrainingArguments

from hftcore.bindings import weighted_loss
from hftcore.bindings.trainers.base import DefenceConfig, DefenceTrainer
from hftcore.bindings.trainers.collate import Collator
from hftcore.bindings.trainers.stream import BatchStream
from hftcore.errors import HftcoreError, NonFiniteError

pytestmark = pytest.mark.usefixtures("one_thread")


class Plain(DefenceTrainer):
    """SFT, written as a defence."""

    def update(self, batches):
        return self.over(batches)()


class WithSecond(DefenceTrainer):
    """SFT on both data sets; what it draws is kept in view."""

    def __init__(self, *args, harmful_dataset=None, **kwargs):
        super().__init__(*args, **kwargs)
        self.harmful = self.add_stream("harmful_dataset", harmful_dataset)
        self.seen = []

    def update(self, batches):
        drawn = self.draw(self.harmful, len(batches))
        self.seen += [batch["input_ids"].tolist() for batch in drawn]
        self.kept["steps"] = self.kept.get("steps", 0) + 1
        self.note(twice=2.0 * self.kept["steps"])
        return self.over(batches)() + self.over(drawn)()


def samples(count, seed=0, prompt=2):
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        length = int(torch.randint(5, 9, (), generator=generator))
        ids = torch.randint(1, VOCABULARY, (length,), generator=generator).tolist()
        made.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    return made


def config(tmp_path, kind=DefenceConfig, **kwargs):
    plain = {
        "output_dir": str(tmp_path),
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "max_steps": 3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "lr_scheduler_type": "constant",
    }
    return kind(**(plain | kwargs))


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def equal(left, right):
    return all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_sft_written_as_a_defence_is_the_trainers_own_bit_for_bit(tmp_path, name, accumulation):
    data = samples(8)
    ours, theirs = tiny_model(name), tiny_model(name)
    options = {"gradient_accumulation_steps": accumulation}
    Plain(ours, config(tmp_path, **options), train_dataset=data).train()
    plain = config(tmp_path, TrainingArguments, **options)
    Trainer(theirs, plain, train_dataset=data, data_collator=Collator(0)).train()
    assert equal(weights(ours), weights(theirs))


def test_a_short_last_accumulation_is_the_trainers_own_too(tmp_path):
    data = samples(6)
    ours, theirs = tiny_model("llama"), tiny_model("llama")
    options = {"gradient_accumulation_steps": 2, "max_steps": -1, "num_train_epochs": 2}
    Plain(ours, config(tmp_path, **options), train_dataset=data).train()
    plain = config(tmp_path, TrainingArguments, **options)
    Trainer(theirs, plain, train_dataset=data, data_collator=Collator(0)).train()
    assert equal(weights(ours), weights(theirs))


def test_the_second_set_is_drawn_once_for_each_micro_batch_and_its_numbers_are_logged(tmp_path):
    trainer = WithSecond(
        tiny_model("llama"),
        config(tmp_path, gradient_accumulation_steps=2, logging_steps=2, max_steps=2),
        train_dataset=samples(8),
        harmful_dataset=samples(3, seed=1),
    )
    trainer.train()
    assert len(trainer.seen) == 4
    entries = [entry for entry in trainer.state.log_history if "twice" in entry]
    assert [entry["twice"] for entry in entries] == [3.0]
    assert entries[0]["loss"] > 0


def test_a_run_resumed_from_a_checkpoint_ends_as_the_run_that_was_not_stopped(tmp_path):
    def trainer(model, steps, folder):
        options = {"max_steps": steps, "save_strategy": "steps", "save_steps": 2}
        data = {"train_dataset": samples(8), "harmful_dataset": samples(5, seed=1)}
        return WithSecond(model, config(folder, **options), **data)

    whole = tiny_model("llama")
    straight = trainer(whole, 4, tmp_path / "whole")
    straight.train()
    trainer(tiny_model("llama"), 2, tmp_path / "parts").train()
    resumed = tiny_model("llama")
    second = trainer(resumed, 4, tmp_path / "parts")
    second.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-2"))
    assert second.seen == straight.seen[2:]
    assert second.kept["steps"] == 4
    assert equal(weights(whole), weights(resumed))


def test_a_checkpoint_of_another_trainer_is_refused(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1}
    plain = config(tmp_path, TrainingArguments, **options)
    Trainer(tiny_model("llama"), plain, train_dataset=samples(4), data_collator=Collator(0)).train()
    again = Plain(tiny_model("llama"), config(tmp_path, max_steps=2), train_dataset=samples(4))
    with pytest.raises(HftcoreError, match=r"no defence_state\.pt"):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_a_loss_that_is_nan_stops_the_run_before_the_weights_change(tmp_path):
    class Broken(DefenceTrainer):
        def update(self, batches):
            return self.over(batches)() * math.nan

    model = tiny_model("llama")
    before = weights(model)
    with pytest.raises(NonFiniteError, match="the loss of step 1 is nan"):
        Broken(model, config(tmp_path), train_dataset=samples(4)).train()
    assert equal(weights(model), before)


def test_an_interrupted_accumulation_leaves_nothing_for_the_next_run(tmp_path):
    trainer = Plain(tiny_model("llama"), config(tmp_path, gradient_accumulation_steps=2), train_dataset=samples(8))
    trainer._waiting.append({"input_ids": torch.zeros(1, 1)})
    trainer.train()
    assert trainer._waiting == []


def test_missing_and_empty_second_sets_are_refused(tmp_path):
    for harmful, message in ((None, "WithSecond needs harmful_dataset"), ([], "harmful_dataset is empty")):
        with pytest.raises(HftcoreError, match=message):
            WithSecond(tiny_model("llama"), config(tmp_path), train_dataset=samples(4), harmful_dataset=harmful)


def test_fp16_loss_scaling_is_refused(tmp_path):
    arguments = config(tmp_path)
    arguments.fp16 = True
    with pytest.raises((HftcoreError, ValueError), match="fp16"):
        Plain(tiny_model("llama"), arguments, train_dataset=samples(4))


def test_a_stream_shows_every_sample_once_before_any_again():
    stream = BatchStream("data", list(range(7)), 3, collate=list, seed=3)
    seen = [sample for _ in range(7) for sample in stream.draw()]
    turns = [seen[start : start + 7] for start in (0, 7, 14)]
    assert all(sorted(turn) == list(range(7)) for turn in turns)
    assert turns[0] != turns[1] != turns[2]


def test_processes_share_one_stream_without_overlap():
    one = BatchStream("data", list(range(12)), 3, collate=list, seed=3)
    both = [BatchStream("data", list(range(12)), 3, collate=list, seed=3, rank=r, world_size=2) for r in (0, 1)]
    together = [batch for _ in range(2) for batch in (both[0].draw(), both[1].draw())]
    assert together == [one.draw() for _ in range(4)]


def test_a_set_smaller_than_a_batch_gives_all_of_itself_each_time():
    stream = BatchStream("data", ["a", "b"], 5, collate=sorted)
    assert [stream.draw() for _ in range(3)] == [["a", "b"]] * 3


def test_a_stream_set_to_a_number_of_batches_goes_on_from_there():
    first, second = (BatchStream("data", list(range(5)), 2, collate=list, seed=1) for _ in range(2))
    drawn = [first.draw() for _ in range(6)]
    second.drawn = 4
    assert [second.draw(), second.draw()] == drawn[4:]


def test_samples_without_labels_or_of_unequal_lengths_are_refused():
    with pytest.raises(HftcoreError, match="must have input_ids and labels, got input_ids"):
        Collator(0)([{"input_ids": [1]}])
    with pytest.raises(HftcoreError, match="one length, at least 1, got 2 and 1"):
        Collator(0)([{"input_ids": [1, 2], "labels": [1]}])


def test_further_columns_are_padded_apart_with_a_mask():
    rows = [
        {"input_ids": [5, 6], "labels": [-100, 6], "refusal_ids": [1, 2, 3]},
        {"input_ids": [7], "labels": [7], "refusal_ids": [4]},
    ]
    batch = Collator(9)(rows)
    assert batch["input_ids"].tolist() == [[5, 6], [7, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1], [1, 0]]
    assert batch["refusal_ids"].tolist() == [[1, 2, 3], [4, 9, 9]]
    assert batch["refusal_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]


SCRIPT = """
import os, sys, torch
from pathlib import Path
sys.path.insert(0, {tests!r})
torch.set_num_threads(1)
folder = Path({folder!r})
{body}
torch.save(found, folder / (os.environ["RANK"] + ".pt"))
# not an ordinary end: a thread of gloo's that frees its last tensor while the interpreter ends is an abort (one run in four)
os._exit(0)
"""


def in_two_processes(folder, body):
    """What each of two processes finds: `body` is code that sets `found`, and may use `folder`."""
    script = folder / "run.py"
    script.write_text(SCRIPT.format(tests=str(Path(__file__).parent), folder=str(folder), body=body))
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", str(script)]
    done = subprocess.run(launch, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


def train_with_second(folder, size):
    model = tiny_model("llama")
    options = {"per_device_train_batch_size": size, "max_steps": 2, "ddp_backend": "gloo" if size == 2 else None}
    data = {"train_dataset": samples(8), "harmful_dataset": samples(8, seed=1)}
    WithSecond(model, config(folder, **options), **data).train()
    return weights(model)


def test_two_processes_train_as_one_with_the_batches_of_both(tmp_path):
    """Each pass averages its gradient over the processes, so the update is that of the common batch."""
    both = in_two_processes(tmp_path, "import test_trainers as t; found = t.train_with_second(folder, 2)")
    alone = train_with_second(tmp_path / "alone", 4)
    for name, value in alone.items():
        assert torch.equal(both[0][name], both[1][name])
        # sums of other orders in float32, through two steps of AdamW at 1e-2
        torch.testing.assert_close(both[0][name], value, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_weights_of_one_through_compute_loss_func_are_the_trainers_own_loss(tmp_path, accumulation):
    data = samples(8)
    found = []
    for function in (None, weighted_loss(lambda logprobs, counts: torch.ones_like(logprobs))):
        model = tiny_model("llama")
        options = {"gradient_accumulation_steps": accumulation, "optim": "sgd", "learning_rate": 0.1}
        arguments = config(tmp_path, TrainingArguments, **options)
        Trainer(model, arguments, train_dataset=data, data_collator=Collator(0), compute_loss_func=function).train()
        found.append(weights(model))
    for name in found[0]:
        # the same sum in another order, three steps
        torch.testing.assert_close(found[0][name], found[1][name], rtol=1e-4, atol=1e-6)


def test_a_weight_multiplies_its_samples_gradient_only():
    logits = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([[-100, 1, 2], [-100, -100, 4]])
    outputs = type("Outputs", (), {"logits": logits})
    weighted_loss(lambda logprobs, counts: torch.tensor([0.0, 2.0]))(outputs, labels, 7).backward()
    assert not logits.grad[0].any()
    expected = torch.softmax(logits[1, 1].detach(), 0)
    expected[4] -= 1
    torch.testing.assert_close(logits.grad[1, 1], 2 * expected / 7)


def test_weights_that_do_not_fit_are_refused():
    outputs = type("Outputs", (), {"logits": torch.zeros(2, 3, 5)})
    labels = torch.tensor([[-100, 1, 2], [-100, -100, 4]])
    for made in (torch.ones(3), torch.tensor([1.0, math.nan])):
        with pytest.raises(HftcoreError, match=r"finite weights of shape \(2,\)"):
            weighted_loss(lambda logprobs, counts, made=made: made)(outputs, labels)
