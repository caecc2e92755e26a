"""Strategies for small problems."""

from hypothesis import strategies as st

from memo_solver import Problem, Request


@st.composite
def problems(draw, max_requests=6, max_alignment=1):
    n = draw(st.integers(0, max_requests))
    requests = []
    for k in range(n):
        lower = draw(st.integers(0, 8))
        upper = lower + draw(st.integers(0, 5))
        size = draw(st.integers(0, 7))
        alignment = draw(st.integers(1, max_alignment))
        requests.append(Request(f"r{k}", lower, upper, size, alignment))
    return Problem(requests=tuple(requests))
