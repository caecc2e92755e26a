"""What dispatch modes that watch or change a step have in common."""

from __future__ import annotations

from torch.utils._python_dispatch import TorchDispatchMode


class OutsideCompiled(TorchDispatchMode):
    """A mode that leaves compiled regions compiled; what they run inside is not seen."""

    supports_higher_order_operators = True

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """It does not stand against compiled regions."""
        return True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
