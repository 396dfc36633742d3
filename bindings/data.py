"""Texts for calibration: from a file or a list of rows to batches of tokens."""

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hftcore.bindings.progress import Track
from hftcore.errors import HftcoreError

log = logging.getLogger("hftcore")

COLUMNS = "`messages`, `prompt` and `completion`, `instruction` and `output` (and `input`), or `text`"
ROLES = ("system", "user", "assistant")

_PREFACE = "Below is an instruction that describes a task"
_TASK = ". Write a response that appropriately completes the request.\n\n"
_TASK_WITH_INPUT = ", paired with an input that provides further context" + _TASK


@dataclass(frozen=True)
class Sample:
    """One text: plain (`text`), or the turns of a chat whose assistant turns are the response.

    `turns` holds (role, content) pairs; `context` is Alpaca's `input` column, for which its template has a place.
    """

    text: str = ""
    turns: tuple[tuple[str, str], ...] = ()
    context: str = ""


def load_samples(source: str | Path | Sequence[Any]) -> list[Sample]:
    """The samples of a file or of rows in memory, in their order.

    Args:
        source: a `.jsonl` file (one object a line) or `.txt` file (one sample a line), blank lines skipped; or
            anything with `__len__` and `__getitem__` whose rows are dicts or strings (a list, a `datasets.Dataset`).
            The columns of a row are `messages`, `prompt` and `completion`, `instruction` and `output` (and `input`), or
            `text`; of several, the first in this order counts.

    Raises:
        HftcoreError: no such file, another kind of file, a malformed row (named by file and line), or no rows at all.

    >>> load_samples([{"prompt": "1 + 1 =", "completion": "2"}])
    [Sample(text='', turns=(('user', '1 + 1 ='), ('assistant', '2')), context='')]
    """
    name = str(source) if isinstance(source, (str, Path)) else "data"
    samples = [_sample(row, where) for where, row in _rows(source)]
    if not samples:
        raise HftcoreError(f"{name} holds no samples; give at least one row")
    return samples


def _rows(source: str | Path | Sequence[Any]) -> Iterator[tuple[str, Any]]:
    """(where, row) for every row, where naming file and line."""
    if not isinstance(source, (str, Path)):
        if not (hasattr(source, "__len__") and hasattr(source, "__getitem__")):
            raise HftcoreError(f"data must be a file or have __len__ and __getitem__, got {type(source).__name__}")
        yield from ((f"data[{index}]", source[index]) for index in range(len(source)))
        return
    path = Path(source)
    if path.suffix not in (".jsonl", ".txt"):
        raise HftcoreError(f"data must be a .jsonl or .txt file, got {path}; convert it to one JSON object a line")
    if not path.is_file():
        raise HftcoreError(f"data must be an existing file, got {path}")
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            where = f"{path}, line {number}"
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                if text:
                    yield where, text if path.suffix == ".txt" else json.loads(text)
            except UnicodeDecodeError as error:
                raise HftcoreError(f"{where}: not UTF-8 (byte {error.start}); save the file as UTF-8") from error
            except (ValueError, RecursionError) as error:
                raise HftcoreError(f"{where}: not valid JSON ({error}); write one object a line") from error


def _sample(row: Any, where: str) -> Sample:
    if isinstance(row, str):
        return Sample(text=row)
    if not isinstance(row, Mapping):
        raise HftcoreError(f"{where}: a row must be an object with {COLUMNS}, got {type(row).__name__}")
    if "messages" in row:
        return Sample(turns=_turns(row["messages"], where, "messages"))
    if "prompt" in row and "completion" in row:
        prompt, completion = row["prompt"], row["completion"]
        if isinstance(prompt, Sequence) and isinstance(completion, Sequence) and not isinstance(prompt, str):
            return Sample(turns=_turns([*prompt, *completion], where, "prompt and completion"))
        turns = (("user", _string(row, "prompt", where)), ("assistant", _string(row, "completion", where)))
        return Sample(turns=turns)
    if "instruction" in row and "output" in row:
        turns = (("user", _string(row, "instruction", where)), ("assistant", _string(row, "output", where)))
        return Sample(turns=turns, context=_string(row, "input", where) if row.get("input") else "")
    if "text" in row:
        return Sample(text=_string(row, "text", where))
    found = ", ".join(f"`{key}`" for key in list(row)[:8]) or "none"
    raise HftcoreError(f"{where}: a row must have the columns {COLUMNS}, got {found}")


