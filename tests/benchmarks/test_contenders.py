from collections import Counter
from unittest import mock

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, SelectiveCheckpointContext

from benchmarks.harness.contenders import CONTENDERS
from benchmarks.harness.contenders.megatron import WAYS
from benchmarks.harness.contenders.packages import SkippedError
from benchmarks.harness.contenders.selective import ATTENTION
from benchmarks.harness.contenders.selective_mm import PRODUCTS, EverySecond
from benchmarks.harness.geometry import Scope

#: The compiler takes half a minute for each on the CPU.
COMPILED = (
    "memory-budget", "unwrapped+compile", "checkpoint+compile", "selective+compile", "selective-mm+compile"
)  # fmt: skip
SLOW = set(COMPILED)
#: Norms are in float32 whatever the model is. Compiled ones round otherwise, and Megatron's are not: relative L2.
ROUNDING = dict.fromkeys((*COMPILED, *WAYS), 1e-6)
TRAINING = [name for name in CONTENDERS if name != "kernels"]
CASES = [(name, Scope.BLOCKS) for name in TRAINING]
CASES += [(name, Scope.STEP) for name in ("selective", "memo-auto", "axolotl", "deepspeed", "megatron-full")]


def made(job):
    try:
        return CONTENDERS[job.contender](job)
    except SkippedError as error:
        pytest.skip(str(error))


def gradients(job):
    found = {}
    contender = made(job)
    contender.start(job.lengths[0])
    contender.step(lambda given: found.update({name: tensor.clone() for name, tensor in given.items()}))
    return found


@pytest.fixture(scope="module")
def expected():
    return {}


@pytest.mark.parametrize(
    ("name", "scope"),
    [pytest.param(*case, marks=pytest.mark.slow) if case[0] in SLOW else case for case in CASES],
)
def test_every_contender_computes_the_same_gradients(make_job, expected, name, scope):
    if scope not in expected:
        expected[scope] = gradients(make_job("unwrapped", dtype="float64", scope=scope))
    found = gradients(make_job(name, dtype="float64", scope=scope))
    assert ("input" in found) == (scope == Scope.BLOCKS)
    assert found.keys() == expected[scope].keys()
    for key, reference in expected[scope].items():
        if name in ROUNDING:
            assert (found[key] - reference).norm() <= ROUNDING[name] * reference.norm()
        else:
            torch.testing.assert_close(found[key], reference, rtol=1e-9, atol=1e-12)
        assert reference.abs().sum() > 0


