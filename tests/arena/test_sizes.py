"""Sizes at other lengths: rounded-up ones exactly where the lengths tell, within bounds where they do not."""

import pytest

from memo_runtime.arena.sizes import MULTIPLES, growth_of
from tests.arena.reductions import scratch

OTHERS = (1, 63, 500, 777, 1023, 1025, 1281, 1504, 1780, 1999, 2047, 2048, 5000)


def padded(multiple, tokens, each=4096, fixed=0):
    return fixed + each * (-(-tokens // multiple) * multiple)


def seen(size, *tokens):
    return growth_of(tuple((at, size(at)) for at in sorted(tokens)))


@pytest.mark.parametrize("multiple", MULTIPLES[:-1])
@pytest.mark.parametrize("fixed", [0, 640])
@pytest.mark.parametrize("each", [6, 4096, 2064])
def test_lengths_that_tell_multiples_apart_give_every_size(multiple, fixed, each):
    def size(tokens):
        return padded(multiple, tokens, each, fixed)

    growth = seen(size, 1000, 1025, 1536, 3001)
    assert growth.multiple == multiple
    for tokens in OTHERS:
        assert growth.at(tokens) == size(tokens)
        least, most = growth.bounds(tokens)
        assert least <= size(tokens)
        assert most is None or size(tokens) <= most


@pytest.mark.parametrize("multiple", [1, 8, 16, 32, 64])
def test_two_lengths_are_enough_where_bytes_a_token_are_whole_and_none_is_left_over(multiple):
    growth = seen(lambda tokens: padded(multiple, tokens), 1000, 1500)
    assert [growth.at(tokens) for tokens in OTHERS] == [padded(multiple, tokens) for tokens in OTHERS]


@pytest.mark.parametrize("multiple", [1, 64, 128, 256, 512])
def test_what_two_lengths_do_not_tell_apart_is_within_bounds(multiple):
    growth = seen(lambda tokens: padded(multiple, tokens), 1024, 1536)
    for tokens in (1025, 1281, 1500, 1536):
        least, most = growth.bounds(tokens)
        assert least <= padded(multiple, tokens) <= most
    assert growth.bounds(1024) == (padded(multiple, 1024),) * 2
    assert growth.bounds(1999) == (padded(multiple, 1536), None)
    # One more length, and there is only one left, or only such as are the same there.
    again = seen(lambda tokens: padded(multiple, tokens), 1024, 1536, 1025)
    assert [again.at(tokens) for tokens in OTHERS] == [padded(multiple, tokens) for tokens in OTHERS]


@pytest.mark.parametrize("known", [(32768, 65536), (32768, 65536, 131072), (1024, 1536), (5000, 20000, 90000)])
def test_scratch_of_reductions_is_within_bounds_between_lengths(known):
    growth = seen(lambda tokens: scratch(tokens, 4096), *known)
    for tokens in range(known[0], known[-1], 97):
        least, most = growth.bounds(tokens)
        assert least <= scratch(tokens, 4096) <= most
        assert least <= growth.at(tokens) <= most
    assert all(growth.at(tokens) == scratch(tokens, 4096) for tokens in known)


def test_what_no_multiple_explains_grows_as_steeply_as_seen():
    growth = growth_of(((100, 1000), (200, 1000), (300, 1200), (400, 3000)))
    assert growth.multiple == 0
    assert [growth.at(tokens) for tokens in (50, 100, 150, 250, 400, 500)] == [500, 1000, 1000, 1100, 3000, 4800]
    assert growth_of(((100, 1000), (200, 1100), (400, 3000), (600, 3000))).at(900) == 3000
    assert growth_of(((100, 1000), (101, 1900), (200, 1100), (300, 1200))).at(250) == 1900


def test_what_never_changes_is_certain():
    growth = growth_of(((100, 1000), (200, 1000)))
    assert (growth.multiple, growth.at(150), growth.bounds(150)) == (1, 1000, (1000, 1000))
    assert growth.bounds(50) == (50_000 // 1123, 1000)
    assert growth.bounds(300) == (1000, None)
