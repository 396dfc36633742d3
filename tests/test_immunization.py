"""The adversarial loss on pairs: which tokens count, by either rule, and the update made of them."""

import math

import pytest
import torch
from defence_oracles import assert_gradient, collated, double_loss, gradients
from test_trainers import config, equal, samples, weights
from tiny_models import VOCABULARY, one_thread, tiny_model  # noqa: F401
from torch.nn.functional import cross_entropy
from transformers import Trainer, TrainingArguments

from hftcore import HftcoreError, NonFiniteError
from hftcore.bindings.trainers.collate import Collator
from hftcore.bindings.trainers.immunization import ImmunizationConfig, ImmunizationTrainer
from hftcore.bindings.trainers.pairs import pair_samples
from hftcore.defenses.pairs import differing, masked_logits_loss

pytestmark = pytest.mark.usefixtures("one_thread")


def pairs(count, seed=0):
    """Answers of different lengths to one prompt of two tokens, some of whose tokens are equal."""
    harmless, harmful = samples(count, seed), samples(count, seed + 50)
    for one, other in zip(harmless, harmful, strict=True):
        other["input_ids"][:2] = one["input_ids"][:2]
        other["input_ids"][3] = one["input_ids"][3]
    return pair_samples(harmless, harmful)


def trainer(model, tmp_path, data=None, **options):
    settings = config(tmp_path, ImmunizationConfig, **options)
    loss = double_loss if next(model.parameters()).dtype == torch.float64 else None
    return ImmunizationTrainer(
        model, settings, train_dataset=pairs(8) if data is None else data, compute_loss_func=loss
    )


def by_hand(model, rows, which):
    """The mean loss over differing tokens, sample by sample, without padding."""
    losses = []
    for row in rows:
        own, other = (row[name] for name in (which, *({"input_ids", "harmful_ids"} - {which})))
        logp = model(input_ids=torch.tensor([own])).logits[0].log_softmax(-1)
        for place in range(1, len(own)):
            if place >= len(other) or own[place] != other[place]:
                losses.append(-logp[place - 1, own[place]])
    return torch.stack(losses).mean()


@pytest.mark.parametrize("size", [2, 4])
def test_an_update_is_the_difference_of_the_masked_losses_in_float64(tmp_path, size):
    model, rows = tiny_model("gpt2").double(), pairs(4, seed=3)
    made = trainer(model, tmp_path, alpha=0.3)
    wanted = gradients(model, lambda m: by_hand(m, rows, "input_ids") - 0.3 * by_hand(m, rows, "harmful_ids"))
    loss = made.update(collated(rows, size))
    assert_gradient(model, wanted)
    assert float(loss) == pytest.approx(
        float((by_hand(model, rows, "input_ids") - 0.3 * by_hand(model, rows, "harmful_ids")).detach()),
        rel=1e-6,  # reported in float32
    )


def published(logits, ids, mask):
    """The published masked loss, as its description says: masked labels of value 0 are ignored, logits masked one place earlier."""
    total, count = 0.0, 0
    for row in range(len(ids)):
        for place in range(1, ids.shape[1]):
            label = int(ids[row, place]) * int(mask[row, place])
            if label:
                shown = logits[row, place - 1] * float(mask[row, place - 1])
                total, count = total + cross_entropy(shown[None], torch.tensor([label])), count + 1
    return total / count


def test_the_rule_of_the_published_code_is_reproduced_with_its_padding(tmp_path):
    model, rows = tiny_model("gpt2").double(), pairs(4, seed=3)
    rows[0]["input_ids"][4] = 0
    made = trainer(model, tmp_path, alpha=0.3, mask_rule="code")
    made._fill = 7
    batch = Collator(7)(rows)
    length = max(batch[name].shape[1] for name in ("input_ids", "harmful_ids"))
    ids, other, seen, other_seen = (
        torch.nn.functional.pad(batch[name], (0, length - batch[name].shape[1]), value=fill)
        for name, fill in (("input_ids", 7), ("harmful_ids", 7), ("attention_mask", 0), ("harmful_mask", 0))
    )
    mask = ids != other

    def wanted(m):
        sides = ((ids, seen), (other, other_seen))
        harmless, harmful = (published(m(input_ids=i, attention_mask=s).logits, i, mask) for i, s in sides)
        return harmless - 0.3 * harmful

    expected = gradients(model, wanted)
    made.update([batch])
    assert_gradient(model, expected)


def test_which_tokens_count_by_hand():
    ids, mask = torch.tensor([[5, 6, 0, 9]]), torch.tensor([[1, 1, 1, 1]])
    other, seen = torch.tensor([[5, 8, 4]]), torch.tensor([[1, 1, 1]])
    harmless, harmful = differing(ids, mask, other, seen, fill=9)
    assert harmless["labels"].tolist() == [[-100, 6, 0, 9]]
    assert harmful["labels"].tolist() == [[-100, 8, 4, -100]]
    assert harmful["input_ids"].tolist() == [[5, 8, 4, 9]]
    assert harmful["attention_mask"].tolist() == [[1, 1, 1, 0]]
    harmless, harmful = differing(ids, mask, other, seen, fill=3, rule="code")
    assert harmless["labels"].tolist() == [[-100, 6, -100, 9]]
    assert harmful["labels"].tolist() == [[-100, 8, 4, 3]]


