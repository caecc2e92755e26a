"""Blocks that multiply by a sparse matrix, such as a graph's: given to them, held, or made of a parameter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import memo_runtime as memo
from memo_runtime.records import Executor
from tests.exactness.compare import WAYS, Way, assert_same, output_loss, run_step
from tests.exactness.hand_written import WIDTH

NODES = 48
EDGES = (torch.rand(NODES, NODES, generator=torch.Generator().manual_seed(1)) < 0.2).double()
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {"coo": Tensor.to_sparse, "csr": Tensor.to_sparse_csr}


class Convolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def edges(self, _: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor, edges: Tensor | None = None) -> Tensor:
        h = self.first(x)
        mixed = torch.sparse.mm(self.edges(h) if edges is None else edges, h)
        return x + self.last(mixed.relu())


class Given(Convolution):
    """Takes it as an argument."""


class Held(Convolution):
    def __init__(self, layout: str) -> None:
        super().__init__()
        self.register_buffer("kept", LAYOUTS[layout](EDGES))

    def edges(self, _: Tensor) -> Tensor:
        return self.kept


class OfParameter(Convolution):
    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.rand(int(EDGES.sum())))

    def edges(self, _: Tensor) -> Tensor:
        return torch.sparse_coo_tensor(EDGES.nonzero().T, self.weights, EDGES.shape)


class OfStates(Convolution):
    """Attention along the edges: what it saves is sparse and made here."""

    def edges(self, h: Tensor) -> Tensor:
        at = EDGES.nonzero().T
        scores = torch.sparse_coo_tensor(at, (h[at[0]] * h[at[1]]).sum(-1), EDGES.shape)
        return torch.sparse.softmax(scores, 1)


class Graph(nn.Module):
    def __init__(self, make: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(make() for _ in range(3))

    def forward(self, x: Tensor, *others: Any) -> Tensor:
        for layer in self.layers:
            x = layer(x, *others)
        return x


def loss_of(layout: str | None) -> Callable[[nn.Module, Any], Tensor]:
    """``layout`` of what is given to the blocks; None: nothing is."""
    others = () if layout is None else (LAYOUTS[layout](EDGES),)

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return output_loss(lambda x: model(x, *others), batch)  # type: ignore[arg-type]

    return loss


def nodes() -> dict[str, Tensor]:
    return {"x": torch.randn(NODES, WIDTH, generator=torch.Generator().manual_seed(2), dtype=torch.float64)}


@pytest.mark.parametrize(("make", "layout"), [
    (Given, "coo"), (Given, "csr"), (lambda: Held("coo"), None), (lambda: Held("csr"), None), (OfParameter, None),
], ids=["given-coo", "given-csr", "held-coo", "held-csr", "of a parameter"])  # fmt: skip
@pytest.mark.parametrize("way", [*WAYS, Way("tiled")], ids=str)
def test_steps_are_the_models(way: Way, make: Callable[[], nn.Module], layout: str | None) -> None:
    torch.manual_seed(0)
    model = Graph(make).double()
    want = run_step(model, nodes(), loss_of(layout))
    way.wrap(model)
    for _ in range(2):
        assert_same(run_step(model, nodes(), loss_of(layout)), want, way)
    for block in memo.report(model).blocks:
        assert block.executor is Executor.REPLAY or way.policy == "recompute"
        assert block.bytes_to_host > 0


def test_one_that_saves_a_sparse_tensor_of_its_own_is_left_alone_and_says_so() -> None:
    torch.manual_seed(0)
    model = Graph(OfStates).double()
    want = run_step(model, nodes(), loss_of(None))
    way = Way("swap")
    way.wrap(model)
    assert_same(run_step(model, nodes(), loss_of(None)), want, way)
    for block in memo.report(model).blocks:
        assert block.executor is Executor.NATIVE
        assert "sparse tensor that it makes itself" in block.reason
