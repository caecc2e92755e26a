"""The public method reaches the blocks in both scopes. Only the pinning is left out: there is no GPU."""

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from transformers import modeling_utils

from benchmarks.harness.contenders import CONTENDERS, hf_checkpointing, hf_offload
from benchmarks.harness.contenders.packages import SkippedError
from benchmarks.harness.geometry import Scope


@pytest.mark.parametrize("scope", [Scope.BLOCKS, Scope.STEP])
def test_inputs_of_blocks_leave_and_gradients_are_the_same(make_job, monkeypatch, scope):
    seen = []

    class Unpinned(saved_tensors_hooks):
        def __init__(self, pin_memory=False, device_type="cuda"):
            assert pin_memory
            super().__init__(lambda tensor: seen.append(tensor.shape) or tensor, lambda tensor: tensor)

    found, expected = {}, {}
    for name, gradients in (("unwrapped", expected), ("hf-offload", found)):
        if name == "hf-offload":
            monkeypatch.setattr(modeling_utils, "save_on_cpu", Unpinned)
            monkeypatch.setattr(hf_offload, "need_gpu", lambda *given: None)
        contender = CONTENDERS[name](make_job(name, dtype="float64", scope=scope))
        contender.start(64)
        contender.step(lambda given, into=gradients: into.update({key: one.clone() for key, one in given.items()}))
    assert seen.count(torch.Size([1, 64, contender.subject.shape.hidden])) == 2
    assert found.keys() == expected.keys()
    for name, reference in expected.items():
        torch.testing.assert_close(found[name], reference, rtol=1e-9, atol=1e-12)
    ((method, settings),) = contender.details()["settings"].items()
    assert method.endswith("checkpointing_enable")
    assert settings["offload"] is True


def test_a_transformers_without_offload_is_named(make_job, monkeypatch):
    monkeypatch.setattr(hf_offload, "need_gpu", lambda *given: None)
    monkeypatch.setattr(hf_checkpointing, "_ENABLERS", ("gradient_checkpointing_disable",))
    with pytest.raises(SkippedError, match="takes no offload: pip install 'transformers"):
        CONTENDERS["hf-offload"](make_job("hf-offload"))
