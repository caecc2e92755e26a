"""Contenders of others that need a GPU, with the pieces of one imitated: streams, and what says where tensors are."""

import inspect
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


@pytest.fixture
def gated(monkeypatch):
    """Liger's kernel of the gate, which is Triton's, imitated; how many tokens it was given."""
    from liger_kernel.transformers import tiled_mlp

    class Gated:
        @staticmethod
        def apply(gate, up):
            seen.append(gate.shape[-2])
            return torch.nn.functional.silu(gate) * up

    seen = []
    monkeypatch.setattr(liger, "need_gpu", lambda *_: None)
    monkeypatch.setattr(tiled_mlp, "LigerSiLUMulFunction", Gated)
    return seen


@needs(LIGER)
def test_liger_runs_mlps_by_tiles_with_everybodys_weights(make_job, gated):
    job = make_job("liger", (TOKENS,), blocks=BLOCKS, dtype="float64")
    contender = CONTENDERS["liger"](job)
    assert_same(contender, job)
    assert len(gated) == 3 * BLOCKS  # forward, the checkpoint's rerun, and the tile's own
    assert contender.recomputed_flops(TOKENS) is None
    assert "apply_liger_kernel_to_llama" not in contender.settings


@needs(LIGER)
@pytest.mark.parametrize("scope", [Scope.BLOCKS, Scope.STEP])
def test_liger_s_norms_and_rotary_positions_are_its_own_by_its_default(make_job, gated, monkeypatch, scope):
    from liger_kernel.transformers import apply_liger_kernel_to_llama, monkey_patch, rms_norm
    from transformers.models.llama import modeling_llama

    class Norm:
        @staticmethod
        def apply(hidden, weight, eps, *_):
            seen.append("norm")
            wide = hidden.float()
            return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(hidden.dtype)

    def rotary(*given, **more):
        seen.append("rotary")
        return before["apply_rotary_pos_emb"](*given, **more)

    seen, before = [], {name: getattr(modeling_llama, name) for name in liger._OF_LLAMA}
    monkeypatch.setattr(rms_norm, "LigerRMSNormFunction", Norm)
    monkeypatch.setattr(monkey_patch, "liger_rotary_pos_emb", rotary)
    job = make_job("liger-kernels", (TOKENS,), blocks=BLOCKS, dtype="float64", scope=scope)
    contender = CONTENDERS["liger-kernels"](job)
    norms = [module for module in contender.subject.model.modules() if type(module).__name__ == "LlamaRMSNorm"]
    assert len(norms) == 2 * BLOCKS + (scope == Scope.STEP)
    assert all(module._get_name() == "LigerRMSNorm" for module in norms)
    assert all(type(layer.mlp).__name__ == "LigerTiledSwiGLUMLP" for layer in contender.subject.layers)
    assert all("forward" not in vars(layer.mlp) for layer in contender.subject.layers)  # its own is by tiles
    if scope == Scope.BLOCKS:
        found = gradients(contender)
        assert seen.count("norm") == 2 * 2 * BLOCKS  # forward and the checkpoint's rerun
        assert seen.count("rotary") == 2 * BLOCKS
        assert len(gated) == 3 * BLOCKS
    contender.close()
    assert {name: getattr(modeling_llama, name) for name in liger._OF_LLAMA} == before
    if scope == Scope.BLOCKS:
        for name, expected in gradients(CONTENDERS["unwrapped"](job)).items():
            torch.testing.assert_close(found[name], expected, rtol=1e-9, atol=1e-12)
    # What is not on by Liger's own default: its plain MLP, in whose place the tiled one is.
    defaults = {n: p.default for n, p in inspect.signature(apply_liger_kernel_to_llama).parameters.items()}
    expected = defaults | {"swiglu": False, "fused_linear_cross_entropy": scope == Scope.STEP}
    assert contender.settings["apply_liger_kernel_to_llama"] | {"model": None} == expected