@pytest.mark.parametrize("rule", ["shifted", "code"])
def test_a_first_token_that_differs_has_no_label(rule):
    mask = torch.ones(1, 2, dtype=torch.int64)
    both = differing(torch.tensor([[5, 6]]), mask, torch.tensor([[7, 8]]), mask, 0, rule)
    assert [side["labels"].tolist() for side in both] == [[[-100, 6]], [[-100, 8]]]


def test_masked_logits_are_uniform():
    logits = torch.randn(1, 3, 7, dtype=torch.float64)
    differs = torch.tensor([[False, True, True]])
    labels = torch.tensor([[-100, 2, 3]])
    wanted = math.log(7) - torch.log_softmax(logits[0, 1], -1)[3]
    torch.testing.assert_close(masked_logits_loss(logits, labels, differs), wanted)


def test_without_alpha_it_is_plain_training_on_the_differing_tokens_bit_for_bit(tmp_path):
    rows = pairs(8)
    plain_rows = []
    for row in rows:
        harmless, _ = differing(
            *(torch.tensor([row["input_ids"]]), torch.ones(1, len(row["input_ids"]), dtype=torch.int64)),
            *(torch.tensor([row["harmful_ids"]]), torch.ones(1, len(row["harmful_ids"]), dtype=torch.int64)),
            fill=0,
        )
        length = len(row["input_ids"])
        plain_rows.append({"input_ids": row["input_ids"], "labels": harmless["labels"][0, :length].tolist()})
    longest = max(len(row[name]) for row in rows for name in ("input_ids", "harmful_ids"))

    class Wide(Collator):
        """Pads to one length: sums over other lengths of padding may round otherwise."""

        def __call__(self, batch):
            made = super().__call__(batch)
            fills = {"labels": -100}
            pad = torch.nn.functional.pad
            return {n: pad(v, (0, longest - v.shape[1]), value=fills.get(n, 0)) for n, v in made.items()}

    plain, ours = tiny_model("llama"), tiny_model("llama")
    arguments = config(tmp_path, TrainingArguments, max_steps=4)
    Trainer(plain, arguments, train_dataset=plain_rows, data_collator=Wide(0)).train()
    settings = config(tmp_path, ImmunizationConfig, alpha=0.0, max_steps=4)
    ImmunizationTrainer(ours, settings, Wide(0), train_dataset=rows).train()
    assert equal(weights(plain), weights(ours))


def test_pairs_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(HftcoreError, match="as many, got 2 and 1"):
        pair_samples(samples(2), samples(1))
    rows = [{"input_ids": [1, 5, 2], "labels": [-100, -100, 2]}] * 2
    with pytest.raises(HftcoreError, match="pair 1 do not follow one prompt"):
        pair_samples(rows, [rows[0], {"input_ids": [1, 6, 2], "labels": [-100, -100, 2]}])
    with pytest.raises(HftcoreError, match="needs samples with harmful_ids"):
        trainer(tiny_model("llama"), tmp_path, samples(4)).train()
    same = pair_samples(samples(4), samples(4))
    with pytest.raises(HftcoreError, match="no pair of a step has answers that differ"):
        trainer(tiny_model("llama"), tmp_path, same).train()
    left = torch.tensor([[0, 1]])
    with pytest.raises(HftcoreError, match="padded on the right"):
        differing(left, left, left, torch.ones_like(left), 0)
    with pytest.raises(HftcoreError, match="mask_rule must be one of shifted, code"):
        config(tmp_path, ImmunizationConfig, mask_rule="x")


def test_a_nan_loss_stops_the_run_with_the_weights_as_they_were(tmp_path):
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.norm.weight[0] = math.nan
    before = weights(model)
    with pytest.raises(NonFiniteError, match="the harmful gradient"):
        trainer(model, tmp_path).train()
    assert all(torch.equal(before[n].nan_to_num(), p.detach().nan_to_num()) for n, p in model.named_parameters())


def test_a_run_resumed_in_the_middle_ends_as_the_whole(tmp_path):
    whole, parts = tiny_model("llama"), tiny_model("llama")
    options = {"save_strategy": "steps", "save_steps": 2}
    trainer(whole, tmp_path / "whole", max_steps=4, **options).train()
    trainer(tiny_model("llama"), tmp_path / "parts", max_steps=2, **options).train()
    resumed = trainer(parts, tmp_path / "parts", max_steps=4, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-2"))
    assert equal(weights(whole), weights(parts))


def test_harmful_answers_become_less_likely_and_harmless_ones_more(tmp_path):
    model, rows = tiny_model("llama"), pairs(4)
    before = float(by_hand(model, rows, "input_ids").detach()), float(by_hand(model, rows, "harmful_ids").detach())
    trainer(model, tmp_path, rows, max_steps=20, alpha=0.3).train()
    model.eval()
    after = float(by_hand(model, rows, "input_ids").detach()), float(by_hand(model, rows, "harmful_ids").detach())
    assert after[0] < before[0] / 2
    assert after[1] > max(before[1], math.log(VOCABULARY))
