"""A batch that is longer than its model has positions for, as a config of Hugging Face says."""

from __future__ import annotations

import torch
from torch import nn

from memo_runtime.wrapping import Batch

_NAME = "max_position_embeddings"


def positions_name(config: object) -> str:
    """What ``config`` calls its number of positions; GPT-2's is ``n_positions``, for one."""
    names = getattr(config, "attribute_map", None)
    return str(names.get(_NAME, _NAME)) if isinstance(names, dict) else _NAME


def beyond_positions(model: nn.Module, batch: Batch) -> str:
    """What has to be said of it; "": nothing."""
    config = getattr(model, "config", None)
    positions = getattr(config, _NAME, None)
    tokens = _tokens(batch)
    if not isinstance(positions, int) or tokens <= positions:
        return ""
    return (
        f"{tokens:,} tokens are beyond the {positions:,} positions that {type(model).__name__} is made for "
        f"({positions_name(config)} in its config): a table of positions has to be longer, rotary embeddings have to "
        "be scaled to be of use (rope_parameters in the config)"
    )


def _tokens(batch: Batch) -> int:
    """Of each sequence; 0: it does not say."""
    found = {name: one for name, one in batch[1].items() if isinstance(one, torch.Tensor)}
    if (ids := found.get("input_ids")) is not None and ids.dim() > 0:
        return int(ids.shape[-1])
    if (states := found.get("inputs_embeds")) is not None and states.dim() > 1:
        return int(states.shape[-2])
    return 0
