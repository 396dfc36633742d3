"""The judges of the defences' updates: losses and gradients in float64, written out anew from logits."""

import torch
from torch import nn

from hftcore.bindings.trainers.collate import Collator


def collated(rows, size=2):
    """Micro-batches of `size` samples."""
    return [Collator(0)(rows[start : start + size]) for start in range(0, len(rows), size)]


def token_losses(logits, labels):
    """Negative log-likelihood of every supervised token, each predicted one position earlier."""
    logp = torch.log_softmax(logits[:, :-1], dim=-1)
    following = labels[:, 1:]
    kept = following != -100
    return -logp[kept].gather(1, following[kept][:, None])[:, 0]


def double_loss(outputs, labels, num_items_in_batch=None):
    """A Trainer's `compute_loss_func`; the models' own loss rounds logits to float32."""
    return token_losses(outputs.logits, labels).sum() / num_items_in_batch


def mean_loss(model, batches):
    """Over all supervised tokens of all micro-batches."""
    found = [
        token_losses(
            model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits, batch["labels"]
        )
        for batch in batches
    ]
    return torch.cat(found).mean()


def gradients(model, loss):
    """Name -> gradient of a 0-d tensor, or of what a function of the model returns; `param.grad` is left alone."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    value = loss(model) if callable(loss) else loss
    found = torch.autograd.grad(value, list(named.values()), allow_unused=True)
    return {name: torch.zeros_like(p) if g is None else g for (name, p), g in zip(named.items(), found, strict=True)}


def norm(grads):
    return sum(float(g.square().sum()) for g in grads.values()) ** 0.5


def shifted(model, step):
    """A function that computes `inside(model)` with the parameters moved by `step`, and puts them back."""

    def run(inside):
        named = dict(model.named_parameters())
        saved = {name: named[name].detach().clone() for name in step}
        with torch.no_grad():
            for name in step:
                named[name] += step[name]
        result = inside(model)
        with torch.no_grad():
            for name in step:
                named[name].copy_(saved[name])
        return result

    return run


def assert_gradient(model: nn.Module, wanted, rtol=1e-9, atol=1e-12):
    """`param.grad` of every trained parameter is as wanted."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            found = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            torch.testing.assert_close(
                found, wanted[name], rtol=rtol, atol=atol, msg=lambda text, name=name: f"{name}: {text}"
            )
