"""MEMO's GPT (arXiv 2407.12117, section 3 and table 2): LayerNorm, causal attention, GeLU; 16 b s h saved elements."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

_VOCABULARY = 50257


class GPTBlock(nn.Module):
    """One layer. What it saves for backward is the table of the paper: 16 times its input."""

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.query, self.key, self.value = (nn.Linear(hidden, hidden) for _ in range(3))
        self.dense = nn.Linear(hidden, hidden)
        self.up, self.down = nn.Linear(hidden, 4 * hidden), nn.Linear(4 * hidden, hidden)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[sequences, tokens, hidden] to the same."""
        rows, tokens, width = hidden.shape
        normed = self.norm1(hidden)
        shape = (rows, tokens, self.heads, width // self.heads)
        query, key, value = (
            project(normed).view(shape).transpose(1, 2) for project in (self.query, self.key, self.value)
        )
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        hidden = hidden + self.dense(mixed.transpose(1, 2).reshape(rows, tokens, width))
        result: torch.Tensor = hidden + self.down(functional.gelu(self.up(self.norm2(hidden))))
        return result


class GPT(nn.Module):
    """Embedding, layers, final norm, head of its own."""

    def __init__(self, layers: int, hidden: int, heads: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(_VOCABULARY, hidden)
        self.layers = nn.ModuleList(GPTBlock(hidden, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(hidden)
        self.head = nn.Linear(hidden, _VOCABULARY, bias=False)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Token ids [sequences, tokens] to hidden states, which the loss takes to logits tile by tile."""
        hidden: torch.Tensor = self.embedding(input_ids)
        for layer in self.layers:
            hidden = layer(hidden)
        normed: torch.Tensor = self.norm(hidden)
        return normed
