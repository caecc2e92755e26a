"""The optimum of tiny problems, by trying every order of placement.

A packing can be pushed down until each request rests on the floor or on another
one; placing requests in order of offset at the lowest offset that is free above
everything placed below them then gives it back. So the best over all orders of
"lowest offset above all conflicting requests placed so far" is the optimum.
"""

from itertools import permutations


def optimum(problem):
    requests = [r for r in problem.requests if not r.is_empty]
    best = sum(r.size + r.alignment for r in requests)
    for order in permutations(requests):
        ends = {}
        peak = 0
        for r in order:
            floor = max((e for q, e in ends.items() if q.lower < r.upper and r.lower < q.upper), default=0)
            offset = -(-floor // r.alignment) * r.alignment
            ends[r] = offset + r.size
            peak = max(peak, offset + r.size)
            if peak >= best:
                break
        best = min(best, peak)
    return best


def peak_load(problem):
    times = [r.lower for r in problem.requests]
    return max((sum(r.size for r in problem.requests if r.lower <= t < r.upper) for t in times), default=0)


def overlaps(problem, offsets):
    """The plainest O(n^2) test of a placement."""
    pairs = [(r, o) for r, o in zip(problem.requests, offsets, strict=True) if not r.is_empty]
    for k, (r, o) in enumerate(pairs):
        for q, p in pairs[:k]:
            if r.lower < q.upper and q.lower < r.upper and o < p + q.size and p < o + r.size:
                return True
    return False
