"""What of a model no length changes. Fitting profiles dozens of lengths, and walks through all modules took longest."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from memo_runtime.blocks.final_norm import final_norm
from memo_runtime.blocks.stack import BlockRef
from memo_runtime.offline.subject import Subject
from memo_runtime.profiling.fingerprint import batch_signature, make_fingerprint
from memo_runtime.profiling.states import gradient_bytes, gradients_of_blocks, gradients_of_embeddings
from memo_runtime.records import Fingerprint


@dataclass(frozen=True, slots=True, kw_only=True)
class Structure:
    """Bytes and FLOPs of a whole model, on one GPU.

    Attributes:
        gradients: of each block that is called, by name. embeddings: of gradients outside of the blocks those that come
            last.
        root_bytes: of parameters outside of the blocks, and ``root_gradients`` of theirs. block_bytes: of the largest
            block.
        flops_outside_called: of one token in linear modules outside of the blocks that are called. flops_outside: of
            those outside of any block. logits: features of the former.
        wide: dtypes of parameters that are wider than two bytes.
    """

    fingerprint: Fingerprint
    gradients: Mapping[str, int]
    embeddings: int
    root_bytes: int
    root_gradients: int
    block_bytes: int
    flops_outside_called: int
    flops_outside: int
    logits: int
    norm_behind: bool
    wide: tuple[str, ...]

    @classmethod
    def of(cls, subject: Subject, device: str, called: Sequence[BlockRef], blocks: Sequence[BlockRef]) -> Structure:
        """That of ``subject`` for a machine's ``device``; ``called``: those of its ``blocks`` that are."""
        model = subject.model
        names = [ref.name for ref in called]
        inside = {id(p) for name in names for p in model.get_submodule(name).parameters()}
        root = [p for p in model.parameters() if id(p) not in inside]
        return cls(
            fingerprint=make_fingerprint(model, names, batch_signature(*subject.batch), "offline", device),
            gradients=gradients_of_blocks(model, [(ref.name, ref.module) for ref in called]),
            # Of a model that is known: its embeddings are called before the first block, and nowhere else.
            embeddings=gradients_of_embeddings(model, inside) if subject.tiled_loss else 0,
            root_bytes=_bytes(root),
            root_gradients=sum(gradient_bytes(p) for p in root),
            block_bytes=max(_bytes(model.get_submodule(name).parameters()) for name in names),
            flops_outside_called=_head_flops(model, names),
            flops_outside=_head_flops(model, [ref.name for ref in blocks]),
            logits=sum(head.out_features for head in _around(model, names)),
            norm_behind=final_norm(model, names) is not None,
            wide=tuple(sorted({_name(p) for p in model.parameters() if p.dtype.itemsize > 2})),
        )


def _bytes(parameters: Iterable[nn.Parameter]) -> int:
    return sum(p.numel() * p.element_size() for p in parameters)


def _name(parameter: nn.Parameter) -> str:
    return str(parameter.dtype).removeprefix("torch.")


def _around(model: nn.Module, names: Sequence[str]) -> Iterator[nn.Linear]:
    """Linear modules outside of the blocks."""
    inside = tuple(f"{name}." for name in names)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and not f"{name}.".startswith(inside):
            yield module


def _head_flops(model: nn.Module, names: Sequence[str]) -> int:
    """FLOPs of one token in what lies outside of the blocks: three products, or two where the weight is frozen."""
    return sum(
        (6 if head.weight.requires_grad else 4) * head.in_features * head.out_features for head in _around(model, names)
    )
