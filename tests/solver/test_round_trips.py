"""What is written is read back as it was, or refused; what is given is not made worse."""

from __future__ import annotations

import json

import pytest

from memo_solver import Placement, Problem, Request, SolveParams, solve
from memo_solver.bilevel import Block, Iteration, solve_bilevel
from memo_solver.errors import InputError
from memo_solver.instances import planted_packing
from memo_solver.reading import read_placement
from memo_solver.writing import write_placement
from tests.solver.test_cli import memo

BIG = 2**63 - 1


def placed(*requests, offsets):
    return Placement(problem=Problem(requests=requests), offsets=offsets)


@pytest.mark.parametrize("suffix", ["csv", "json"])
@pytest.mark.parametrize("name", ["a\rb", 'a"b', "a,b", "a\nb", "é"])
def test_ids_survive(tmp_path, name, suffix):
    placement = placed(Request(name, 0, 1, 1), offsets=(0,))
    write_placement(placement, tmp_path / f"p.{suffix}")
    assert read_placement(tmp_path / f"p.{suffix}").by_id() == {name: 0}


@pytest.mark.parametrize("name", [" a", "a\t", " "])
def test_ids_that_a_csv_file_would_cut_are_refused(tmp_path, name):
    placement = placed(Request(name, 0, 1, 1), offsets=(0,))
    with pytest.raises(InputError, match=r"which CSV files lose: write a \.json file"):
        write_placement(placement, tmp_path / "p.csv")
    assert not (tmp_path / "p.csv").exists()
    write_placement(placement, tmp_path / "p.json")
    assert read_placement(tmp_path / "p.json").by_id() == {name: 0}


@pytest.mark.parametrize("suffix", ["csv", "json"])
def test_offsets_beyond_64_bits_are_refused_before_a_file_is_touched(tmp_path, suffix):
    requests = (Request("a", 0, 1, BIG), Request("b", 0, 1, BIG), Request("c", 0, 1, 1))
    placement = placed(*requests, offsets=(0, BIG, 2 * BIG))
    with pytest.raises(InputError, match=r"request 'c': offset .* does not fit in 64 bits"):
        write_placement(placement, tmp_path / f"p.{suffix}")
    assert list(tmp_path.iterdir()) == []


def test_half_a_character_is_no_id():
    with pytest.raises(InputError, match="lone surrogate"):
        Request("\ud800", 0, 1, 1)


WRONG = [{"num_threads": 1.5}, {"num_threads": "2"}, {"time_limit_seconds": "3"}, {"exact": False}, {"native": "off"}]


@pytest.mark.parametrize("wrong", WRONG)
def test_parameters_of_another_type_are_refused_by_name(wrong):
    with pytest.raises(InputError, match=next(iter(wrong))):
        SolveParams(**wrong)


def test_a_placement_in_the_file_is_where_the_search_starts(tmp_path):
    """A perfect packing that first fit, which is all there is time for, does not find."""
    file = tmp_path / "placed.csv"
    packing = planted_packing(150, seed=3)
    best = solve(packing, SolveParams(time_limit_seconds=60)).placement
    assert best.peak == packing.capacity
    free = solve(Problem(requests=packing.requests), SolveParams(time_limit_seconds=0.001))
    assert free.peak > best.peak
    write_placement(best, file)
    done = memo(file, "--time-limit", "1ms", "--json", "-o", file)
    assert done.returncode == 0
    assert json.loads(done.stdout)["peak"] == read_placement(file).peak == best.peak


def test_a_damaged_cache_is_made_again(tmp_path):
    blocks = [Block(id="b", lower=0, upper=2, requests=(Request("p", 0, 1, 3), Request("q", 0, 2, 2)))]
    good = solve_bilevel(blocks, Iteration(requests=()), cache_dir=tmp_path).solution.peak
    (entry,) = tmp_path.iterdir()
    content = json.loads(entry.read_text())
    for damage in ("[" * 100_000, json.dumps({**content, "peak": 1e400}), json.dumps({**content, "peak": 99999})):
        entry.write_text(damage)
        assert solve_bilevel(blocks, Iteration(requests=()), cache_dir=tmp_path).solution.peak == good
        assert json.loads(entry.read_text()) == content
