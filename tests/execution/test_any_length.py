"""Tiles of many sizes: a few are compiled each for itself, the others share programs that take their number."""

from __future__ import annotations

import operator

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.functional import scaled_dot_product_attention, silu

from memo_runtime.execution import any_length, compilers, sized_program, tiled_cache
from memo_runtime.execution.any_length import AnyLength
from memo_runtime.execution.compilers import NotCompiledError, as_module, compiled, run_eagerly
from memo_runtime.execution.sized_graph import Line, Sized, read
from memo_runtime.execution.sized_records import plain
from memo_runtime.execution.tiled import TiledBlock
from memo_runtime.execution.tiled_cache import ProgramCache
from tests.execution.tiles import assert_exact, call_of

WIDTH = 16
#: Of blocks by tiles of 16 tokens: the last tile has another size each time.
LENGTHS = (21, 34, 23, 40, 25, 42, 27, 44, 29, 46, 31)


def traced(function, tokens):
    graph = make_fx(function)(torch.ones(2, tokens, WIDTH), torch.ones(WIDTH, WIDTH)).graph
    for node, shape in zip(graph.nodes, ((2, tokens, WIDTH), (WIDTH, WIDTH)), strict=False):
        node.meta["val"] = torch.empty(shape, device="meta")
    return graph


def product(x, w):
    return ((x.flatten(0, 1) @ w).view(2, -1, WIDTH)[:, 1:].sum(1), x.shape[1] * w)


def between(function, *lengths):
    return Sized.between(*((tokens, read(traced(function, tokens))) for tokens in lengths))


def test_sizes_are_lines_through_two_graphs():
    sized = between(product, 5, 9)
    assert sized is not None
    assert sized.lines()[0][:2] == ((2, Line(1, 0), WIDTH), (Line(WIDTH, 0), WIDTH, 1))
    for tokens in (2, 5, 7, 31):
        assert sized.at(tokens) == read(traced(product, tokens))


def test_its_graph_takes_the_number():
    sized = between(product, 5, 9)
    module = as_module(sized.graph())
    for tokens in (3, 12):
        x, w = torch.randn(2, tokens, WIDTH), torch.randn(WIDTH, WIDTH)
        assert sized.fits(tokens, [x, w])
        assert not sized.fits(tokens + 1, [x, w])
        assert not sized.fits(tokens, [x.double(), w])
        assert not sized.fits(tokens, [x, torch.randn(WIDTH, 2 * WIDTH)[:, ::2]])
        for mine, theirs in zip(module(tokens, x, w), product(x, w), strict=True):
            assert torch.equal(mine, theirs)


def test_a_stride_of_a_single_element_may_be_any():
    sized = Sized.between(*((tokens, read(one_row(tokens))) for tokens in (5, 9)))
    rows = torch.randn(1, 64, WIDTH)[:, :7]
    assert rows.stride(0) == 64 * WIDTH
    assert sized.fits(7, [rows])


def one_row(tokens):
    graph = make_fx(torch.neg)(torch.ones(1, tokens, WIDTH)).graph
    next(iter(graph.nodes)).meta["val"] = torch.empty(1, tokens, WIDTH, device="meta")
    return graph


@pytest.mark.parametrize("other", [
    lambda x, w: (x.flatten(0, 1) @ w, torch.sin(w)),  # another operator
    lambda x, w: (x.flatten(0, 1) @ w, w * 3.0),  # another number
    lambda x, w: (x.flatten(0, 1) @ w,),  # fewer
])  # fmt: skip
def test_graphs_that_differ_in_more_have_none(other):
    graph, another = traced(lambda x, w: (x.flatten(0, 1) @ w, w * 2.0), 5), traced(other, 9)
    assert Sized.between((5, read(graph)), (9, read(another))) is None
    assert Sized.between((5, read(graph)), (5, read(graph))) is None