def _string(row: Mapping[str, Any], column: str, where: str) -> str:
    if not isinstance(row[column], str):
        raise HftcoreError(f"{where}: `{column}` must be a string, got {type(row[column]).__name__}")
    return row[column]


def _turns(messages: Any, where: str, column: str) -> tuple[tuple[str, str], ...]:
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise HftcoreError(
            f"{where}: `{column}` must be a list of turns with `role` and `content`, got {messages!r:.60}"
        )
    for index, turn in enumerate(messages):
        if not isinstance(turn, Mapping) or turn.get("role") not in ROLES or not isinstance(turn.get("content"), str):
            raise HftcoreError(
                f"{where}: turn {index} of `{column}` must have a `role` of {', '.join(ROLES)} and a `content` string, "
                f"got {turn!r:.80}"
            )
    return tuple((turn["role"], turn["content"]) for turn in messages)


def make_batches(
    samples: Sequence[Sample],
    tokenizer: Any,
    batch_size: int = 8,
    max_length: int = 512,
    num_samples: int | None = None,
    response_labels: bool = True,
) -> list[dict[str, Tensor]]:
    """Right-padded batches in the order of the samples, ready for a causal model's forward.

    Chats go through the tokenizer's chat template or, when it has none, through Alpaca's template with an end-of-text
    token after each response. Tokens past `max_length` are cut off. A sample left without a counted token is skipped;
    the log says so.

    Args:
        samples: what `load_samples` returned.
        tokenizer: of transformers; its `padding_side` is neither used nor changed.
        batch_size: samples in a batch, >= 1.
        max_length: tokens of a sample that are kept, >= 1.
        num_samples: use only the first so many samples; None for all.
        response_labels: count only assistant turns (a plain text counts everywhere); False counts every token.

    Returns:
        Dicts of [B, T] int64 tensors on the CPU: `input_ids`; `attention_mask`, 0 on padding; `labels`, the token or
        -100 where it does not count. T is the longest sample of the batch.

    Raises:
        HftcoreError: a number out of range, or every sample skipped.
    """
    for name, value in (("batch_size", batch_size), ("max_length", max_length), ("num_samples", num_samples)):
        if value is not None and value < 1:
            raise HftcoreError(f"{name} must be at least 1, got {value}")
    used = list(samples[:num_samples])
    encoded, skipped = [], []
    for index, sample in enumerate(Track(used, "tokenizing")):
        ids, counted = _encode(sample, tokenizer)
        labels = [token if counts or not response_labels else -100 for token, counts in zip(ids, counted, strict=True)][
            :max_length
        ]
        if any(label != -100 for label in labels):
            encoded.append((ids[:max_length], labels))
        else:
            skipped.append(index)
    if skipped:
        what, remedy = f"response token within max_length={max_length}", "raise max_length, or count all tokens"
        if not response_labels:
            what, remedy = "token", "give texts that are not empty"
        reason = f"{len(skipped)} of {len(used)} samples (the first is number {skipped[0] + 1}) have no {what}"
        if not encoded:
            raise HftcoreError(f"{reason}; {remedy}")
        log.warning("skipped: %s", reason)
    pad = next((token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id) if token is not None), 0)
    return [_pad(encoded[start : start + batch_size], pad) for start in range(0, len(encoded), batch_size)]


