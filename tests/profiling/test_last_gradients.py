"""Gradients of embeddings come when all blocks have gone backward, on the machine itself as offline."""

import pytest
import torch
from transformers import BartConfig, BartForConditionalGeneration, LlamaConfig, LlamaForCausalLM

import memo_runtime as memo

WIDTH, VOCABULARY, FLOAT32 = 32, 300, 4


def llama(*, tied):
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=WIDTH, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
            vocab_size=VOCABULARY, tie_word_embeddings=tied,
        )
    )  # fmt: skip


def last(model, **more):
    ids = torch.randint(VOCABULARY, (1, 64))
    return memo.profile(model, {"input_ids": ids, "labels": ids, **more}).states.gradients_last


@pytest.mark.parametrize(("tied", "tables"), [(False, 1), (True, 0)], ids=["own head", "tied"])
def test_of_embeddings_that_are_no_head(tied, tables):
    model = llama(tied=tied)
    memo.wrap(model)
    assert last(model) == tables * VOCABULARY * WIDTH * FLOAT32


def test_not_of_frozen_ones_or_where_a_loss_of_the_model_s_own_may_use_them():
    frozen = llama(tied=False)
    frozen.get_input_embeddings().requires_grad_(False)
    memo.wrap(frozen)
    assert last(frozen) == 0
    own = llama(tied=False)
    memo.wrap(own, loss="native")
    assert last(own) == 0


def test_nothing_is_said_of_a_decoder_behind_an_encoder():
    model = BartForConditionalGeneration(
        BartConfig(
            d_model=WIDTH, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
            encoder_ffn_dim=64, decoder_ffn_dim=64, vocab_size=VOCABULARY, max_position_embeddings=64,
        )
    )  # fmt: skip
    memo.wrap(model)
    assert last(model, decoder_input_ids=torch.randint(VOCABULARY, (1, 64))) == 0
