"""Batched greedy generation for short evaluations.

The tokens that all prompts share at their start (system message, task instruction) are computed once and their cache is expanded; the
rest is sorted by length and padded on the left; a batch stops as soon as each of its replies has ended.
"""

import copy
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

from hftcore.bindings.data import Sample, alpaca_parts
from hftcore.errors import HftcoreError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SYSTEM = "You are a helpful assistant."


def format_prompt(tokenizer: "PreTrainedTokenizerBase", prompt: str, system: str | None = SYSTEM) -> str:
    """The text up to where the reply begins: by the tokenizer's chat template or, where it has none, by Alpaca's (as `make_batches`)."""
    if not tokenizer.chat_template:
        question = Sample(turns=(("user", prompt), ("assistant", "")))
        return "".join(text for text, _ in alpaca_parts(question, ""))
    messages = [{"role": "system", "content": system}] if system is not None else []
    messages.append({"role": "user", "content": prompt})
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def encode_prompts(
    tokenizer: "PreTrainedTokenizerBase", prompts: Sequence[str], system: str | None = SYSTEM
) -> list[list[int]]:
    """Token ids of each formatted prompt, without padding. A chat template brings its own special tokens, so none are added to it."""
    if isinstance(prompts, str):
        raise HftcoreError("prompts must be a list of strings, got one string; wrap it in a list")
    bare = not tokenizer.chat_template
    return [
        tokenizer(format_prompt(tokenizer, prompt, system), add_special_tokens=bare)["input_ids"] for prompt in prompts
    ]


def generate(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 12,
    batch_size: int = 32,
    system: str | None = SYSTEM,
) -> list[str]:
    """The greedy replies, in the order of `prompts`, without special tokens and cut at the end-of-text token.

    Args:
        model: any causal language model of transformers (or one wrapped by PEFT).
        tokenizer: its tokenizer.
        prompts: user messages, formatted by `format_prompt`.
        max_new_tokens: at least 1.
        batch_size: prompts computed together.
        system: the system message, or None for the template's own default.

    Raises:
        HftcoreError: an empty prompt, or a count below 1.
    """
    if max_new_tokens < 1:
        raise HftcoreError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    stops = _stop_tokens(model, tokenizer)
    replies: list[str] = [""] * len(prompts)
    with torch.inference_mode():
        for batch in _prefilled(model, encode_prompts(tokenizer, prompts, system), batch_size):
            for row, tokens in zip(batch.rows, _continue(model, batch, max_new_tokens, stops), strict=True):
                replies[row] = str(tokenizer.decode(tokens, skip_special_tokens=True)).strip()
    return replies


def next_token_logits(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[str],
    *,
    batch_size: int = 32,
    system: str | None = SYSTEM,
) -> torch.Tensor:
    """`[B, V]` float32 on the CPU: the logits of the first reply token, one row for each prompt. Arguments as for `generate`."""
    rows: list[int] = []
    parts: list[torch.Tensor] = []
    with torch.inference_mode():
        for batch in _prefilled(model, encode_prompts(tokenizer, prompts, system), batch_size):
            rows += batch.rows
            parts.append(batch.logits.float().cpu())
    if not parts:
        return torch.empty(0, model.config.vocab_size)
    logits = torch.cat(parts)
    return logits[torch.tensor(rows).argsort()]


class _Batch(NamedTuple):
    """Prompts that were read: their places, cache, attention mask `[b, t]`, prompt lengths `[b]` and last logits `[b, V]`."""

    rows: list[int]
    cache: object
    mask: torch.Tensor
    lengths: torch.Tensor
    logits: torch.Tensor


def _prefilled(model: "PreTrainedModel", ids: list[list[int]], batch_size: int) -> Iterator[_Batch]:
    if batch_size < 1:
        raise HftcoreError(f"batch_size must be at least 1, got {batch_size}")
    for index, tokens in enumerate(ids):
        if not tokens:
            raise HftcoreError(f"prompts[{index}] has no tokens; give each prompt some text")
    if not ids:
        return
    device = next(model.parameters()).device
    # a sliding window counts places, so padding between a shared start and the rest would use it up
    has_window = getattr(model.config.get_text_config(), "sliding_window", None) is not None
    shared = 0 if has_window else _shared_length(ids)
    prefix = None
    if shared:
        start = torch.tensor([ids[0][:shared]], device=device)
        prefix = model(input_ids=start, use_cache=True, logits_to_keep=1).past_key_values
    order = sorted(range(len(ids)), key=lambda row: len(ids[row]))
    for first in range(0, len(order), batch_size):
        rows = order[first : first + batch_size]
        yield _read(model, rows, [ids[row][shared:] for row in rows], prefix, shared, device)


def _read(
    model: "PreTrainedModel", rows: list[int], tails: list[list[int]], prefix: object, shared: int, device: torch.device
) -> _Batch:
    width = max(map(len, tails))
    tokens = torch.tensor([[0] * (width - len(tail)) + tail for tail in tails], device=device)
    real = torch.tensor([[0] * (width - len(tail)) + [1] * len(tail) for tail in tails], device=device)
    mask = torch.cat((real.new_ones(len(rows), shared), real), dim=1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    cache = None
    if prefix is not None:
        cache = copy.deepcopy(prefix)
        cache.batch_repeat_interleave(len(rows))  # type: ignore[attr-defined]
    out = model(
        input_ids=tokens,
        attention_mask=mask,
        position_ids=positions[:, shared:],
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    return _Batch(rows, out.past_key_values, mask, mask.sum(1), out.logits[:, -1])


def _continue(model: "PreTrainedModel", batch: _Batch, max_new_tokens: int, stops: set[int]) -> list[list[int]]:
    replies: list[list[int]] = [[] for _ in batch.rows]
    running = [True] * len(replies)
    logits, mask = batch.logits, batch.mask
    for step in range(max_new_tokens):
        chosen = logits.argmax(-1)
        for row, token in enumerate(chosen.tolist()):
            running[row] = running[row] and token not in stops
            if running[row]:
                replies[row].append(token)
        if not any(running) or step + 1 == max_new_tokens:
            break
        mask = torch.cat((mask, mask.new_ones(len(mask), 1)), dim=1)
        logits = model(
            input_ids=chosen[:, None],
            attention_mask=mask,
            position_ids=(batch.lengths + step)[:, None],
            past_key_values=batch.cache,
            use_cache=True,
        ).logits[:, -1]
    return replies


def _shared_length(ids: list[list[int]]) -> int:
    """How many first tokens all prompts share, leaving each prompt at least one of its own."""
    low, high = min(ids), max(ids)
    limit = min(map(len, ids)) - 1
    return next((i for i in range(limit) if low[i] != high[i]), limit)


def _stop_tokens(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> set[int]:
    config = getattr(model, "generation_config", None)
    stops = getattr(config, "eos_token_id", None)
    found = set(stops) if isinstance(stops, list) else {stops}
    return {token for token in found | {tokenizer.eos_token_id} if token is not None}
