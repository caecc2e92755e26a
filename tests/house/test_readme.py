"""The README's code runs, in its order, with a model and a batch as the reader would have them."""

import re

import pytest
import torch

from tests.house.sources import ROOT

pytest.importorskip("transformers")


def test_the_examples_run(capsys, tmp_path, monkeypatch):
    from transformers import LlamaConfig, LlamaForCausalLM

    import memo_runtime as memo

    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "vocab_size": 64}
    config = LlamaConfig(**shape, num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=1 << 18)
    ids = torch.randint(64, (1, 128))
    model = LlamaForCausalLM(config)
    names = {"model": model, "ids": ids}
    monkeypatch.chdir(tmp_path)  # one example writes a file
    first, second = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    exec(first, names)
    assert "report: policy auto" in capsys.readouterr().out
    assert all(parameter.grad is not None for parameter in model.parameters())
    memo.unwrap(model)
    exec(second, names)
    assert "1 x 131,072 tokens" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]
