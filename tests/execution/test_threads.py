"""Threads take turns, or are told so; transforms of torch.func are refused by name."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import memo_runtime as memo
from memo_runtime.errors import MemoError
from tests.execution.test_inner_autograd import WAYS, Part, sequence, tower

ways = pytest.mark.parametrize(("policy", "alpha"), WAYS)


def wrapped(plain: nn.Module, policy: str, alpha: float | None) -> nn.Module:
    return memo.wrap(copy.deepcopy(plain), policy=policy, alpha=alpha, keep_last=0)


def gradients(model: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(model(x), list(model.parameters()))


def assert_close(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> None:
    for a, b in zip(got, want, strict=True):
        assert torch.linalg.vector_norm(a - b) <= 1e-12 * torch.linalg.vector_norm(b)


def in_thread(run: Callable[[], object]) -> object:
    """The result of ``run`` in a thread of its own, or its error."""
    found: list[object] = []

    def work() -> None:
        try:
            found.append(run())
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    return found[0]



@pytest.mark.slow
def test_two_models_are_captured_in_two_threads():
    plain = [tower(Part) for _ in range(2)]
    models = [memo.wrap(copy.deepcopy(one), policy="tiled", alpha=0.5, keep_last=0, tile=5) for one in plain]
    start = threading.Barrier(2)
    found: dict[int, tuple[Tensor, ...]] = {}

    def work(number: int) -> None:
        start.wait()
        found[number] = gradients(models[number], sequence(number))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, model in enumerate(models):
        assert_close(found[number], gradients(plain[number], sequence(number)))
        assert {block.executor for block in memo.report(model).blocks} == {"tiled"}


@ways
@pytest.mark.parametrize("known", [False, True])
def test_many_threads_are_right_or_refused(policy, alpha, known):
    plain = tower(Part)
    model = wrapped(plain, policy, alpha)
    if known:
        gradients(model, sequence())
    start = threading.Barrier(4)
    right, refused, other = [], [], []

    def work(number: int) -> None:
        for turn in range(4):
            x = sequence(10 * number + turn)
            start.wait()
            try:
                found = gradients(model, x)
            except MemoError as error:
                refused.append(str(error))
            except BaseException as error:
                other.append(error)
            else:
                right.append((x, found))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert other == []
    assert right
    assert all("a lock around forward and backward" in message for message in refused)
    for x, found in right:
        assert_close(found, gradients(plain, x))
    assert_close(gradients(model, sequence()), gradients(plain, sequence()))
    totals = memo.report(model).totals
    assert (totals.stash_bytes, totals.host_bytes_in_use, totals.open_copies) == (0, 0, 0)


@ways
def test_threads_that_take_turns(policy, alpha):
    plain = tower(Part)
    model = wrapped(plain, policy, alpha)
    lock = threading.Lock()

    def work(number: int) -> None:
        for turn in range(3):
            x = sequence(10 * number + turn)
            with lock:
                found = gradients(model, x)
            assert_close(found, gradients(plain, x))

    results: list[object] = []
    threads = [
        threading.Thread(target=lambda n=number: results.append(in_thread(lambda: work(n)))) for number in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [None] * 3


def test_a_forward_between_forward_and_backward_of_another_thread_is_refused_and_changes_nothing():
    plain = tower(Part)
    model = wrapped(plain, "memo", 0.37)
    loss = model(sequence(1))
    error = in_thread(lambda: gradients(model, sequence(2)))
    assert isinstance(error, MemoError)
    assert "'MainThread'" in str(error)
    with torch.no_grad():
        assert torch.equal(in_thread(lambda: evaluated(model, sequence(2))), plain(sequence(2)))
    assert_close(torch.autograd.grad(loss, list(model.parameters())), gradients(plain, sequence(1)))
    assert_close(in_thread(lambda: gradients(model, sequence(2))), gradients(plain, sequence(2)))


def evaluated(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x)


def test_backward_in_another_thread_than_forward():
    plain = tower(Part)
    model = wrapped(plain, "memo", 0.37)
    loss = model(sequence())
    assert_close(in_thread(lambda: torch.autograd.grad(loss, list(model.parameters()))), gradients(plain, sequence()))


def test_a_thread_that_died_in_its_step_or_whose_block_raised_is_in_nobodys_way():
    plain = tower(Part)
    model = wrapped(plain, "memo", 0.37)
    held = in_thread(lambda: model(sequence(1)))
    assert_close(gradients(model, sequence(2)), gradients(plain, sequence(2)))

    def broken(*_: object) -> None:
        raise InterruptedError

    handle = model.layers[1].up.register_forward_hook(broken)
    with pytest.raises(InterruptedError):
        model(sequence(1))
    handle.remove()
    assert_close(in_thread(lambda: gradients(model, sequence(3))), gradients(plain, sequence(3)))
    assert_close(torch.autograd.grad(held, list(model.parameters())), gradients(plain, sequence(1)))


TRANSFORMS = {
    "grad": lambda model, x: torch.func.grad(model)(x),
    "vjp": lambda model, x: torch.func.vjp(model, x),
    "vmap": lambda model, x: torch.func.vmap(lambda row: model(row[None]))(x),
    "jvp": lambda model, x: torch.func.jvp(model, (x,), (x,)),
}


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_a_transform_is_refused_by_name(transform, known):
    plain = tower(Part)
    model = wrapped(plain, "memo", 0.37)
    if known:
        gradients(model, sequence())
    name = "grad" if transform == "vjp" else transform
    with pytest.raises(MemoError, match=rf"torch.func runs Tower inside a transform \({name}\).*memo.unwrap"):
        TRANSFORMS[transform](model, sequence())
    assert_close(gradients(model, sequence()), gradients(plain, sequence()))
    memo.unwrap(model)
    TRANSFORMS[transform](model, sequence())


def forward_mode(model: nn.Module, x: Tensor) -> None:
    with torch.autograd.forward_ad.dual_level():
        model(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)))


#: Ways of running a model in which what blocks save is no memory, and a word that the refusal has for each.
UNREAL = {
    "forward mode": (forward_mode, "forward mode"),
    "export": (lambda model, x: torch.export.export(model, (x,)), "traced"),
    "jit": (lambda model, x: torch.jit.trace(model, (x,)), "traced"),
}


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("policy", ["swap", "recompute", "tiled"])
@pytest.mark.parametrize("way", UNREAL)
def test_tracing_and_forward_mode_are_refused_by_name(way, policy, known):
    plain, (run, word) = tower(Part), UNREAL[way]
    model = wrapped(plain, policy, None)
    if known:
        gradients(model, sequence())
    with pytest.raises(MemoError, match=rf"Tower .*{word}.*memo.unwrap"):
        run(model, sequence())
    with torch.no_grad():
        run(model, sequence())
    assert_close(gradients(model, sequence()), gradients(plain, sequence()))


@pytest.mark.parametrize("without", [torch.no_grad, torch.inference_mode])
def test_without_gradients_everything_is_as_before(without):
    plain = tower(Part)
    model = wrapped(plain, "memo", 0.37)
    for _ in range(2):
        with without():
            assert torch.equal(model(sequence()), plain(sequence()))
            rows = torch.func.vmap(lambda row: model(row[None]))(sequence())
        assert rows.shape == (2,)
        assert_close(gradients(model, sequence()), gradients(plain, sequence()))
