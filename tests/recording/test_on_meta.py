"""Meta tensors: attention as one operator, and questions about values that are not there."""

import pytest
import torch
from torch.nn import functional

from memo_runtime.errors import TraceError
from memo_runtime.recording.meta_attention import fused_attention_on_meta
from memo_runtime.recording.meta_scalars import PlainAnswers
from memo_runtime.recording.operators import OperatorRecorder


def attend(mask=None, tokens=512, heads=2):
    q = torch.empty(1, 4, tokens, 16, device="meta", requires_grad=True)
    k, v = (torch.empty(1, heads, tokens, 16, device="meta", requires_grad=True) for _ in range(2))
    with OperatorRecorder([q, k, v]) as recorder:
        out = functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=heads != 4
        )
        out.sum().backward()
    assert k.grad.shape == k.shape
    return max(request.size for request in recorder.trace().requests)


@pytest.mark.parametrize("heads", [2, 4])
def test_no_matrix_of_tokens_times_tokens(heads):
    assert attend(heads=heads) >= 4 * 512 * 512
    with fused_attention_on_meta():
        assert attend(heads=heads) < 4 * 512 * 512


def test_with_a_mask_the_scores_are_not_there_either():
    mask = torch.ones(1, 1, 512, 512, dtype=torch.bool, device="meta")
    with fused_attention_on_meta():
        assert attend(mask) <= 4 * 512 * 512  # the bias, once


@pytest.mark.parametrize("masked", [False, True])
def test_values_may_have_another_width_than_keys(masked):
    query, value = (torch.empty(1, 4, 512, width, device="meta", requires_grad=True) for width in (24, 16))
    mask = torch.ones(1, 1, 512, 512, dtype=torch.bool, device="meta") if masked else None
    with fused_attention_on_meta():
        result = functional.scaled_dot_product_attention(query, query, value, attn_mask=mask, is_causal=not masked)
    assert result.shape == value.shape
    result.sum().backward()
    assert (query.grad.shape, value.grad.shape) == (query.shape, value.shape)


def test_other_devices_and_the_time_afterwards_are_as_before():
    own = functional.scaled_dot_product_attention
    x = torch.randn(1, 2, 8, 4)
    expected = own(x, x, x)
    with fused_attention_on_meta():
        assert torch.equal(functional.scaled_dot_product_attention(x, x, x), expected)
    assert functional.scaled_dot_product_attention is own
    with pytest.raises(ZeroDivisionError), fused_attention_on_meta():
        raise ZeroDivisionError
    assert functional.scaled_dot_product_attention is own


def test_questions_get_the_plain_answer():
    mask = torch.ones(4, dtype=torch.bool, device="meta")
    with PlainAnswers() as answers:
        assert bool(mask.all())
        assert not bool(mask.any())
        assert answers.assumed == 2
        with pytest.raises(TraceError, match="reads a number"):
            mask.sum().item()
