"""Small models for the tests on a GPU: large enough that copies and kernels overlap, small enough for seconds."""

from __future__ import annotations

import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

VOCABULARY = 512


def llama(
    dtype: torch.dtype, *, blocks: int = 4, hidden: int = 512, attention: str = "sdpa", grouped: bool = True
) -> LlamaForCausalLM:
    """A Llama shape with heads of 64, two queries a key where ``grouped``, on the GPU."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=blocks,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 128 if grouped else hidden // 64,
        vocab_size=VOCABULARY,
        max_position_embeddings=65536,
        attn_implementation=attention,
    )
    return LlamaForCausalLM(config).to("cuda", dtype).train()


def gpt2(dtype: torch.dtype, *, dropout: float) -> GPT2LMHeadModel:
    """A GPT-2 shape with dropout everywhere, on the GPU."""
    torch.manual_seed(0)
    config = GPT2Config(
        n_embd=256,
        n_layer=3,
        n_head=4,
        vocab_size=VOCABULARY,
        n_positions=4096,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPT2LMHeadModel(config).to("cuda", dtype).train()


def batch(rows: int, tokens: int, seed: int = 1) -> dict[str, torch.Tensor]:
    """Token ids that are their own labels."""
    ids = torch.randint(0, VOCABULARY, (rows, tokens), generator=torch.Generator().manual_seed(seed)).cuda()
    return {"input_ids": ids, "labels": ids}


def step(
    model: torch.nn.Module, data: dict[str, torch.Tensor], seed: int = 3
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss and gradients of one step; streams run freely."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(seed)
    loss = model(**data).loss
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def error(found: dict[str, torch.Tensor], reference: dict[str, torch.Tensor]) -> float:
    """Relative L2 error over all gradients."""
    gap = sum((found[n].double() - reference[n].double()).norm() ** 2 for n in reference)
    size = sum(reference[n].double().norm() ** 2 for n in reference)
    return float((gap / size) ** 0.5)


def llama_and_float32(
    data: dict[str, torch.Tensor], **shape: int
) -> tuple[LlamaForCausalLM, dict[str, torch.Tensor], float]:
    """A Llama in bfloat16, the gradients of the same in float32, and how far its own are from those, unwrapped.

    No fused kernel takes float32 with grouped heads, so all scores of a block exist: of one block at a time.
    """
    model, reference = llama(torch.bfloat16, **shape), llama(torch.float32, **shape)
    reference.load_state_dict(model.state_dict())
    reference.gradient_checkpointing_enable()
    exact = step(reference, data)[1]
    del reference
    plain = error(step(model, data)[1], exact)
    model.zero_grad(set_to_none=True)
    return model, exact, plain
