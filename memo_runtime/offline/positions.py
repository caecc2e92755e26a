"""How long a sequence a model knows positions for, and what to do about a longer one."""

from __future__ import annotations

from memo_runtime.errors import ArgumentError
from memo_runtime.offline.subject import Subject


def note_on_positions(subject: Subject, tokens: int) -> tuple[str, ...]:
    """What has to be said of ``tokens`` tokens, if they are more than the model has positions for."""
    if subject.positions is None or tokens <= subject.positions:
        return ()
    factor = -(-tokens // subject.positions)
    return (
        f"{tokens:,} tokens are beyond the {subject.positions:,} positions that {subject.name} is made for: it runs, "
        "but its rotary embedding has to be scaled to be of use (rope_scaling in its config, such as "
        f'{{"rope_type": "yarn", "factor": {factor}.0, "original_max_position_embeddings": {subject.positions}}}, or a '
        "larger rope_theta); give --max-positions where that is arranged",
    )


def note_on_table(name: str, tokens: int) -> str:
    """What has to be said where the model's table of positions ends a search at ``tokens`` tokens."""
    return (
        f"{name} learns a table of positions, which ends the search at {tokens:,} tokens: --max-positions plans a "
        "longer one, whose new rows have to be trained"
    )


def check_positions(subject: Subject, tokens: int, what: str) -> None:
    """Refuse lengths for which a model with a table of positions has no rows.

    Raises:
        ArgumentError: there are too few.
    """
    if subject.learned_positions and subject.positions is not None and tokens > subject.positions:
        raise ArgumentError(
            f"{what} is more than the {subject.positions:,} positions that {subject.name} learns, a table of its own: "
            f"give --max-positions {tokens} to plan for a longer table (which has to be trained; a factory makes its "
            "own), or fewer tokens"
        )