class Calls(TorchDispatchMode):
    """Counts operators."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func] += 1
        return func(*args, **(kwargs or {}))


def calls(job):
    contender = made(job)
    contender.start(job.lengths[0])
    contender.step()
    with Calls() as mode:
        contender.step()
    return mode.counts


@pytest.mark.parametrize(
    ("name", "times"),
    [
        ("unwrapped", 1),
        ("checkpoint", 2),
        ("save_on_cpu", 2),
        ("selective", 1),
        ("selective-mm", 1),
        ("axolotl", 1),
        ("megatron-full", 2),
        ("megatron-selective", 1),
        ("megatron-mlp-chunks", 2),
    ],
)
def test_attention_runs_again_or_does_not(make_job, name, times):
    counts = calls(make_job(name))
    assert sum(counts[op] for op in ATTENTION) == 2 * times


def test_every_second_product_is_kept_and_counts_begin_anew_in_each_block(make_job):
    """q, v, gate and down of a Llama: k, o and up run again, in every block."""
    seen = []

    class Recorded(EverySecond):
        def __call__(self, context, operator, *args, **kwargs):
            found = super().__call__(context, operator, *args, **kwargs)
            if operator in PRODUCTS and not context.is_recompute:
                seen.append((tuple(args[-1].shape), found == CheckpointPolicy.MUST_SAVE))
            return found

    contender = made(make_job("selective-mm", blocks=3))
    contender.start(64)
    with mock.patch("benchmarks.harness.contenders.selective_mm.EverySecond", Recorded):
        contender.step()
    q, k, up, down = (96, 96), (96, 32), (96, 256), (256, 96)
    block = [(q, True), (k, False), (k, True), (q, False), (up, True), (up, False), (down, True)]
    assert seen == 3 * block


def test_products_are_counted_apart_in_forward_and_rerun():
    """PyTorch 2.13 asks in forward only, older ones again in the rerun, which ends before the last product."""
    policy, product = EverySecond(), torch.ops.aten.mm.default
    for rerun, times in ((False, 7), (True, 6)):
        context = SelectiveCheckpointContext(is_recompute=rerun)
        found = [policy(context, product) == CheckpointPolicy.MUST_SAVE for _ in range(times)]
        assert found == [place % 2 == 0 for place in range(times)]
        assert policy(context, torch.ops.aten.mul.Tensor) == CheckpointPolicy.PREFER_RECOMPUTE


def test_attention_that_is_not_fused_runs_again_under_selective(make_job):
    """It saves the fused operators; with another kernel it would silently be plain checkpointing."""
    counts = calls(make_job("selective", attention="math"))
    assert sum(counts[op] for op in ATTENTION) == 0


def test_kernels_are_those_of_the_blocks_once(make_job):
    counts = calls(make_job("kernels"))
    assert counts[torch.ops.aten.mm.out] == 2 * 7 * 3
    assert sum(counts[op] for op in ATTENTION) == 2


def test_kernels_count_what_they_hold(make_job):
    contender = CONTENDERS["kernels"](make_job("kernels"))
    contender.start(64)
    held = contender.resident_bytes()
    weights = sum(linear.size for linear in contender.shape.linears)
    assert held >= 4 * (weights + 3 * 64 * contender.shape.intermediate)
    contender.finish()
    assert 4 * weights <= contender.resident_bytes() < held


def test_save_on_cpu_offloads_what_checkpoints_keep(make_job, monkeypatch):
    seen = []

    class Recorder(saved_tensors_hooks):
        def __init__(self, pin_memory):
            assert not pin_memory
            super().__init__(lambda tensor: seen.append(tensor.shape) or tensor, lambda tensor: tensor)

    monkeypatch.setattr("benchmarks.harness.contenders.save_on_cpu.save_on_cpu", Recorder)
    gradients(make_job("save_on_cpu"))
    assert seen.count(torch.Size([1, 64, 96])) == 2


def test_memo_gets_the_budget_of_its_length(make_job):
    job = make_job("memo-auto", (64, 96), budgets={96: 10**9}, host_budget=10**8)
    contender = CONTENDERS["memo-auto"](job)
    limits = []
    for tokens in job.lengths:
        contender.start(tokens)
        contender.step()
        limits.append(contender.subject.model._memo.session.plan.limits)
        contender.finish()
    assert [limit.device_source for limit in limits] != ["budget", "budget"]
    assert limits[1].device_bytes == 10**9
    assert limits[0].host_bytes == limits[1].host_bytes == 10**8
    assert not hasattr(contender.subject.model, "_memo")


def test_memo_reserves_no_optimizer_where_there_is_none(make_job):
    contender = CONTENDERS["memo-auto"](make_job("memo-auto"))
    contender.start(64)
    contender.step()
    assert contender.subject.model._memo.session.plan.profile.states.optimizer == 0


def test_memo_carries_out_the_plan_that_the_first_of_several_runs_wrote(make_job, tmp_path):
    plans, profiled = [], []
    for _ in range(2):
        contender = CONTENDERS["memo-replay"](make_job("memo-replay", plans=str(tmp_path / "kept")))
        contender.start(64)
        contender.step()
        wrapped = contender.subject.model._memo
        plans.append(wrapped.session.plan)
        profiled.append(wrapped.profiled)
        contender.finish()
    assert plans[0] == plans[1]
    assert profiled == [1, 0]
    assert [path.name for path in tmp_path.iterdir()] == ["kept-64.json"]
