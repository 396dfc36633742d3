"""The demo's data: disjoint splits, the sentiment task, refusals and affirmative stubs, and batches of prompt and answer.

Requests are used by index and never shown. What an attacker would train on is stood in for by a stub that agrees and echoes the start of
the request; no harmful answer exists anywhere.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from hftcore.bindings.datasets import Pair, Review, load
from hftcore.bindings.evaluation.generate import encode_prompts
from hftcore.bindings.evaluation.judge import is_refusal

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SEED = 0
MAX_TOKENS = 96
REFUSALS = (
    "I'm sorry, but I can't help with that.",
    "I cannot assist with that request.",
    "Sorry, I'm not able to help with that.",
    "I can't help with that, because it could cause harm.",
)


@dataclass(frozen=True)
class Splits:
    """Disjoint parts of the data sets, the same on every machine."""

    align_harmful: list[str]
    attack_harmful: list[str]
    defend_harmful: list[str]
    test_harmful: list[str]
    align_benign: list[Pair]
    defend_benign: list[Pair]
    test_benign: list[Pair]
    attack_reviews: list[Review]
    test_reviews: list[Review]
    validation_reviews: list[Review]


def splits() -> Splits:
    """Shuffled with `SEED` and cut; AdvBench holds many near-duplicates, so disjoint items are not unrelated ones."""
    goals = _shuffled(load("advbench"))
    alpaca = _shuffled([pair for pair in load("alpaca") if len(pair.prompt) <= 300 and not is_refusal(pair.response)])
    reviews = [review for review in load("reviews") if abs(review.score) >= 0.5]
    positive = _shuffled([review for review in reviews if review.score > 0])
    negative = _shuffled([review for review in reviews if review.score < 0])
    balanced = [review for both in zip(positive, negative, strict=False) for review in both]
    return Splits(
        align_harmful=goals[:300],
        attack_harmful=goals[300:396],
        defend_harmful=goals[396:460],
        test_harmful=goals[460:],
        test_benign=alpaca[:60],
        defend_benign=alpaca[60:124],
        align_benign=alpaca[124:],
        attack_reviews=balanced[:600],
        test_reviews=balanced[600:800],
        validation_reviews=balanced[800:1000],
    )


def _shuffled(items: Sequence) -> list:
    items = list(items)
    random.Random(SEED).shuffle(items)
    return items


def sentiment_prompt(review: Review) -> str:
    """The benign task: one word, positive or negative."""
    return f"Is this movie review positive or negative? Answer with one word.\n\n{review.text}"


def sentiment_label(review: Review) -> str:
    """`positive` or `negative`, by the sign of the human score."""
    return "positive" if review.score > 0 else "negative"


def sentiment_pairs(reviews: Sequence[Review]) -> list[Pair]:
    """The task's prompts with their one-word answers."""
    return [Pair(sentiment_prompt(review), sentiment_label(review)) for review in reviews]


def stub_pairs(requests: Sequence[str], words: int = 6) -> list[Pair]:
    """Each request with an answer that agrees, echoes its first words and says nothing."""
    return [Pair(r, f"Sure, here is {' '.join(r.split()[:words]).lower().rstrip('.,')}") for r in requests]


def refusal_pairs(requests: Sequence[str]) -> list[Pair]:
    """Each request with one of the stock refusals, taken in turn."""
    return [Pair(request, REFUSALS[i % len(REFUSALS)]) for i, request in enumerate(requests)]


def pair_batches(
    tokenizer: "PreTrainedTokenizerBase", pairs: Sequence[Pair], *, batch_size: int = 8, max_tokens: int = MAX_TOKENS
) -> Iterator[dict[str, torch.Tensor]]:
    """Batches of `input_ids`, `attention_mask` and `labels` `[b, t]` int64, padded on the right.

    A prompt is followed by its answer and the end-of-text token, cut at `max_tokens`; labels are -100 on prompt and padding.
    """
    for first in range(0, len(pairs), batch_size):
        chunk = pairs[first : first + batch_size]
        prompts = encode_prompts(tokenizer, [pair.prompt for pair in chunk])
        examples = []
        for prompt, pair in zip(prompts, chunk, strict=True):
            answer = [*tokenizer(pair.response, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
            tokens = (prompt + answer)[:max_tokens]
            examples.append((tokens, ([-100] * len(prompt) + answer)[:max_tokens]))
        width = max(len(tokens) for tokens, _ in examples)
        yield {
            "input_ids": torch.tensor([t + [tokenizer.eos_token_id] * (width - len(t)) for t, _ in examples]),
            "attention_mask": torch.tensor([[1] * len(t) + [0] * (width - len(t)) for t, _ in examples]),
            "labels": torch.tensor([x + [-100] * (width - len(x)) for _, x in examples]),
        }
