"""The GPU's kernel merges two parts of an attention as float64 does, wherever their elements lie."""

import pytest
import torch

from memo_runtime.execution.mixers.merging import Part, merge_into

pytestmark = pytest.mark.gpu


def part(shape, dtype, *, behind, scale=1.0):
    """[B, H, S, D] in the memory order of a projection, and its log-sum-exps."""
    batch, heads, rows, depth = shape
    output = torch.randn(batch, rows, heads, depth, device="cuda", dtype=dtype).transpose(1, 2)
    lse = scale * torch.randn(batch, heads, rows, *behind, device="cuda")
    return Part(output, lse)


@pytest.mark.parametrize("behind", [(), (1,)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(1, 8, 1000, 128), (2, 3, 77, 80), (1, 1, 1, 64)])
def test_the_kernel_merges_as_float64_does(shape, dtype, behind):
    torch.manual_seed(0)
    own, before = (part(shape, dtype, behind=behind, scale=20.0) for _ in range(2))
    # A chunk's place among all queries, with rows around it that stay.
    batch, heads, rows, depth = shape
    whole = torch.full((batch, rows + 5, heads, depth), 7.0, device="cuda", dtype=dtype).transpose(1, 2)
    lses = torch.full((batch, heads, rows + 5, *behind), 7.0, device="cuda")
    merge_into(Part(whole[:, :, 3 : rows + 3], lses[:, :, 3 : rows + 3]), own, before)
    share = torch.sigmoid(before.lse.double() - own.lse.double()).reshape(batch, heads, rows, 1)
    expected = own.output.double().lerp(before.output.double(), share)
    lse = torch.logaddexp(own.lse.double(), before.lse.double())
    torch.testing.assert_close(whole[:, :, 3 : rows + 3], expected.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-6)
    torch.testing.assert_close(lses[:, :, 3 : rows + 3], lse.float(), rtol=1e-6, atol=1e-6)
    for kept in (whole[:, :, :3], whole[:, :, rows + 3 :], lses[:, :, :3], lses[:, :, rows + 3 :]):
        assert (kept == 7.0).all()


def test_it_is_one_kernel():
    own, before, place = (part((1, 4, 4096, 128), torch.bfloat16, behind=()) for _ in range(3))
    merge_into(place, own, before)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as prof:
        merge_into(place, own, before)
        torch.cuda.synchronize()
    kernels = [event for event in prof.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert [event.name for event in kernels] == ["_merge"]
