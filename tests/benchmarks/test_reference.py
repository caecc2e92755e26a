"""Gradients beside those of a wider dtype: whose they are, what is compared, and what is too far."""

import pytest
import torch

from benchmarks.harness import reference, runner
from benchmarks.harness.contenders import CONTENDERS, Unwrapped
from benchmarks.harness.geometry import Scope
from benchmarks.harness.reference import refer
from benchmarks.harness.runner import main
from benchmarks.harness.sketch import relative_difference
from benchmarks.harness.subject import Subject
from tests.benchmarks.test_runner import rows_of
from tests.benchmarks.wrong import WrongGradients


@pytest.mark.parametrize("scope", list(Scope))
@pytest.mark.parametrize(("dtype", "wider", "apart"), [
    ("bfloat16", "float32", (1e-3, 0.05)), ("float32", "float64", (1e-9, 1e-5))
])  # fmt: skip
def test_the_reference_is_the_same_model_in_a_wider_dtype(make_job, scope, dtype, wider, apart):
    job = make_job("unwrapped", scope=scope, dtype=dtype, sketch_at=64)
    found = refer(job)
    assert found["details"]["dtype"] == wider
    contender, facts = Unwrapped(job), {}
    contender.start(64)
    contender.step(lambda gradients: facts.update(sketch=reference.encode(reference.sketch(gradients))))
    assert apart[0] < relative_difference(facts["sketch"], found["gradient_sketch"]) < apart[1]


def test_its_attention_is_that_of_the_model(make_job):
    """In the same dtype and with a mask nowhere, nothing is left of the difference but the order of sums."""
    job = make_job("unwrapped", dtype="float64")
    losses = []
    for attention in ("sdpa", reference._registered()):
        subject = Subject(job.settings, longest=64, attention=attention)
        batch = subject.batch(64)
        subject.backward(batch, lambda gradients: losses.append({n: g.clone() for n, g in gradients.items()}))
    assert losses[0].keys() == losses[1].keys()
    assert all(torch.allclose(losses[0][name], losses[1][name], rtol=1e-9, atol=1e-12) for name in losses[0])


def test_what_would_take_too_long_is_compared_with_unwrapped(in_process, arguments, monkeypatch, caplog):
    monkeypatch.setitem(reference._AFFORDABLE, "cpu", 1)
    given = arguments("unwrapped,checkpoint", lengths="48")
    assert main(given) == 0
    assert "48 tokens in float64 take too long: unwrapped is the reference" in caplog.text
    rows = rows_of(given)
    assert [row["contender"] for row in rows] == ["unwrapped", "checkpoint"]
    assert {row["details"]["gradient_reference"] for row in rows} == {"unwrapped"}


def test_a_reference_that_does_not_fit_is_a_row_and_the_others_are_compared_with_unwrapped(
    in_process, arguments, monkeypatch, capsys
):
    def refuse(job):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("benchmarks.harness.worker.refer", refuse)
    given = arguments("unwrapped,checkpoint", lengths="48")
    assert main(given) == 0
    assert main(given) == 0
    rows = rows_of(given)
    assert [(row["contender"], row["status"]) for row in rows] == [
        ("reference", "oom"), ("unwrapped", "ok"), ("checkpoint", "ok"),
    ]  # fmt: skip
    assert rows[2]["details"]["gradient_reference"] == "unwrapped"
    assert "gradients from unwrapped's" in capsys.readouterr().out


def test_gradients_too_far_from_the_reference_are_an_error_without_unwrapped_too(in_process, arguments, monkeypatch):
    monkeypatch.setitem(CONTENDERS, "checkpoint", WrongGradients)
    given = arguments("checkpoint", lengths="48")
    assert main(given) == 1
    (row,) = [row for row in rows_of(given) if row["contender"] == "checkpoint"]
    assert row["status"] == "error"
    assert "(relative L2) from float64's; at most 0.0001 is rounding" in row["error"]


def test_no_reference_where_nothing_is_compared(in_process, arguments):
    assert main(arguments("kernels", lengths="48")) == 0
    assert main(arguments("unwrapped", "--reference", "unwrapped", lengths="48")) == 0
    assert "reference" not in [job.contender for job in in_process]
    assert runner.WIDER.get("float64") is None


class FarOff(WrongGradients):
    """Its gradients are twice as large."""

    def step(self, on_gradients=None):
        if on_gradients is None:
            return super().step()
        return Unwrapped.step(self, lambda given: on_gradients({name: 2 * one for name, one in given.items()}))


