"""Copies that are made as late as they may be, into memory that holds NaN until then; and waits that are left out."""

from __future__ import annotations

import math
import weakref

import pytest

import memo_runtime as memo
from memo_runtime.errors import CopyError
from memo_runtime.native.backend import TorchBackend
from memo_runtime.native.engine import Ticket
from memo_runtime.native.twin import TorchEngine
from tests.exactness.models import FAMILIES, text

POLICIES = [("swap", None), ("recompute", None), ("memo", 0.4)]


class LateEngine(TorchEngine):
    """Makes a copy when somebody waits for it, and fills its target with NaN before.

    ``leave_out``: the direction whose waits do nothing. ``fail``: the submission to the host that fails, from 1.
    """

    leave_out = ""
    fail = 0

    def __init__(self, device):
        super().__init__(device)
        self.pairs, self.count, self.sent = {}, 0, 0

    def _submit(self, out, pairs, name):
        for _, target in pairs:
            if target.is_floating_point():
                target.fill_(math.nan)
        self.count += 1
        self.sent += out
        failing = out and self.sent == self.fail
        self.pairs[self.count] = ("out" if out else "in", pairs, name if failing else "")
        ticket = Ticket(self, pairs, name, number=self.count)
        weakref.finalize(ticket, self.pairs.pop, self.count, None)
        return ticket

    def _wait(self, number):
        direction, pairs, failing = self.pairs.pop(number)
        if failing:
            raise CopyError(f"copying '{failing.splitlines()[0]}' failed")
        if direction != self.leave_out:
            for source, target in pairs:
                target.copy_(source)

    def _cancel(self, number):
        return self.pairs.pop(number) is not None

    def _forget(self, number):
        assert number not in self.pairs

    @property
    def open_copies(self):
        return len(self.pairs)


@pytest.fixture
def late(monkeypatch):
    monkeypatch.setenv("MEMO_NATIVE", "off")
    monkeypatch.setattr(TorchBackend, "engine", lambda self: LateEngine(self.device))
    return LateEngine


def gradients(model):
    model.zero_grad(set_to_none=True)
    model(**text(rows=2, tokens=21)).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def worst(found, plain):
    """The largest relative error of a gradient; infinite where one is NaN."""
    errors = [float((found[name] - plain[name]).norm() / plain[name].norm()) for name in plain]
    return math.inf if any(math.isnan(one) for one in errors) else max(errors)


@pytest.mark.parametrize(("policy", "alpha"), POLICIES)
def test_late_copies_change_nothing(late, policy, alpha):
    model = FAMILIES["llama"].make()
    plain = gradients(model)
    memo.wrap(model, policy=policy, alpha=alpha, keep_last=0)
    for _ in range(3):
        assert worst(gradients(model), plain) <= 1e-12
    assert memo.report(model).totals.open_copies == 0
    assert memo.report(model).copies == "PyTorch (MEMO_NATIVE=off)"


@pytest.mark.parametrize("direction", ["out", "in"])
@pytest.mark.parametrize(("policy", "alpha"), POLICIES)
def test_without_a_wait_gradients_are_wrong(late, monkeypatch, policy, alpha, direction):
    """What the test before relies on: a wait that does nothing shows."""
    model = FAMILIES["llama"].make()
    plain = gradients(model)
    memo.wrap(model, policy=policy, alpha=alpha, keep_last=0)
    monkeypatch.setattr(late, "leave_out", direction)
    try:
        found = worst(gradients(model), plain)
    except memo.errors.ReplayMismatchError:
        found = math.inf  # the witness saw that the rerun started from other numbers
    assert found == math.inf


def test_a_failed_copy_is_told_by_the_backward_that_needs_it_and_the_next_step_works(late, monkeypatch):
    model = FAMILIES["llama"].make()
    plain = gradients(model)
    memo.wrap(model, policy="memo", alpha=0.4, keep_last=0)
    gradients(model)
    engine = model._memo.session.tools.engine
    engine.sent, engine.fail = 0, 2
    with pytest.raises(CopyError, match=r"copying 'model\.layers\.1 [a-z ]+\d*' failed"):
        gradients(model)
    engine.fail = 0
    assert worst(gradients(model), plain) <= 1e-12
    assert memo.report(model).totals.open_copies == 0
