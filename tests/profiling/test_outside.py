"""What the plan reserves for the part of a step behind the blocks."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from memo_runtime.losses.tiles import ROWS_BYTES, TILE_BYTES
from memo_runtime.profiling.outside import loss_peak, outside_peak, result_bytes
from memo_runtime.recording.meta_scalars import PlainAnswers
from memo_runtime.recording.operators import OperatorRecorder
from memo_runtime.records import BlockProfile
from memo_runtime.traces.trace import Phase

TOKENS, HIDDEN_BYTES = 64, 64 * 16 * 4


def profiles(count: int) -> list[BlockProfile]:
    return [
        BlockProfile(name=f"layers.{i}", kind="Linear", stack=0, tokens=TOKENS, token_dim=1, input_leaf=0, reason="")
        for i in range(count)
    ]


class Stack(nn.Module):
    def __init__(self, **behind: nn.Module) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, 16)
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(2))
        self.rotary = nn.Identity()
        for name, module in behind.items():
            setattr(self, name, module)


def peak(model: nn.Module, *, tiled_loss: bool = False) -> int:
    return outside_peak(model, profiles(2), 1, HIDDEN_BYTES, tiled_loss=tiled_loss).at(TOKENS)


def test_a_model_that_ends_with_its_blocks_needs_the_last_state_and_its_gradient() -> None:
    assert peak(Stack()) == 2 * HIDDEN_BYTES


def test_a_final_norm_needs_its_copies() -> None:
    assert peak(Stack(norm=nn.LayerNorm(16))) == 7 * HIDDEN_BYTES


def test_a_scale_of_the_model_itself_counts_as_something_behind() -> None:
    model = Stack()
    model.scale = nn.Parameter(torch.ones(16))
    assert peak(model) == 7 * HIDDEN_BYTES


@pytest.mark.parametrize(
    ("behind", "tiled_loss", "features"),
    [({}, False, 16), ({"head": nn.Linear(16, 100)}, False, 100), ({"head": nn.Linear(16, 100)}, True, 0),
     ({"condition": nn.Linear(1, 1)}, False, 16)],
    ids=["bare", "head", "loss by tiles", "no head"],
)  # fmt: skip
def test_a_model_returns_states_logits_or_a_number(behind, tiled_loss, features) -> None:
    found = result_bytes(Stack(**behind), profiles(2), 1, HIDDEN_BYTES / TOKENS, tiled_loss=tiled_loss)
    assert found.at(TOKENS) == TOKENS * features * 4


@pytest.mark.parametrize("tiled_loss", [False, True])
def test_a_head_makes_logits_unless_the_loss_is_tiled(tiled_loss: bool) -> None:
    logits = 0 if tiled_loss else TOKENS * 100 * 2 * (4 + 4)
    assert peak(Stack(head=nn.Linear(16, 100)), tiled_loss=tiled_loss) == 6 * HIDDEN_BYTES + logits


@pytest.mark.parametrize("behind", [True, False], ids=["a head", "the caller"])
@pytest.mark.parametrize(("dtype", "copies"), [(torch.bfloat16, 12), (torch.float32, 6)])
def test_the_copies_are_those_of_hugging_faces_norm(dtype: torch.dtype, copies: int, behind: bool) -> None:
    """What makes the norm's gradient lets go of it; a caller who gives one holds it."""
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    with torch.device("meta"):
        norm = llama.LlamaRMSNorm(64).to(dtype)
        state = torch.empty(1024, 64, dtype=dtype).requires_grad_()
        arriving = torch.empty_like(state)
    with PlainAnswers(), OperatorRecorder([*norm.parameters(), state, arriving]) as recorder:
        recorder.begin(Phase.BACKWARD)
        # The last block's result, which nobody keeps but the norm.
        result = norm(state * 1)
        edge = torch.autograd.graph.get_gradient_edge(result * 1 if behind else result)
        del result
        torch.autograd.grad([edge], [state, norm.weight], [arriving])
        recorder.end(Phase.BACKWARD)
    trace = recorder.trace()
    live = highest = 0
    for index, allocates in trace.events():
        live += trace.requests[index].size if allocates else -trace.requests[index].size
        highest = max(highest, live)
    # Beside the weight, the state, and behind a head the gradient that it was given itself.
    known = norm.weight.nbytes + state.nbytes * (1 + behind)
    assert (highest - known) / state.nbytes == pytest.approx(copies + (not behind), abs=0.1)


def test_a_loss_by_tiles_holds_a_tile_and_the_heads_gradient_in_float32() -> None:
    vocabulary, width = 151936, 1024
    with torch.device("meta"):
        head = nn.Linear(width, vocabulary, bias=False, dtype=torch.bfloat16)
    model = Stack(head=head)
    weights, hidden = vocabulary * width, 64 * 1024 * 2
    found = loss_peak(model, profiles(2), hidden)
    tile = TILE_BYTES["cuda"] // (2 * vocabulary) // 128 * 128 * 2 * vocabulary
    rows = ROWS_BYTES["cuda"] // (4 * vocabulary) * 4 * vocabulary
    assert found.constant == 4 * weights + tile + 2 * rows
    assert found.linear == 5 * hidden / TOKENS
    head.weight.requires_grad_(False)
    assert loss_peak(model, profiles(2), hidden).constant == tile + 2 * rows
    # Of a head that is larger than a tile, its gradient and the copy of that in bf16 are the most.
    with torch.device("meta"):
        large = nn.Linear(8192, vocabulary, bias=False, dtype=torch.bfloat16)
    assert loss_peak(Stack(head=large), profiles(2), hidden).constant == (4 + 2) * 8192 * vocabulary


def test_without_a_head_there_is_no_loss_by_tiles() -> None:
    assert loss_peak(Stack(), profiles(2), HIDDEN_BYTES).at(TOKENS) == 0
