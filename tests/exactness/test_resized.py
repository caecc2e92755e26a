"""Buffers whose size changes in place: the profile's runs and reruns leave them as a step without memo would."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import memo_runtime as memo

# What tests share is told by NumPy, whose view of a buffer lets nobody give it another size.
pytestmark = pytest.mark.anew

WIDTH = 16
WAYS = [("auto", None), ("swap", None), ("recompute", None), ("memo", 0.0), ("memo", 0.37), ("memo", 1.0),
        ("replay", None), ("tiled", None)]  # fmt: skip


class Block(nn.Module):
    """Attention and a product, from what ``prepared`` makes of the input and of the buffer."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.register_buffer("seen", torch.zeros(rows, WIDTH))

    def prepared(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        x = self.prepared(x)
        query, key, value = (one.unsqueeze(1) for one in self.into(x).chunk(3, dim=-1))
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True).squeeze(1)
        return x + torch.tanh(self.out(mixed))


class Observes(Block):
    """An observer: empty until the first forward gives it its size."""

    def __init__(self) -> None:
        super().__init__(0)

    def prepared(self, x: Tensor) -> Tensor:
        least = x.detach().amin((0, 1))
        if self.seen.numel() == 0:
            self.seen.resize_(1, WIDTH).copy_(least)
        else:
            self.seen.copy_(torch.minimum(self.seen, least))
        return x - 0.1 * self.seen


class Appends(Block):
    """A row more at every forward, in the same memory."""

    def __init__(self) -> None:
        super().__init__(0)

    def prepared(self, x: Tensor) -> Tensor:
        rows = self.seen.shape[0]
        self.seen.resize_(rows + 1, WIDTH)
        self.seen[rows] = x.detach().mean((0, 1))
        return x + 0.1 * self.seen.sum(0)


class AppendsElements(Block):
    """A row more at every forward, by other elements."""

    def __init__(self) -> None:
        super().__init__(0)

    def prepared(self, x: Tensor) -> Tensor:
        self.seen.data = torch.cat([self.seen.data, x.detach().mean((0, 1))[None]])
        return x + 0.1 * self.seen.sum(0)


class OfSequences(Block):
    """A row for every sequence of the batch, begun anew where there are others."""

    def __init__(self) -> None:
        super().__init__(1)

    def prepared(self, x: Tensor) -> Tensor:
        if self.seen.shape[0] != x.shape[0]:
            self.seen.resize_(x.shape[0], WIDTH).zero_()
        result = x * (1 + self.seen[:, None])
        self.seen.lerp_(x.detach().mean(1), 0.5)
        return result


class Model(nn.Module):
    def __init__(self, block: type[Block]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(block() for _ in range(3))  # type: ignore[call-arg]

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x.square().mean()


def trained(model: nn.Module, rows: tuple[int, ...]) -> list[Tensor]:
    torch.manual_seed(0)
    found = []
    for count in rows:
        loss = model(torch.randn(count, 48, WIDTH, dtype=torch.float64))
        loss.backward()
        found.append(loss.detach())
    return [*found, *(one.grad for one in model.parameters()), *model.state_dict().values()]


@pytest.mark.parametrize(("policy", "alpha"), WAYS)
@pytest.mark.parametrize("block", [Observes, Appends, AppendsElements, OfSequences])
def test_a_buffer_of_another_size(block, policy, alpha):
    torch.manual_seed(1)
    plain = Model(block).double()
    mine = memo.wrap(copy.deepcopy(plain), policy=policy, alpha=alpha, keep_last=0)
    rows = (2, 2, 3, 3, 2, 3)
    for theirs, ours in zip(trained(plain, rows), trained(mine, rows), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("block", [Observes, Appends, AppendsElements, OfSequences])
def test_a_profile_leaves_its_size(block):
    torch.manual_seed(1)
    model = Model(block).double()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    memo.profile(model, (torch.randn(2, 48, WIDTH, dtype=torch.float64),))
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_why_a_block_is_not_run_again():
    torch.manual_seed(1)
    model = memo.wrap(Model(Appends).double(), policy="recompute", keep_last=0)
    trained(model, (2,))
    assert {block.reason for block in memo.report(model).blocks} == {
        f"it modifies layers.{number}.seen in place, so it is not run again: what it saves is swapped whole"
        for number in range(3)
    }
