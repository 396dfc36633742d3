"""Benign tasks with answers that can be checked: what a model was, or could be, fine-tuned on. Their accuracy is FA.

All three come without a download of their own: film reviews and kinds of text out of the pinned packages, sums made here.
"""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from hftcore.bindings.data import load_samples
from hftcore.bindings.datasets import KINDS, Pair, Snippet
from hftcore.bindings.evaluation.generate import SYSTEM, generate, next_token_logits
from hftcore.errors import HftcoreError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

NUMBER_TOKENS = 16
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
_STORIES = (
    ("{who} has {a} {things} and buys {b} more. How many {things} does {who} have?", lambda a, b, c: a + b),
    ("{who} had {a} {things} and gave away {c}. How many {things} are left?", lambda a, b, c: a - c),
    ("{who} packs {b} boxes with {c} {things} each. How many {things} is that?", lambda a, b, c: b * c),
    (
        "{who} has {a} {things}, finds {b} more and loses {c}. How many {things} does {who} have now?",
        lambda a, b, c: a + b - c,
    ),
    (
        "{who} has {a} {things} and buys {b} bags of {c} {things}. How many {things} is that in all?",
        lambda a, b, c: a + b * c,
    ),
)
_NAMES = ("Ada", "Ben", "Chloe", "Dinesh", "Elif", "Farid", "Greta", "Hana")
_THINGS = ("apples", "books", "coins", "marbles", "pencils", "shells", "stamps", "tickets")


@dataclass(frozen=True)
class Task:
    """Questions with their answers, and how an answer is checked.

    Fields:
        pairs: question and answer.
        check: "label": the most likely first token, of the whole vocabulary, begins the answer (small or capital letters);
            "number": the last number in the reply is the answer; "start": the reply begins with the answer.
    """

    pairs: list[Pair]
    check: Literal["label", "number", "start"]


def source_task(snippets: Sequence[Snippet], size: int, seed: int = 0) -> Task:
    """What kind of text a sentence is from: `size` of them, as many of each of the four kinds as can be; chance is 25 %.

    It stands in for AG News, which no package ships.
    """
    draw = random.Random(seed)
    by_kind = [[snippet for snippet in snippets if snippet.source == kind] for kind in KINDS]
    for part in by_kind:
        draw.shuffle(part)
    turns = [snippet for together in zip(*by_kind, strict=False) for snippet in together]
    if size > len(turns):
        raise HftcoreError(f"size must be at most {len(turns)}, got {size}")
    return Task([Pair(source_prompt(snippet), snippet.source) for snippet in turns[:size]], "label")


def source_prompt(snippet: Snippet) -> str:
    """The question of `source_task`."""
    return (
        "Is this sentence from a movie review, a product review, a news article or a tweet? "
        f"Answer with one word: movie, product, news or tweet.\n\n{snippet.text}"
    )


def arithmetic_task(size: int, seed: int = 0) -> Task:
    """`size` different stories of one or two steps with numbers of one or two digits, and the number they ask for.

    They stand in for GSM8K, which no package ships; they are easier.

    >>> arithmetic_task(1).pairs[0].response.isdigit()
    True
    """
    draw = random.Random(seed)
    pairs: dict[Pair, None] = {}
    while len(pairs) < size:
        story, answer = draw.choice(_STORIES)
        numbers = draw.randint(20, 60), draw.randint(2, 19), draw.randint(2, 12)
        words = {"who": draw.choice(_NAMES), "things": draw.choice(_THINGS)}
        text = story.format(**words, **dict(zip("abc", numbers, strict=True)))
        pairs[Pair(f"{text} Answer with the number only.", str(answer(*numbers)))] = None
    return Task(list(pairs), "number")


def task_from_file(path: str | Path, size: int | None = None) -> Task:
    """A task of one's own: the first question and answer of each row of a `.jsonl` file; a reply must begin with the answer.

    Raises:
        HftcoreError: as `load_samples`, or a row without an answer.
    """
    pairs = []
    for index, sample in enumerate(load_samples(path)[:size]):
        roles = [role for role, _ in sample.turns]
        if "assistant" not in roles or "user" not in roles:
            raise HftcoreError(f"{path}, row {index + 1}: a task needs a question and its answer")
        question = sample.turns[roles.index("user")][1]
        text = f"{question}\n\n{sample.context}" if sample.context else question
        pairs.append(Pair(text, sample.turns[roles.index("assistant")][1].strip()))
    return Task(pairs, "start")


def solved(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    task: Task,
    batch_size: int = 32,
    system: str | None = SYSTEM,
) -> list[bool]:
    """For each question, whether the model's greedy answer passes the task's check; `batch_size` and `system` as for `generate`."""
    questions = [pair.prompt for pair in task.pairs]
    answers = [pair.response for pair in task.pairs]
    if task.check == "label":
        logits = next_token_logits(model, tokenizer, questions, batch_size=batch_size, system=system)
        starts = [str(tokenizer.decode(token)).strip().lower() for token in logits.argmax(-1).tolist()]
        return [bool(s) and answer.lower().startswith(s) for s, answer in zip(starts, answers, strict=True)]
    longest = max((len(_ids(tokenizer, answer)) for answer in answers), default=1)
    tokens = NUMBER_TOKENS if task.check == "number" else longest + 2
    replies = generate(model, tokenizer, questions, max_new_tokens=tokens, batch_size=batch_size, system=system)
    passes = last_number_is if task.check == "number" else begins_with
    return [passes(reply, answer) for reply, answer in zip(replies, answers, strict=True)]


def last_number_is(reply: str, answer: str) -> bool:
    """Whether the last number in the reply equals the answer; commas inside numbers do not matter.

    >>> last_number_is("20 + 1,003 = 1,023.", "1023"), last_number_is("20", "21"), last_number_is("none", "0")
    (True, False, False)
    """
    numbers = _NUMBER.findall(reply)
    return bool(numbers) and float(numbers[-1].replace(",", "")) == float(answer)


def begins_with(reply: str, answer: str) -> bool:
    """Whether the reply begins with the answer and does not go on with the same word; case does not matter.

    >>> begins_with("Positive.", "positive"), begins_with("Positively", "positive")
    (True, False)
    """
    start, wanted = reply.strip().lower(), answer.strip().lower()
    return start.startswith(wanted) and not start[len(wanted) : len(wanted) + 1].isalnum()


def _ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]
