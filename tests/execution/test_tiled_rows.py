"""Parts of tensors without gaps, as kernels want them."""

import torch

from memo_runtime.execution.tiled_rows import like, without_gaps
from memo_runtime.records import TokenAxis


def test_dimensions_of_size_one_have_strides_that_kernels_take():
    """cuDNN refuses log-sum-exps, [batch, heads, tokens, 1], whose last stride is not one, or ends the process."""
    for batch in (1, 2):
        part = torch.arange(batch * 8 * 5.0).view(batch, 8, 5, 1).narrow(1, 2, 4)
        found = without_gaps(part)
        assert torch.equal(found, part)
        assert found.stride() == (20, 5, 1, 1)


def test_the_order_of_dimensions_in_memory_stays():
    heads = torch.randn(1, 6, 4, 3).transpose(1, 2)  # [batch, heads, tokens, depth], token-major
    whole = without_gaps(heads)
    assert whole.data_ptr() == heads.data_ptr()
    assert whole.stride() == (72, 3, 12, 1)
    part = without_gaps(heads.narrow(1, 1, 2))
    assert part.stride() == (36, 3, 6, 1)
    assert torch.equal(part, heads.narrow(1, 1, 2))


def test_expanded_heads_lie_outside_of_their_features():
    """Keys of one head that all heads of queries share: features of one token stay together."""
    keys = torch.randn(2, 1, 5, 3).expand(2, 4, 5, 3)
    assert without_gaps(keys).stride() == (60, 15, 3, 1)
    assert like(keys, TokenAxis(dim=2), tokens=10, length=5).stride() == (120, 30, 3, 1)
