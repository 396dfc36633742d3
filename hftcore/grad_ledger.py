"""Squared per-sample gradient norms of parameters, from the pairs (inputs, output gradients) of every call of their modules."""

from typing import Any, cast

import torch
from torch import Tensor

from hftcore.errors import HftcoreError
from hftcore.grad_rules import EmbeddingRule, LinearRule, Rule
from hftcore.kernels import gradients
from hftcore.ops.gradients import embedding_grad_norms_sq, grad_norms_sq, host_kernels

GRAM = 1 << 22  # elements of a Gram matrix that is kept for the other layers with the same input


class Ledger:
    """Adds up what `record` is told. A matrix that is used several times waits for all its calls, for their cross terms count.

    Entries are keyed by `Rule.key`: a parameter's name, for fused experts one key an expert.
    """

    def __init__(self, norms_only: bool, keep: bool):
        self.norms_only = norms_only
        self.keep = keep
        self.kept: list[tuple[Rule, Tensor, Tensor]] = []
        self._names: dict[str, str] = {}
        self._squares: dict[str, Tensor] = {}
        self._vectors: dict[str, Tensor] = {}
        self._calls: dict[str, int] = {}
        self._seen: dict[str, int] = {}
        self._ids: dict[str, list[Tensor]] = {}
        self._waiting: dict[str, list[tuple[Rule, Tensor, Tensor]]] = {}
        self._heads: dict[str, tuple[Tensor, Tensor]] = {}
        self._gram: tuple[Tensor, int, Tensor] | None = None

    def expect(self, rule: Rule, ids: Tensor | None) -> None:
        """A call of a module in the forward pass; `ids` [B, T] are the rows that an embedding looked up."""
        for own in rule.parameters:
            self._calls[rule.key(own)] = self._calls.get(rule.key(own), 0) + 1
        if ids is not None:
            self._ids.setdefault(rule.key("weight"), []).append(ids)

    def looked_up(self, name: str) -> Tensor | None:
        """The rows of a matrix that embeddings looked up, if nothing else was called with it."""
        ids = self._ids.get(name, [])
        return torch.cat([own.flatten() for own in ids]) if ids and len(ids) == self._calls[name] else None

    def record(self, rule: Rule, x: Tensor, g: Tensor) -> dict[str, Tensor]:
        """Take the pair of one call, x [B, T, N] (ids [B, T]) and g [B, T, M]; returns the gradients that are not autograd's to form.

        Raises:
            HftcoreError: the module was not called as often as that: a second backward pass.
        """
        for own in rule.parameters:
            key = rule.key(own)
            self._names[key] = rule.parameters[own]
            self._seen[key] = self._seen.get(key, 0) + 1
            if self._seen[key] > self._calls[key]:
                raise HftcoreError(
                    "a second backward pass ran in one capture_grad_norms block; open a block for each, with its own forward pass"
                )
        if self.keep:
            self.kept.append((rule, x, g))
        found = {}
        for own, vector in rule.vectors(x, g).items():
            key = rule.key(own)
            self._vectors[key] = self._vectors[key] + vector if key in self._vectors else vector
            if not self.norms_only:
                found[own] = vector.sum(dim=0)
        if rule.matrix in rule.parameters:
            gradient = self._matrix(rule, rule.key(rule.matrix), x, g)
            if gradient is not None:
                found[rule.matrix] = gradient
        return found

    def close(self) -> None:
        """Settle matrices of which some call had no backward pass."""
        self._gram = None
        self._heads.clear()
        for key in list(self._waiting):
            self._combine(key)

    def squares(self) -> dict[str, Tensor]:
        """Parameter name -> [B], of the samples' shares of the batch's gradient."""
        total: dict[str, Tensor] = {}
        for key, square in self._squares.items():
            name = self._names[key]
            total[name] = total[name] + square if name in total else square
        for key, vector in self._vectors.items():
            name, square = self._names[key], vector.square().sum(dim=1)
            total[name] = total[name] + square if name in total else square
        return total

    def _matrix(self, rule: Rule, key: str, x: Tensor, g: Tensor) -> Tensor | None:
        """The square goes into the ledger; the gradient comes back if it is wanted here."""
        wants_gradient = isinstance(rule, LinearRule) and not self.norms_only
        calls, ids = self._calls[key], self._ids.get(key, ())
        if calls == 2 and len(ids) == 1 and key not in self._waiting:
            if isinstance(rule, LinearRule):
                # of the head's gradient the embedding needs no more than the columns it looked up
                self._heads[key] = x, g.gather(2, ids[0].reshape(len(g), 1, -1).expand(-1, g.shape[1], -1))
                return self._linear(rule, key, x, g, wants_gradient)
            if isinstance(rule, EmbeddingRule) and key in self._heads:
                of_head = self._squares[key]
                self._squares[key] = _tied(of_head, *self._heads.pop(key), x, g, rule.padding_idx)
                return None
        if calls > 1:
            waiting = self._waiting.setdefault(key, [])
            waiting.append((rule, x, g))
            if len(waiting) == calls:
                self._combine(key)
            return rule.gradient(x, g) if wants_gradient else None
        if isinstance(rule, EmbeddingRule):
            self._squares[key] = embedding_grad_norms_sq(x, g, rule.padding_idx)
            return None
        return self._linear(rule, key, x, g, wants_gradient)

    def _linear(self, rule: Rule, key: str, x: Tensor, g: Tensor, wants_gradient: bool) -> Tensor | None:
        gram = self._gram_of(x)
        kernels = host_kernels(x, g)
        if wants_gradient and _is_direct_with_gradient(kernels, x, g, gram is not None):
            left, right = (g, x) if isinstance(rule, LinearRule) and rule.transposed else (x, g)
            self._squares[key], gradient = kernels.direct_with_gradient(left, right)
            return gradient
        if gram is None and _is_worth_a_gram(kernels, x, g):
            gram = kernels.lower_gram(x)
            # the input is held with its Gram matrix, so that no other tensor can come to lie where it was
            self._gram = x, x._version, gram
        self._squares[key] = grad_norms_sq(x, g) if gram is None else kernels.grad_norms_sq(x, g, gram)
        return rule.gradient(x, g) if wants_gradient else None

    def _gram_of(self, x: Tensor) -> Tensor | None:
        """The Gram matrix of the very same input, unchanged since, if a layer before (q, k, v; gate, up) had it."""
        if self._gram is None:
            return None
        kept, version, gram = self._gram
        is_same = kept.data_ptr() == x.data_ptr() and (kept.shape, kept.stride()) == (x.shape, x.stride())
        return gram if is_same and version == x._version else None

    def _combine(self, key: str) -> None:
        """The norm over several calls: calls follow one another as more tokens of a sample would."""
        records = self._waiting.pop(key)
        linear = [(x, g) for rule, x, g in records if isinstance(rule, LinearRule)]
        looked_up = [(x, g, rule.padding_idx) for rule, x, g in records if isinstance(rule, EmbeddingRule)]
        if linear:
            x, g = (torch.cat(parts, dim=1) for parts in zip(*linear, strict=True))
            square = grad_norms_sq(x, g)
        if looked_up:
            ids = torch.cat([part[0] for part in looked_up], dim=1)
            of_rows = torch.cat([part[1] for part in looked_up], dim=1)
            padding = looked_up[0][2]
            if linear:
                at_ids = g.gather(2, ids.unsqueeze(1).expand(-1, g.shape[1], -1))
                square = _tied(square, x, at_ids, ids, of_rows, padding)
            else:
                square = embedding_grad_norms_sq(ids, of_rows, padding)
        self._squares[key] = square


