"""Real text as training batches.

By default the text is what every Python carries with it: the documentation topics of ``pydoc_data.topics``,
then the sources of the standard library, in a fixed order, so that two machines with the same Python train on
the same bytes. Any UTF-8 file does as well. Tokens are bytes unless a tokenizer is named:

    documents  ->  tokens of as many of them as are needed, one behind the other  ->  batch i = the next rows
                   [doc 0 | boundary | doc 1 | boundary | ...]                        of the length asked

Reading stops as soon as there are enough tokens. A text that ends earlier starts again from its beginning.
A row is one long document of them all, or holds documents that are packed: then each token has its place in its own
document as position, and a model's attention stays inside it.
"""

from __future__ import annotations

import codecs
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

_CHUNK_BYTES = 1 << 20


class TextError(ValueError):
    """The text or the tokenizer that was asked for cannot be used."""


class Encoder(Protocol):
    """Text to token ids; ``boundary`` (or None) goes between documents."""

    vocabulary: int
    boundary: int | None

    def encode(self, text: str) -> torch.Tensor:
        """Token ids of ``text`` as a one-dimensional int32 tensor."""


class ByteEncoder:
    """One token per byte of UTF-8, and one special token between documents."""

    vocabulary = 257
    boundary: int | None = 256

    def encode(self, text: str) -> torch.Tensor:
        """Token ids of ``text`` as a one-dimensional int32 tensor."""
        data = bytearray(text.encode("utf-8", errors="replace"))
        # frombuffer refuses an empty buffer.
        return torch.frombuffer(data, dtype=torch.uint8).int() if data else torch.empty(0, dtype=torch.int32)


class FolderEncoder:
    """A Hugging Face tokenizer from a folder; nothing is downloaded."""

    def __init__(self, folder: str) -> None:
        if not Path(folder).is_dir():
            raise TextError(f"--tokenizer {folder}: no such folder; give one with a tokenizer.json")
        from transformers import AutoTokenizer

        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except Exception as error:  # what it raises depends on which file is missing or broken
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise TextError(f"--tokenizer {folder}: no tokenizer can be read from it: {first}") from error
        self.vocabulary: int = len(self._tokenizer)
        self.boundary: int | None = self._tokenizer.eos_token_id

    def encode(self, text: str) -> torch.Tensor:
        """Token ids of ``text`` as a one-dimensional int32 tensor."""
        ids = self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return torch.tensor(ids, dtype=torch.int32)


class Source(Protocol):
    """Where text comes from; ``cycles`` where even one sequence may be longer than all of it."""

    name: str
    cycles: bool

    def documents(self) -> Iterator[str]:
        """The texts, in an order that is the same every time."""


class StandardLibrary:
    """The documentation topics of the running Python, then the sources of its standard library."""

    name = "the standard library"
    cycles = True

    def documents(self) -> Iterator[str]:
        """The texts, in an order that is the same every time."""
        yield from _topics()
        for folder, folders, files in os.walk(sysconfig.get_paths()["stdlib"]):
            # Installed packages are no part of the standard library, and differ between machines.
            folders[:] = sorted(set(folders) - {"site-packages", "dist-packages", "__pycache__"})
            for name in sorted(files):
                if name.endswith(".py"):
                    yield from _source(Path(folder, name))


def _source(path: Path) -> Iterator[str]:
    try:
        yield path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return  # some files of its own test suite are broken on purpose


def _topics() -> Iterator[str]:
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions leave it out
        return
    for name in sorted(topics):
        yield topics[name]


class TextFile:
    """A UTF-8 file of any size, read piece by piece; the whole of it is one document."""

    cycles = False

    def __init__(self, path: str) -> None:
        self.name = path
        if Path(path).is_dir():
            raise TextError(f"--text {path} is a folder; give a file")
        try:
            Path(path).open("rb").close()
        except OSError as error:
            raise TextError(f"--text {path} cannot be read: {error.strerror or error}") from error

    def documents(self) -> Iterator[str]:
        """The texts, in an order that is the same every time."""
        decoder = codecs.getincrementaldecoder("utf-8")()
        done = 0
        with Path(self.name).open("rb") as file:
            while True:
                data = file.read(_CHUNK_BYTES)
                try:
                    text = decoder.decode(data, final=not data)
                except UnicodeDecodeError as error:
                    where = max(0, done + error.start)
                    raise TextError(f"--text {self.name} is not UTF-8 text (near byte {where:,})") from None
                if text:
                    yield text
                if not data:
                    return
                done += len(data)


@dataclass(frozen=True, slots=True, kw_only=True)
class Corpus:
    """Tokens of a text, and where they are from.

    ``bytes_read`` is the UTF-8 text behind ``tokens``; ``complete``: the source has no more. ``starts``: places of
    the first tokens of documents.
    """

    tokens: torch.Tensor
    source: str
    bytes_read: int
    complete: bool
    starts: torch.Tensor

    def batch(self, index: int, *, rows: int, length: int) -> torch.Tensor:
        """Batch ``index`` as ``[rows, length]`` int64: the text in order, starting again at its end."""
        return self.tokens[self._places(index, rows, length)].long().view(rows, length)

    def positions(self, index: int, *, rows: int, length: int) -> torch.Tensor:
        """Of each token of that batch, its place in its document; what a row begins in the middle of starts there."""
        where = self._places(index, rows, length)
        since = where - self.starts[torch.searchsorted(self.starts, where, right=True) - 1]
        return torch.minimum(since.view(rows, length), torch.arange(length))

    def _places(self, index: int, rows: int, length: int) -> torch.Tensor:
        start = index * rows * length
        return torch.arange(start, start + rows * length) % self.tokens.numel()

    def describe(self, needed: int) -> str:
        """One line: what was found, and how often it is gone through where it is shorter than ``needed``."""
        found = self.tokens.numel()
        text = f"text: {self.bytes_read:,} bytes of {self.source} as {found:,} tokens; {needed:,} needed"
        if found < needed:
            text += f": there is no more, so it is gone through {needed / found:.1f} times"
        return text


def read_corpus(source: Source, encoder: Encoder, *, needed: int, length: int) -> Corpus:
    """The first ``needed`` tokens of ``source``, or all where it is shorter.

    Raises:
        TextError: no text at all, or a file with less than one sequence of ``length`` tokens.
    """
    pieces: list[torch.Tensor] = []
    starts = [0]
    found = bytes_read = 0
    complete = True
    # A file comes in pieces of one document: no boundary inside it.
    boundary = None if isinstance(source, TextFile) else encoder.boundary
    for text in source.documents():
        if found >= needed:
            complete = False
            break
        piece = encoder.encode(text)
        if boundary is not None:
            piece = torch.cat([piece, torch.tensor([boundary], dtype=torch.int32)])
        pieces.append(piece)
        found += piece.numel()
        if not isinstance(source, TextFile) and found > starts[-1]:
            starts.append(found)
        bytes_read += len(text.encode("utf-8", errors="replace"))
    if found == 0:
        raise TextError(f"{source.name} has no text: give a UTF-8 file with --text")
    if found < length and not source.cycles:
        raise TextError(
            f"--text {source.name} has {found:,} tokens ({bytes_read:,} bytes) and one sequence needs "
            f"{length:,}: give a longer file, or --seq-len {found}"
        )
    tokens = torch.cat(pieces)[:needed]
    begun = torch.tensor([start for start in starts if start < tokens.numel()])
    return Corpus(tokens=tokens, source=source.name, bytes_read=bytes_read, complete=complete, starts=begun)
