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
