"""What the backward through values made of parameters takes (a position bias of all pairs, from a table): it runs once,
behind all tiles, on gradients of full length.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from memo_runtime.blocks.ambient import AutocastState
from memo_runtime.blocks.failures import first_line, pass_on
from memo_runtime.capture.captured import TRACING, Captured
from memo_runtime.capture.split import Segment
from memo_runtime.errors import CaptureRefusedError
from memo_runtime.execution.inlining import storages
from memo_runtime.execution.tiled_costs import bytes_alive
from memo_runtime.execution.tiled_programs import forward_nodes, run_node


def weights_backward_bytes(captured: Captured, tokens: int, autocast: AutocastState) -> int:
    """Most bytes alive in it at ``tokens`` tokens, beside those values and their own gradients.

    Raises:
        CaptureRefusedError: what is made of parameters does not run at that length.
    """
    inside = set(captured.stages.weights)
    given_to = (stage.sources if isinstance(stage, Segment) else stage.inputs for stage in captured.stages.stages)
    used = dict.fromkeys(node for nodes in given_to for node in nodes if node in inside)
    wanted = captured.stages.differentiable
    results = [node for node in used if node in wanted]
    given = dict.fromkeys(one for node in inside for one in node.all_input_nodes
                          if one not in inside and isinstance(one.meta["val"], torch.Tensor))  # fmt: skip
    if not results or not any(node in wanted for node in given):
        return 0

    def size(value: Any) -> Any:
        return captured.size(value, tokens)

    def joint(leaves: list[torch.Tensor], tangents: list[torch.Tensor]) -> list[Any]:
        values: dict[fx.Node, Any] = dict(zip(given, leaves, strict=True))
        for node in captured.stages.weights:
            values[node] = run_node(node, values, size)
        sought = [one for one in leaves if one.requires_grad]
        grads = torch.autograd.grad([values[node] for node in results], sought, tangents, allow_unused=True)
        return [one for one in grads if one is not None]

    mode, one_thread = FakeTensorMode(), torch.autograd.set_multithreading_enabled(False)
    no_questions = torch.autograd.set_detect_anomaly(False)
    with TRACING, mode, torch.enable_grad(), autocast.uncached().restored(), one_thread, no_questions:
        leaves, tangents = ([_fake(node, size) for node in nodes] for nodes in (given, results))
        for node, leaf in zip(given, leaves, strict=True):
            leaf.requires_grad_(node in wanted)
        try:
            graph = make_fx(joint, tracing_mode="real")(leaves, tangents).graph
        except Exception as error:
            pass_on(error)
            reason = f"what backward through them takes at {tokens:,} tokens cannot be told: {first_line(error)}"
            raise CaptureRefusedError("values made of parameters", reason) from error
    # What is made of the leaves alone is there all the while.
    forward = forward_nodes(graph, [node for node in graph.nodes if node.op == "placeholder"][: len(leaves)])
    return bytes_alive(graph, {key for node in forward for key, _ in storages(node.meta.get("val"))})


def _fake(node: fx.Node, size: Any) -> torch.Tensor:
    value = node.meta["val"]
    return torch.empty([int(size(one)) for one in value.shape], dtype=value.dtype, device=value.device)
