"""A forward that writes to parameters does so once in the first step too: the profile's runs are put back."""

import copy

import pytest
import torch
from torch import nn

import memo_runtime as memo

WIDTH = 16
POLICIES = ("swap", "recompute", "memo", "replay", "tiled", "auto")


class Block(nn.Module):
    """``how`` its forward writes to its own weight; "": not at all."""

    def __init__(self, how=""):
        super().__init__()
        self.how, self.inner = how, nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        weight = self.inner.weight
        if self.how == "data":
            weight.data = nn.functional.normalize(weight.data, dim=-1)
        elif self.how:
            with torch.no_grad():
                weight.copy_(nn.functional.normalize(weight, dim=-1)) if self.how == "copy" else weight.mul_(0.9)
        return x + torch.tanh(self.inner(x))


class Model(nn.Module):
    """A momentum encoder that its forward moves, as ``how`` says, between blocks."""

    def __init__(self, how, inside):
        super().__init__()
        self.how = how
        self.layers = nn.ModuleList(Block(inside) for _ in range(3))
        self.head = nn.Linear(WIDTH, WIDTH)
        self.slow = copy.deepcopy(self.head).requires_grad_(False)

    def _move(self):
        slow, head = self.slow, self.head
        with torch.no_grad():
            if self.how == "lerp":
                slow.weight.lerp_(head.weight + 1, 0.1)
            elif self.how == "foreach":
                torch._foreach_lerp_(list(slow.parameters()), [one + 1 for one in head.parameters()], 0.1)
            elif self.how == "load":
                slow.load_state_dict({name: one + 0.1 for name, one in slow.state_dict().items()})
            elif self.how == "data in place":
                slow.weight.data.add_(0.1)
            elif self.how == "data":
                slow.weight.data = slow.weight.data + 0.1

    def forward(self, x):
        self._move()
        for layer in self.layers:
            x = layer(x)
        return (self.head(x) - self.slow(x)).square().mean()


def trained(model, steps=3):
    torch.manual_seed(0)
    losses = []
    for _ in range(steps):
        loss = model(torch.randn(2, 40, WIDTH, dtype=torch.float64))
        loss.backward()
        losses.append(loss.detach())
    return torch.stack(losses), [one.grad for one in model.parameters()], list(model.state_dict().values())


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(("how", "inside"), [
    *((how, "") for how in ("lerp", "foreach", "load", "data in place", "data")),
    *(("", inside) for inside in ("copy", "mul", "data")),
])  # fmt: skip
def test_they_are_written_to_once_a_step(how, inside, policy):
    torch.manual_seed(1)
    plain = Model(how, inside).double()
    mine = memo.wrap(copy.deepcopy(plain), policy=policy)
    expected, found = trained(plain), trained(mine)
    for theirs, ours in zip((expected[0], *expected[1], *expected[2]), (found[0], *found[1], *found[2]), strict=True):
        if theirs is None or ours is None:
            assert theirs is ours
        else:
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_why_a_block_that_exchanges_elements_is_not_run_again():
    torch.manual_seed(1)
    model = memo.wrap(Model("", "data").double(), policy="recompute")
    trained(model, steps=1)
    reasons = {block.reason for block in memo.report(model).blocks}
    assert any("inner.weight" in reason and "swapped whole" in reason for reason in reasons)
