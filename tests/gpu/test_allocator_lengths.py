"""The planned allocator where the length changes with every step: all are served, and losses keep their bits."""

import gc

import pytest
import torch

import memo_runtime as memo
from memo_runtime.lookup import find_wrapped
from tests.gpu.models import batch, llama

pytestmark = pytest.mark.gpu
#: Two that settle, two that are recorded (the second of a length that was not), the longest; then none comes twice.
FIRST = (1024, 1024, 1024, 1536, 2048, 2048)
OTHERS = (1999, 1025, 1780, 777, 2047, 1281)


@pytest.fixture
def kernels_that_repeat_their_bits():
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def run(layout):
    """Losses of a wrapped model's steps, and what the allocator's report says after each of the last."""
    torch.manual_seed(0)
    model = llama(torch.bfloat16, blocks=4, hidden=512)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    memo.wrap(model, policy="recompute", optimizer=optimizer, layout=layout)
    memory, losses, reports = find_wrapped(model).memory, [], []
    for at, tokens in enumerate((*FIRST, *OTHERS)):
        loss = model(**batch(1, tokens, at)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach().clone())
        if memory is not None:
            memory.end()
            memory._steps.wait()
            reports.append(memory.report())
    notes = memo.report(model).notes
    memo.unwrap(model)
    return torch.stack(losses).cpu(), reports[len(FIRST) :], notes


def test_lengths_that_never_come_back_are_served(allocator, kernels_that_repeat_their_bits):
    expected, _, _ = run("native")
    gc.collect()
    torch.cuda.empty_cache()
    found, reports, notes = run("planned")
    for tokens, report in zip(OTHERS, reports, strict=True):
        print(f"\n{tokens}: {report}")
    assert torch.equal(found, expected)
    assert len(reports) == len(OTHERS)
    for report in reports:
        assert report.state == "planned", notes
        assert report.plans == 1
        assert report.served_bytes >= 0.99 * report.bytes
