"""Masks of Hugging Face decoders as spans, so that no tensor of S x S is made.

transformers makes the masks of sliding layers, of padding and of packed documents before any block runs, as one boolean
for every pair of tokens: 16 GiB at 131,072. Attention and masks are chosen by a name in the model's config; while a
model is wrapped, that name is ``NAME``, under which two functions of this file are registered:

    mask         transformers' mask, unless it is large and runs of keys: then spans, [B, 1, S, 2]
    attention    transformers' ``sdpa`` for any other mask or none, ``masked_attention`` for spans

Plain causal attention has no mask and is the call that it was. Small masks are made as the unwrapped model makes them,
and its attention is then equal to the last bit.

Left alone are encoders, encoder-decoders, models whose attention is not chosen by name, models that ask for ``sdpa`` by
name themselves, and every other choice of the user's (``eager``, ``flash_attention_2``, ``flex_attention``).
"""

from __future__ import annotations

import inspect
import logging
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from memo_runtime.blocks.names import InstalledName
from memo_runtime.blocks.spans import dense_mask, is_spans, spans_tensor
from memo_runtime.execution.mixers.masked import masked_attention
from memo_runtime.integrations.mask_spans import NoSpansError, spans_of
from memo_runtime.units import format_bytes

logger = logging.getLogger("memo_runtime")

NAME = "memo_sdpa"
_OWN = "sdpa"
#: Masks with fewer elements (16 MiB) are made whole, as the unwrapped model does.
SMALL_MASK = 1 << 24
#: A model that looks for the name itself goes another way under another name.
_ASKS = re.compile(r"_attn_implementation\s*(?:==|!=|in\b|not in\b)[^\n]*\bsdpa\b")
#: What else an attention function may be given that changes the result, where it is not None.
_CHANGES = ("position_bias", "softcap", "s_aux")
#: Reasons for a mask of S x S that were logged.
_said: set[str] = set()


# ---- what transformers calls


def _transformers(name: str) -> Any:
    """A module of transformers, which whoever has such a model has loaded."""
    return sys.modules[f"transformers.{name}"]


def mask(
    batch_size: int, q_length: int, kv_length: int, q_offset: Any = 0, kv_offset: Any = 0, **given: Any
) -> torch.Tensor | None:
    """transformers' ``sdpa_mask``, or spans where that would be large."""
    masking = _transformers("masking_utils")
    own = masking.sdpa_mask
    everything = {"q_offset": q_offset, "kv_offset": kv_offset, **given}
    square = q_length == kv_length and isinstance(q_offset, int) and q_offset == 0 == kv_offset
    device = torch.device(given.get("device", "cpu"))
    without_values = torch.compiler.is_compiling() or device.type == "meta"
    if without_values or not square or batch_size * q_length * kv_length < SMALL_MASK:
        return own(batch_size, q_length, kv_length, **everything)  # type: ignore[no-any-return]
    padding = masking.prepare_padding_mask(given.get("attention_mask"), kv_length, kv_offset)
    if given.get("allow_is_causal_skip", True) and masking._ignore_causal_mask_sdpa(
        padding, q_length, kv_length, q_offset, kv_offset, given.get("local_size")
    ):
        return None
    function = given.get("mask_function", masking.causal_mask_function)
    if padding is not None:
        function = masking.and_masks(function, masking.padding_mask_function(padding))
    try:
        first, end = spans_of(function, batch_size, q_length, device)
    except NoSpansError as error:
        _say(f"attention gets a mask of {q_length:,} x {kv_length:,} ({format_bytes(batch_size * q_length * kv_length)}"
             f"), since {error}")  # fmt: skip
        return own(batch_size, q_length, kv_length, **everything)  # type: ignore[no-any-return]
    return spans_tensor(first, end)


def attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    **given: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' ``sdpa_attention_forward``, which also takes spans as a mask."""
    if attention_mask is not None and is_spans(attention_mask):
        reason = next((name for name in _CHANGES if given.get(name) is not None), "dropout" if dropout else None)
        if reason is None:
            output = masked_attention(query, key, value, attention_mask, scaling)
            return output.transpose(1, 2).contiguous(), None
        tokens = key.shape[2]
        _say(f"attention gets a mask of {tokens:,} x {tokens:,}, since it has {reason}, which only that way takes")
        attention_mask = dense_mask(attention_mask, tokens)
    own = _transformers("integrations.sdpa_attention").sdpa_attention_forward
    found: tuple[torch.Tensor, None] = own(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **given
    )
    return found


def _say(text: str) -> None:
    if text not in _said:
        _said.add(text)
        logger.warning("memo: %s", text)


# ---- in a model


@dataclass(slots=True)
class MaskInstallation:
    """The configs whose name was changed."""

    configs: list[Any] = field(default_factory=list)

    @property
    def active(self) -> bool:
        """There are any."""
        return bool(self.configs)

    def remove(self) -> None:
        """Put the name back; one that the user has set since stays."""
        for config in self.configs:
            if isinstance(config._attn_implementation, InstalledName):
                config._attn_implementation_internal = _OWN
        self.configs.clear()


def install_masks(model: nn.Module) -> MaskInstallation:
    """Let the decoders in ``model`` say masks in spans; does nothing where there are none."""
    made = MaskInstallation()
    modeling = sys.modules.get("transformers.modeling_utils")
    if modeling is None or "transformers.masking_utils" not in sys.modules:
        return made
    for config in _configs(model):
        if not made.configs:
            _register(modeling)
        config._attn_implementation_internal = InstalledName.over(_OWN, NAME)
        made.configs.append(config)
    return made


def _register(modeling: Any) -> None:
    modeling.ALL_ATTENTION_FUNCTIONS.register(NAME, attention)
    _transformers("masking_utils").ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, mask)


def _configs(model: nn.Module) -> Iterator[Any]:
    """Configs under which a decoder's causal attention runs by ``sdpa``, each once, and those that stand for them."""
    found: dict[int, Any] = {}
    owners: list[Any] = [one for one in model.modules() if _is_decoder(one)]
    for owner in owners:
        for module in owner.modules():
            config = getattr(module, "config", None)
            if getattr(module, "is_causal", None) is True and config is not None and config is owner.config:
                found[id(config)] = config
    for owner in owners:  # a model of several towers makes the masks of its decoder
        text = owner.config.get_text_config(decoder=True)
        if id(text) in found:
            found[id(owner.config)] = owner.config
    yield from found.values()


def _is_decoder(module: nn.Module) -> bool:
    """A Hugging Face model, no encoder-decoder, whose attention is chosen by the name ``sdpa`` and nothing else."""
    config: Any = getattr(module, "config", None)
    if not getattr(module, "_supports_attention_backend", False) or config is None:
        return False
    if getattr(config, "_attn_implementation", None) != _OWN or getattr(config, "is_encoder_decoder", False):
        return False
    return not any(_ASKS.search(_source(base)) for base in type(module).__mro__ if ".models." in base.__module__)


def _source(base: type) -> str:
    try:
        return inspect.getsource(sys.modules[base.__module__])
    except (OSError, KeyError, TypeError):  # no source at hand: nothing is known of it
        return f"_attn_implementation == '{_OWN}'"