def _pad(rows: Sequence[tuple[list[int], list[int]]], pad: int) -> dict[str, Tensor]:
    shape = len(rows), max(len(ids) for ids, _ in rows)
    batch = {
        "input_ids": torch.full(shape, pad),
        "attention_mask": torch.zeros(shape, dtype=torch.int64),
        "labels": torch.full(shape, -100),
    }
    for row, (ids, labels) in enumerate(rows):
        batch["input_ids"][row, : len(ids)] = torch.tensor(ids)
        batch["attention_mask"][row, : len(ids)] = 1
        batch["labels"][row, : len(ids)] = torch.tensor(labels)
    return batch


def _encode(sample: Sample, tokenizer: Any) -> tuple[list[int], list[bool]]:
    """Token ids of a whole sample, and for each whether it counts as response."""
    if not sample.turns:
        ids = tokenizer(sample.text)["input_ids"]
        return ids, [True] * len(ids)
    has_template = bool(getattr(tokenizer, "chat_template", None))
    parts = _chat_parts(sample, tokenizer) if has_template else alpaca_parts(sample, tokenizer.eos_token or "")
    # a chat template writes the special tokens itself
    options = {"add_special_tokens": not has_template}
    if not getattr(tokenizer, "is_fast", False):
        return _encode_apart(parts, tokenizer, options)
    encoding = tokenizer("".join(text for text, _ in parts), return_offsets_mapping=True, **options)
    spans, position = [], 0
    for text, is_response in parts:
        if is_response:
            spans.append((position, position + len(text)))
        position += len(text)
    counted = [any(begin < stop and end > start for start, stop in spans) for begin, end in encoding["offset_mapping"]]
    return encoding["input_ids"], counted


def _encode_apart(
    parts: list[tuple[str, bool]], tokenizer: Any, options: dict[str, bool]
) -> tuple[list[int], list[bool]]:
    """The same for tokenizers that do not tell where a token came from: every part on its own."""
    ids: list[int] = []
    counted: list[bool] = []
    for index, (text, is_response) in enumerate(parts):
        part = tokenizer(text, add_special_tokens=options["add_special_tokens"] and index == 0)["input_ids"]
        ids += part
        counted += [is_response] * len(part)
    return ids, counted


def _chat_parts(sample: Sample, tokenizer: Any) -> list[tuple[str, bool]]:
    """The rendered chat cut into (text, is response) parts."""
    messages = [{"role": role, "content": content} for role, content in sample.turns]
    if sample.context:
        messages[0] = {"role": messages[0]["role"], "content": f"{messages[0]['content']}\n\n{sample.context}"}

    def render(turns: list[dict[str, str]], prompt: bool) -> str:
        return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=prompt)

    whole = render(messages, False)
    parts, position = [], 0
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        start = _common(whole, render(messages[:index], True)) if index else 0
        stop = _common(whole, render(messages[: index + 1], False))
        start = max(start, position)
        parts += [(whole[position:start], False), (whole[start:stop], True)]
        position = max(position, stop)
    return [*parts, (whole[position:], False)]


def _common(whole: str, prefix: str) -> int:
    """How far two renderings of a chat agree: a template may write the last turn unlike the same turn further up."""
    if whole.startswith(prefix):
        return len(prefix)
    return next(
        (index for index, (a, b) in enumerate(zip(whole, prefix, strict=False)) if a != b), min(len(whole), len(prefix))
    )


def alpaca_parts(sample: Sample, end: str) -> list[tuple[str, bool]]:
    """Alpaca's template, as the papers on harmful fine-tuning use it; further turns repeat it without the preface."""
    parts = [(_PREFACE + (_TASK_WITH_INPUT if sample.context else _TASK), False)]
    for role, content in sample.turns:
        if role == "system":
            parts.append((f"{content}\n\n", False))
        elif role == "user":
            parts.append((f"### Instruction:\n{content}\n\n", False))
            if sample.context:
                parts.append((f"### Input:\n{sample.context}\n\n", False))
        else:
            parts += [("### Response:", False), (f"{content}{end}", True), ("\n\n", False)]
    return parts[:-1] if sample.turns[-1][0] == "assistant" else parts
