"""What a batch says of sequences is used, said or refused: their number, their lengths, positions that are learned."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from memo_runtime.errors import ArgumentError, OffloaderActiveError, ProfileError
from memo_runtime.machines.catalogue import find_machine
from memo_runtime.offline.profile import study_model
from memo_runtime.offline.subject import subject_of

H100 = find_machine("h100-80gb")


class Mix(nn.Module):
    """Attention and a product, without which a block would have nothing to train."""

    def __init__(self):
        super().__init__()
        self.into, self.out = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, hidden):
        rows, tokens, _ = hidden.shape
        query, key, value = self.into(hidden).view(rows, tokens, 3, 2, 8).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        return hidden + self.out(mixed.transpose(1, 2).reshape(rows, tokens, 16))


class Towers(nn.Module):
    """Two stacks over sequences of their own, one of which learns its positions."""

    def __init__(self):
        super().__init__()
        self.long = nn.ModuleList(Mix() for _ in range(2))
        self.short = nn.ModuleList(Mix() for _ in range(2))
        self.position_embeddings = nn.Parameter(torch.zeros(1, 32, 16))

    def forward(self, hidden, other):
        other = other + self.position_embeddings
        for layer in self.long:
            hidden = layer(hidden)
        for layer in self.short:
            other = layer(other)
        return hidden.sum() + other.sum()


class Folds(Mix):
    """A block for sequences of 64, and no others."""

    def forward(self, hidden):
        return super().forward(hidden.view(1, 8, 8, 16).flatten(1, 2))


def study(model, *shapes):
    return study_model(subject_of("mine", model, (tuple(torch.empty(*shape) for shape in shapes), {})), H100)


def stack(block=Mix):
    return nn.Sequential(block(), block(), nn.Linear(16, 8))


def test_sequences_of_a_batch_are_counted_and_said():
    one, three = (study(stack(), (rows, 64, 16)).at(4096) for rows in (1, 3))
    assert any("a step has 3 sequences of 4,096 tokens each" in note for note in three.profile.notes)
    assert not any("sequences" in note for note in one.profile.notes)
    assert three.model_flops == pytest.approx(3 * one.model_flops, rel=1e-2)


def test_towers_of_different_lengths_and_tables_of_positions_are_said():
    notes = study(Towers(), (1, 64, 16), (1, 32, 16)).at(4096).profile.notes
    (lengths,) = (note for note in notes if "sequences of the batch differ" in note)
    assert "(32 in short.0 and 1 more, 64 in long.0 and 1 more)" in lengths
    assert "planned with 4,096 tokens" in lengths
    (table,) = (note for note in notes if "positions are learned" in note)
    assert "position_embeddings (32), which have fewer rows than 4,096" in table


@pytest.mark.parametrize("tokens", [1, 15])
def test_a_handful_of_tokens_shows_nothing(tokens):
    with pytest.raises(ProfileError, match=f"sequences of {tokens} tokens, and at least 16"):
        study(stack(), (1, tokens, 16))


def test_a_block_that_is_made_for_one_length_is_named():
    with pytest.raises(ProfileError, match=r"0 \(Folds\) runs on the 64 tokens of the batch and not on more: Runtime"):
        study(stack(Folds), (1, 64, 16))


def test_where_nothing_is_trained_there_is_no_step():
    with pytest.raises(ArgumentError, match=r"no parameter of mine is trained .* --lora 16"):
        study(stack().requires_grad_(False), (1, 64, 16))


def test_attention_that_no_gradient_passes_counts_one_forward():
    whole = study(stack(), (1, 64, 16)).at(1 << 20).model_flops
    upper = stack()
    upper[0].requires_grad_(False)
    # Nearly all of a million tokens is attention: three forwards of two blocks, or three of one and one of the other.
    assert study(upper, (1, 64, 16)).at(1 << 20).model_flops == pytest.approx(whole * 4 / 6, rel=1e-3)


def test_gradient_checkpointing_is_refused_as_wrap_refuses_it():
    model = stack()
    model[1].gradient_checkpointing = True
    with pytest.raises(OffloaderActiveError, match="gradient checkpointing is on in '1'"):
        study(model, (1, 64, 16))


def test_a_mask_of_all_tokens_is_the_plain_case():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2,
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    ids = torch.zeros(2, 64, dtype=torch.long)
    batch = {"input_ids": ids, "labels": ids, "use_cache": False}
    plain, masked = (
        study_model(subject_of("mine", model, ((), given)), H100).at(4096)
        for given in (batch, {**batch, "attention_mask": torch.ones_like(ids)})
    )
    assert masked.model_flops == plain.model_flops
    assert masked.profile.blocks == plain.profile.blocks
