"""Indices outside of a tensor end a trial before the operator runs: on CUDA nothing could run after it."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import memo_runtime as memo
from memo_runtime.lookup import find_wrapped
from memo_runtime.profiling.bounds import check_bounds

X = torch.randn(4, 6)
LONG = torch.tensor([0, 3, 5])
MASK = torch.tensor([True, False, True, True])

INSIDE = {
    "index": lambda: X[torch.tensor([0, -4, 3])],
    "second dimension": lambda: X[:, torch.tensor([5, -6])],
    "mask": lambda: X[MASK],
    "mask over both": lambda: X[X > 0],
    "index_select": lambda: X.index_select(1, LONG),
    "gather": lambda: X.gather(1, LONG.expand(4, 3)),
    "scatter_add": lambda: torch.zeros(4, 6).scatter_add_(1, LONG.expand(4, 3), X[:, :3]),
    "index_add": lambda: torch.zeros(4, 6).index_add_(1, LONG, X[:, :3]),
    "index_put": lambda: torch.zeros(4, 6).index_put_((torch.tensor([3, 0]),), X[:2]),
    "embedding": lambda: torch.nn.functional.embedding(torch.tensor([3, 0]), X),
    "loss": lambda: torch.nn.functional.cross_entropy(X, torch.tensor([0, 5, -100, 2])),
    "no index": lambda: X[torch.empty(0, dtype=torch.long)],
    "take": lambda: torch.take(X, torch.tensor([23, -24])),
}
OUTSIDE = {
    "index": lambda: X[torch.tensor([0, 4])],
    "negative": lambda: X[torch.tensor([-5])],
    "behind a mask": lambda: X.view(2, 2, 6)[:, torch.tensor([True, False]), torch.tensor([6])],
    "index_select": lambda: X.index_select(0, LONG),
    "gather": lambda: X.gather(0, LONG.expand(4, 3)),
    "scatter_add": lambda: torch.zeros(4, 6).scatter_add_(0, LONG[:, None].expand(3, 6), X[:3]),
    "index_add": lambda: torch.zeros(4, 6).index_add_(0, LONG, X[:3]),
    "index_put": lambda: torch.zeros(4, 6).index_put_((torch.tensor([4, 0]),), X[:2]),
    "embedding": lambda: torch.nn.functional.embedding(torch.tensor([4, 0]), X),
    "loss": lambda: torch.nn.functional.cross_entropy(X, torch.tensor([0, 6, -100, 2])),
    "take": lambda: torch.take(X, torch.tensor([24])),
}


class _Checked(TorchDispatchMode):
    """Checks every operator and says which ran."""

    def __init__(self):
        super().__init__()
        self.ran = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        check_bounds(func, args, kwargs or {})
        self.ran.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", INSIDE)
def test_what_is_inside_runs(name):
    with _Checked() as checked:
        INSIDE[name]()
    assert checked.ran


@pytest.mark.parametrize("name", OUTSIDE)
def test_what_is_outside_is_told_before_it_runs(name):
    with pytest.raises(IndexError, match="asks for index"), _Checked():
        OUTSIDE[name]()


def test_ends_of_groups_lie_within_the_rows():
    rows, experts = torch.randn(8, 16), torch.randn(2, 16, 16)
    grouped = torch.ops.aten._grouped_mm.default
    check_bounds(grouped, (rows, experts, torch.tensor([3, 8])), {})
    check_bounds(grouped, (rows.T, rows, torch.tensor([3, 8])), {})
    for arguments in ((rows, experts), (rows.T, rows)):
        with pytest.raises(IndexError, match="_grouped_mm asks for index 9"):
            check_bounds(grouped, (*arguments, torch.tensor([3, 9])), {})


def test_counts_of_the_whole_are_not_used_on_a_slice(monkeypatch):
    """Experts by grouped products: the counts of tokens per expert are a cumsum, which is pinned by its name."""
    config = Qwen3MoeConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, head_dim=16,
        moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    config._experts_implementation = "grouped_mm"
    model = Qwen3MoeForCausalLM(config).to(torch.bfloat16).train()
    ids = torch.randint(0, 64, (1, 200))
    memo.wrap(model, policy="replay", alpha=0.5)
    model(input_ids=ids, labels=ids).loss.backward()
    profile = find_wrapped(model).session.plan.profile.blocks[0]
    assert not profile.sliceable
    assert "_grouped_mm asks for index" in profile.reason or "order of tokens" in profile.reason
