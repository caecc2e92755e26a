"""What the model is called with is there for the whole step, and forecasts count it once."""

import pytest
import torch
from torch import nn

from memo_runtime.blocks.call import BlockCall
from memo_runtime.machines.catalogue import find_machine
from memo_runtime.offline.batches import Sequences, batch_bytes, note_on_features
from memo_runtime.offline.profile import study_model
from memo_runtime.offline.subject import subject_named, subject_of
from memo_runtime.sizes import Growth
from tests.offline.test_sequences import Mix

WIDTH, TOKENS = 16, 64
H100 = find_machine("h100-80gb")


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
    study = study_model(subject_of("mine", Weighed(), (batch, {})), H100)
    return study.at(4096).profile.outside_forward


@pytest.mark.parametrize("weights", [0, 1, 2])
def test_an_argument_of_the_model_is_counted_and_the_first_blocks_input_once(weights):
    batch = [torch.empty(2, TOKENS, WIDTH) for _ in range(1 + weights)]
    assert entry_of(*batch) == Growth(linear=2 * WIDTH * 4 * (1 + weights))


def test_ids_and_labels_of_a_model_by_name():
    study = study_model(subject_named("llama-1b"), H100)
    assert study.at(8192).profile.outside_forward == Growth(linear=2 * 2048 + 2 * 8)


def grows(batch, *, rows=3, calls=()):
    return batch_bytes(batch, Sequences(rows=rows, lengths={0, TOKENS}, width=WIDTH), calls)


def empty(*shape, dtype=torch.float32):
    return torch.empty(*shape, dtype=dtype, device="meta")


@pytest.mark.parametrize(
    ("shape", "dtype", "growth"),
    [
        ((3, TOKENS), torch.int64, Growth(linear=24)),
        ((3, TOKENS + 1), torch.int64, Growth(linear=24)),
        ((3, 1, TOKENS, TOKENS), torch.bool, Growth(quadratic=3)),
        ((3, TOKENS, TOKENS), torch.bool, Growth(quadratic=3)),
        ((TOKENS, TOKENS), torch.bool, Growth(quadratic=1)),
        ((3, TOKENS, 128), torch.float32, Growth(linear=1536)),
        ((3, TOKENS, WIDTH), torch.bfloat16, Growth(linear=96)),
        ((TOKENS, 3, WIDTH), torch.bfloat16, Growth(linear=96)),
        ((3, 80), torch.float32, Growth(constant=960)),
        ((3, 0), torch.float32, Growth()),
        ((TOKENS, TOKENS, TOKENS), torch.uint8, Growth(quadratic=64)),
    ],
)
def test_how_a_tensor_grows(shape, dtype, growth):
    batch = ((), {"given": {"one": empty(*shape, dtype=dtype)}, "use_cache": False})
    assert grows(batch) == growth


def test_as_many_sequences_as_tokens():
    ids, mask = empty(TOKENS, TOKENS, dtype=torch.int64), empty(TOKENS, 1, TOKENS, TOKENS, dtype=torch.bool)
    assert grows([ids], rows=TOKENS) == Growth(linear=8 * TOKENS)
    assert grows([mask], rows=TOKENS) == Growth(quadratic=TOKENS)
    assert grows([empty(TOKENS, TOKENS, WIDTH)], rows=TOKENS) == Growth(linear=4 * TOKENS * WIDTH)


def test_as_many_features_as_tokens_are_said():
    sequences = Sequences(rows=3, lengths={TOKENS}, width=TOKENS)
    features, mask = empty(3, TOKENS, TOKENS), empty(3, TOKENS, TOKENS, dtype=torch.bool)
    assert batch_bytes([features, mask], sequences, ()) == Growth(linear=3 * TOKENS * 4, quadratic=3)
    (note,) = note_on_features([features, mask], sequences)
    assert note.startswith("an argument (3, 64, 64) of the model is taken for 64 features of each token")
    study = study_model(subject_of("mine", Weighed(), ((torch.empty(2, WIDTH, WIDTH),), {})), H100)
    assert any("could be one number for each pair of tokens" in note for note in study.at(4096).profile.notes)
    assert not list(note_on_features([empty(3, TOKENS, WIDTH)], Sequences(rows=3, lengths={TOKENS}, width=WIDTH)))


def test_memory_is_counted_once():
    ids, mask = empty(3, TOKENS, dtype=torch.int64), empty(1, 1, TOKENS, TOKENS)
    assert grows([ids, ids, ids[:]]) == Growth(linear=24)
    assert grows([mask.expand(3, 32, TOKENS, TOKENS)]) == Growth(quadratic=4)


def test_sparse_and_nested_tensors():
    indices, values = torch.zeros(2, 5, dtype=torch.int64), torch.zeros(5)
    assert grows([torch.sparse_coo_tensor(indices, values, (TOKENS, TOKENS))]) == Growth(constant=2 * 5 * 8 + 5 * 4)
    assert grows([torch.zeros(8, TOKENS).to_sparse_csr()]) == Growth(constant=9 * 8)
    ragged = [torch.zeros(3, WIDTH), torch.zeros(4, WIDTH)]
    assert grows([torch.nested.nested_tensor(ragged, layout=torch.jagged)]) == Growth(constant=7 * WIDTH * 4)


def test_arguments_that_blocks_are_handed_on_are_theirs():
    mask, other, features = empty(1, 1, TOKENS, TOKENS), empty(1, TOKENS), empty(1, TOKENS, 128)
    call = BlockCall.of((empty(1, TOKENS, WIDTH), mask, features[..., :8]), {}).detached()
    found = grows(((), {"mask": mask, "ids": other, "features": features}), rows=1, calls=[call])
    assert found == Growth(linear=4 + (128 - 8) * 4)