@pytest.mark.parametrize("size", [lambda tokens: tokens * tokens, lambda tokens: 64 // tokens])
def test_a_size_that_is_no_line_is_seen_at_the_third(size):
    def function(x, w):
        return (w * size(x.shape[1]) + x.sum(),)

    sized = between(function, 5, 9)
    assert sized is None or sized.at(20) != read(traced(function, 20))


def test_true_is_not_one():
    graphs = []
    for given in (True, False):
        graphs.append(make_fx(lambda x: (x.sum(-1, given),))(torch.ones(2, 3)).graph)  # noqa: B023 - traced at once
        next(iter(graphs[-1].nodes)).meta["val"] = torch.ones(2, 3)
    assert read(graphs[0]) != read(graphs[1])


class Layer(nn.Module):
    """Norm, gate and residual around causal attention; ``heads`` of several sequences."""

    def __init__(self):
        super().__init__()
        self.norm, self.qkv = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH)
        self.up, self.gate, self.down = (nn.Linear(WIDTH, WIDTH, bias=bias) for bias in (True, False, True))

    def forward(self, x):
        queries, keys, values = (
            one.unflatten(-1, (2, -1)).transpose(1, 2) for one in self.qkv(self.norm(x)).chunk(3, -1)
        )
        mixed = scaled_dot_product_attention(queries, keys, values, is_causal=True).transpose(1, 2).flatten(2)
        x = x + mixed
        return x + self.down(silu(self.gate(x)) * self.up(x))


@pytest.fixture
def made(monkeypatch):
    """What is compiled, which is run as it is: "one" for one size, "many" for any number."""
    found = []

    def note(kind):
        def compile_one(module, given):
            found.append(kind)
            return module.forward

        return compile_one

    monkeypatch.setattr(compilers, "through_inductor", note("one"))
    monkeypatch.setattr(sized_program, "through_inductor", note("many"))
    return found


def run(programs, lengths=LENGTHS, alpha=0.5, sequences=2):
    block = Layer().double()
    for tokens in lengths:
        x = torch.randn(sequences, tokens, WIDTH, dtype=torch.float64, requires_grad=True)
        assert_exact(call_of(block, x), TiledBlock(block, tile=16, alpha=alpha, programs=programs))


@pytest.mark.parametrize("sequences", [1, 2])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_later_sizes_share_programs_that_are_compiled_once(made, alpha, sequences):
    programs = ProgramCache(compiled)
    run(programs, alpha=alpha, sequences=sequences)
    assert made.count("one") <= any_length._ALONE * 2 * 4  # of two segments, four programs at most
    assert 0 < made.count("many") <= 2 * 4
    before = len(made)
    run(programs, (30, 28, 26, 46, 45, 25), alpha=alpha, sequences=sequences)
    assert len(made) == before


@pytest.fixture
def traces(monkeypatch):
    """Sizes that were traced."""
    found, make = [], tiled_cache.make_programs

    def trace(captured, stage, sources, tokens, autocast, *, compiler):
        if compiler is not run_eagerly:  # of a check that a capture is right
            found.append(tokens)
        return make(captured, stage, sources, tokens, autocast, compiler=compiler)

    monkeypatch.setattr(tiled_cache, "make_programs", trace)
    return found


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_later_sizes_are_not_traced(made, traces, alpha):
    programs = ProgramCache(compiled)
    run(programs, alpha=alpha)
    assert len(traces) == 2 * any_length._ALONE
    assert len(programs) == 2 * len({16, *(tokens % 16 for tokens in LENGTHS)})
    run(programs, (17,), alpha=alpha)
    assert traces[2 * any_length._ALONE :] == [1, 1]


def test_they_are_traced_where_the_first_sizes_are_not_of_one_form(made, traces, monkeypatch):
    monkeypatch.setattr(any_length, "_form_of", lambda _: None)
    run(ProgramCache(compiled))
    assert len(traces) == 2 * len({16, *(tokens % 16 for tokens in LENGTHS)})
    assert made.count("many") > 0


def test_a_record_of_a_later_size_is_the_one_that_would_be_traced(made, monkeypatch):
    seen, look = [], AnyLength.record

    def note(self, tokens, layout):
        found = look(self, tokens, layout)
        seen.append((tokens, found))
        return None

    monkeypatch.setattr(AnyLength, "record", note)
    make, pairs = tiled_cache.make_programs, []

    def both(*given, compiler):
        found = make(*given, compiler=compiler)
        if compiler is not run_eagerly and seen[-1][1] is not None:
            pairs.append([comparable(one) for one in (found, seen[-1][1])])
        return found

    monkeypatch.setattr(tiled_cache, "make_programs", both)
    run(ProgramCache(compiled))
    assert len(pairs) >= 10
    for traced_one, found in pairs:
        assert traced_one == found


def comparable(record):
    """A record without its programs."""
    programs = [record.casts, record.backward, record.backward_kept]
    programs += [one.program for one in (record.forward, record.forward_keep, record.rebuild)]
    return plain(record, {id(program): 0 for program in programs})


def test_a_form_needs_three_sizes_and_all_of_them(made, monkeypatch):
    looked = []
    find = any_length._form_of
    monkeypatch.setattr(any_length, "_form_of", lambda sizes: looked.append(sizes) or find(sizes))
    run(ProgramCache(compiled))
    for sizes in looked:
        assert find(sizes) is not None
        assert find(sizes[:2]) is None
        sizes[3].record = (*sizes[3].record[:-1], ("other",))
        assert find(sizes) is None
        sizes[3].record = None


def test_what_is_taken_for_granted_of_the_number_holds(made, monkeypatch):
    compile_one, ranges = sized_program._compile, []

    def of_a_range(sized, tokens, tensors):
        program, holds = compile_one(sized, tokens, tensors)
        ranges.append(tokens)
        return program, lambda other: holds(other) and (other <= 8) == (tokens <= 8)

    monkeypatch.setattr(sized_program, "_compile", of_a_range)
    run(ProgramCache(compiled), (*LENGTHS, 18, 19, 28, 30))
    assert {tokens <= 8 for tokens in ranges} == {True, False}
    assert len(ranges) <= 2 * 2 * 4


def test_a_single_token_is_compiled_by_itself(made):
    programs = ProgramCache(compiled)
    run(programs, LENGTHS[:-1])
    shared = made.count("many")
    run(programs, (17,))
    assert made.count("many") == shared


def test_what_cannot_be_compiled_for_many_is_compiled_by_itself(made, monkeypatch):
    def refuse(*_):
        raise NotCompiledError("no such thing")

    monkeypatch.setattr(sized_program, "through_inductor", refuse)
    run(ProgramCache(compiled))
    assert made.count("one") > any_length._ALONE * 2 * 2


def test_graphs_that_are_no_lines_are_compiled_by_themselves(made, monkeypatch):
    monkeypatch.setattr(Sized, "between", lambda *_: None)
    run(ProgramCache(compiled), LENGTHS[:7])
    assert made.count("many") == 0


@pytest.mark.parametrize("compiler", [compiled, run_eagerly])
def test_programs_of_lengths_that_come_once_do_not_pile_up(made, compiler, monkeypatch):
    monkeypatch.setattr(tiled_cache, "_MOST_SIZES", 3)
    programs = ProgramCache(compiler)
    run(programs, (*LENGTHS, *LENGTHS))
    assert len(programs) <= 2 * 3


def test_first_sizes_that_come_again_are_not_compiled_again(made, monkeypatch):
    monkeypatch.setattr(tiled_cache, "_MOST_SIZES", 2)
    programs = ProgramCache(compiled)
    run(programs, (21, 34))
    before = len(made)
    run(programs, (34, 21, 34, 21))
    assert len(made) == before


def test_the_programs_of_a_size_are_told_by_their_order():
    asked = []
    lengths = AnyLength(lambda graph: asked.append(graph) or run_eagerly(graph))
    for _ in range(2):
        compiler = lengths.compiler(5, "layout")
        first, second = (compiler(traced(one, 5)) for one in (product, lambda x, w: (x @ w,)))
        assert first is not second
    assert len(asked) == 2


@pytest.mark.slow
@pytest.mark.parametrize("sequences", [1, 2])
def test_through_the_compiler(sequences):
    run(ProgramCache(compiled), LENGTHS, sequences=sequences)


@pytest.mark.slow
def test_the_compiler_takes_the_number_as_an_argument():
    sized = between(product, 5, 9)
    tensors = torch.randn(2, 6, WIDTH), torch.randn(WIDTH, WIDTH)
    program = sized_program.SizedProgram(sized, 6, tensors)
    for tokens in (6, 2, 300, 7):
        x, w = torch.randn(2, tokens, WIDTH), torch.randn(WIDTH, WIDTH)
        assert sized.at(tokens) == read(traced(product, tokens))
        if program.serves(tokens, sized):
            for mine, theirs in zip(program(tokens, x, w), product(x, w), strict=True):
                torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-4)
        else:
            assert tokens in (2, 300)
    assert not program.serves(1, sized)


def test_numbers_are_made_once():
    graph = between(product, 5, 9).graph()
    made = [node.args[1] for node in graph.nodes if node.target is operator.mul]
    assert len(made) == len(set(made))
