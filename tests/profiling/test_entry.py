"""Who holds what the first block is given: ``Profile.entry`` says that nobody does while blocks go backward."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import nn

import memo_runtime as memo
from memo_runtime.profiling import model as profiling
from memo_runtime.profiling.entry import is_alone, is_saved_in_front
from tests.exactness.hand_written import WIDTH, Attention
from tests.tiny import few_samples

__all__ = ["few_samples"]


class Stack(nn.Module):
    """Blocks behind ``front``."""

    def __init__(self, front):
        super().__init__()
        self.front = front
        self.layers = nn.ModuleList([Attention() for _ in range(2)])

    def forward(self, x):
        x = self.front(x)
        for layer in self.layers:
            x = layer(x)
        return x


class Held(nn.Module):
    """Keeps what it yields."""

    def forward(self, x):
        self.kept = x * 2.0
        return self.kept


class Leaf(nn.Module):
    """Yields what it is given."""

    def forward(self, x):
        return x


class Cubed(torch.autograd.Function):
    """Saves what it yields."""

    @staticmethod
    def forward(ctx, x):
        made = x**3
        ctx.save_for_backward(made)
        return made

    @staticmethod
    def backward(ctx, grad):
        (made,) = ctx.saved_tensors
        return 3 * grad * made ** (2 / 3)


class Custom(nn.Module):
    """Through an operator of one's own."""

    def forward(self, x):
        return Cubed.apply(x)


@pytest.fixture
def answers(monkeypatch):
    """By question what was found out."""
    found = {}
    for question in (is_saved_in_front, is_alone):
        def noted(tensor, question=question):
            found[question.__name__] = question(tensor)
            return found[question.__name__]

        monkeypatch.setattr(profiling, question.__name__, noted)
    return found


@pytest.mark.parametrize(
    ("front", "saved"),
    [
        (nn.Linear(4, 4), False), (nn.Sequential(nn.Linear(4, 4), nn.GELU()), False), (nn.LayerNorm(4), False),
        (Leaf(), False), (nn.Tanh(), True), (Custom(), True), (nn.Sequential(nn.Tanh(), nn.Flatten(0, 1)), True),
        (nn.Sequential(*(nn.Linear(4, 4) for _ in range(70))), True),
    ],
    ids=["linear", "gelu", "norm", "leaf", "tanh", "autograd.Function", "a view of it", "too many to tell"],
)  # fmt: skip
def test_what_an_operator_in_front_has_saved(front, saved):
    assert is_saved_in_front(front(torch.randn(1, 3, 4, requires_grad=True))) == saved


def test_what_was_written_to_in_front_is_for_its_own_backward_to_refuse():
    hidden = torch.randn(1, 3, 4, requires_grad=True) * 1.0
    squared = hidden.pow(2)
    hidden.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        _ = squared.grad_fn._saved_self
    assert not is_saved_in_front(squared)


@pytest.mark.parametrize(("front", "alone"), [(nn.Linear(WIDTH, WIDTH), True), (Held(), False), (Leaf(), False)])
def test_who_holds_the_input_of_the_first_block(front, alone, answers):
    memo.profile(Stack(front), torch.randn(1, 32, WIDTH, requires_grad=True))
    assert answers == {"is_saved_in_front": False, "is_alone": alone}


@pytest.mark.parametrize("policy", ["tiled", "replay"])
def test_an_embedding_s_result_goes_with_the_forward(policy, answers):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=64, num_attention_heads=4, num_hidden_layers=2, vocab_size=64,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).train()
    tokens = torch.randint(0, 64, (1, 48))
    memo.wrap(model, policy=policy, keep_last=0)
    seen = []
    model.get_input_embeddings().register_forward_hook(lambda *args: seen.append(weakref.ref(args[-1])))
    model(input_ids=tokens, labels=tokens)
    assert answers == {"is_saved_in_front": False, "is_alone": True}
    seen.clear()
    loss = model(input_ids=tokens, labels=tokens).loss
    assert [one() for one in seen] == [None]
    loss.backward()
