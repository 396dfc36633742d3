"""The ops: checked and dispatched to a backend; those of scoring and removal also stand under `torch.ops.hftcore`.

Everything about ranking is the same for all of them: the score of a weight is fp32(|w|) * sqrt(energy), one rounding; weights are
ordered by (score, position) ascending; a NaN or infinite score is refused before anything is changed. Masks are packed, one bit a
weight, 1 = removed: bit j (least significant first) of byte b of a row is column 8 b + j.
"""

from hftcore.ops import registry as registry
from hftcore.ops.energy import column_energy
from hftcore.ops.fingerprints import fingerprint
from hftcore.ops.gradients import embedding_grad_norms_sq, grad_norms_sq, input_gram
from hftcore.ops.likelihood import sequence_logprobs, weighted_cross_entropy
from hftcore.ops.masks import count_mask, masked_put_, masked_take, pack_mask, unpack_mask
from hftcore.ops.removal import prune_, prune_mask, wanda_scores

__all__ = [
    "column_energy",
    "count_mask",
    "embedding_grad_norms_sq",
    "fingerprint",
    "grad_norms_sq",
    "input_gram",
    "masked_put_",
    "masked_take",
    "pack_mask",
    "prune_",
    "prune_mask",
    "sequence_logprobs",
    "unpack_mask",
    "wanda_scores",
    "weighted_cross_entropy",
]
