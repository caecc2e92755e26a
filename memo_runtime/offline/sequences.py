"""What a batch says of sequences: how many there are, whether all blocks see the same, which positions are learned."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from torch import nn

from memo_runtime.errors import ProfileError
from memo_runtime.records import BlockProfile

#: Fewer tokens do not show which dimension is theirs: attention to one is another operator, and sizes coincide.
_FEWEST = 16
_SHOWN = 3


def check_length(profile: BlockProfile) -> None:
    """Refuse to conclude anything from a handful of tokens.

    Raises:
        ProfileError: the block saw fewer than that.
    """
    if 0 < profile.tokens < _FEWEST:
        raise ProfileError(
            f"{profile.name} is called with sequences of {profile.tokens} tokens, and at least {_FEWEST} are needed to "
            "see how it grows with them: let the factory return a batch of a few hundred tokens"
        )


def note_on_sequences(rows: int, seen: Mapping[str, int], tokens: int) -> Iterator[str]:
    """What has to be said of ``rows`` sequences and of blocks, by name, that have ``seen`` so many tokens of each."""
    if rows > 1:
        yield f"a step has {rows} sequences of {tokens:,} tokens each, since the batch has {rows}"
    by_tokens: dict[int, list[str]] = {}
    for name, count in seen.items():
        if count:
            by_tokens.setdefault(count, []).append(name)
    if len(by_tokens) > 1:
        parts = [
            f"{count:,} in {names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''}"
            for count, names in sorted(by_tokens.items())
        ]
        yield (
            f"sequences of the batch differ ({', '.join(parts)}): every one of them is planned with {tokens:,} tokens, "
            "also where training would keep one short"
        )


def note_on_tables(model: nn.Module, blocks: Sequence[str], tokens: int) -> Iterator[str]:
    """What has to be said of tables of positions outside of ``blocks`` that have fewer rows than ``tokens``."""
    inside = tuple(f"{name}." for name in blocks)
    short = [
        f"{name} ({parameter.shape[-2]:,})"
        for name, parameter in model.named_parameters()
        if "position" in name and parameter.dim() >= 2 and not name.startswith(inside)
        if parameter.shape[-2] < tokens
    ]
    if short:
        more = ", ..." if len(short) > _SHOWN else ""
        yield (
            f"positions are learned in {', '.join(short[:_SHOWN])}{more}, which have fewer rows than {tokens:,}: such "
            "a length needs a model that is made with longer tables (of an image: more patches)"
        )
