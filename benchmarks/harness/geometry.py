"""The shapes that are measured, and what a step of them costs in FLOPs.

Shapes are the example's, so that ``llama-8b`` is one thing in the whole project. Two scopes:

    blocks   a stack of N blocks, forward and backward; no embedding, norm or head, no optimizer
    step     the causal language model, loss and AdamW: a whole training step
"""

from __future__ import annotations

import importlib.util
import os
import sys
import textwrap
from collections.abc import Collection
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

from memo_runtime.reporting.mfu import model_flops

_ROOT = Path(__file__).resolve().parents[2]
_EXAMPLES = str(_ROOT / "examples")
if _EXAMPLES not in sys.path:
    sys.path.append(_EXAMPLES)

import geometries  # noqa: E402 - of the examples, at once: a tree may be replaced while a run goes on

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_CONFIGS = _ROOT / "benchmarks" / "configs"

#: Model types whose MLP is two products with a function between them.
_UNGATED = ("starcoder2",)
#: Geometries that are one GPU's share of a larger model: what a table says of them. There are blocks only.
SHARES = {
    "gpt-7b-tp8": "one of 8 tensor-parallel ranks of MEMO's GPT 7B, its own work without any communication",
}


class Scope(StrEnum):
    """What one step is."""

    BLOCKS = "blocks"
    STEP = "step"


