"""MEMO's own 7B on eight A800: what the paper says follows from the offline profile (arXiv 2407.12117)."""

import pytest

from memo_runtime.config import make_settings
from memo_runtime.machines.catalogue import find_machine
from memo_runtime.offline.planning import finished
from memo_runtime.offline.profile import profile_offline
from memo_runtime.offline.subject import subject_named
from memo_runtime.planning.memo_alpha import SwapDemand, memo_alpha
from memo_runtime.planning.planner import make_plan
from memo_runtime.records import Role
from memo_runtime.units import GiB

#: A model of 7B is profiled here, which takes twenty seconds.
pytestmark = pytest.mark.slow
A800 = find_machine("a800-80gb")
GPUS = 8


@pytest.fixture(scope="module")
def offline():
    """At 1M tokens; blocks are polynomials, so other lengths follow."""
    return profile_offline(
        subject_named("memo-7b"), A800, tokens=1 << 20, gpus=GPUS, host_bytes=2000 * GiB
    )


def demand(block, local):
    fixed = sum(g.size.at(local) for g in block.groups if g.role in (Role.INPUT, Role.MIXER))
    token = sum(g.size.at(local) for g in block.groups if g.role is Role.TOKEN)
    return SwapDemand(fixed_bytes=fixed, token_bytes=token, forward_seconds=block.forward_seconds.exact(local))


def test_a_layer_saves_sixteen_times_its_input(offline):
    block = offline.profile.blocks[0]
    local = block.tokens
    one = 2 * local * 4096
    saved = demand(block, local)
    # The table of the paper, and what it leaves out: log-sum-exp and the norms' statistics.
    assert saved.fixed_bytes == pytest.approx(2 * one, rel=0.01)
    assert saved.token_bytes == pytest.approx(14 * one, rel=0.001)


def test_the_swap_fraction_is_what_2000_gib_of_host_memory_allow(offline):
    plan = finished(make_plan(offline.profile, make_settings(policy="memo")), offline)
    assert plan.blocks[0].alpha == pytest.approx(0.45, abs=0.005)
    assert any("host memory binds" in note for note in plan.notes)
    assert plan.forecast.peak_bytes < A800.memory_bytes
    assert plan.forecast.host_bytes * GPUS <= 2000 * GiB
    assert (plan.seq_len, plan.gpus) == (1 << 20, GPUS)
    # The paper reports 52.3 %.
    assert 0.42 < plan.forecast.mfu < 0.55


def test_full_swap_hides_from_about_192k_tokens_on(offline):
    block = offline.profile.blocks[0]

    def hides(tokens):
        link = offline.profile.link.to_host
        return memo_alpha([demand(block, tokens // GPUS)], to_host_rate=link, host_bytes=float("inf")).by_link >= 1

    crossover = next(tokens for tokens in range(1 << 14, 1 << 20, 1 << 12) if hides(tokens))
    assert crossover == pytest.approx(192 * 1024, rel=0.1)
    assert all(hides(tokens) for tokens in range(crossover, 1 << 20, 1 << 16))


def test_attention_takes_nine_tenths_beyond_576k_tokens(offline):
    run = offline.runs()["layers.0"]
    tokens = 576 * 1024

    def share(length):
        scale = length / run.tokens
        shares = A800.shares
        attention = run.forward.attention * scale**2 / (A800.peak_flops * shares.attention_forward)
        products = run.forward.matmul * scale / (A800.peak_flops * shares.matmul)
        others = run.forward.traffic * scale / (A800.memory_rate * shares.elementwise)
        return attention / (attention + products + others)

    assert share(tokens) == pytest.approx(0.92, abs=0.02)
    assert share(128 * 1024) < 0.8
