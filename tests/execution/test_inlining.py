"""Bytes of compiled programs: never below what one takes, and less than operator by operator."""

import pytest
import torch
from torch import nn
from torch.nn.functional import gelu, scaled_dot_product_attention

from memo_runtime.blocks.ambient import AutocastState
from memo_runtime.blocks.call import BlockCall
from memo_runtime.capture.split import Segment
from memo_runtime.execution.compilers import compiled, run_eagerly
from memo_runtime.execution.inlining import inlined
from memo_runtime.execution.tiled import TiledBlock
from memo_runtime.execution.tiled_cache import ProgramCache
from memo_runtime.execution.tiled_costs import bytes_alive
from memo_runtime.execution.tiled_profile import tile_programs
from tests.exactness.hand_written import merge_heads

WIDTH, TOKENS, TILE = 64, 512, 256


class Layer(nn.Module):
    """Norms in float32, a gated MLP whose gate takes no ``exp``, which PyTorch holds on a CPU and not on a GPU."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.all, self.merge = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.gate, self.up = (nn.Linear(WIDTH, 4 * WIDTH, bias=False) for _ in range(2))
        self.down = nn.Linear(4 * WIDTH, WIDTH, bias=False)

    def forward(self, x):
        parts = (one.unflatten(-1, (4, -1)).transpose(1, 2) for one in self.all(self.first(x)).chunk(3, -1))
        x = x + self.merge(merge_heads(scaled_dot_product_attention(*parts, is_causal=True)))
        h = self.second(x)
        return x + self.down(gelu(self.gate(h)) * self.up(h))


def graphs_and_inputs():
    """The graphs of all programs of a layer, and random inputs of each."""
    torch.manual_seed(0)
    x = torch.randn(1, TOKENS, WIDTH, requires_grad=True)
    call = BlockCall.of((x,), {})
    captured = TiledBlock(Layer(), tile=1, programs=ProgramCache(run_eagerly)).captured(call)
    graphs = []

    def keep(graph):
        graphs.append(graph)
        return run_eagerly(graph)

    for index, stage in enumerate(captured.stages.stages):
        if isinstance(stage, Segment):
            tile_programs(captured, index, TOKENS, TILE, AutocastState.current("cpu"), compiler=keep)
    for graph in graphs:
        values = [node.meta["val"] for node in graph.nodes if node.op == "placeholder"]
        yield graph, [torch.empty_strided(one.shape, one.stride()).normal_() for one in values]


def most_bytes(program, given):
    """Most bytes that ``program`` has allocated at once, as PyTorch's profiler saw the allocator."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        results = program(*given)
    events = [one for one in profiler.profiler.kineto_results.events() if one.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda one: one.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    del results
    return most


@pytest.mark.slow
def test_bytes_of_compiled_programs_are_bounded_and_fewer():
    saved = 0
    for graph, given in graphs_and_inputs():
        bound, eager = bytes_alive(graph, inlined(graph)), bytes_alive(graph)
        program = compiled(graph)
        program(*given)  # what its first call takes is the compiler's
        measured = most_bytes(program, given)
        assert measured <= bound + 8 * TILE * 4 + 4096, graph  # sums by row and by thread
        assert bound <= eager
        saved += eager - bound
    assert saved > WIDTH * TILE * 4  # one value of a tile at least


def test_what_products_and_the_caller_read_is_held():
    def program(x, w):
        h = (x.double().pow(2) + 1).rsqrt()  # read by a sum and a product of numbers: made again by each
        scaled = x * h  # read by a matrix product
        shifted = x + 1  # the caller's
        return scaled @ w, h.sum(-1), x.sin() * h, shifted

    graph = torch.fx.experimental.proxy_tensor.make_fx(program, tracing_mode="fake")(
        torch.randn(8, 4, dtype=torch.float64), torch.randn(4, 4, dtype=torch.float64)
    ).graph
    unmade = inlined(graph)
    held = [
        node.name for node in graph.nodes
        if node.op == "call_function" and node.meta["val"].untyped_storage()._cdata not in unmade
    ]  # fmt: skip
    assert held == ["mul", "add_1", "mm", "sum_1", "mul_1"]
    assert bytes_alive(graph, unmade) < bytes_alive(graph)


def test_a_value_of_many_tensors_is_held_where_many_read_it():
    def program(a, b, c, d, e):
        total = a + b + c + d + e
        return total.sum(0), total.cos() + 1

    graph = torch.fx.experimental.proxy_tensor.make_fx(program, tracing_mode="fake")(
        *(torch.randn(8, 4) for _ in range(5))
    ).graph
    unmade = inlined(graph)
    names = {node.name: node.meta["val"].untyped_storage()._cdata in unmade
             for node in graph.nodes if node.op == "call_function"}  # fmt: skip
    assert names == {
        "add": True, "add_1": True, "add_2": True, "add_3": False, "sum_1": False, "cos": True, "add_4": False,
    }  # fmt: skip


def test_what_a_value_is_made_of_stays_until_its_last_reader():
    def program(x, w):
        y = x @ w
        again = y.cos()  # not held: y is, until the end
        z = again.sum(-1, keepdim=True) @ w[:1]
        return z, z @ w + again

    graph = torch.fx.experimental.proxy_tensor.make_fx(program, tracing_mode="fake")(
        torch.randn(64, 32), torch.randn(32, 32)
    ).graph
    size = 64 * 32 * 4
    assert bytes_alive(graph) == 4 * size  # again, z, their product and the sum
    assert bytes_alive(graph, inlined(graph)) == 4 * size  # y in the place of again


def test_what_is_written_to_is_held():
    def program(x, y):
        h = x.cos()
        h.add_(y)
        return h.sum(0), h.sin() + 1

    graph = torch.fx.experimental.proxy_tensor.make_fx(program, tracing_mode="fake")(
        torch.randn(8, 4), torch.randn(8, 4)
    ).graph
    unmade = inlined(graph)
    held = {node.name for node in graph.nodes if node.op == "call_function"
            and node.meta["val"].untyped_storage()._cdata not in unmade}  # fmt: skip
    assert held == {"cos", "add_", "sum_1", "add"}
