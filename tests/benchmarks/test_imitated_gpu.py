"""Contenders of others that need a GPU, with the pieces of one imitated: streams, and what says where tensors are."""

from contextlib import nullcontext

import pytest
import torch

from benchmarks.harness.contenders import CONTENDERS, liger, trl
from benchmarks.harness.contenders.packages import DEEPSPEED, LIGER, TRL
from benchmarks.harness.geometry import Scope

BLOCKS, TOKENS = 4, 64


class Stream:
    """Everything on it is done at once."""

    def __init__(self):
        self.events = 0

    def record_event(self):
        self.events += 1
        return Stream()

    def wait_stream(self, _):
        """It has nothing under way."""

    wait_event = wait_stream

    def synchronize(self):
        """It is."""


class Accelerator:
    """As PyTorch's device modules and DeepSpeed's accelerators are."""

    Stream = Stream

    def __init__(self):
        self.compute = Stream()

    def current_stream(self):
        return self.compute

    def stream(self, _):
        return nullcontext()

    def is_available(self):
        return False

    def is_synchronized_device(self):
        return False

    def on_accelerator(self, _):
        return True


def needs(package):
    return pytest.mark.skipif(not package.is_there, reason=f"pip install {package.requirement}")


def gradients(contender):
    found = {}
    contender.start(TOKENS)
    contender.step(lambda given: found.update({name: tensor.clone() for name, tensor in given.items()}))
    return found


def assert_same(contender, job):
    plain = CONTENDERS["unwrapped"](job)
    found, expected = gradients(contender), gradients(plain)
    assert found.keys() == expected.keys()
    for name, reference in expected.items():
        torch.testing.assert_close(found[name], reference, rtol=1e-9, atol=1e-12)


@needs(DEEPSPEED)
@pytest.mark.parametrize("scope", [Scope.BLOCKS, Scope.STEP])
def test_deepspeed_sends_inputs_of_all_blocks_but_the_last_to_the_host(make_job, monkeypatch, scope):
    from deepspeed.runtime.activation_checkpointing import offload_activations

    accelerator = Accelerator()
    monkeypatch.setattr(offload_activations, "get_accelerator", lambda: accelerator)
    job = make_job("deepspeed", (TOKENS,), blocks=BLOCKS, dtype="float64", scope=scope)
    contender = CONTENDERS["deepspeed"](job)
    assert_same(contender, job)
    stats, hidden = contender._manager.stats, contender.subject.shape.hidden
    assert stats.marked_tensors == BLOCKS
    assert stats.offloaded_tensors == stats.restored_tensors == BLOCKS - 1
    assert stats.offloaded_bytes == 8 * (BLOCKS - 1) * TOKENS * hidden


@needs(TRL)
@pytest.mark.parametrize("scope", [Scope.BLOCKS, Scope.STEP])
@pytest.mark.parametrize(("name", "fewest"), [("trl-offload", BLOCKS), ("trl-offload-all", 8 * BLOCKS)])
def test_trl_sends_what_is_saved_to_the_host(make_job, monkeypatch, scope, name, fewest):
    accelerator = Accelerator()
    monkeypatch.setattr(trl, "need_gpu", lambda *_: None)
    monkeypatch.setitem(trl._OPTIONS, "use_pin_memory", False)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda *_: None)
    job = make_job(name, (TOKENS,), blocks=BLOCKS, dtype="float64", scope=scope)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "get_device_module", lambda *_: accelerator)
        patch.setattr(torch.accelerator, "current_accelerator", lambda *_, **__: torch.device("cpu"))
        contender = CONTENDERS[name](job)
    head = getattr(contender.subject.model, "lm_head", None)
    assert not any(trl._hooks(head)), "a head with hooks has full logits"
    assert_same(contender, job)
    sent = contender._manager.s1.events
    assert sent >= fewest
    if (name, scope) == ("trl-offload", Scope.BLOCKS):
        assert sent == BLOCKS  # inputs alone
    assert not contender._manager.tracker


@needs(LIGER)
def test_liger_runs_mlps_by_tiles_with_everybodys_weights(make_job, monkeypatch):
    from liger_kernel.transformers import tiled_mlp

    class Gated:
        """Its kernel is Triton's."""

        @staticmethod
        def apply(gate, up):
            seen.append(gate.shape[-2])
            return torch.nn.functional.silu(gate) * up

    seen = []
    monkeypatch.setattr(liger, "need_gpu", lambda *_: None)
    monkeypatch.setattr(tiled_mlp, "LigerSiLUMulFunction", Gated)
    job = make_job("liger", (TOKENS,), blocks=BLOCKS, dtype="float64")
    contender = CONTENDERS["liger"](job)
    assert_same(contender, job)
    assert len(seen) == 3 * BLOCKS  # forward, the checkpoint's rerun, and the tile's own
    assert contender.recomputed_flops(TOKENS) is None
