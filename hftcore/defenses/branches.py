"""Two answers to one prompt in a single sequence: prompt, target, refusal, where neither answer sees the other."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hftcore.errors import HftcoreError

PAD, PROMPT, TARGET, REFUSAL = range(4)
IGNORED = -100


class Answered(NamedTuple):
    """A sample cut at its first supervised token: prompt [P], answer [L] and the answer's labels [L]."""

    prompt: Tensor
    answer: Tensor
    labels: Tensor


def cut(input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> list[Answered]:
    """The samples of a batch without their padding, on either side.

    Args:
        input_ids, attention_mask, labels: [B, T] integers; labels -100 where nothing is supervised.

    Raises:
        HftcoreError: a sample without a supervised token, or without a prompt before the first one.

    >>> rows = torch.tensor([[0, 7, 8, 9]]), torch.tensor([[0, 1, 1, 1]]), torch.tensor([[-100, -100, 8, 9]])
    >>> cut(*rows)[0].prompt, cut(*rows)[0].answer
    (tensor([7]), tensor([8, 9]))
    """
    samples = []
    for row, (ids, mask, own) in enumerate(zip(input_ids, attention_mask.bool(), labels, strict=True)):
        ids, own = ids[mask], own[mask]
        supervised = (own != IGNORED).nonzero()
        if len(supervised) == 0:
            raise HftcoreError(
                f"sample {row} has no supervised token (all labels -100); leave it out, or keep more tokens"
            )
        start = int(supervised[0])
        if start == 0:
            raise HftcoreError(
                f"sample {row} has no prompt: its first token is supervised; set the labels of the prompt to -100, so that it is known "
                "what a refusal would answer"
            )
        samples.append(Answered(ids[:start], ids[start:], own[start:]))
    return samples


def branched(samples: Sequence[Answered], refusals: Sequence[Tensor], pad: int = 0) -> dict[str, Tensor]:
    """One right-padded batch of prompt, target and refusal, S long.

    Args:
        samples: as `cut` returns them.
        refusals: [R] tokens for each.
        pad: token on padding.

    Returns:
        [B, S] int64 tensors: `input_ids`; `position_ids`, both answers going on from the prompt; `segments`, of PAD, PROMPT, TARGET and
        REFUSAL; and `target_next` and `refusal_next`, the token that each position predicts in either branch, or -100. The prompt's last
        token predicts the first of both.

    >>> batch = branched([Answered(torch.tensor([7]), torch.tensor([8, 9]), torch.tensor([8, 9]))], [torch.tensor([3])])
    >>> batch["input_ids"].tolist(), batch["position_ids"].tolist()
    ([[7, 8, 9, 3]], [[0, 1, 2, 1]])
    >>> batch["target_next"].tolist(), batch["refusal_next"].tolist()
    ([[8, 9, -100, -100]], [[3, -100, -100, -100]])
    """
    rows: dict[str, list[Tensor]] = {
        name: [] for name in ("input_ids", "position_ids", "segments", "target_next", "refusal_next")
    }
    for sample, refusal in zip(samples, refusals, strict=True):
        P, L, R = len(sample.prompt), len(sample.answer), len(refusal)
        rows["input_ids"].append(torch.cat([sample.prompt, sample.answer, refusal]))
        rows["position_ids"].append(torch.cat([torch.arange(P + L), torch.arange(P, P + R)]))
        rows["segments"].append(torch.tensor([PROMPT] * P + [TARGET] * L + [REFUSAL] * R))
        target, refused = torch.full((P + L + R,), IGNORED), torch.full((P + L + R,), IGNORED)
        target[P - 1 : P + L - 1] = sample.labels
        refused[P - 1] = refusal[0]
        refused[P + L : P + L + R - 1] = refusal[1:]
        rows["target_next"].append(target)
        rows["refusal_next"].append(refused)
    fill = {"input_ids": pad, "target_next": IGNORED, "refusal_next": IGNORED}
    return {
        name: torch.nn.utils.rnn.pad_sequence(values, batch_first=True, padding_value=fill.get(name, 0))
        for name, values in rows.items()
    }


def branch_mask(segments: Tensor) -> Tensor:
    """Who sees whom: [B, 1, S, S] bool, true where the query (third axis) sees the key (fourth).

    What comes before in the prompt or in one's own branch, and always oneself, so that no row of the softmax is empty.

    Args:
        segments: [B, S] as `branched` returns them.

    >>> branch_mask(torch.tensor([[1, 2, 3]]))[0, 0].int()
    tensor([[1, 0, 0],
            [1, 1, 0],
            [1, 0, 1]], dtype=torch.int32)
    """
    S = segments.shape[1]
    before = torch.ones(S, S, dtype=torch.bool, device=segments.device).tril()
    query, key = segments[:, :, None], segments[:, None, :]
    seen = (key == PROMPT) | ((key == query) & (key != PAD))
    return ((seen & before) | torch.eye(S, dtype=torch.bool, device=segments.device)).unsqueeze(1)


def separate(samples: Sequence[Answered], refusals: Sequence[Tensor] | None, pad: int = 0) -> dict[str, Tensor]:
    """A plain right-padded batch of prompts and answers, or of prompts and refusals: `input_ids`, `attention_mask`, `labels`, [B, T]."""
    rows = []
    for index, sample in enumerate(samples):
        answer, labels = (sample.answer, sample.labels) if refusals is None else (refusals[index], refusals[index])
        blank = torch.full((len(sample.prompt),), IGNORED)
        ids = torch.cat([sample.prompt, answer])
        rows.append((ids, torch.ones_like(ids), torch.cat([blank, labels])))
    return {
        name: torch.nn.utils.rnn.pad_sequence([row[place] for row in rows], batch_first=True, padding_value=value)
        for place, (name, value) in enumerate((("input_ids", pad), ("attention_mask", 0), ("labels", IGNORED)))
    }
