"""Which moments a block by tiles has, and what of its products is there."""

import pytest

from memo_runtime.records import Growth, Moment, TileAt, TiledProfile

BACKWARD = {  # (kept tokens of 32 in tiles of 8) -> kept tokens of the segment at hand whose products are there
    TileAt.ANY: {0: 0, 8: 0, 16: 0, 32: 0},
    TileAt.FIRST_KEPT: {0: None, 8: 8, 16: 16, 32: 32},
    TileAt.LATER_KEPT: {0: None, 8: None, 16: 8, 32: 24},
    TileAt.FIRST_BARE: {0: 0, 8: None, 16: None, 32: None},
    TileAt.LATER_BARE: {0: 0, 8: 0, 16: 0, 32: None},
}
FORWARD = BACKWARD | {
    TileAt.FIRST_KEPT: {0: None, 8: 0, 16: 0, 32: 0},
    TileAt.LATER_BARE: {0: 0, 8: 8, 16: 16, 32: None},
}


@pytest.mark.parametrize(("backward", "own"), [(True, BACKWARD), (False, FORWARD)])
def test_products_come_and_go_tile_by_tile(backward, own):
    for at, cases in own.items():
        moment = Moment(full=Growth(), own=Growth(linear=1), at=at)
        assert {prefix: moment.bytes_at(32, 8, prefix, backward=backward) for prefix in cases} == cases


def test_what_is_there_is_summed_and_a_single_tile_has_none_behind_it():
    moment = Moment(
        full=Growth(linear=100), tile=Growth(constant=5, linear=10), fixed=3, missing=Growth(linear=20),
        kept=Growth(linear=1), own=Growth(linear=2), at=TileAt.FIRST_KEPT,
    )  # fmt: skip
    assert moment.bytes_at(32, 8, 16, backward=True) == 3200 - 640 + 85 + 3 + 16 + 32
    for at in (TileAt.LATER_BARE, TileAt.LATER_KEPT):
        assert Moment(full=Growth(linear=1), at=at).bytes_at(32, 32, 0, backward=True) is None


def test_groups_divide_the_heads_and_keep_tensors_below_what_32_bits_count():
    takes = TiledProfile(
        stash=(), resident=Growth(), products=(), forward=(), backward=(), again_flops=Growth(), saved_flops=Growth(),
        heads=12, elements=Growth(linear=2048),
    )  # fmt: skip
    assert [takes.groups_at(4096, asked) for asked in (1, 2, 3, 4, 6, 8, 12)] == [1, 2, 3, 4, 6, 4, 12]
    assert takes.groups_at(2**20 - 1, 1) == 1
    assert takes.groups_at(2**20, 1) == 2
    assert takes.groups_at(2**22, 2) == 6
    assert takes.groups_at(2**30, 1) == 12


def test_what_is_of_all_heads_is_divided_by_the_groups():
    moment = Moment(full=Growth(linear=10), part=Growth(linear=6))
    sizes = [moment.bytes_at(100, 8, 0, backward=True, groups=groups) for groups in (1, 2, 3)]
    assert sizes == [1600, 1300, 1200]
