"""How suggestions are put: as arguments of ``memo.wrap`` and ``memo.plan``, or as options of the command line."""

from __future__ import annotations

from dataclasses import dataclass

from memo_runtime.units import parse_bytes


class PythonWords:
    """Keyword arguments: ``policy='replay'``, ``budget='45.04GiB'``."""

    def footing(self) -> str:
        """Of what the figures are, if that has to be said."""
        return ""

    def length(self, tokens: int, asked: int) -> str:
        """A shorter sequence."""
        return f"{tokens:,} tokens instead of {asked:,}"

    def setting(self, name: str, value: str | float) -> str:
        """One setting."""
        return f"{name}='{value}'" if isinstance(value, str) else f"{name}={value:g}"

    def size(self, name: str, size_bytes: int) -> str:
        """A budget of at least ``size_bytes``."""
        return self.setting(name, size_at_least(size_bytes))

    def together(self, *settings: str) -> str:
        """Several settings at once."""
        return ", ".join(settings)

    def without(self, setting: str, *names: str) -> str:
        """``setting``, which does not go with those called ``names``."""
        return f"{setting} without {' and '.join(names)}" if names else setting


@dataclass(frozen=True, slots=True)
class CommandWords(PythonWords):
    """Options of ``memo plan``, of which ``--seq-len`` and ``--host-memory`` are of all ``gpus`` together."""

    gpus: int

    def footing(self) -> str:
        """That sizes are those of one GPU, where there are several."""
        return f"each of {self.gpus} GPUs; --seq-len and --host-memory are of all together" if self.gpus > 1 else ""

    def length(self, tokens: int, asked: int) -> str:
        """A shorter sequence, as it is given."""
        return f"--seq-len {tokens * self.gpus} instead of {asked * self.gpus}"

    def setting(self, name: str, value: str | float) -> str:
        """One option."""
        text = value if isinstance(value, str) else f"{value:g}"
        return f"{_option(name)} {text}"

    def size(self, name: str, size_bytes: int) -> str:
        """A limit; host memory is divided by the GPUs."""
        if name == "host_budget":
            return self.setting("host_memory", size_at_least(size_bytes * self.gpus))
        return self.setting(name, size_at_least(size_bytes))

    def together(self, *settings: str) -> str:
        """Several options at once."""
        return " ".join(settings)

    def without(self, setting: str, *names: str) -> str:
        """One option, and those that it does not go with."""
        return PythonWords.without(self, setting, *map(_option, names))


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


PYTHON = PythonWords()


def size_at_least(size_bytes: int) -> str:
    """A size in words of this library that is ``size_bytes`` or slightly more: ``"84.13GiB"``, ``"320B"``."""
    for unit in ("TiB", "GiB", "MiB", "KiB"):
        scale = parse_bytes(f"1{unit}")
        if size_bytes >= scale:
            hundredths = -(-size_bytes * 100 // scale)
            while parse_bytes(f"{hundredths / 100:.2f}{unit}") < size_bytes:
                hundredths += 1
            return f"{hundredths / 100:.2f}{unit}"
    return f"{size_bytes}B"
