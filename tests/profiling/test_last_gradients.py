"""Gradients of embeddings come when all blocks have gone backward, on the machine itself as offline."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import BartConfig, BartForConditionalGeneration, LlamaConfig, LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast

import memo_runtime as memo

WIDTH, VOCABULARY, FLOAT32 = 32, 300, 4


class Tables(TorchDispatchMode):
    """How many tensors of ``size`` bytes an operator has at once, as arguments and results."""

    def __init__(self, size):
        super().__init__()
        self.size, self.most = size, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        found = [one for one in tree_leaves((args, kwargs, result)) if isinstance(one, torch.Tensor)]
        there = {one.untyped_storage()._cdata for one in found if one.untyped_storage().nbytes() == self.size}
        self.most = max(self.most, len(there))
        return result


def llama(*, tied):
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=WIDTH, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
            vocab_size=VOCABULARY, tie_word_embeddings=tied,
        )
    )  # fmt: skip


def states(model, **more):
    ids = torch.randint(VOCABULARY, (1, 64))
    return memo.profile(model, {"input_ids": ids, "labels": ids, **more}).states


def last(model, **more):
    return states(model, **more).gradients_last


@pytest.mark.parametrize(("tied", "tables"), [(False, 1), (True, 0)], ids=["own head", "tied"])
def test_of_embeddings_that_are_no_head(tied, tables):
    model = llama(tied=tied)
    memo.wrap(model)
    found = states(model)
    assert found.gradients_last == tables * VOCABULARY * WIDTH * FLOAT32
    assert found.gradients_tied == (1 - tables) * VOCABULARY * WIDTH * FLOAT32


def test_two_gradients_of_a_tied_table_and_their_sum_are_there_at_once():
    """PyTorch does not write one into the other: a forecast counts two tables beside all gradients."""
    model = llama(tied=True)
    memo.wrap(model)
    ids = torch.randint(VOCABULARY, (1, 64))
    loss = model(input_ids=ids, labels=ids).loss
    with Tables(VOCABULARY * WIDTH * FLOAT32) as tables:
        loss.backward()
    assert tables.most == 3


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [8192, 65536])
def test_a_table_s_backward_takes_on_a_gpu_what_is_forecast(tokens):
    table = torch.nn.Embedding(32768, 1024, device="cuda", dtype=torch.bfloat16)
    hidden = table(torch.arange(tokens, device="cuda") % 32768)
    gradient = torch.ones_like(hidden)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated() - gradient.nbytes
    torch.cuda.reset_peak_memory_stats()
    hidden.backward(gradient)
    size = table.weight.nbytes
    taken = torch.cuda.max_memory_allocated() - before - size
    rows = gradient.nbytes
    # As _embedding_peak has it; beside that, indices.
    assert taken == pytest.approx(rows + rows // 5 + 2 * min(rows, size), rel=0.05)


def test_not_of_frozen_ones_or_where_a_loss_of_the_model_s_own_may_use_them():
    frozen = llama(tied=False)
    frozen.get_input_embeddings().requires_grad_(False)
    memo.wrap(frozen)
    assert last(frozen) == 0
    own = llama(tied=False)
    memo.wrap(own, loss="native")
    assert last(own) == 0


class Late(LlamaForCausalLM):
    """Adds an embedding of its own to what the blocks have made."""

    def __init__(self, config):
        super().__init__(config)
        self.late = torch.nn.Embedding(VOCABULARY, WIDTH)

    def forward(self, input_ids=None, labels=None):
        hidden = self.model(input_ids, use_cache=False).last_hidden_state + self.late(input_ids)
        logits = self.lm_head(hidden)
        return CausalLMOutputWithPast(loss=self.loss_function(logits=logits, labels=labels, vocab_size=VOCABULARY))


def test_not_of_one_that_is_called_behind_the_blocks():
    model = Late(llama(tied=False).config)
    memo.wrap(model)
    assert last(model) == VOCABULARY * WIDTH * FLOAT32


def test_nothing_is_said_of_a_decoder_behind_an_encoder():
    model = BartForConditionalGeneration(
        BartConfig(
            d_model=WIDTH, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
            encoder_ffn_dim=64, decoder_ffn_dim=64, vocab_size=VOCABULARY, max_position_embeddings=64,
        )
    )  # fmt: skip
    memo.wrap(model)
    assert last(model, decoder_input_ids=torch.randint(VOCABULARY, (1, 64))) == 0
