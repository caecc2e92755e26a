"""A run goes on where its code is the same, whatever else lies in the checkout."""

import subprocess

import pytest

from benchmarks.harness import provenance


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A repository with one commit."""
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    for folder in ("memo_runtime", "benchmarks/results", "docs"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "memo_runtime" / "here.py").write_text("one = 1\n")
    (tmp_path / "benchmarks" / "results" / "rows.jsonl").write_text("{}\n")
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "--message", "all"]):
        subprocess.run([*git, *command], check=True)
    return tmp_path


@pytest.mark.parametrize("path", ["bench.jsonl", "benchmarks/results/new.jsonl", "benchmarks/results/rows.jsonl",
                                  "traces/unwrapped-64.json.gz", "docs/notes.md"])  # fmt: skip
def test_what_is_written_beside_is_no_change(checkout, path):
    before = provenance.commit()
    (checkout / path).parent.mkdir(exist_ok=True)
    (checkout / path).write_text("other\n")
    assert provenance.commit() == before
    assert len(before) == 40


@pytest.mark.parametrize("path", ["memo_runtime/here.py", "memo_runtime/new.py", "benchmarks/new.py", "setup.py"])
def test_other_code_is_a_change(checkout, path):
    before = provenance.commit()
    (checkout / path).write_text("other = 2\n")
    assert provenance.commit() == f"{before}-changed"
