from benchmarks.harness.rows import make_row
from benchmarks.harness.table import run_table

BASE = {
    "run": "r", "geometry": "llama-8b", "scope": "blocks", "blocks": 4, "gpu": "NVIDIA H100 80GB HBM3", "cpu": "x",
    "config": {"dtype": "bfloat16", "attention": "cudnn"}, "versions": {"torch": "2.11.0"},
}  # fmt: skip


def row(contender, tokens, seconds=None, peak=None, **more):
    timing = (
        {} if seconds is None else {"step_seconds": seconds, "p20": seconds, "p80": seconds, "n": 3, "status": "ok"}
    )
    return make_row({**BASE, "contender": contender, "seq_len": tokens, "peak_allocated": peak, **timing, **more})


def test_lengths_in_order_with_speed_against_checkpointing():
    rows = [
        row("kernels", 131_072, 4.4, 2**34),
        row("checkpoint", 131_072, 6.0, 41 * 2**30, mfu=0.5, hfu=0.66),
        row("memo-auto", 131_072, 5.0, 44 * 2**30, budget=43 * 2**30, mfu=0.6, gradient_difference=1.2e-3),
        row("unwrapped", 65_536, 1.5, 60 * 2**30),
        row("unwrapped", 131_072, status="oom", error="OutOfMemoryError: CUDA out of memory\nmore"),
    ]
    text = run_table(rows)
    lines = text.splitlines()
    assert lines[0].startswith("run r: llama-8b, 4 blocks, scope blocks, bfloat16, cudnn attention, torch 2.11.0")
    assert text.index("65,536 tokens") < text.index("131,072 tokens")
    memo = next(line.split() for line in lines if line.startswith("memo-auto "))
    assert memo == ["memo-auto", "5", "5", "5", "3", "1.20", "60.0%", "44.00", "43.00", "1.2e-03"]
    assert "memo-auto at 131,072: its peak is above its budget" in lines
    assert lines[-1] == "unwrapped at 131,072: oom, OutOfMemoryError: CUDA out of memory"


def test_small_peaks_are_shown_in_mib():
    assert "20.00" in run_table([row("unwrapped", 64, 1.0, 20 * 2**20)])


def test_no_rows():
    assert run_table([]) == "no rows"
