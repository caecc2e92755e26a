"""What the rebuilt combination keeps on the host. On the CPU its copies are copies, without streams."""

import pytest
import torch

from benchmarks.harness.contenders import CONTENDERS, axolotl
from benchmarks.harness.contenders.host_copies import HostCopies

BLOCKS, TOKENS = 3, 64


@pytest.fixture
def started(make_job, monkeypatch):
    """The contender, with results of any size sent; what was sent, by step."""
    monkeypatch.setattr(axolotl, "SMALLEST", 1)
    sent = []

    def send(self, tensor, original=HostCopies.send):
        sent.append(original(self, tensor))
        return sent[-1]

    monkeypatch.setattr(HostCopies, "send", send)
    contender = CONTENDERS["axolotl"](make_job("axolotl", blocks=BLOCKS, dtype="float64"))
    contender.start(TOKENS)
    return contender, sent


def gradients(contender):
    found = {}
    contender.step(lambda given: found.update({name: tensor.clone() for name, tensor in given.items()}))
    return found


def test_inputs_and_attention_go_to_the_host_and_nothing_else(started):
    contender, sent = started
    contender.step()
    shape = contender.subject.shape
    hidden = [one for one in sent if one.host.shape == (1, TOKENS, shape.hidden)]
    outputs = [one for one in sent if one.host.shape == (1, shape.heads, TOKENS, shape.head_dim)]
    sums = [one for one in sent if one.host.shape == (1, shape.heads, TOKENS)]
    assert len(hidden) == len(outputs) == len(sums) == BLOCKS
    assert len(sent) == 3 * BLOCKS
    assert all(one.device is None for one in sent)


def test_gradients_with_everything_on_the_host_in_two_steps(started, make_job):
    contender, sent = started
    plain = CONTENDERS["unwrapped"](make_job("unwrapped", blocks=BLOCKS, dtype="float64"))
    plain.start(TOKENS)
    expected = gradients(plain)
    for _ in range(2):
        found = gradients(contender)
        assert found.keys() == expected.keys()
        for name, reference in expected.items():
            torch.testing.assert_close(found[name], reference, rtol=1e-9, atol=1e-12)
    first, second = sent[: len(sent) // 2], sent[len(sent) // 2 :]
    assert {one.host.data_ptr() for one in second} == {one.host.data_ptr() for one in first}


def test_the_next_length_begins_with_nothing_on_the_host(started):
    contender, _ = started
    contender.step()
    assert contender._copies._unused
    contender.finish()
    assert not contender._copies._unused


def test_the_row_says_how(started):
    contender, _ = started
    assert contender.details()["settings"]["host"] == ["layer inputs", "attention outputs"]
