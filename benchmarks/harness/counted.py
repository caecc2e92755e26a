"""That a model is what its FLOPs are counted for, and that its blocks can be called: or nobody measures it.

Whatever is wrong here is wrong for every contender, so it refuses the run and is no row of one.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import nn

from benchmarks.harness.geometry import Scope, Shape, UnknownGeometryError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_WORKING = "such as those of Llama, Mistral, Qwen 2 and 3, OLMo 2, Phi 3, Starcoder 2, Mixtral and OLMoE"
#: What transformers make the mask of a window with: a model whose module has it not ignores the config's field.
_MASK = "create_sliding_window_causal_mask"
#: What transformers raise where they make no model of a config; memory that is short is none of these.
NO_MODEL = (ValueError, TypeError, AttributeError, KeyError, AssertionError, ImportError, NotImplementedError)
_FULL, _SLIDING = "full_attention", "sliding_attention"


def find_windows(config: PreTrainedConfig, model: nn.Module) -> tuple[int, ...]:
    """The window of each block of ``model`` that has one, in tokens.

    Raises:
        UnknownGeometryError: a block's attention is neither causal nor causal within a window.
    """
    kinds = list(getattr(config, "layer_types", None) or ())[: config.num_hidden_layers]
    other = next((kind for kind in kinds if kind not in (_FULL, _SLIDING)), None)
    has_them = hasattr(sys.modules[type(model).__module__], _MASK)
    if other is not None or (_SLIDING in kinds and not has_them):
        raise UnknownGeometryError(
            f"a config of type {config.model_type!r} has blocks of {other or _SLIDING}, whose FLOPs are not counted: "
            f"blocks have {_FULL}, or {_SLIDING} by the mask that transformers make, {_WORKING}"
        )
    size = getattr(config, "sliding_window", None)
    if not size or not has_them:
        return ()
    return (int(size),) * (kinds.count(_SLIDING) if kinds else config.num_hidden_layers)


def check_windows(shape: Shape, scope: Scope, longest: int) -> None:
    """That blocks are called with the masks that they need.

    Raises:
        UnknownGeometryError: blocks alone have windows, whose masks the model makes.
    """
    shortest = min(shape.windows, default=longest)
    if scope == Scope.BLOCKS and shortest < longest:
        raise UnknownGeometryError(
            f"blocks of this geometry see the last {shortest:,} tokens only, by a mask that their model makes, and "
            f"--scope blocks has no model: give --scope step, lengths up to {shortest:,}, or a config without "
            "sliding_window"
        )


def check_layers(layers: Sequence[nn.Module], shape: Shape) -> None:
    """That FLOPs are counted as they are done, in every block.

    Raises:
        UnknownGeometryError: a block has other matrix products than its shape, or drops some of its numbers.
    """
    counted = sum(linear.weights for linear in shape.linears) + shape.adapters
    for place, layer in enumerate(layers):
        there = sum(parameter.numel() for parameter in layer.parameters() if parameter.dim() > 1)
        if there != counted and shape.rank:
            raise UnknownGeometryError(
                f"--lora {shape.rank}: adapters would be counted beside every product of a block, and PEFT puts them "
                "beside modules of class nn.Linear alone, which experts and products joined into one are not: leave it "
                "out"
            )
        if there != counted:
            which = "a block" if place == 0 else f"block {place}"
            unlike = "" if place == 0 else ", as for the blocks before it"
            raise UnknownGeometryError(
                f"{which} of this geometry has {there:,} weights in matrix products, and FLOPs would be counted for "
                f"{counted:,}{unlike}: the harness knows decoders of equal blocks with attention and an MLP, gated or "
                f"not, or experts (benchmarks/harness/geometry.py), {_WORKING}"
            )
        _check_dropout(layer)


def _check_dropout(layer: nn.Module) -> None:
    for module in layer.modules():
        part = module.p if isinstance(module, nn.Dropout) else getattr(module, "attention_dropout", 0.0)
        if isinstance(part, float) and part > 0:
            raise UnknownGeometryError(
                f"blocks of this geometry have dropout of {part:g}: contenders drop other numbers, so that their "
                "gradients could not be compared; give a config whose dropout is 0"
            )


def check_calls(layers: Sequence[nn.Module], rotary: nn.Module) -> None:
    """That blocks alone can be called as Llama's are: with one pair of rotary tables for all, and no mask.

    Raises:
        UnknownGeometryError: they take something else.
    """
    tables = [one for one in _parameters(rotary) if one.default is inspect.Parameter.empty]
    given = {one.name for one in _parameters(layers[0])}
    if len(tables) > 2 or not {"attention_mask", "position_embeddings"} <= given:
        raise UnknownGeometryError(
            f"blocks of class {type(layers[0]).__name__} are not called as Llama's are, with a mask and one pair of "
            "rotary tables, and --scope blocks calls them alone: give --scope step"
        )


def _parameters(module: nn.Module) -> list[inspect.Parameter]:
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [one for one in inspect.signature(module.forward).parameters.values() if one.kind not in kinds]


def refusal(error: Exception, config: PreTrainedConfig, attention: str) -> UnknownGeometryError:
    """What transformers said that make no model of ``config``, as a refusal of it."""
    said = " ".join(str(error).split())[:200]
    return UnknownGeometryError(
        f"no decoder with {attention} attention can be made of a config of type {config.model_type!r} ({said}): what "
        f"is measured are decoders of blocks with attention and an MLP, {_WORKING}"
    )


def keeps_blocks(model: nn.Module) -> bool:
    """Whether ``model`` keeps its blocks where Llama does, and makes their rotary tables."""
    return isinstance(getattr(model, "layers", None), nn.ModuleList) and isinstance(
        getattr(model, "rotary_emb", None), nn.Module
    )
