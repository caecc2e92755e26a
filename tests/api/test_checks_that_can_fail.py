"""What is there to find errors has to be able to find them."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import memo_runtime as memo
from memo_runtime import checking
from memo_runtime.blocks import operators
from memo_runtime.errors import ProfileError, ReplayMismatchError


class LongShift(nn.Module):
    """Mixes tokens where there are many: a crop runs none of the operators that would show it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        far = functional.pad(x[:, :-700], (0, 0, 700, 0)) if x.shape[1] > 700 else torch.zeros_like(x)
        return x + self.linear(torch.cat([x, far], -1))


class Tower(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(LongShift(), nn.GELU()) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x.square().mean()


def test_check_without_arguments_runs_blocks_again():
    result = memo.check(Tower().double(), torch.randn(1, 64, 16, dtype=torch.float64))
    assert result.ok
    assert result.report.totals.bytes_to_host > 0
    assert result.report.totals.recomputed_flops > 0


def test_check_without_arguments_finds_a_wrong_rerun():
    with pytest.raises(ReplayMismatchError):
        memo.check(Tower().double(), torch.randn(1, 1500, 16, dtype=torch.float64))


@pytest.mark.parametrize("name", ["nolib::noop", "aten::no_such_operator", "scan", "aten::"])
def test_a_mixer_that_there_is_not_is_refused(name):
    with pytest.raises(ValueError, match=r"operator"):
        memo.register_mixer(name)


def test_a_mixer_that_there_is_is_taken(monkeypatch):
    monkeypatch.setattr(operators, "_registered_mixers", set())
    before = operators.registered_mixers()
    memo.register_mixer("aten::cumsum")
    assert operators.registered_mixers() - before == {"aten.cumsum"}


class Normed(nn.Module):
    def __init__(self, norm) -> None:
        super().__init__()
        self.up, self.down = norm(nn.Linear(16, 32)), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(x).tanh())


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("norm", ["weight_norm", "spectral_norm"])
@pytest.mark.parametrize("trained", [False, True])
def test_check_copies_a_weight_that_is_computed_from_others(norm, trained):
    """The old norms keep a tensor with a graph in the module, which deepcopy refuses."""
    torch.manual_seed(0)
    model = nn.Sequential(*(Normed(getattr(nn.utils, norm)) for _ in range(3))).double()
    x = torch.randn(2, 24, 16, dtype=torch.float64)
    if trained:
        model(x).square().mean().backward()
    result = memo.check(model, x)
    assert result.ok
    assert result.report.totals.recomputed_flops > 0
    assert len(dict(model.named_parameters())) == len(list(model.parameters()))
    model(x).square().mean().backward()


class Locked(Tower):
    """A model that cannot be copied."""

    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()


def test_a_model_that_cannot_be_copied_says_what_would_work():
    with pytest.raises(ProfileError, match=r"Locked cannot be copied \(TypeError: .*lock.*take out what holds it"):
        memo.check(Locked().double(), torch.randn(1, 64, 16, dtype=torch.float64))


def test_a_gradient_that_is_missing_is_no_traceback(monkeypatch):
    """Wrapped, one parameter gets no gradient: that is a failed check."""
    original = checking._run

    def forgetful(model, batch, start):
        loss, gradients = original(model, batch, start)
        if next(iter(model.modules())).__dict__.get("_memo") is not None:
            gradients.popitem()
        return loss, gradients

    monkeypatch.setattr(checking, "_run", forgetful)
    result = memo.check(Tower().double(), torch.randn(1, 64, 16, dtype=torch.float64))
    assert not result.ok
    assert not result.bit_identical
    assert result.worst_error == 1


class Penalised(Tower):
    """Its loss counts how often the class was called: another one in each run, with the same gradients."""

    calls = 0

    def __init__(self, each: float) -> None:
        super().__init__()
        self.each = each

    def forward(self, x: Tensor) -> Tensor:
        Penalised.calls += 1
        return super().forward(x) + self.each * Penalised.calls


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_a_loss_that_differs_is_not_exact(dtype):
    found = memo.check(Penalised(1000.0).to(dtype), torch.randn(1, 64, 16, dtype=dtype))
    assert not found.ok
    assert "NOT exact" in str(found)
    assert memo.check(Penalised(0.0).to(dtype), torch.randn(1, 64, 16, dtype=dtype)).ok


@pytest.mark.parametrize(("scale", "words"), [(float("nan"), "is nan"), (float("inf"), "is inf"), (0.0, "are zero")])
def test_a_step_in_which_nothing_counts_is_not_compared(scale, words):
    class Scaled(Tower):
        def forward(self, x: Tensor) -> Tensor:
            return scale * super().forward(x)

    with pytest.raises(ProfileError, match=f"{words}.*labels that count"):
        memo.check(Scaled().double(), torch.randn(1, 64, 16, dtype=torch.float64))


def test_a_gradient_that_is_no_number_is_named():
    class Rooted(Tower):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + torch.sqrt(0 * next(self.parameters()).sum())

    with pytest.raises(ProfileError, match=r"gradient of 'layers.0.*' in the unwrapped model .* not finite.*finite"):
        memo.check(Rooted().double(), torch.randn(1, 64, 16, dtype=torch.float64))


def test_a_small_loss_that_differs_is_not_exact():
    class Small(Penalised):
        def forward(self, x: Tensor) -> Tensor:
            return 1e-9 * super().forward(x)

    torch.manual_seed(0)
    x = torch.randn(1, 64, 16)
    assert memo.check(Small(0.0), x).ok
    found = memo.check(Small(1000.0), x)
    assert found.gradient_error < 1e-6
    assert not found.ok
