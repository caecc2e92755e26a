import pytest
import torch

from benchmarks.harness.sketch import decode, encode, norm, relative_difference, sketch


@pytest.fixture
def gradients():
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(300, 70, generator=generator) for name in ("first", "second", "third")}


def apart(ours, theirs):
    return relative_difference(encode(sketch(ours)), encode(sketch(theirs)))


def true_distance(ours, theirs):
    return norm(ours[name] - theirs[name] for name in theirs) / norm(theirs.values())


def test_equal_gradients_are_not_apart(gradients):
    assert apart(gradients, {name: tensor.clone() for name, tensor in gradients.items()}) == 0


@pytest.mark.parametrize("noise", [1e-6, 1e-3, 0.1])
def test_the_estimate_is_close_to_the_distance(gradients, noise):
    noisy = {name: tensor + noise * torch.randn_like(tensor) for name, tensor in gradients.items()}
    assert apart(noisy, gradients) == pytest.approx(true_distance(noisy, gradients), rel=0.35)


def test_whatever_is_wrong_shows(gradients):
    wrong = {
        "one parameter missing": gradients | {"second": torch.zeros(300, 70)},
        "a wrong sign": gradients | {"second": -gradients["second"]},
        "rows exchanged": gradients | {"second": gradients["second"].flip(0)},
        "two parameters exchanged": {**gradients, "first": gradients["second"], "second": gradients["first"]},
    }
    for what, given in wrong.items():
        assert apart(given, gradients) == pytest.approx(true_distance(given, gradients), rel=0.35), what


def test_nan_is_not_close(gradients):
    assert not apart(gradients | {"first": torch.full((300, 70), torch.nan)}, gradients) <= 1e9


def test_text_keeps_every_bit():
    sums = [0.1, -2e300, 3e-300]
    assert list(decode(encode(sums))) == sums
