"""Blocks written by hand by tiles, and the check of every capture."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from memo_runtime.blocks.call import BlockCall
from memo_runtime.blocks.declared import declare_token_wise
from memo_runtime.capture.captured import capture
from memo_runtime.errors import CaptureRefusedError
from memo_runtime.execution import tiled as tiled_module
from memo_runtime.execution.compilers import run_eagerly
from memo_runtime.execution.tiled import TiledBlock
from memo_runtime.execution.tiled_cache import ProgramCache
from tests.capture import blocks
from tests.exactness import hand_written
from tests.exactness.hand_written import HEADS, WIDTH
from tests.execution.tiles import TOLERANCE, assert_exact, call_of, run, worst

BLOCKS = [
    hand_written.Attention, hand_written.TwoMixers, hand_written.NoMixer, hand_written.OwnPositions,
    hand_written.BufferedMask, hand_written.DictOutput, hand_written.TimeFirst, hand_written.Normalised,
    hand_written.Twice, blocks.Detached, blocks.LearnedBias, blocks.PassThrough, blocks.AnotherWay,
    blocks.Tables, blocks.WritesView, blocks.Sinks,
]  # fmt: skip


def double(kind):
    torch.manual_seed(0)
    return kind().double().train()


def hidden(tokens=29, rows=3):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(rows, tokens, WIDTH, generator=generator, dtype=torch.float64).requires_grad_()


@pytest.mark.parametrize(
    "alpha", [pytest.param(0.0, marks=pytest.mark.slow), 0.5, pytest.param(1.0, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("kind", BLOCKS, ids=lambda kind: kind.__name__)
def test_exact(kind, alpha):
    block = double(kind)
    assert_exact(call_of(block, hidden()), TiledBlock(block, tile=8, alpha=alpha))


@pytest.mark.parametrize("declared", [False, True])
def test_buffers_get_their_gradient(declared):
    """Also where they are computed anew for each call, and in a module that was declared."""
    block = double(blocks.BufferedScale)
    if declared:
        block = double(hand_written.Attention)
        block.up = Scaled(block.up).double()
        declare_token_wise(block.up)
    owner = block.up if declared else block
    tiled = TiledBlock(block, tile=8, alpha=0.5)
    for number in (1, 2):
        leaf = torch.linspace(0.5, number, WIDTH, dtype=torch.float64).requires_grad_()
        found = []
        for forward in (block.forward, tiled):
            owner.scale = number * leaf
            (grad,) = torch.autograd.grad(forward(hidden()).square().sum(), leaf)
            found.append(grad)
        assert worst(found[1:], found[:1]) <= TOLERANCE


class Scaled(nn.Module):
    """A layer behind a buffer that whoever calls it computes."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer
        self.register_buffer("scale", torch.ones(WIDTH))

    def forward(self, x):
        return self.layer(x * self.scale)


def test_parameters_that_functional_call_exchanges_get_their_gradient():
    block = double(hand_written.Attention)
    named = {name: (1.1 * one.detach()).requires_grad_() for name, one in block.named_parameters()}
    tiled, found = TiledBlock(block, tile=8), []

    class Forward(nn.Module):
        def __init__(self, forward):
            super().__init__()
            self.block, self.run = block, forward

        def forward(self, x):
            return self.run(x)

    for forward in (block.forward, tiled):
        inside = {f"block.{name}": one for name, one in named.items()}
        result = torch.func.functional_call(Forward(forward), inside, (hidden(),))
        found.append(torch.autograd.grad(result.square().sum(), list(named.values())))
    assert worst(found[1], found[0]) <= TOLERANCE


def test_anomaly_mode():
    """It asks every gradient whether it is NaN: not while programs are traced, whose gradients have no values."""
    block = double(hand_written.Attention)
    with torch.autograd.set_detect_anomaly(True):
        assert_exact(call_of(block, hidden()), TiledBlock(block, tile=8))
        assert torch.is_anomaly_enabled()


def test_tokens_without_a_batch():
    block = double(hand_written.Sequential2d)
    assert_exact(call_of(block, hidden()[0].detach().requires_grad_()), TiledBlock(block, tile=8))


