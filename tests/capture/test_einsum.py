"""``torch.einsum`` and other ways of writing a block, by tiles: followed where tokens stay apart, and exact."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from memo_runtime.blocks.call import BlockCall
from memo_runtime.capture.axes import NotTokenWiseError, at
from memo_runtime.capture.einsum import einsum_axis
from memo_runtime.execution.tiled import TiledBlock

WIDTH, HEADS, TOKENS = 16, 4, 23


@pytest.mark.parametrize(("equation", "operands", "place"), [
    ("btd,dhk->bthk", [(3, at(1)), (3, None)], at(1)),
    ("btd,dhk->bhkt", [(3, at(1)), (3, None)], at(3)),
    ("...d,df->...f", [(3, at(1)), (2, None)], at(1)),
    ("...td,btd->...t", [(3, at(1)), (3, at(1))], at(1)),
    ("btd,btd->bt", [(3, at(1)), (3, at(1))], at(1)),
    ("b t d , d -> b t", [(3, at(1)), (1, None)], at(1)),
    ("bd,dt", [(2, None), (2, at(1))], at(1)),
    ("td,de", [(2, at(0)), (2, None)], at(1)),  # in the order of the alphabet: et
    ("nd,df->nf", [(2, at(0, outer=3)), (2, None)], at(0, outer=3)),
    ("dhk,khe->de", [(3, None), (3, None)], None),
])  # fmt: skip
def test_tokens_are_where_the_equation_puts_them(equation, operands, place):
    assert einsum_axis(equation, operands) == place


@pytest.mark.parametrize(("equation", "operands", "reason"), [
    ("bthk,bshk->bhts", [(4, at(1)), (4, at(1))], "every token meets every other"),
    ("bt,btd->bd", [(2, at(1)), (3, at(1))], "it sums over tokens"),
    ("...t,...t->...", [(2, at(1)), (2, at(1))], "it sums over tokens"),
    ("tt->t", [(2, at(0))], "it takes the diagonal along tokens"),
    ("nd,nd->nd", [(2, at(0)), (2, at(0, outer=3))], "every token meets every other"),
])  # fmt: skip
def test_what_mixes_tokens_is_refused(equation, operands, reason):
    with pytest.raises(NotTokenWiseError, match=reason):
        einsum_axis(equation, operands)


class Written(nn.Module):
    """Projections by ``einsum``, queries and keys of length one, slopes, and a product with what ``mT`` turns."""

    def __init__(self):
        super().__init__()
        self.project = nn.Parameter(torch.randn(3, WIDTH, HEADS, WIDTH // HEADS) / WIDTH**0.5)
        self.merge = nn.Parameter(torch.randn(HEADS, WIDTH // HEADS, WIDTH) / WIDTH**0.5)
        self.wide, self.narrow = nn.Linear(WIDTH, 2 * WIDTH), nn.Parameter(torch.randn(WIDTH, 2 * WIDTH) / WIDTH)
        self.slope = nn.PReLU()

    def forward(self, x):
        query, key, value = (torch.einsum("btd,dhk->bhtk", x, one) for one in self.project)
        query, key = functional.normalize(query, dim=-1), functional.normalize(key, dim=-1)
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + torch.einsum("bhtk,hkd->btd", mixed, self.merge)
        turned = self.slope(self.wide(x)).mT
        return x + torch.einsum("...f,df->...d", turned.mT, self.narrow)


@pytest.mark.parametrize("rows", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_a_block_that_is_written_so_is_exact(rows):
    torch.manual_seed(0)
    block = Written().double()
    x = torch.randn(rows, TOKENS, WIDTH, dtype=torch.float64)

    def gradients(forward):
        given = x.clone().requires_grad_()
        result = forward(given)
        wanted = [given, *block.parameters()]
        return [result, *torch.autograd.grad(result.sin().sum(), wanted)]

    tiled = TiledBlock(block, tile=5, alpha=0.4)
    expected, found = gradients(block), gradients(tiled)
    assert tiled.captured(BlockCall.of((x.clone().requires_grad_(),), {})).mixers == 1
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


class SlopeForEachToken(Written):
    def __init__(self):
        super().__init__()
        self.slope = nn.PReLU(TOKENS)


def test_a_slope_for_each_token_is_refused():
    from memo_runtime.errors import CaptureRefusedError

    block = SlopeForEachToken().double()
    x = torch.randn(1, TOKENS, WIDTH, dtype=torch.float64, requires_grad=True)
    with pytest.raises(CaptureRefusedError):
        TiledBlock(block, tile=5)(x)
