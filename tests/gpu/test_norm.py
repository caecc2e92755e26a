"""The norm behind the blocks at 1 GiB of hidden state: about what it takes, and that it is the same norm."""

import pytest
import torch

from memo_runtime.execution.norm import install_norm, remove_norm
from memo_runtime.units import GiB

pytestmark = pytest.mark.gpu
WIDTH = 2048
TOKENS = GiB // (2 * WIDTH)


def run(norm, hidden, grad):
    """(result, gradients, GiB beside input and the gradient that comes)."""
    hidden.grad = norm.weight.grad = None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = norm(hidden)
    result.backward(grad)
    torch.cuda.synchronize()
    taken = (torch.cuda.max_memory_allocated() - before) / GiB
    return result.detach()[:, ::4096].clone(), hidden.grad[:, ::4096].clone(), norm.weight.grad.clone(), taken


def test_it_takes_its_result_and_one_gradient():
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    torch.manual_seed(0)
    norm = llama.LlamaRMSNorm(WIDTH).to("cuda", torch.bfloat16)
    hidden = torch.randn(1, TOKENS, WIDTH, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    grad = torch.randn_like(hidden)
    *theirs, whole = run(norm, hidden, grad)
    assert install_norm(norm)
    run(norm, hidden, grad)  # captured
    *mine, tiled = run(norm, hidden, grad)
    remove_norm(norm)
    assert whole > 9
    assert tiled < 2.3
    for one, other in zip(mine, theirs, strict=True):
        assert float((one.double() - other.double()).norm() / other.double().norm()) < 0.01
