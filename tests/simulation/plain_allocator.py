"""The same rules, written down once more with lists and no linking: what the simulator is compared with."""

KIB, MIB = 1024, 1024**2


class PlainAllocator:
    """Without expandable segments. Segments are lists of [size, used].

    Their addresses: chunks of 32 MiB or a multiple, each below the last, are lists of cells of 2 MiB; what is smaller
    than 32 MiB goes into the lowest chunk with enough free cells in a row.
    """

    def __init__(self):
        self.segments = []  # (small, stream, [[size, used], ...])
        self.places = []  # (number of the chunk, number of the cell) of each segment
        self.chunks = []
        self.reserved = self.allocated = self.reserved_peak = self.allocated_peak = 0

    def allocate(self, request, stream):
        size = max(512, (request + 511) // 512 * 512)
        small = size <= MIB
        fits = [
            (piece[0], -self.places[number][0], self.places[number][1], at, number)
            for number, (kind, own, pieces) in enumerate(self.segments)
            if kind == small and own == stream
            for at, piece in enumerate(pieces)
            if not piece[1] and piece[0] >= size
        ]
        if fits:
            *_, at, number = min(fits)
        else:
            total = 2 * MIB if small else 20 * MIB if size < 10 * MIB else (size + 2 * MIB - 1) // (2 * MIB) * 2 * MIB
            self.segments.append((small, stream, [[total, False]]))
            self.places.append(self.place(total // (2 * MIB)))
            self.reserved += total
            self.reserved_peak = max(self.reserved_peak, self.reserved)
            number, at = len(self.segments) - 1, 0
        pieces = self.segments[number][2]
        rest = pieces[at][0] - size
        if rest >= 512 if small else rest > MIB:
            pieces[at : at + 1] = [[size, False], [rest, False]]
        piece = pieces[at]
        piece[1] = True
        self.allocated += piece[0]
        self.allocated_peak = max(self.allocated_peak, self.allocated)
        return piece

    def place(self, cells):
        for number in reversed(range(len(self.chunks)) if cells < 16 else ()):
            chunk = self.chunks[number]
            for at in range(len(chunk) - cells + 1):
                if not any(chunk[at : at + cells]):
                    chunk[at : at + cells] = [True] * cells
                    return number, at
        self.chunks.append([at < cells for at in range((cells + 15) // 16 * 16)])
        return len(self.chunks) - 1, 0

    def free(self, piece):
        self.allocated -= piece[0]
        for _, _, pieces in self.segments:
            at = next((at for at, other in enumerate(pieces) if other is piece), None)
            if at is None:
                continue
            piece[1] = False
            if at + 1 < len(pieces) and not pieces[at + 1][1]:
                piece[0] += pieces.pop(at + 1)[0]
            if at > 0 and not pieces[at - 1][1]:
                piece[0] += pieces.pop(at - 1)[0]
            return


def plain_peaks(trace):
    """(allocated, reserved) peaks of a trace."""
    allocator, blocks = PlainAllocator(), {}
    for index, allocates in trace.events():
        request = trace.requests[index]
        if allocates:
            blocks[index] = allocator.allocate(request.size, request.stream)
        else:
            allocator.free(blocks.pop(index))
    return allocator.allocated_peak, allocator.reserved_peak
