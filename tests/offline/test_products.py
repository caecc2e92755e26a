"""A block that is tried on the CPU: its products of half precision are those of float32."""

import pytest
import torch
from torch import nn

from memo_runtime.offline.products import ProductsInFloat32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_and_their_gradients_are_rounded_once(dtype):
    torch.manual_seed(0)
    layer, x = nn.Linear(48, 32).to(dtype), torch.randn(2, 5, 48).to(dtype).requires_grad_()
    wide = nn.Linear(48, 32)
    wide.load_state_dict(layer.state_dict())
    with ProductsInFloat32():
        result = layer(x)
        result.sum().backward()
    given = x.detach().float().requires_grad_()
    expected = wide(given)
    expected.sum().backward()
    pairs = (result, expected), (x.grad, given.grad), (layer.weight.grad, wide.weight.grad)
    for one, other in pairs:
        assert one.dtype == dtype
        assert torch.equal(one, other.to(dtype))
    assert result.stride() == expected.stride()


def test_all_else_is_what_it_was():
    torch.manual_seed(0)
    double, half = torch.randn(3, 4, dtype=torch.float64), torch.randn(3, 4).bfloat16()
    numbers = torch.arange(12).view(3, 4)

    def results():
        return [double @ double.t(), half.exp(), half.sum(0), numbers @ numbers.t()]

    expected = results()
    with ProductsInFloat32():
        found, sizes = results(), half.to("meta") @ half.to("meta").t()
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert (sizes.device.type, sizes.dtype, tuple(sizes.shape)) == ("meta", torch.bfloat16, (3, 3))