def test_values_of_another_block_get_their_gradient():
    block = double(hand_written.SharedValues)
    first = torch.randn(3, HEADS, 29, WIDTH // HEADS, dtype=torch.float64, requires_grad=True)
    tiled = TiledBlock(block, tile=8)
    assert_exact(call_of(block, hidden(), first), tiled)
    assert_exact(call_of(block, hidden(), None), tiled)


def test_a_bias_of_all_pairs_gets_its_gradient():
    block = double(hand_written.Biased)
    bias = torch.randn(1, HEADS, 29, 29, dtype=torch.float64, requires_grad=True)
    assert_exact(call_of(block, hidden(), bias=bias), TiledBlock(block, tile=8))


@pytest.mark.parametrize("others", [29, 11])
def test_attention_to_other_tokens(others):
    block = double(blocks.Cross)
    keys = torch.randn(3, others, WIDTH, dtype=torch.float64, requires_grad=True)
    assert_exact(call_of(block, hidden(), keys), TiledBlock(block, tile=8))


def test_packed_documents():
    block = double(blocks.DocumentMask)
    documents = torch.tensor([0] * 7 + [1] * 12 + [2] * 10).expand(3, -1)
    assert_exact(call_of(block, hidden(), documents), TiledBlock(block, tile=8))


@pytest.mark.parametrize("shape", [(29, 29), (3, 29, 29)])
def test_masks_without_a_dimension_of_heads(shape):
    block = double(blocks.MaskOfRows)
    mask = torch.ones(shape, dtype=torch.bool).tril()
    mask[..., 3:7, 1] = False
    assert_exact(call_of(block, hidden(), mask), TiledBlock(block, tile=8))


def test_a_mask_that_tokens_see_too():
    block = double(blocks.MaskByTiles)
    mask = torch.randn(3, 1, 29, 29, dtype=torch.float64, requires_grad=True)
    assert_exact(call_of(block, hidden(), mask), TiledBlock(block, tile=8))


def test_an_input_without_gradient_and_frozen_parameters():
    block = double(hand_written.Attention)
    tiled = TiledBlock(block, tile=8)
    assert_exact(call_of(block, hidden().detach()), tiled)
    block.project.requires_grad_(False)
    assert_exact(call_of(block, hidden()), tiled)


def test_a_gradient_for_one_output_only():
    block = double(hand_written.DictOutput)
    tiled, x = TiledBlock(block, tile=8), hidden()
    for name in ("hidden", "mixed"):
        wanted = [x, block.merge.weight, block.project.weight]
        theirs = torch.autograd.grad(block(x)[name].square().sum(), wanted, allow_unused=True)
        mine = torch.autograd.grad(tiled(x)[name].square().sum(), wanted, allow_unused=True)
        theirs = [torch.zeros_like(one) if grad is None else grad for one, grad in zip(wanted, theirs, strict=True)]
        mine = [torch.zeros_like(one) if grad is None else grad for one, grad in zip(wanted, mine, strict=True)]
        assert worst(mine, theirs) <= 1e-12


def test_an_input_that_is_not_contiguous():
    block = double(hand_written.Attention)
    x = torch.randn(29, 3, WIDTH, dtype=torch.float64).transpose(0, 1).requires_grad_()
    assert_exact(call_of(block, x), TiledBlock(block, tile=8))


def test_without_grad_the_block_itself_runs():
    block = double(hand_written.Attention)
    tiled = TiledBlock(block, tile=8)
    with torch.no_grad():
        assert torch.equal(tiled(hidden()), block(hidden()))
    assert tiled.kernels == []


def test_switched_state_between_steps():
    """State that a trace freezes: each setting has its own capture, and the first one serves again."""
    block, x = double(blocks.Switched), hidden()
    tiled = TiledBlock(block, tile=8)
    for scale in (1.0, 3.0, 1.0):
        block.settings["scales"][0] = scale
        assert_exact(call_of(block, x), tiled)
    assert len(tiled._captures) == 2


class FromOutside(hand_written.Attention):
    """Reads an attribute of its class, and a global."""

    factor = 1.0

    def forward(self, x):
        return super().forward(self.factor * GAIN["by"] * x)


GAIN = {"by": 1.0}


def test_what_a_block_reads_outside_of_itself_changes_between_steps(monkeypatch):
    """Each state has its own capture, and the first one serves again."""
    block, x = double(FromOutside), hidden()
    tiled = TiledBlock(block, tile=8)
    assert_exact(call_of(block, x), tiled)
    monkeypatch.setattr(FromOutside, "factor", 2.0)
    assert_exact(call_of(block, x), tiled)
    monkeypatch.setitem(GAIN, "by", 3.0)
    assert_exact(call_of(block, x), tiled)
    monkeypatch.undo()
    assert_exact(call_of(block, x), tiled)
    assert len(tiled._captures) == 3


def test_a_global_that_is_another_at_every_call_is_named(monkeypatch):
    monkeypatch.setattr(tiled_module, "_RESTLESS", 2)
    tiled, call = TiledBlock(double(FromOutside), tile=8), BlockCall.of((hidden(),), {})
    for step in (1.0, 2.0):
        monkeypatch.setitem(GAIN, "by", step)
        tiled.captured(call)
    assert "global 'GAIN' of " in tiled.restless


@pytest.mark.slow
def test_lora_with_its_adapter_switched():
    peft = pytest.importorskip("peft")
    base = nn.Sequential(double(hand_written.Attention))
    config = peft.LoraConfig(target_modules=["up", "merge"], init_lora_weights=False)
    model = peft.get_peft_model(base, config)
    block = model.base_model.model[0].double()
    tiled, x = TiledBlock(block, tile=8), hidden()
    assert_exact(call_of(block, x), tiled)
    with model.disable_adapter():
        assert_exact(call_of(block, x), tiled)
    assert_exact(call_of(block, x), tiled)
    assert len(tiled._captures) == 2


def test_parameters_changed_in_place_between_forward_and_backward_are_an_error():
    block, x = double(hand_written.Attention), hidden()
    y = TiledBlock(block, tile=8)(x)
    with torch.no_grad():
        block.up.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_backward_twice_is_an_error():
    y = TiledBlock(double(hand_written.Attention), tile=8)(hidden()).sum()
    y.backward()
    with pytest.raises(RuntimeError, match="second time"):
        y.backward()


@pytest.mark.parametrize("power", [1, 2])
def test_gradients_of_gradients_are_refused(power):
    """Also where those that come in have no graph: a penalty would be a constant otherwise."""
    block, x = double(hand_written.Attention), hidden()
    tiled = TiledBlock(block, tile=8)
    (grad,) = torch.autograd.grad(tiled(x).pow(power).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"by tiles, and the gradients.*policy='replay'"):
        (grad.square().sum() + block.up.weight.sum()).backward()
    assert_exact(call_of(block, x), tiled)


def test_low_precision_weight_gradients_are_summed_in_float32():
    """Many tiles: sums in bfloat16 would lose what single tiles add."""
    torch.manual_seed(0)
    block = hand_written.Attention().bfloat16()
    x = torch.randn(1, 512, WIDTH).bfloat16().requires_grad_()
    reference = hand_written.Attention().double()
    reference.load_state_dict(block.state_dict())
    exact = run(call_of(reference, x.detach().double().requires_grad_()), reference)[1]
    theirs = run(call_of(block, x), block)[1]
    mine = run(call_of(block, x), TiledBlock(block, tile=8))[1]
    assert worst(mine, exact) <= 1.1 * worst(theirs, exact)


def test_autocast():
    torch.manual_seed(0)
    block = hand_written.Attention()
    x = torch.randn(2, 29, WIDTH, requires_grad=True)
    tiled = TiledBlock(block, tile=8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        theirs = run(call_of(block, x), block)
        mine = run(call_of(block, x), tiled)
        y = tiled(x)
    assert mine[0][0].dtype == theirs[0][0].dtype
    assert worst(mine[0], theirs[0]) < 1e-2
    assert worst(mine[1], theirs[1]) < 2e-2
    # Backward outside of autocast, as most loops have it.
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64).to(y.dtype)
    outside = torch.autograd.grad(y, [x, *block.parameters()], weights)
    assert worst(outside, mine[1]) == 0.0


def test_blocks_alike_share_programs():
    programs = ProgramCache(run_eagerly)
    for tokens in (29, 29, 37):
        TiledBlock(double(hand_written.Attention), tile=8, programs=programs)(hidden(tokens)).sum().backward()
    assert len(programs) == 4  # two segments, two tile sizes
    assert len(programs.checked) == 1


# ---- the check


@pytest.mark.anew
def test_a_wrong_capture_is_refused(monkeypatch):
    """What a frozen switch would be: the graph of another activation."""

    def wrong(block, call, forward=None):
        found = capture(block, call)
        for node in found.stages.stages[-1].nodes:
            if node.target is torch.ops.aten.silu.default:
                node.target = torch.ops.aten.relu.default
        return found

    monkeypatch.setattr(tiled_module, "capture", wrong)
    with pytest.raises(CaptureRefusedError, match="check: output 0 differs by"):
        TiledBlock(double(hand_written.Attention), tile=8)(hidden())


@pytest.mark.anew
def test_a_lost_gradient_is_refused(monkeypatch):
    def wrong(block, call, forward=None):
        found = capture(block, call)
        found.stages.differentiable -= {node for node, name in found.states if name == "up.weight"}
        return found

    monkeypatch.setattr(tiled_module, "capture", wrong)
    with pytest.raises(CaptureRefusedError, match=r"check: gradient of up\.weight differs by"):
        TiledBlock(double(hand_written.Attention), tile=8)(hidden())


def test_a_block_that_is_another_at_every_call_says_so(monkeypatch):
    """And does not keep every graph that it ever had."""
    monkeypatch.setattr(tiled_module, "_RESTLESS", 3)
    monkeypatch.setattr(tiled_module, "_MOST_CAPTURES", 2)
    block, x = double(hand_written.Attention), hidden()
    tiled, said = TiledBlock(block, tile=6), []
    for step in (0, 1, 2, 2):
        block.merge.step = step
        tiled.captured(BlockCall.of((x,), {}))
        said.append(tiled.restless)
    assert said == ["", "", "attribute 'merge.step'", ""]
    assert len(tiled._captures) == 2


def test_a_check_leaves_random_state_and_gradients_alone():
    block, x = double(hand_written.InPlace), hidden()
    before = torch.get_rng_state()
    TiledBlock(block, tile=8).captured(BlockCall.of((x,), {}))
    assert torch.equal(torch.get_rng_state(), before)
    assert x.grad is None
    assert all(one.grad is None for one in block.parameters())


@pytest.mark.parametrize(("tile", "alpha"), [(0, 0.0), (-3, 0.0), (8, -0.1), (8, 1.5)])
def test_settings_that_mean_nothing(tile, alpha):
    with pytest.raises(ValueError, match=r"tile is|alpha is"):
        TiledBlock(double(hand_written.Attention), tile=tile, alpha=alpha)
