"""A ``GPTModel`` of Megatron-core from its local spec (no Transformer Engine) in the place of a subject's blocks.

It is built as a stage in the middle of a pipeline is, without embedding, final norm and head: those, and the loss by
tiles, are everybody's. Its core attention is PyTorch's fused attention, as everybody's, and its rotary table the
subject's. In a group of one process nothing is ever sent.

On the CPU three things differ, since Megatron asks for a GPU there without an option: its checkpoints put back the
state of the GPU's generator (there is none, and nothing random runs), the rotary table moves to a GPU at its first use
(it stays), and its fused functions are compiled (its own options ``bias_activation_fusion`` and ``bias_dropout_fusion``
are off, only because a compiler for the CPU takes longer than the step).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from benchmarks.harness.subject import Subject

#: Of an ungated MLP: Megatron's fused GELU is the approximation by tanh, whatever its name says.
_TANH = partial(functional.gelu, approximate="tanh")


class FusedAttention(nn.Module):
    """Causal attention by PyTorch, for Megatron's core-attention slot: [tokens, sequences, heads, size] each."""

    def __init__(self, **_: Any) -> None:
        """Megatron says more than is needed."""
        super().__init__()

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        """[tokens, sequences, heads * size]."""
        heads = [one.permute(1, 2, 0, 3) for one in (query, key, value)]
        found = functional.scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=True)
        return found.permute(2, 0, 1, 3).flatten(2)


class Stack(nn.Module):
    """All blocks as one module, called as a layer of Hugging Face's is.

    Attributes:
        gpt: Megatron's model.
    """

    def __init__(self, gpt: Any) -> None:
        super().__init__()
        self.gpt = gpt

    def forward(self, hidden: torch.Tensor, **_: Any) -> torch.Tensor:
        """Hidden states [1, tokens, hidden] through every block; Megatron has tokens first."""
        # As its own embedding leaves them: a transposed view has other strides at each length, and for each its fused
        # functions are compiled again, up to a limit beyond which they are not fused at all.
        self.gpt.set_input_tensor(hidden.squeeze(0).unsqueeze(1))
        found = self.gpt(input_ids=None, position_ids=None, attention_mask=None).squeeze(1).unsqueeze(0)
        self.gpt.set_input_tensor(None)
        return found


def build(subject: Subject, options: dict[str, Any], *, longest: int) -> Stack:
    """The model of ``subject``'s shape with Megatron's ``options``, its weights not yet set."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel

    _join_group()
    config = _config(subject, options)
    spec = get_gpt_layer_local_spec(normalization=config.normalization)
    spec.submodules.self_attention.submodules.core_attention = FusedAttention
    gpt = GPTModel(
        config, spec, vocab_size=1, max_sequence_length=longest, pre_process=False, post_process=False,
        position_embedding_type="rope",
    )  # fmt: skip
    gpt.rotary_pos_emb.inv_freq = subject.stack.rotary_emb.inv_freq.detach().clone()
    if subject.device.type == "cpu":
        _do_without_gpu(gpt.rotary_pos_emb)
    return Stack(gpt.to(device=subject.device, dtype=config.params_dtype).train())


def forget_tables() -> None:
    """Drop the rotary tables of lengths before, which Megatron keeps for 32 lengths."""
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

    RotaryEmbedding.forward.cache_clear()


def _config(subject: Subject, options: dict[str, Any]) -> Any:
    from megatron.core.transformer.transformer_config import TransformerConfig

    shape, dtype = subject.shape, getattr(torch, subject.settings.dtype)
    fused = subject.device.type == "cuda"
    ungated = functional.gelu if fused else _TANH
    return TransformerConfig(
        num_layers=shape.blocks,
        hidden_size=shape.hidden,
        ffn_hidden_size=shape.intermediate,
        num_attention_heads=shape.heads,
        num_query_groups=shape.kv_heads,
        kv_channels=shape.head_dim,
        normalization="RMSNorm" if shape.gated else "LayerNorm",
        layernorm_epsilon=subject.config.rms_norm_eps if shape.gated else subject.config.norm_epsilon,
        gated_linear_unit=shape.gated,
        activation_func=functional.silu if shape.gated else ungated,
        add_bias_linear=not shape.gated,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        perform_initialization=False,
        use_cpu_initialization=not fused,
        bias_activation_fusion=fused,
        bias_dropout_fusion=fused,
        transformer_impl="local",
        **options,
    )


def _join_group() -> None:
    """A group of one process, once."""
    from megatron.core import parallel_state
    from torch import distributed

    if not distributed.is_initialized():
        distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel()


def _do_without_gpu(rotary: Any) -> None:
    from megatron.core.tensor_parallel import random

    random._get_cuda_rng_state = lambda *_, **__: None
    random._set_cuda_rng_state = lambda *_, **__: None

    def table(tokens: int, offset: int = 0) -> torch.Tensor:
        angles = rotary.get_freqs_non_repeated(tokens, offset)
        return torch.cat((angles, angles), dim=-1)[:, None, None, :]

    rotary.get_emb = table