class NoMemory(Unwrapped):
    """It does not fit."""

    def step(self, on_gradients=None):
        raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize("order", ["unwrapped,checkpoint,selective", "checkpoint,selective,unwrapped"])
def test_a_failed_unwrapped_widens_nobody_s_bound(in_process, arguments, monkeypatch, order):
    monkeypatch.setitem(CONTENDERS, "unwrapped", FarOff)
    monkeypatch.setitem(CONTENDERS, "checkpoint", WrongGradients)
    given = arguments(order, lengths="48")
    assert main(given) == 1
    rows = {row["contender"]: row for row in rows_of(given)}
    assert {name: row["status"] for name, row in rows.items()} == {
        "reference": "ok", "unwrapped": "error", "checkpoint": "error", "selective": "ok",
    }  # fmt: skip
    assert "at most 0.0001 is rounding" in rows["checkpoint"]["error"]


@pytest.mark.parametrize(("rounding", "most"), [(None, 1e-4), (4e-5, 1e-4), (9e-5, 1.8e-4), (4e-4, 5e-4), (0.2, 1e-4)])
def test_how_far_apart_gradients_may_be(make_runner, rounding, most):
    """Twice plain PyTorch's rounding, never more than unwrapped may be off by, and nothing of one that is wrong."""
    run = make_runner("unwrapped,checkpoint")
    plain, other = run.options.entries
    row = {"details": {"dtype": "float64"} | ({} if rounding is None else {"rounding": rounding})}
    assert run._most(other, row) == pytest.approx(most)
    assert run._most(plain, row) == pytest.approx(5e-4)


@pytest.mark.parametrize("more", [["--reference", "unwrapped"], []])
@pytest.mark.parametrize("order", ["checkpoint,unwrapped", "checkpoint"])
@pytest.mark.usefixtures("in_process")
def test_gradients_are_compared_where_unwrapped_is_not_the_first(arguments, monkeypatch, more, order, capsys):
    monkeypatch.setitem(reference._AFFORDABLE, "cpu", 1)
    monkeypatch.setitem(CONTENDERS, "checkpoint", WrongGradients)
    given = arguments(order, *more, lengths="48")
    if (more, order) == (["--reference", "unwrapped"], "checkpoint"):
        # Who asks for unwrapped's and does not name it has none, and is told so.
        assert main(given) == 0
        assert "checkpoint: its gradients are compared with nobody's" in capsys.readouterr().err
        return
    assert main(given) == 1
    found, wrong, *others = rows_of(given)
    assert (found["contender"], found["details"]["dtype"]) == ("reference", "float32")
    assert wrong["status"] == "error"
    assert "from unwrapped's; at most 0.0001 is rounding" in wrong["error"]
    assert all(row["gradient_difference"] < 1e-6 for row in others)
    assert {row["details"]["gradient_reference"] for row in (wrong, *others)} == {"unwrapped"}


def test_gradients_are_compared_where_unwrapped_does_not_fit(in_process, arguments, monkeypatch):
    monkeypatch.setitem(CONTENDERS, "unwrapped", NoMemory)
    monkeypatch.setitem(CONTENDERS, "checkpoint", WrongGradients)
    given = arguments("unwrapped,checkpoint", "--reference", "unwrapped", lengths="48")
    assert main(given) == 1
    assert [(row["contender"], row["status"]) for row in rows_of(given)] == [
        ("unwrapped", "oom"), ("reference", "ok"), ("checkpoint", "error"),
    ]  # fmt: skip


def test_a_wider_reference_that_does_not_fit_leaves_plain_pytorch_s(make_job, monkeypatch):
    def refuse(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(reference, "_wide", refuse)
    found = refer(make_job("unwrapped", dtype="bfloat16"))
    assert found["details"] == {"dtype": "bfloat16", "wider": "OutOfMemoryError: CUDA out of memory"}


def test_what_plain_pytorch_cannot_do_is_no_failure_of_the_reference(make_job, monkeypatch, caplog):
    def refuse(*_):
        raise RuntimeError("No available kernel")

    monkeypatch.setattr(Subject, "tile_loss", refuse)
    found = refer(make_job("unwrapped"))
    assert found["details"] == {"dtype": "float64"}
    assert "plain PyTorch in float32 does not run here: No available kernel" in caplog.text
