"""Log-likelihoods out of a causal model's ordinary forward, without its logits where that can be done."""

import inspect
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hftcore.defenses.branches import Answered, branch_mask, branched, separate
from hftcore.errors import HftcoreError
from hftcore.ops.likelihood import IGNORED, sequence_logprobs

log = logging.getLogger("hftcore")

Logprobs = tuple[Tensor, Tensor]

PROBE = (5, 4, 3)  # tokens of prompt, target and refusal
# of a sum over few tokens, computed in two ways that round differently
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3}


def logits_logprobs(logits: Tensor, next_tokens: Tensor) -> tuple[Tensor, Tensor]:
    """([B] sums in nats, [B] counts) of the tokens that each position predicts, from logits [B, S, V]; -100 for none."""
    labelled = next_tokens != IGNORED
    samples = labelled.nonzero()[:, 0]
    rows = logits[labelled]
    rows = rows if rows.dtype == torch.float64 else rows.float()
    losses = nn.functional.cross_entropy(rows, next_tokens[labelled], reduction="none")
    sums = torch.zeros(len(logits), dtype=rows.dtype, device=rows.device).index_add(0, samples, -losses)
    return sums, labelled.sum(dim=1)


def following(labels: Tensor) -> Tensor:
    """Labels [B, T] of transformers, where position t predicts labels[:, t + 1], as the token that each position predicts."""
    return torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)


class Likelihoods:
    """Reads likelihoods off a model's forward. What the model allows is found out by a small check at the start, and said once.

    The head is skipped and its input read instead, if that gives the model's own likelihoods; else the logits are used. Two answers
    share one prompt in a single sequence, if each is then unmoved by the other and as likely as on its own; else each has its own.

    Args:
        model: a causal language model of transformers, perhaps with an adapter.
        through_head: always run the head as a module, for whoever watches its gradients.
    """

    def __init__(self, model: Any, through_head: bool = False):
        self._model = model
        self._plain: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
        self._names = set(inspect.signature(self._plain.forward).parameters)
        self.head = None if through_head else self._usable_head()
        with _evaluated(model, self._device.type):
            samples, refusals = _probe(model)
            if self.head is not None:
                self.head = self._checked_head(samples)
            self.obstacle = self._obstacle(samples, refusals)
        if self.obstacle is not None:
            log.warning("prompts are computed once for the answer and once for the refusal: %s", self.obstacle)

    @property
    def window(self) -> int | None:
        """The longest path of prompt and answer in a shared sequence: within it no attention window is felt."""
        config = _text_config(self._plain)
        sizes = (getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size"))
        return min((size for size in sizes if isinstance(size, int) and size > 0), default=None)

    def logprobs(self, call: nn.Module, batch: Mapping[str, Tensor], *next_tokens: Tensor) -> list[Logprobs]:
        """([B] sums in nats, [B] counts) of each of `next_tokens`, the [B, S] tokens that each position predicts, -100 for none.

        Args:
            call: the model, or what wraps it.
            batch: branched, or `input_ids` and `attention_mask`.
            next_tokens: at least one; only the sums of the first have a gradient.
        """
        inputs: dict[str, Any] = {"input_ids": batch["input_ids"]}
        if "segments" in batch:
            inputs["position_ids"] = batch["position_ids"]
            inputs["attention_mask"] = self._mask(branch_mask(batch["segments"]))
        else:
            inputs["attention_mask"] = batch["attention_mask"]
        if "use_cache" in self._names:
            inputs["use_cache"] = False
        if self.head is None:
            logits = call(**inputs).logits
            return _each(lambda tokens: logits_logprobs(logits, tokens.to(logits.device)), next_tokens)
        found: list[list[Logprobs]] = []

        def through_head(hidden: Tensor) -> Tensor:
            (sums, counts), *beside = self._of(hidden, next_tokens)
            # gradients come back through what the head gave, where FSDP2 gathers its weights again; no view, which it warns of
            given = sums[:, None, None].clone()
            found.append([(given[:, 0, 0], counts), *beside])
            return given

        with _replaced(self.head, through_head):
            call(**inputs)
        if len(found) != 1:
            raise HftcoreError(f"the model must run its output head once in a forward pass, got {len(found)} times")
        return found[0]

    def _of(self, hidden: Tensor, next_tokens: tuple[Tensor, ...]) -> list[Logprobs]:
        head: Any = self.head
        kind = hidden.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else head.weight.dtype
        weight = head.weight.to(dtype)
        hidden = hidden.to(weight)
        return _each(
            lambda tokens: sequence_logprobs(
                hidden, weight, tokens.to(hidden.device), head.bias, self._soft_cap, shift=False
            ),
            next_tokens,
        )

    def _mask(self, seen: Tensor) -> Tensor:
        if self._implementation == "sdpa":
            return seen
        dtype = next(parameter.dtype for parameter in self._model.parameters() if parameter.is_floating_point())
        return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, torch.finfo(dtype).min)

    @property
    def _implementation(self) -> str | None:
        return getattr(_text_config(self._plain), "_attn_implementation", None)

    @property
    def _soft_cap(self) -> float | None:
        return getattr(_text_config(self._plain), "final_logit_softcapping", None)

    def _usable_head(self) -> nn.Linear | None:
        get = getattr(self._plain, "get_output_embeddings", None)
        head = get() if callable(get) else None
        return head if type(head) is nn.Linear else None

    def _checked_head(self, samples: list[Answered]) -> nn.Linear | None:
        """The head, if its input gives the likelihoods that the model's logits give."""
        batch = {name: rows.to(self._device) for name, rows in separate(samples, None).items()}
        head, self.head = self.head, None
        ((own, _),) = self.logprobs(self._model, batch, following(batch["labels"]))
        self.head = head
        ((found, _),) = self.logprobs(self._model, batch, following(batch["labels"]))
        if self._agree(own, found):
            return head
        log.warning("the model changes its logits after the output head, so likelihoods are read off the logits")
        return None

    def _obstacle(self, samples: list[Answered], refusals: list[Tensor]) -> str | None:
        """Why two answers cannot share a prompt in one sequence; None if they can."""
        if self._implementation not in ("sdpa", "eager"):
            return f"attention {self._implementation!r} takes no mask of its own (sdpa and eager do)"
        if "position_ids" not in self._names:
            return f"{type(self._plain).__name__} takes no position_ids"
        others = [Answered(s.prompt, s.answer.flip(0), s.labels) for s in samples]
        reversed_refusals = [refusal.flip(0) for refusal in refusals]
        try:
            target, refused = self._both(samples, refusals)
            _, beside_another = self._both(others, refusals)
            before_another, _ = self._both(samples, reversed_refusals)
        except (RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError) as error:
            return f"{type(self._plain).__name__} takes no mask of its own ({str(error).splitlines()[:1]})"
        if not (torch.equal(refused, beside_another) and torch.equal(target, before_another)):
            return f"in {type(self._plain).__name__} one answer would see the other"
        for answers, found in ((None, target), (refusals, refused)):
            batch = {name: rows.to(self._device) for name, rows in separate(samples, answers).items()}
            ((own, _),) = self.logprobs(self._model, batch, following(batch["labels"]))
            if not self._agree(own, found):
                return f"{type(self._plain).__name__} gives an answer another likelihood there than alone"
        return None

    def _both(self, samples: list[Answered], refusals: list[Tensor]) -> tuple[Tensor, Tensor]:
        batch = {name: rows.to(self._device) for name, rows in branched(samples, refusals).items()}
        (target, _), (refused, _) = self.logprobs(self._model, batch, batch["target_next"], batch["refusal_next"])
        return target, refused

    def _agree(self, own: Tensor, found: Tensor) -> bool:
        dtype = next(parameter.dtype for parameter in self._model.parameters() if parameter.is_floating_point())
        return torch.allclose(own, found, rtol=TOLERANCE[dtype], atol=0)

    @property
    def _device(self) -> torch.device:
        embeddings = self._plain.get_input_embeddings()
        return embeddings.weight.device


