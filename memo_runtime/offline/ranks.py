"""One rank of several: what sharding changes about its work and memory, and what the GPUs tell each other.

The sequence is cut into as many parts as there are GPUs, and each holds ``tokens / gpus`` of every token-wise tensor.
Only attention sees all tokens:

    Ulysses   where heads (of keys too) divide: all-to-all of q, k, v and of the result; each GPU has all tokens of some
              heads, so the bytes are the same and the work is a share of the whole
    ring      else: keys and values go round, one neighbour to the next, under the attention of the part before

Parameters, gradients and optimizer states are sharded (fully_shard): a block's parameters are gathered before its
forward and its backward, its gradients are reduced and scattered after. Gathering hides behind the compute of the block
before as far as that lasts; all-to-all hides behind nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from memo_runtime.errors import ArgumentError
from memo_runtime.offline.work import Heads


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranks:
    """How a model is spread over ``gpus`` of one node; ``ulysses`` is False for a ring, and without meaning for one."""

    gpus: int
    ulysses: bool = True

    @property
    def words(self) -> str:
        """For a plan's notes."""
        if self.gpus == 1:
            return "one GPU"
        how = "Ulysses (all-to-all of heads)" if self.ulysses else "ring attention (heads do not divide)"
        return (
            f"{self.gpus} GPUs, one planned: sequence split {self.gpus} ways with {how}; parameters, gradients and "
            "optimizer states sharded; host memory divided evenly"
        )

    @property
    def others(self) -> float:
        """Share of what is gathered or exchanged that comes from other GPUs."""
        return (self.gpus - 1) / self.gpus

    def local(self, tokens: int) -> int:
        """Tokens of one rank.

        Raises:
            ArgumentError: they do not divide.
        """
        if tokens % self.gpus:
            near = max(self.gpus, tokens // self.gpus * self.gpus)
            raise ArgumentError(
                f"--seq-len {tokens:,} does not divide over {self.gpus} GPUs: {near:,} and {near + self.gpus:,} do"
            )
        return tokens // self.gpus

    def exchanged(self, heads: Sequence[Heads]) -> float:
        """Bytes that a rank sends for one of its tokens in the forward of a block; the backward sends as many
        (twice as many in a ring, where gradients of keys and values go round too).
        """
        if self.gpus == 1:
            return 0.0
        if self.ulysses:
            return self.others * sum(2 * one.query_bytes + 2 * one.key_bytes for one in heads)
        return (self.gpus - 1) * sum(2 * one.key_bytes for one in heads)

    def sent(self, heads: Sequence[Heads], tokens: int, *, weights: int, gradients: int) -> int:
        """Bytes that a rank sends for a block in one step on ``tokens`` tokens of its own."""
        backward = 1 if self.ulysses else 2
        states = self.others * (2 * weights + gradients)
        return round((1 + backward) * self.exchanged(heads) * tokens + states)

    def buffers(self, heads: Sequence[Heads]) -> int:
        """Bytes for one token that stand beside a block's own while attention runs: what is sent while its
        counterpart is received.
        """
        if self.gpus == 1 or not heads:
            return 0
        return max(one.query_bytes + 2 * one.key_bytes if self.ulysses else 2 * one.key_bytes for one in heads)


def choose_ranks(gpus: int, heads: Sequence[Heads]) -> Ranks:
    """Ulysses where every attention's heads divide, else a ring.

    Raises:
        ArgumentError: fewer than one GPU.
    """
    if gpus < 1:
        raise ArgumentError(f"--gpus {gpus} is not a number of GPUs: give 1 or more")
    return Ranks(gpus=gpus, ulysses=all(one.queries % gpus == 0 and one.keys % gpus == 0 for one in heads))
