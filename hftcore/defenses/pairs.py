"""A harmless and a harmful answer to one prompt, compared token by token: what immunization and RepNoise learn from."""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, pad

from hftcore.defenses.settings import check_choice
from hftcore.errors import HftcoreError

IGNORED = -100
RULES = ("shifted", "code")


def differing(
    ids: Tensor, mask: Tensor, other_ids: Tensor, other_mask: Tensor, fill: int, rule: str = "shifted"
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Both answers as batches of one length, whose labels are the tokens in which they differ.

    The shared prompt and tokens that happen to be equal drop out. A pair that does not differ has no label.

    Args:
        ids, mask: [B, T] harmless tokens and their attention mask, padded on the right.
        other_ids, other_mask: [B, S] harmful ones.
        fill: token to pad with; for rule "code", which scores padding, the one that the batches were padded with.
        rule: "shifted", which counts neither padding nor first tokens, which nothing predicts; or "code", the published labels: of padding
            beside an answer too, but not of token 0.

    Returns:
        (harmless, harmful): `input_ids`, `attention_mask` and `labels`, [B, max(T, S)], and `differs`, bool.

    Raises:
        HftcoreError: another rule, batches of different size, or padding on the left.

    >>> ids, other = torch.tensor([[5, 6, 7]]), torch.tensor([[5, 8, 7, 9]])
    >>> harmless, harmful = differing(ids, torch.ones_like(ids), other, torch.ones_like(other), fill=0)
    >>> harmless["labels"].tolist(), harmful["labels"].tolist()
    ([[-100, 6, -100, -100]], [[-100, 8, -100, 9]])
    """
    check_choice("mask_rule", rule, RULES)
    if len(ids) != len(other_ids):
        raise HftcoreError(f"harmless and harmful answers must be as many, got {len(ids)} and {len(other_ids)}")
    if not (bool(mask[:, 0].all()) and bool(other_mask[:, 0].all())):
        raise HftcoreError("pairs must be padded on the right, so that equal prompts stand side by side")
    length = max(ids.shape[1], other_ids.shape[1])
    rows = [
        (pad(own, (0, length - own.shape[1]), value=fill), pad(seen, (0, length - seen.shape[1])))
        for own, seen in ((ids, mask), (other_ids, other_mask))
    ]
    differs = rows[0][0] != rows[1][0]
    # a token opposite padding differs, whatever the padding is made of
    differs |= rows[0][1] != rows[1][1] if rule == "shifted" else torch.zeros_like(differs)
    batches = []
    for own, seen in rows:
        scored = differs & (own != 0 if rule == "code" else seen.bool())
        labels = own.masked_fill(~scored, IGNORED)
        labels[:, 0] = IGNORED
        batches.append({"input_ids": own, "attention_mask": seen, "labels": labels, "differs": differs})
    return batches[0], batches[1]


def masked_logits_loss(logits: Tensor, labels: Tensor, differs: Tensor) -> Tensor:
    """Σ of the published loss over labelled tokens: logits at positions that do not differ count as zero, 0-d.

    So the first token of a differing stretch is scored by a uniform distribution, log V, without a gradient.

    Args:
        logits: [B, T, V]; position t predicts labels[:, t + 1].
        labels, differs: [B, T] as `differing` gives them for rule "code".

    >>> logits, differs = torch.tensor([[[9.0, 0.0], [9.0, 0.0], [0.0, 0.0]]]), torch.tensor([[False, True, True]])
    >>> masked_logits_loss(logits, torch.tensor([[-100, 1, 1]]), differs)          # log 2 and 9
    tensor(9.6933)
    """
    shown = logits[:, :-1] * differs[:, :-1, None]
    return cross_entropy(shown.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED, reduction="sum")
