"""What is no tensor, no model, no batches is refused in a line that names the argument."""

import pytest
import torch
from torch import nn

import hftcore
from hftcore import Pattern, ops

HALF = Pattern("50%")
ONES = torch.ones(4)
SQUARE = torch.eye(4)
LAYER = nn.Linear(4, 4)
ENERGY = hftcore.Energy({"": ONES})


def enter(context):
    with context:
        pass


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ops.prune_mask(None, ONES, HALF), "weight must be a tensor, got NoneType"),
        (
            lambda: ops.prune_(SQUARE.to_sparse(), ONES, HALF),
            "weight must be a dense tensor, got one of layout torch.sparse_coo",
        ),
        (lambda: ops.prune_(SQUARE.to("meta"), ONES, HALF), "weight must have values, got a tensor on the meta device"),
        (lambda: ops.prune_mask(SQUARE, None, HALF), "energy must be a tensor, got NoneType"),
        (lambda: ops.prune_mask(SQUARE, [1.0] * 4, HALF), "energy must be a tensor, got list"),
        (lambda: ops.prune_mask(SQUARE, ONES, HALF, "aligned"), "reference must be a tensor, got str"),
        (lambda: ops.prune_mask(SQUARE, ONES, None), "pattern must be a Pattern or its text"),
        (lambda: ops.wanda_scores(None, ONES), "weight must be a tensor"),
        (lambda: ops.masked_take(SQUARE, None), "mask must be a tensor"),
        (lambda: ops.column_energy(None), "x must be a tensor"),
        (lambda: ops.grad_norms_sq(None, torch.ones(1, 2, 3)), "x must be a tensor"),
        (lambda: ops.grad_norms_sq(torch.ones(1, 2, 3), None), "g must be a tensor"),
        (lambda: ops.sequence_logprobs(torch.ones(1, 2, 3), None, None), "head_weight must be a tensor"),
        (lambda: ops.fingerprint(SQUARE.to_sparse()), "tensor must be a dense tensor"),
        (lambda: ops.fingerprint(torch.ones(2, dtype=torch.complex128)), "1, 2, 4 or 8 bytes, got torch.complex128"),
        (lambda: hftcore.calibrate(None, []), "model must be a torch.nn.Module, got NoneType"),
        (lambda: hftcore.calibrate(LAYER, None), "batches must be an iterable of dicts of tensors, got NoneType"),
        (lambda: hftcore.antidote(None, []), "model must be a torch.nn.Module"),
        (lambda: hftcore.prune("model", None, HALF, score="magnitude"), "model must be a torch.nn.Module, got str"),
        (lambda: hftcore.antidote(LAYER, None, 1.5), "dense_ratio: sparsity must be a share in .* got 1.5"),
        (
            lambda: hftcore.antidote(LAYER, ENERGY, 0.1, benign_batches=ENERGY, benign_ratio=-1),
            "benign_ratio: .* got -1",
        ),
        (
            lambda: hftcore.prune(LAYER, ENERGY, HALF, reference="aligned"),
            "reference must be a torch.nn.Module, got str",
        ),
        (lambda: hftcore.prune(LAYER, ENERGY, HALF, minus=ENERGY), r"minus must be \(Energy, Pattern\) .* got Energy"),
        (lambda: hftcore.prune(LAYER, ENERGY, HALF, minus=(ENERGY, 0.5)), "pattern must be a Pattern or its text"),
        (lambda: hftcore.panacea_perturb(None, [], 1.0), "model must be a torch.nn.Module"),
        (lambda: enter(hftcore.capture_grad_norms(None)), "model must be a torch.nn.Module"),
        (lambda: enter(hftcore.capture_energy(None)), "model must be a torch.nn.Module"),
    ],
)
@pytest.mark.filterwarnings("ignore:removing the highest")
def test_what_is_of_no_use_is_named(call, message):
    with pytest.raises(hftcore.HftcoreError, match=message):
        call()
