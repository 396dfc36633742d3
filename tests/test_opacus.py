"""Per-sample gradient norms beside Opacus': where it is right, and where it stops. Skipped where its environment is not installed."""

from contextlib import contextmanager

import pytest
import torch
import transformers
from tiny_models import GPT2, VOCABULARY, one_thread, tiny_model  # noqa: F401

import hftcore
from hftcore.bench.packages import OPACUS, opacus_peers, why_not
from hftcore.bench.steps import loop_of_backwards
from hftcore.bench.worker import WorkerError

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(why_not("opacus") is not None, reason="hftcore-bench peers --install makes Opacus' environment"),
]


def tokens():
    """Three samples; one has a token twice."""
    ids = torch.randint(1, VOCABULARY, (3, 7), generator=torch.Generator().manual_seed(0))
    ids[0, 3] = ids[0, 1]
    return ids


def ours(model, ids):
    with hftcore.capture_grad_norms(model, norms_only=True) as norms:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return norms.per_sample


@contextmanager
def opacus(model, ids):
    peers, _, close = opacus_peers(model, ids)
    try:
        yield peers
    finally:
        close()


def test_the_norms_are_those_of_opacus_where_it_runs():
    model, ids = tiny_model("llama"), tokens()
    with opacus(model, ids) as peers:
        assert set(peers) == set(OPACUS)
        for peer in peers.values():
            torch.testing.assert_close(peer(), ours(model, ids), rtol=1e-5, atol=0)


def untied_gpt2():
    """Its positions are looked up once for the whole batch."""
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2, tie_word_embeddings=False)).eval()


@pytest.mark.parametrize("make", [lambda: tiny_model("llama-tied"), untied_gpt2, lambda: tiny_model("gemma2")])
def test_models_that_opacus_stops_at_get_the_norms_of_single_samples(make):
    model, ids = make(), tokens()
    with opacus(model, ids) as peers, pytest.raises(WorkerError):
        peers["Opacus ghost clipping"]()
    torch.testing.assert_close(ours(model, ids), loop_of_backwards(model, ids), rtol=1e-5, atol=0)
