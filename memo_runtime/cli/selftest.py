"""One real training step of a small wrapped model beside its unwrapped twin.

Small enough for seconds on any machine, yet through the whole runtime: profile, plan, swap, rebuild.
"""

from __future__ import annotations

import copy
import math

import torch
from torch import nn

from memo_runtime.cli.findings import SelfTest

#: float32 against float32: a rebuilt part changes summation shapes, nothing more.
BOUND = 1e-5

_WIDTH = 64
_BLOCKS = 3
_TOKENS = 256


class _Model(nn.Module):
    """An embedding, a stack of transformer layers, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(128, _WIDTH)
        layer = nn.TransformerEncoderLayer(
            _WIDTH, nhead=2, dim_feedforward=4 * _WIDTH, dropout=0.0, batch_first=True, norm_first=True
        )
        self.layers = nn.ModuleList([copy.deepcopy(layer) for _ in range(_BLOCKS)])
        self.head = nn.Linear(_WIDTH, 128)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.embedding(tokens)
        for layer in self.layers:
            hidden = layer(hidden)
        logits = self.head(hidden)
        return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def run_selftest(device: torch.device) -> SelfTest:
    """Trains one step on ``device``, half of each block swapped and half rebuilt; never raises."""
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(0)
            return _compare(device)
    except Exception as error:  # doctor's whole purpose is to say what does not work
        return SelfTest(device=str(device), ok=False, error=f"{type(error).__name__}: {error}")


def _compare(device: torch.device) -> SelfTest:
    from memo_runtime import api

    plain = _Model().to(device)
    wrapped = copy.deepcopy(plain)
    tokens = torch.randint(128, (2, _TOKENS), device=device)
    api.wrap(wrapped, policy="memo", alpha=0.5, keep_last=0)
    expected, actual = plain(tokens), wrapped(tokens)
    expected.backward()
    actual.backward()
    totals = api.report(wrapped).totals
    api.unwrap(wrapped)
    loss_difference = abs(actual.item() - expected.item()) / abs(expected.item())
    gradient_error = _distance(plain, wrapped)
    acted = totals.bytes_to_host > 0 and totals.recomputed_flops > 0
    exact = max(loss_difference, gradient_error) <= BOUND
    return SelfTest(
        device=str(device),
        ok=acted and exact,
        loss_difference=loss_difference,
        gradient_error=gradient_error,
        bytes_to_host=totals.bytes_to_host,
        recomputed_flops=totals.recomputed_flops,
        error="" if acted else "nothing was swapped or nothing was rebuilt",
    )


def _distance(reference: nn.Module, other: nn.Module) -> float:
    """Relative L2 distance of all gradients together."""
    difference = norm = 0.0
    for one, two in zip(reference.parameters(), other.parameters(), strict=True):
        if one.grad is None or two.grad is None:
            return float("inf")
        difference += (one.grad.double() - two.grad.double()).square().sum().item()
        norm += one.grad.double().square().sum().item()
    return math.sqrt(difference / norm)
