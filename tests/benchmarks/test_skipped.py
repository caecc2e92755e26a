import json

import pytest

from benchmarks.harness.contenders import CONTENDERS
from benchmarks.harness.contenders.packages import (
    DEEPSPEED,
    LIGER,
    MEGATRON,
    TRAINSTREAM,
    TRL,
    Package,
    SkippedError,
    imported,
    need,
)

NOBODY = Package("nobody_has_this.part", "nobody-has-this", None)
MISSING = Package("nobody_has_this_module", "nobody-has-this", "1.2.3")


def test_what_is_not_installed_is_named_with_the_line_that_installs_it():
    there = Package("torch", "torch", "2.11.0")
    need("contender", [there])
    with pytest.raises(SkippedError) as caught:
        need("contender", [there, MISSING])
    assert str(caught.value) == (
        "contender needs nobody-has-this, not installed here: pip install torch==2.11.0 nobody-has-this==1.2.3"
    )
    with pytest.raises(SkippedError, match=r"pip install nobody-has-this$"):
        need("contender", [NOBODY])


def test_one_that_is_there_without_what_it_needs_itself_is_skipped_too(tmp_path, monkeypatch):
    (tmp_path / "half_of_it.py").write_text("import nobody_has_this_module")
    monkeypatch.syspath_prepend(str(tmp_path))
    half = Package("half_of_it", "half-of-it", "1.2.3")
    need("contender", [half])
    with pytest.raises(SkippedError) as caught:
        imported("contender", half, "half_of_it")
    assert str(caught.value) == (
        "contender has half-of-it, which cannot be imported here (No module named 'nobody_has_this_module'): "
        "pip install half-of-it==1.2.3, with all that it needs"
    )
    assert imported("contender", Package("json", "json", None), "json.decoder") is json.decoder


@pytest.mark.parametrize(
    ("name", "package"),
    [
        ("trl-offload", TRL),
        ("trl-offload-all", TRL),
        ("liger", LIGER),
        ("hf-offload+liger", LIGER),
        ("liger-kernels", LIGER),
        ("hf-offload+liger-kernels", LIGER),
        ("deepspeed", DEEPSPEED),
        ("trainstream", TRAINSTREAM),
        ("megatron-full", MEGATRON),
    ],
)
def test_each_names_its_package(make_job, name, package):
    if package.is_there:
        pytest.skip(f"{package.name} is installed")
    with pytest.raises(SkippedError) as caught:
        CONTENDERS[name](make_job(name))
    needed, line = str(caught.value).split(", not installed here: pip install ")
    assert needed.startswith(f"{name} needs {package.name}")
    assert package.requirement in line.split()


def test_a_skipped_contender_is_a_row_and_no_failure(in_process, make_runner, arguments, tmp_path):
    assert make_runner("unwrapped,hf-offload").run() == 0
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    (row,) = [row for row in rows if row["contender"] == "hf-offload"]
    assert row["status"] == "skipped"
    assert "hf-offload runs on CUDA GPUs only (it pins host memory): use --device cuda" in row["error"]
    assert row["step_seconds"] is None
    before = len(in_process)
    assert make_runner("unwrapped,hf-offload").run() == 0
    assert not [job for job in in_process[before:] if job.contender == "hf-offload"]
