"""What stands in for a kernel yields the same memory, and lets the real one through where that is asked."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

import memo_runtime as memo
from memo_runtime.blocks.real_kernels import RealKernels
from memo_runtime.blocks.spans import spans_tensor
from memo_runtime.errors import RehearsalError
from memo_runtime.execution.mixers.masked import masked_attention
from memo_runtime.rehearsal.kernels import KERNELS
from memo_runtime.rehearsal.laws import lengths
from memo_runtime.rehearsal.short import short_layout
from memo_runtime.rehearsal.stand_ins import StandIns

CPU = torch.device("cpu")


def attend(query, key, value, **settings):
    """Output and gradients, on tensors of their own."""
    given = [one.detach().requires_grad_() for one in (query, key, value)]
    output = scaled_dot_product_attention(*given, **settings)
    return output, *torch.autograd.grad(output, given, torch.ones_like(output) * 0.5)


def memory(tensors):
    """All that another allocator would see."""
    return [(t.shape, t.stride(), t.storage_offset(), t.dtype, t.untyped_storage().nbytes()) for t in tensors]


def inputs(rows, tokens, heads, *, keys=None, dtype=torch.float32, token_major=True, fused=False):
    """Queries, keys and values in some order of memory."""
    if fused:
        whole = torch.randn(rows, tokens, 3 * heads * 8, dtype=dtype)
        return [part.unflatten(-1, (heads, 8)).transpose(1, 2) for part in whole.chunk(3, -1)]
    counts = (tokens, keys or tokens, keys or tokens)
    made = [torch.randn(rows, count, heads, 8, dtype=dtype).transpose(1, 2) for count in counts]
    return made if token_major else [one.contiguous() for one in made]


CASES = [
    (inputs(1, 9, 2), {"is_causal": True}),
    (inputs(1, 301, 4), {"is_causal": True}),
    (inputs(3, 301, 4, dtype=torch.bfloat16), {"is_causal": True}),
    (inputs(2, 130, 4, token_major=False, dtype=torch.float64), {}),
    (inputs(2, 200, 2, fused=True), {"is_causal": True}),
    (inputs(2, 100, 4, keys=200), {}),
    (inputs(2, 200, 4, keys=100), {}),
    # As chunks of queries meet the keys before them: shares that are no line of rounded lengths.
    (inputs(1, 128, 4, keys=384), {}),
    (inputs(1, 96, 2, keys=672), {}),
    (inputs(1, 100, 2, keys=777), {}),
    (inputs(2, 100, 4), {"attn_mask": torch.zeros(100, 100)}),
]


@pytest.mark.parametrize(("given", "settings"), CASES)
def test_results_lie_in_memory_as_the_kernels_do(given, settings):
    real = attend(*given, **settings)
    with StandIns(CPU) as stand_ins:
        rehearsed = attend(*given, **settings)
        with RealKernels():
            again = attend(*given, **settings)
    assert memory(rehearsed) == memory(real)
    assert all(torch.isfinite(one).all() for one in rehearsed)
    assert all(map(torch.equal, again, real))
    assert all(map(torch.equal, attend(*given, **settings), real))
    assert (stand_ins.calls["cpu"].forward, stand_ins.calls["cpu"].backward) == (1, 1)


def test_every_token_sees_itself_and_forward_and_backward_belong_together():
    given = inputs(1, 40, 2, dtype=torch.float64)
    with StandIns(CPU):
        output, query, key, value = attend(*given, is_causal=True)
    assert torch.equal(output, given[2])
    assert not query.any()
    assert not key.any()
    assert torch.equal(value, torch.full_like(value, 0.5))


def test_lengths_have_the_remainder_of_the_one_that_is_asked():
    assert lengths("cuda", 1_000_001, 1_000_001) == (2048 + 577, 4096 + 577)
    assert lengths("cuda", 4096, 4096) == (4096,)
    # 32,768 queries and three times as many keys: 1,024 and 2,048 queries.
    assert lengths("cuda", 32_768, 98_304) == (3072, 6144)
    assert lengths("cuda", 98_305, 32_768) == (98_305,)  # no shorter ones have their remainders
    # Rows of a fused projection keep their gaps; heads in front of tokens are as far apart as tokens are many.
    assert short_layout(((2, 4, 100, 8), (9600, 8, 96, 1)), 10, 100) == ((2, 4, 10, 8), (960, 8, 96, 1))
    assert short_layout(((2, 4, 100, 8), (3200, 800, 8, 1)), 10, 100) == ((2, 4, 10, 8), (320, 80, 8, 1))


def test_every_kernel_has_operators_with_the_arguments_that_are_read():
    for kernel in (one for kernels in KERNELS.values() for one in kernels):
        forward = getattr(torch.ops.aten, kernel.operator).default._schema
        backward = getattr(torch.ops.aten, kernel.backward).default._schema
        assert {"query", "key", "value", "dropout_p", "is_causal"} <= {one.name for one in forward.arguments}
        assert set(kernel.saved) <= {one.name for one in backward.arguments}
        assert len(kernel.saved) <= len(forward.returns)


@pytest.fixture
def scan():
    """An operator that a user has named; counts its real runs."""
    runs = []

    @torch.library.custom_op("memo_test_rehearsal::scan", mutates_args=())
    def run(x: torch.Tensor) -> torch.Tensor:
        runs.append(1)
        return x.cumsum(1)

    run.register_fake(torch.empty_like)
    run.register_autograd(lambda ctx, grad: grad.flip(1).cumsum(1).flip(1))
    memo.register_mixer("memo_test_rehearsal::scan")
    return run, runs


def test_a_named_operator_is_replaced_where_its_library_says_what_it_yields(scan):
    operator, runs = scan
    x = torch.randn(2, 9, 4, requires_grad=True)
    with StandIns(CPU) as stand_ins:
        result = operator(x)
        result.sum().backward()
    assert not runs
    assert result.shape == x.shape
    assert stand_ins.calls["memo_test_rehearsal::scan"].forward == 1
    assert torch.equal(operator(x), x.cumsum(1))
    assert runs


def test_attention_under_spans_runs_as_it_is_and_the_kernels_in_it_do_not():
    first, end = torch.tensor([0] * 20 + [20] * 30), torch.arange(1, 51)
    spans, given = spans_tensor(first[None], end[None]), inputs(1, 50, 2)
    given = [one.requires_grad_() for one in given]
    with StandIns(CPU) as stand_ins:
        output = masked_attention(*given, spans)
        output.sum().backward()
    assert torch.equal(output, given[2])
    assert set(stand_ins.calls) == {"cpu"}
    assert (stand_ins.calls["cpu"].forward, stand_ins.calls["cpu"].backward) == (2, 2)


def test_one_rehearsal_at_a_time():
    with StandIns(CPU), pytest.raises(RehearsalError, match="a rehearsal is under way in this process"):
        StandIns(CPU).__enter__()
    with pytest.raises(RehearsalError, match="device type 'meta' cannot be replaced; there is: cpu, cuda"):
        StandIns(torch.device("meta")).__enter__()
    with StandIns(CPU) as stand_ins:
        assert not stand_ins.calls
