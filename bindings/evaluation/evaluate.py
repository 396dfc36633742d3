"""Scores of a chat model: harmful score, over-refusal, task accuracies, perplexity and drift, each with its interval.

HS alone cannot tell "refused" from "broken": a model that writes noise serves no request either. So beside HS stand HS+, which counts noise
as harmful too, and the shares of replies that refuse, agree and are no language.
"""

import functools
import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hftcore.bindings.evaluation.drift import embedding_drift, window_losses
from hftcore.bindings.evaluation.generate import generate
from hftcore.bindings.evaluation.judge import Judge, KeywordJudge, is_affirmative, is_degenerate, is_refusal
from hftcore.bindings.evaluation.metrics import Mean, Score, Share, bootstrap_mean
from hftcore.bindings.evaluation.suites import Suite
from hftcore.bindings.evaluation.tasks import Task, solved
from hftcore.errors import HftcoreError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Items = dict[str, list[float]]


@dataclass(frozen=True)
class Subject:
    """The model that is asked, its tokenizer, and the model before fine-tuning where there is one."""

    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"
    reference: "PreTrainedModel | None" = None
    batch_size: int = 32


@dataclass(frozen=True)
class Part:
    """One step of an evaluation: `measure(subject)` gives the numbers of each item, by score; `recipe` decides them."""

    recipe: dict[str, Any]
    measure: Callable[[Subject], Items]


def parts(suite: Suite, judge: Judge, has_reference: bool = False) -> list[Part]:
    """The steps of a suite, the quickest to spoil first: harmful requests, benign ones, tasks, perplexity, drift."""
    talk = {"max_new_tokens": suite.max_new_tokens, "system": suite.system}
    steps = [
        Part(
            {"part": name, "items": _digest(requests), **talk, **judge.recipe},
            functools.partial(_harmful, suite=suite, judge=judge, name=name, requests=requests),
        )
        for name, requests in suite.harmful.items()
    ]
    if suite.benign:
        recipe = {"part": "over_refusal", "items": _digest(suite.benign), **talk, **KeywordJudge().recipe}
        steps.append(Part(recipe, functools.partial(_over_refusal, suite=suite)))
    for name, task in suite.tasks.items():
        recipe = {"part": name, "items": _digest([list(pair) for pair in task.pairs]), "check": task.check}
        recipe["system"] = suite.system
        steps.append(Part(recipe, functools.partial(_task, suite=suite, name=name, task=task)))
    if suite.documents:
        recipe = {"part": "perplexity", "items": _digest(suite.documents)}
        steps.append(Part(recipe, functools.partial(_perplexity, documents=suite.documents)))
    if suite.drift and has_reference:
        recipe = {"part": "HED", "items": _digest([list(pair) for pair in suite.drift])}
        steps.append(Part(recipe, functools.partial(_drift, suite=suite)))
    return steps


def evaluate(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    suite: Suite,
    *,
    judge: Judge | None = None,
    reference: "PreTrainedModel | None" = None,
    batch_size: int = 32,
) -> dict[str, Score]:
    """The scores of a model, in percent where they are shares.

    For each set of harmful requests: its score (`HS`: requests served, by the judge) and the same with incoherent replies counted as
    harmful too (`HS+`). Of the first set: `refusal`, `affirmative` and `degenerate`, the replies that refuse, open by agreeing, or are no
    language. `over_refusal`: benign requests refused. For each task its accuracy (`FA`, …). `perplexity` of plain text. With a reference,
    `HED` (as published, a sum) and `HED_mean`.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        suite: what to ask.
        judge: None: `KeywordJudge`.
        reference: the model before fine-tuning.
        batch_size: prompts computed together.

    Source: HS and FA of Antidote and Panacea, HS+ of Antibody's code, HED of Vaccine; see `docs/evaluate.md` for the differences.
    """
    subject = Subject(model, tokenizer, reference, batch_size)
    items: Items = {}
    for part in parts(suite, judge or KeywordJudge(), reference is not None):
        items |= part.measure(subject)
    return scores(items)


def scores(items: Items) -> dict[str, Score]:
    """Shares of the 0s and 1s, perplexity of the losses, and the total and the mean of the drifts."""
    return {name: _score(name, values) for name, values in items.items()}


def _score(name: str, values: Sequence[float]) -> Score:
    if name not in ("perplexity", "HED", "HED_mean"):
        return Share(int(sum(values)), len(values))
    mean = bootstrap_mean(values)
    if name == "perplexity":
        return Mean(math.exp(mean.value), math.exp(mean.low), math.exp(mean.high), mean.total)
    if name == "HED":
        return Mean(mean.total * mean.value, mean.total * mean.low, mean.total * mean.high, mean.total)
    return mean


def _harmful(subject: Subject, suite: Suite, judge: Judge, name: str, requests: list[str]) -> Items:
    replies = _replies(subject, suite, requests)
    served = judge.harmful(requests, replies)
    noise = [is_degenerate(reply) for reply in replies]
    either = [a or b for a, b in zip(served, noise, strict=True)]
    found: dict[str, list[bool]] = {name: served, f"{name}+": either}
    if name == next(iter(suite.harmful)):
        found["refusal"] = [is_refusal(reply) for reply in replies]
        found["affirmative"] = [is_affirmative(reply) for reply in replies]
        found["degenerate"] = noise
    return {score: [float(value) for value in values] for score, values in found.items()}


def _over_refusal(subject: Subject, suite: Suite) -> Items:
    return {"over_refusal": [float(is_refusal(reply)) for reply in _replies(subject, suite, suite.benign)]}


def _task(subject: Subject, suite: Suite, name: str, task: Task) -> Items:
    hits = solved(subject.model, subject.tokenizer, task, subject.batch_size, suite.system)
    return {name: [float(hit) for hit in hits]}


def _perplexity(subject: Subject, documents: list[str]) -> Items:
    return {"perplexity": window_losses(subject.model, subject.tokenizer, documents, windows=len(documents) // 2)}


def _drift(subject: Subject, suite: Suite) -> Items:
    if subject.reference is None:
        raise HftcoreError("HED needs a reference: the model before fine-tuning; got None")
    sums, means = embedding_drift(subject.model, subject.reference, subject.tokenizer, suite.drift)
    return {"HED": sums, "HED_mean": means}


def _replies(subject: Subject, suite: Suite, prompts: list[str]) -> list[str]:
    return generate(
        subject.model,
        subject.tokenizer,
        prompts,
        max_new_tokens=suite.max_new_tokens,
        batch_size=subject.batch_size,
        system=suite.system,
    )


def _digest(items: Sequence[Any]) -> str:
    return hashlib.sha256(json.dumps(list(items)).encode()).hexdigest()[:16]
