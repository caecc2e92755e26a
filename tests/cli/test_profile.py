"""``memo profile``: a factory's model measured and written, and mistakes before anything long is done."""

import pytest
from typer.testing import CliRunner

from memo_runtime.cli.app import app
from memo_runtime.persist import load_profile

FACTORY = """
import torch
from torch import nn

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(16, 64), nn.Linear(64, 16)
    def forward(self, x):
        return x + self.down(torch.nn.functional.gelu(self.up(x)))

def make():
    return nn.Sequential(*(Block() for _ in range(4))), torch.randn(1, 64, 16)
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "profiledmodel.py").write_text(FACTORY)
    return tmp_path


def memo(*arguments):
    return CliRunner().invoke(app, ["profile", *arguments])


def test_a_factory_is_profiled_and_written(folder):
    result = memo("--model", "profiledmodel:make", "-o", "profile.json")
    assert result.exit_code == 0, result.output
    profile = load_profile(folder / "profile.json")
    assert [block.name for block in profile.blocks] == ["0", "1", "2", "3"]
    assert "Block" in result.stdout or "0-3" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model", "profiledmodel:make", "-o", "none/profile.json"], "there is no folder none"),
        (["--model", "profiledmodel:make", "-o", "p.json", "--device", "gpu9"], "is no device"),
        (["--model", "profiledmodel:make", "-o", "p.json", "--device", "cuda:77"], "no cuda:77"),
        (["--model", "profiledmodel:missing", "-o", "p.json"], "missing"),
        (["--model", "lama", "-o", "p.json"], "there are llama"),
    ],
)
def test_mistakes_are_one_message(folder, arguments, said):
    result = memo(*arguments)
    assert result.exit_code == 2, result.output
    assert said in " ".join(result.output.split())
    assert not (folder / "p.json").exists()
