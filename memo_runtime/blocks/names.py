"""Names that are put into a model's config while it is wrapped, and that copies of the model do not carry."""

from __future__ import annotations

from typing import Any

#: In the memo of a ``copy.deepcopy``: what is copied is run in the place of the original, names included.
AS_IT_IS = "memo_runtime: as it is"


class InstalledName(str):
    """A name in a config; in copies and pickles of the config it is the name from before."""

    before: str

    @classmethod
    def over(cls, before: str, name: str) -> InstalledName:
        """``name`` in the place of ``before``."""
        made = cls(name)
        made.before = before
        return made

    def __deepcopy__(self, memo: dict[Any, Any]) -> str:
        return self if AS_IT_IS in memo else self.before

    def __copy__(self) -> str:
        return self.before

    def __reduce__(self) -> Any:
        return str, (self.before,)
