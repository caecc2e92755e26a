"""Complex numbers: bytes like others, and views that conjugate or negate what lies in memory."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import memo_runtime as memo
from memo_runtime.records import Executor
from tests.execution.test_inner_autograd import WAYS

WIDTH = 16


class Holomorphic(nn.Module):
    """Saves a product, its conjugate over the same memory, and an imaginary part with the sign turned."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = (nn.Linear(WIDTH, WIDTH, dtype=torch.complex128) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x)
        turned = h.conj()
        return x + 0.1 * self.down(h * turned) * turned.imag.sigmoid() + torch.sin(0.1 * turned)


class Attending(Holomorphic):
    """Complex attention: scores by the conjugate, weights by their size."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x)
        weights = (h @ h.mH).abs().softmax(-1)
        return x + self.down(weights.to(h.dtype) @ h)


class Tower(nn.Module):
    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.stem = nn.Linear(WIDTH, WIDTH, dtype=torch.complex128)
        self.layers = nn.ModuleList(kind() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer in self.layers:
            x = layer(x)
        return x.abs().square().mean()


@pytest.mark.parametrize(("policy", "alpha"), WAYS)
@pytest.mark.parametrize("kind", [Holomorphic, Attending])
def test_it_is_managed_and_exact(kind, policy, alpha):
    torch.manual_seed(0)
    plain = Tower(kind)
    model = memo.wrap(copy.deepcopy(plain), policy=policy, alpha=alpha, keep_last=0)
    for seed in range(2):
        x = torch.randn(2, 40, WIDTH, dtype=torch.complex128, generator=torch.Generator().manual_seed(seed))
        for each in (plain, model):
            each.zero_grad(set_to_none=True)
            each(x).backward()
        for want, got in zip(plain.parameters(), model.parameters(), strict=True):
            if policy == "swap":
                assert torch.equal(want.grad, got.grad)
            gap = torch.linalg.vector_norm(want.grad - got.grad)
            assert gap <= 1e-12 * torch.linalg.vector_norm(want.grad)
    blocks = memo.report(model).blocks
    assert [block.executor for block in blocks] == [Executor.REPLAY] * 3
    assert all(block.bytes_to_host == block.bytes_to_device > 0 for block in blocks)
    assert all((block.recomputed_flops > 0) == (policy != "swap") for block in blocks)
