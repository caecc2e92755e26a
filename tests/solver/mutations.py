"""Mutated input files, by seed."""

import random

from memo_solver.instances import random_requests
from memo_solver.writing import format_csv, format_json

TOKENS = [
    b",", b"\n", b'"', b"\0", b"-", b"1e9", b"9223372036854775808", b"-1", b"[", b"]", b"{", b"}", b"null",
    b"true", b"id", b"size", b"offset", b"\xff", b"\xef\xbb\xbf", b"\r", b" ", b":", b"\\u0000", b"NaN", b"0x1",
    b"99999999999999999999999999", b"[[[[[[[[", b'{"a":', b"\xc3\xa9", b"''",
]  # fmt: skip


def seeds():
    """Good files that mutations start from, with the name that gives their format."""
    problem = random_requests(6, seed=1, max_alignment=4)
    stacked = tuple(100 * k for k in range(6))
    return [
        ("x.csv", format_csv(problem).encode()),
        ("x.csv", format_csv(problem, stacked).encode()),
        ("x.json", format_json(problem).encode()),
        ("x.json", format_json(problem, stacked).encode()),
    ]


def mutated(number):
    """Mutation `number`: file name and bytes."""
    rng = random.Random(number)
    files = seeds()
    path, data = files[number % len(files)]
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        at = rng.randrange(len(data) + 1)
        kind = rng.randrange(6)
        if kind == 0:
            data[at:at] = rng.choice(TOKENS)
        elif kind == 1:
            del data[at : at + rng.randint(1, 12)]
        elif kind == 2 and at < len(data):
            data[at] = rng.randrange(256)
        elif kind == 3:
            data[at:at] = data[rng.randrange(len(data) + 1) :][: rng.randint(1, 40)]
        elif kind == 4:
            data[at : at + rng.randint(1, 4)] = rng.choice(TOKENS)
        else:
            lines = bytes(data).split(b"\n")
            rng.shuffle(lines)
            data = bytearray(b"\n".join(lines))
    return path, bytes(data)
