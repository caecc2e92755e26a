"""A step of the optimizer for each parameter as soon as its gradient is whole, in backward: a way to save memory.

``register_post_accumulate_grad_hook`` must run once for each backward, with the whole gradient, also of one that
two blocks share, and what it writes to the parameter must reach nobody who still goes backward.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import memo_runtime as memo
from memo_runtime.records import Executor
from tests.exactness import hand_written
from tests.exactness.compare import TOLERANCE, assert_clean, model_loss, output_loss, relative_error
from tests.exactness.models import FAMILIES

_WAYS = {
    "tiled": ({"tile": 8, "alpha": 0.5, "keep_last": 0}, {Executor.TILED}),
    "replay": ({"alpha": 0.37, "keep_last": 0}, {Executor.REPLAY}),
    "swap": ({"keep_last": 0}, {Executor.REPLAY}),
    "recompute": ({"keep_last": 1}, {Executor.REPLAY, Executor.KEEP}),
    "auto": ({}, {Executor.REPLAY, Executor.KEEP}),
}


@dataclass
class Descent:
    """Gradient descent by hooks, every ``every`` backwards; ``seen``: (norm of the gradient at each call) by name."""

    every: int
    seen: dict[str, list[float]] = field(default_factory=dict)

    def on(self, model: nn.Module) -> None:
        for name, parameter in model.named_parameters():
            self.seen[name] = []
            parameter.register_post_accumulate_grad_hook(self._step_of(name))

    def _step_of(self, name: str) -> Any:
        def step(parameter: Tensor) -> None:
            assert parameter.grad is not None
            self.seen[name].append(float(parameter.grad.norm()))
            if len(self.seen[name]) % self.every == 0:
                with torch.no_grad():
                    parameter.sub_(parameter.grad, alpha=0.05)
                parameter.grad = None

        return step


def trained(model: nn.Module, batches: list[dict[str, Any]], every: int, loss_of: Any) -> Descent:
    descent = Descent(every)
    descent.on(model)
    for batch in batches:
        loss_of(model, batch).backward()
    return descent


def assert_same_descent(model: nn.Module, batches: list[dict[str, Any]], every: int, loss_of: Any, **how: Any) -> None:
    plain = copy.deepcopy(model)
    want = trained(plain, batches, every, loss_of)
    memo.wrap(model, **how)
    got = trained(model, batches, every, loss_of)
    assert got.seen.keys() == want.seen.keys()
    for name, norms in want.seen.items():
        assert len(got.seen[name]) == len(norms) == len(batches)
        assert got.seen[name] == pytest.approx(norms, rel=1e-10, abs=1e-15)
    theirs = {name: one.detach() for name, one in plain.named_parameters()}
    assert relative_error({name: one.detach() for name, one in model.named_parameters()}, theirs) <= TOLERANCE
    assert_clean(model)


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("policy", _WAYS)
def test_blocks_that_share_a_parameter(policy: str, every: int) -> None:
    torch.manual_seed(0)
    model = hand_written.Stack(*(hand_written.Attention() for _ in range(3))).double()
    first, last = model.blocks[0], model.blocks[2]
    last.up.weight = first.up.weight
    generator = torch.Generator().manual_seed(1)
    shape = (3, 17, hand_written.WIDTH)
    batches = [{"x": torch.randn(shape, generator=generator, dtype=torch.float64)} for _ in range(4)]
    settings, executors = _WAYS[policy]
    assert_same_descent(model, batches, every, output_loss, policy=policy, loss="native", **settings)
    assert {block.executor for block in memo.report(model).blocks} <= executors


@pytest.mark.parametrize("policy", [pytest.param("tiled", marks=pytest.mark.slow), "replay"])
def test_a_tied_head_whose_loss_goes_by_tiles(policy: str) -> None:
    """Embedding and head are one parameter; the head's gradient is made with the loss."""
    family = FAMILIES["llama"]
    model = family.make(tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    batches = [family.batch(rows=2, tokens=tokens) for tokens in (17, 21)]
    assert_same_descent(model, batches, 1, model_loss, policy=policy, **_WAYS[policy][0])