@dataclass(frozen=True, slots=True, kw_only=True)
class Linear:
    """One matrix product of a block: [tokens, inputs] times [inputs, outputs]; of several experts, some for a token."""

    name: str
    inputs: int
    outputs: int
    experts: int = 1
    active: int = 1

    @property
    def size(self) -> int:
        """Parameters that a token meets."""
        return self.active * self.inputs * self.outputs

    @property
    def weights(self) -> int:
        """Parameters."""
        return self.experts * self.inputs * self.outputs


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A decoder, as far as FLOPs and kernels go.

    Attributes:
        heads, kv_heads, head_dim: of attention. vocabulary: of the head, 0 for blocks alone.
        gated: the MLP has a product for its gate.
        experts, active: MLPs of a block, and those that a token goes through; a router chooses among several.
        rank: of the adapters beside every product of the blocks, all else being frozen; 0: there are none.
        windows: of the blocks whose attention sees so many tokens only, up to its own; the others see all before.
    """

    hidden: int
    intermediate: int
    blocks: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    gated: bool = True
    experts: int = 1
    active: int = 1
    rank: int = 0
    windows: tuple[int, ...] = ()

    @property
    def attention_width(self) -> int:
        """Query heads times their size."""
        return self.heads * self.head_dim

    @property
    def linears(self) -> tuple[Linear, ...]:
        """The matrix products of one block, in order."""
        hidden, keys = self.hidden, self.kv_heads * self.head_dim
        sizes = {
            "q_proj": (hidden, self.attention_width),
            "k_proj": (hidden, keys),
            "v_proj": (hidden, keys),
            "o_proj": (self.attention_width, hidden),
            **({"router": (hidden, self.experts)} if self.experts > 1 else {}),
        }
        mlp = {
            **({"gate_proj": (hidden, self.intermediate)} if self.gated else {}),
            "up_proj": (hidden, self.intermediate),
            "down_proj": (self.intermediate, hidden),
        }
        several = {"experts": self.experts, "active": self.active}
        return (
            *(Linear(name=name, inputs=a, outputs=b) for name, (a, b) in sizes.items()),
            *(Linear(name=name, inputs=a, outputs=b, **several) for name, (a, b) in mlp.items()),
        )

    @property
    def adapters(self) -> int:
        """Parameters of the adapters of one block: two thin matrices for each of its products."""
        return sum(self.rank * (linear.inputs + linear.outputs) for linear in self.linears)

    def attended(self, tokens: int) -> int:
        """Twice the pairs of query and key of all blocks: ``L S^2``, and ``W (2 S - W)`` of a block with a window W."""
        whole = (self.blocks - len(self.windows)) * tokens * tokens
        return whole + sum(seen * (2 * tokens - seen) for seen in (min(one, tokens) for one in self.windows))

    def model_flops(self, tokens: int) -> int:
        """Forward and backward of one sequence, nothing counted twice: ``6 N S + 6 L d S^2``, ``4 N S`` of frozen N.

        N counts matrix products only; norms, about 0.004 % of an 8B block's parameters, are left out. Of a block with a
        window, attention counts as far as it reaches.
        """
        own = self.blocks * sum(linear.size for linear in self.linears) + self.vocabulary * self.hidden
        products = model_flops(
            parameters=own + self.blocks * self.adapters, frozen=own if self.rank else 0, layers=0,
            attention_width=self.attention_width, tokens=tokens,
        )  # fmt: skip
        return products + 6 * self.attention_width * self.attended(tokens)

    def rerun_flops(
        self, tokens: int, *, attention: bool, last: bool = False, kept: Collection[str] = ()
    ) -> int:  # fmt: skip
        """FLOPs of running every block once more for its backward, with or without its attention.

        Products named in ``kept`` are not repeated: what they returned was saved. That is for blocks without adapters.

        Without ``last`` the last product is not repeated: nobody saved its output, and PyTorch's checkpoint stops
        before it. That of experts is: what they are weighted with wants it for its gradient. So is one with an adapter,
        whose first product comes after it; what ends there is the adapter's second one.
        """
        last = last or self.experts > 1
        repeated = self.linears if last or self.rank else [one for one in self.linears if one.name != "down_proj"]
        products = sum(2 * linear.size for linear in repeated if linear.name not in kept) + 2 * self.adapters
        if self.rank and not last:
            products -= 2 * self.rank * self.hidden
        again = 2 * self.attention_width * self.attended(tokens) if attention else 0
        return self.blocks * products * tokens + again


class UnknownGeometryError(ValueError):
    """No such geometry, or one of which nothing could be measured as it is counted; says what would work."""


def check_geometry(name: str) -> None:
    """That ``name`` is a geometry, or the path of a Hugging Face config. Needs no torch.

    What it is a config of, transformers say to the first contender's process: here they would bring torch.

    Raises:
        UnknownGeometryError: it is neither, or what makes models of them is not installed.
    """
    if importlib.util.find_spec("transformers") is None:
        raise UnknownGeometryError("models come from Hugging Face transformers: pip install 'memo-runtime[hf]'")
    if not name.strip() or (os.path.isdir(name) and not os.path.exists(Path(name) / "config.json")):
        raise UnknownGeometryError(f"--geometry {name!r} names no config.json; {_known()}")
    _find(name)


def _own() -> dict[str, Path]:
    return {path.stem: path for path in sorted(_CONFIGS.glob("*.json"))}


def _known() -> str:
    names = ", ".join([*geometries.GEOMETRIES, *_own()])
    return f"there are: {names}, or give the path of a Hugging Face config.json"


def _find(name: str) -> geometries.Geometry:
    try:
        return geometries.find_geometry(str(_own().get(name, name)))
    except (geometries.GeometryError, OSError) as error:  # of a name that no file can have
        if os.path.exists(name):
            raise UnknownGeometryError(str(error)) from None
        raise UnknownGeometryError(f"--geometry {name} is unknown; {_known()}") from None


def make_config(name: str, *, tokens: int, blocks: int | None) -> PreTrainedConfig:
    """The Hugging Face config of geometry ``name``, cut to ``blocks``, with room for ``tokens`` positions.

    Raises:
        UnknownGeometryError: no such geometry, or the installed transformers make none of it.
    """
    found = _find(name)
    try:
        return geometries.make_config(found, tokens=tokens, layers=blocks)
    except geometries.GeometryError as error:
        # Where a type is unknown, transformers list all that they know.
        raise UnknownGeometryError(textwrap.shorten(str(error), 300, placeholder=" ...")) from error


def make_shape(config: PreTrainedConfig, scope: Scope, *, rank: int = 0) -> Shape:
    """What of a config the harness counts with, with adapters of ``rank`` or, with 0, without.

    Raises:
        UnknownGeometryError: its blocks are not of attention and an MLP.
    """
    needed = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    missing = [name for name in needed if getattr(config, name, None) is None]
    if missing:
        raise UnknownGeometryError(
            f"a config of type {config.model_type!r} has no {', '.join(missing)}: what is measured are blocks of "
            "attention and an MLP, such as those of Llama"
        )
    experts = getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None) or 1
    inside = getattr(config, "moe_intermediate_size", None) if experts > 1 else None
    return Shape(
        hidden=config.hidden_size,
        intermediate=inside or config.intermediate_size,
        blocks=config.num_hidden_layers,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        vocabulary=config.vocab_size if scope == Scope.STEP else 0,
        gated=config.model_type not in _UNGATED,
        experts=experts,
        active=config.num_experts_per_tok if experts > 1 else 1,
        rank=rank,
    )
