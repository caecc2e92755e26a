"""Random programs of copies, and a machine that runs one on any engine."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from hypothesis import strategies as st

TENSORS = 3
SLOTS = 4
SLOT_BYTES = 6 * 8 * 16 * 4
#: Each device tensor is [outer, rows, inner]; a copy takes rows [start, stop) of every outer.
SHAPES = ((1, 48, 4), (3, 16, 4), (6, 8, 4))
DTYPES = (torch.uint8, torch.int16, torch.float32)


@dataclass(frozen=True)
class Fill:
    """Compute writes a tensor."""

    tensor: int
    value: int


@dataclass(frozen=True)
class Move:
    """One submission: rows of tensors and slots, one direction; ``wait`` at once, or when something needs it."""

    out: bool
    pairs: tuple[tuple[int, int, int, int], ...]  # tensor, slot, start, stop
    wait: bool


@st.composite
def programs(draw):
    """Fills and moves over three tensors and four slots."""
    steps = []
    for _ in range(draw(st.integers(1, 14))):
        if draw(st.integers(0, 3)) == 0:
            steps.append(Fill(draw(st.integers(0, TENSORS - 1)), draw(st.integers(0, 250))))
            continue
        pairs = []
        for slot in draw(st.lists(st.integers(0, SLOTS - 1), min_size=1, max_size=3, unique=True)):
            tensor = draw(st.integers(0, TENSORS - 1))
            rows = SHAPES[tensor][1]
            start, stop = sorted(draw(st.lists(st.integers(0, rows), min_size=2, max_size=2)))
            pairs.append((tensor, slot, start, stop))
        # Copies of one submission have no order: none writes what another of them touches.
        pairs = list({tensor: pair for pair in pairs for tensor in [pair[0]]}.values())
        steps.append(Move(draw(st.booleans()), tuple(pairs), draw(st.booleans())))
    return steps


@dataclass
class Machine:
    """Runs programs: ``tensors`` on the device, ``slots`` of host memory, and how compute fills a tensor."""

    engine: object
    tensors: list[torch.Tensor]
    slots: list[torch.Tensor]
    fill: object
    waiting: list[tuple[object, set[tuple[str, int]]]] = field(default_factory=list)

    def run(self, program) -> None:
        """The program, with waits only where two steps touch the same memory."""
        for step in program:
            if isinstance(step, Fill):
                self._settle({("tensor", step.tensor)})
                self.fill(self.tensors[step.tensor], step.value)
                continue
            touched = {("tensor", t) for t, *_ in step.pairs} | {("slot", s) for _, s, *_ in step.pairs}
            self._settle(touched)
            pairs = [self._ends(*pair) for pair in step.pairs]
            many = self.engine.many_to_host if step.out else self.engine.many_to_device
            one = self.engine.to_host if step.out else self.engine.to_device
            pairs = pairs if step.out else [(host, device) for device, host in pairs]
            ticket = one(*pairs[0], name="one") if len(pairs) == 1 else many(pairs, name="many")
            self.waiting.append((ticket, touched))
            if step.wait:
                self._settle(touched)
        self._settle(None)

    def _ends(self, tensor: int, slot: int, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        device = self.tensors[tensor]
        rows = device[:, start:stop]
        host = self.slots[slot].view(device.dtype)[: rows.numel()].view(rows.shape)
        return rows, host

    def _settle(self, touched) -> None:
        for ticket, what in [one for one in self.waiting if touched is None or one[1] & touched]:
            ticket.wait()
            self.waiting.remove((ticket, what))


def start_values(make):
    """Device tensors with known, different contents; ``make(shape, dtype)`` gives each its memory."""
    tensors = []
    for index, (shape, dtype) in enumerate(zip(SHAPES, DTYPES, strict=True)):
        tensor = make(shape, dtype)
        tensor.copy_((torch.arange(tensor.numel()).view(shape) * (index + 3) % 120).to(dtype))
        tensors.append(tensor)
    return tensors