def _tied(of_head: Tensor, x: Tensor, at_ids: Tensor, ids: Tensor, of_rows: Tensor, padding: int | None) -> Tensor:
    """The squared norm of one matrix that is both head and embedding, from that of its part as the head."""
    if padding is not None:
        of_rows = of_rows.masked_fill((ids == padding).unsqueeze(-1), 0)
    cross = gradients.tied_cross(x, at_ids, of_rows)
    return (of_head + embedding_grad_norms_sq(ids, of_rows) + 2 * cross).clamp(min=0)


def _is_worth_a_gram(kernels: Any, x: Tensor, g: Tensor) -> bool:
    B, T, N = x.shape
    # on a GPU the kernel keeps the Gram matrix on chip, and making it anew costs less than storing it
    if x.device.type != "cpu" or T > N or B * T * T > GRAM:
        return False
    return cast(bool, kernels.is_ghost(T, g.shape[2], N))


def _is_direct_with_gradient(kernels: Any, x: Tensor, g: Tensor, has_gram: bool) -> bool:
    if x.device.type != "cpu":
        return False
    # a processor with bfloat16 units forms a bfloat16 gradient several times as fast as float32 shares of it
    if kernels is gradients and torch.bfloat16 in (x.dtype, g.dtype):
        return False
    return cast(bool, kernels.is_direct_with_gradient(x.shape[1], g.shape[2], x.shape[2], has_gram))