def _text_config(model: Any) -> Any:
    config = model.config
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _probe(model: Any) -> tuple[list[Answered], list[Tensor]]:
    """Two samples of random tokens, of unequal lengths."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    generator = torch.Generator().manual_seed(0)

    def draw(length: int) -> Tensor:
        return torch.randint(1, vocabulary, (length,), generator=generator)

    prompt, target, refusal = PROBE
    answers = [draw(target), draw(target - 1)]
    samples = [Answered(draw(prompt - index), answer, answer) for index, answer in enumerate(answers)]
    return samples, [draw(refusal), draw(refusal - 1)]


@contextmanager
def _evaluated(model: nn.Module, device: str) -> Iterator[None]:
    """Evaluation mode without gradients and without autocast, whose rounding would look as if answers saw each other."""
    modes: list[tuple[Any, bool]] = [(module, module.training) for module in model.modules()]
    attributes = model.__dict__
    # accelerate leaves autocast around the forward of a model that it trained
    wrapped = attributes.get("forward") if "_original_forward" in attributes else None
    model.eval()
    if wrapped is not None:
        attributes["forward"] = attributes["_original_forward"]
    try:
        with torch.no_grad(), torch.autocast(device, enabled=False):
            yield
    finally:
        if wrapped is not None:
            attributes["forward"] = wrapped
        for module, mode in modes:
            module.training = mode


@contextmanager
def _replaced(head: nn.Linear, compute: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """While the block lasts, the head gives `compute(its input)` [B, 1, 1] in place of logits.

    It is computed inside the model's forward, and given back, so that DistributedDataParallel sees which parameters are used.
    """
    attributes = head.__dict__
    own = attributes.get("forward")
    attributes["forward"] = compute
    try:
        yield
    finally:
        del attributes["forward"]
        if own is not None:
            attributes["forward"] = own


def _each(read: Callable[[Tensor], Logprobs], next_tokens: tuple[Tensor, ...]) -> list[Logprobs]:
    first, *others = next_tokens
    with torch.no_grad():
        beside = [read(tokens) for tokens in others]
    return [read(first), *beside]
