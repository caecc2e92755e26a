"""What the model is called with is there for the whole step, and forecasts count it once."""

import pytest
import torch
from torch import nn

from memo_runtime.blocks.call import BlockCall
from memo_runtime.machines.catalogue import find_machine
from memo_runtime.offline.batches import batch_bytes
from memo_runtime.offline.profile import study_model
from memo_runtime.offline.subject import subject_named, subject_of
from memo_runtime.sizes import Growth
from tests.offline.test_sequences import Mix

WIDTH, TOKENS = 16, 64


class Weighed(nn.Module):
    """A stack, and a loss that weighs each feature of its result."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Mix() for _ in range(3))

    def forward(self, hidden, *weights):
        for block in self.blocks:
            hidden = block(hidden)
        return sum(((hidden * one).sum() for one in weights), hidden.sum())


def entry_of(*batch):
    study = study_model(subject_of("mine", Weighed(), (batch, {})), find_machine("h100-80gb"))
    return study.at(4096).profile.outside_forward


@pytest.mark.parametrize("weights", [0, 1, 2])
def test_an_argument_of_the_model_is_counted_and_the_first_blocks_input_once(weights):
    batch = [torch.empty(2, TOKENS, WIDTH) for _ in range(1 + weights)]
    assert entry_of(*batch) == Growth(linear=2 * WIDTH * 4 * (1 + weights))


def test_ids_and_labels_of_a_model_by_name():
    study = study_model(subject_named("llama-1b"), find_machine("h100-80gb"))
    assert study.at(8192).profile.outside_forward == Growth(linear=2 * 2048 + 2 * 8)


@pytest.mark.parametrize(
    ("shape", "dtype", "growth"),
    [
        ((3, TOKENS), torch.int64, Growth(linear=24)),
        ((3, 1, TOKENS, TOKENS), torch.bool, Growth(quadratic=3)),
        ((3, TOKENS, TOKENS), torch.bool, Growth(quadratic=3)),
        ((3, TOKENS, 128), torch.float32, Growth(linear=1536)),
        ((3, TOKENS, WIDTH), torch.bfloat16, Growth(linear=96)),
        ((3, 80), torch.float32, Growth(constant=960)),
        ((3, 0), torch.float32, Growth()),
        ((TOKENS, TOKENS, TOKENS), torch.uint8, Growth(quadratic=64)),
    ],
)
def test_how_a_tensor_grows(shape, dtype, growth):
    batch = ((), {"given": {"one": torch.empty(*shape, dtype=dtype, device="meta")}, "use_cache": False})
    assert batch_bytes(batch, {0, TOKENS}, [], width=WIDTH) == growth


def test_as_many_features_as_tokens():
    batch = (torch.empty(3, TOKENS, TOKENS, device="meta"), torch.empty(TOKENS, TOKENS, device="meta"))
    assert batch_bytes(batch, {TOKENS}, [], width=TOKENS) == Growth(linear=3 * TOKENS * 4, quadratic=4)


def test_arguments_that_blocks_are_handed_on_are_theirs():
    mask, other = torch.empty(1, 1, TOKENS, TOKENS, device="meta"), torch.empty(1, TOKENS, device="meta")
    call = BlockCall.of((torch.empty(1, TOKENS, WIDTH, device="meta"), mask), {}).detached()
    assert batch_bytes(((), {"mask": mask, "ids": other}), {TOKENS}, [call], width=WIDTH) == Growth(linear=4)
