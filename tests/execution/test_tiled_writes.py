"""Blocks that write to values of their own and make tensors of Python data, by tiles."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from memo_runtime.capture.captured import capture
from memo_runtime.errors import CaptureRefusedError
from memo_runtime.execution.tiled import TiledBlock
from tests.capture.test_refusals import call_of as call_of_tokens
from tests.exactness.hand_written import WIDTH
from tests.execution.tiles import assert_exact, call_of

HALF = WIDTH // 2


def halves(x):
    """Both written, which is all of it."""
    y = x.new_empty(x.shape)
    y[..., :HALF].copy_(2 * x[..., HALF:])
    y[..., HALF:] = x[..., :1]
    return y


def interleaved(x):
    """With a step, one of them added to what is there."""
    y = torch.zeros_like(x)
    y[..., ::2] = x[..., 1::2]
    y[..., 1::2] += 3 * x[..., ::2]
    return y


def seen_by_views(x):
    """A view is read after the whole was written to, and after the view."""
    y = 2 * x
    view = y.transpose(1, 2)
    y.add_(1.0)
    before = view.sum(1)[..., None]
    view.mul_(x.transpose(1, 2))
    return y + before + view.transpose(1, 2)


def single(x):
    """Single features, and slices of slices."""
    y = x.clone()
    y[..., 3] = x[..., 0].square()
    y[..., 4:12][..., 2:4].mul_(0.5)
    y.unsqueeze(1)[:, 0, :, 7:9] = 1.0
    y.view(*x.shape[:2], 4, -1)[:, :, 1] -= x[..., :8]
    y.unflatten(-1, (4, -1)).permute(2, 0, 1, 3)[2].fill_(0.25)
    return y + x


def the_same_for_all(x):
    """What has no tokens is written to every token."""
    y = x.new_empty(x.shape)
    y[..., :HALF] = torch.linspace(0.5, 1.0, HALF, dtype=x.dtype)
    y[..., HALF:].copy_(x[..., HALF:])
    return y * x


def other_precision(x):
    """What is written is rounded to the precision of what it is written to."""
    y = torch.zeros_like(x, dtype=torch.bfloat16)
    y[..., :HALF] = x[..., :HALF].detach()
    y.add_(x.detach())
    z = 2 * x
    z.lt_(0.5)
    return x + y.to(x.dtype) + z


def table(x):
    """Numbers from a list, one of them a negative zero, and indices from lists."""
    slopes = torch.tensor([2.0 ** -(1 + place % 4) for place in range(WIDTH - 1)] + [-0.0], dtype=x.dtype)
    sign = torch.tensor(-0.0, dtype=x.dtype).copysign(slopes[-1])
    return x * slopes + x[..., [-1]] + x[..., [3, 0, -2]].sum(-1, keepdim=True) + 1 / (1 / sign + 3)


def picked(x):
    """By numbers without tokens between dimensions, and rows of a table by numbers of each token."""
    y = x.unflatten(-1, (4, 8))
    apart = y[:, :, torch.tensor([1, 0])[:, None], torch.tensor([2, 5, 7])]
    rows = torch.tensor([[0.5, 2.0], [1.0, -1.0]], dtype=x.dtype)[(x[..., 0] > 0).long()]
    ahead = y.unsqueeze(1)[[0], :, :, [1]].sum(0)
    return x + apart.sum((2, 3))[..., None] + rows[..., :1] + ahead.sum((0, 2))[..., None]


def routed(x):
    weight, choice = x.softmax(-1).topk(3)
    return x + torch.zeros_like(x).scatter_(-1, choice, weight)


def turned(x):
    """By complex numbers."""
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
    angle = torch.arange(x.shape[1], dtype=x.dtype)[:, None] * torch.linspace(0.1, 1.0, HALF, dtype=x.dtype)
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle)).flatten(-2)


FORMS = [halves, interleaved, seen_by_views, single, the_same_for_all, other_precision, table, picked, routed, turned]

#: One of each kind of thing; the others are run with the slow tests.
QUICK = (halves, seen_by_views, table)


class Changed(nn.Module):
    """A layer for what ``forms`` make of its input."""

    def __init__(self, *forms):
        super().__init__()
        self.forms, self.layer = forms, nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        y = x
        for form in self.forms:
            y = form(y)
        return x + self.layer(y)


def hidden():
    return torch.randn(3, 29, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()


@pytest.mark.parametrize(
    "form",
    [one if one in QUICK else pytest.param(one, marks=pytest.mark.slow) for one in FORMS],
    ids=lambda form: form.__name__,
)
def test_exact(form):
    block = Changed(form).double().train()
    assert_exact(call_of(block, hidden()), TiledBlock(block, tile=8, alpha=0.5))


def shifted(x):
    y = torch.zeros_like(x)
    y[:, 1:] = x[:, :-1]
    return y


def only_the_last(x):
    y = 2 * x
    y[:, -1] = 0.0
    return y


def one_of_several_views(x):
    y = 2 * x
    first, _ = y.chunk(2, dim=-1)
    first.detach().zero_()
    return y


def of_the_length(x):
    return x * torch.tensor([1.0, x.shape[1]], dtype=x.dtype).sum()


def of_every_length(x):
    return x * torch.tensor([1.0 / (1 + place) for place in range(x.shape[1])], dtype=x.dtype)[:, None]


def picks_tokens(x):
    return x + x[:, [0]]


def of_many_numbers(x):
    return x * torch.tensor([1.0] * 128 * WIDTH + [0.5], dtype=x.dtype)[-1]


def without_gradient(x):
    """What was written has a gradient, and is read where there is none."""
    y = x.new_empty(x.shape)
    y.copy_(x)
    with torch.no_grad():
        scale = y.abs().amax(-1, keepdim=True)
    return x / scale


REFUSED = {
    shifted: ("aten.slice", "a part of the tokens"),
    only_the_last: ("aten.select", "takes single tokens"),
    one_of_several_views: ("aten.zero_", "writes to a view that aten.detach has taken"),
    of_the_length: ("forward", "one number of tokens only"),
    of_every_length: ("forward", "one number of tokens only"),
    picks_tokens: ("aten.index", "picks tokens"),
    of_many_numbers: ("torch.tensor", "4,097 numbers"),
    without_gradient: ("aten.abs", "without gradients"),
}


@pytest.mark.parametrize("form", REFUSED, ids=lambda form: form.__name__)
def test_refused(form):
    operator, reason = REFUSED[form]
    with pytest.raises(CaptureRefusedError) as caught:
        capture(Changed(form), call_of_tokens())
    assert caught.value.operator == operator
    assert reason in caught.value.reason


def test_slices_that_are_all_of_a_value_are_joined():
    """So that what is not written is not read either, nor copied."""
    names = [node.target for node in capture(Changed(halves), call_of_tokens()).traced.graph.nodes]
    assert torch.ops.aten.cat.default in names
    assert torch.ops.aten.new_empty.default not in names


class Scales(nn.Module):
    def __init__(self, *scales):
        super().__init__()
        self.scales, self.layer = list(scales), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return self.layer(x * torch.tensor(self.scales, dtype=x.dtype).sum())


def test_blocks_with_other_numbers_share_no_programs_and_a_list_that_changes_is_captured_again():
    call, block = call_of_tokens(), Scales(1.0, 0.0).double()
    assert capture(Scales(1.0, 0.0), call).signature == capture(Scales(1.0, 0.0), call).signature
    assert capture(Scales(1.0, 0.0), call).signature != capture(Scales(1.0, -0.0), call).signature
    tiled = TiledBlock(block, tile=8)
    for scale in (1.0, 3.0):
        block.scales[0] = scale
        assert_exact(call_of(block, hidden()), tiled)


def test_a_program_may_write_over_a_constant():
    """Compiled ones do, once nothing reads it any more."""
    numbers, settings = [1.0, -0.0, 3.0], ([3], torch.float32, torch.device("cpu"))
    made = torch.ops.memo_runtime.constant(numbers, *settings)
    made.add_(1)
    again = torch.ops.memo_runtime.constant(numbers, *settings)
    assert torch.equal(again, torch.tensor(numbers))
    assert again.signbit().tolist() == [False, True, False]
