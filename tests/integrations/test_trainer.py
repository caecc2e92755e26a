"""Hugging Face's Trainer, unchanged, with a wrapped model: the numbers of the unwrapped run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import memo_runtime as memo
from memo_runtime.config import Loss
from memo_runtime.integrations.huggingface import install
from memo_runtime.losses.lazy_logits import LazyLogits
from tests.integrations.models import VOCABULARY, make

Prepare = Callable[[Any], Any]


def by_install(model: Any) -> Any:
    """Head and loss alone."""
    assert install(model, loss=Loss.TILED).active
    return model


def by_swap(model: Any) -> Any:
    return memo.wrap(model, policy="swap", keep_last=0)


def by_memo(model: Any) -> Any:
    return memo.wrap(model, policy="memo", alpha=0.37, keep_last=0)


WRAPPED: dict[str, Prepare] = {"loss alone": by_install, "swap": by_swap, "memo": by_memo}


class Texts(Dataset[dict[str, torch.Tensor]]):
    """Sequences of one length with different numbers of labels that count."""

    def __init__(self, count: int) -> None:
        self._ids = torch.randint(3, VOCABULARY, (count, 15), generator=torch.Generator().manual_seed(count))

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = self._ids[index]
        labels = ids.clone()
        labels[: index % 5] = -100
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    """Three steps of four micro-batches; every step is logged."""
    chosen: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 3,
        "gradient_accumulation_steps": 4,
        "max_steps": 3,
        "learning_rate": 3e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 7,
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(**(chosen | changes))


def trainer(model: Any, settings: TrainingArguments, **how: Any) -> Trainer:
    return Trainer(model=model, args=settings, train_dataset=Texts(32), eval_dataset=Texts(7), **how)


def numbers(history: list[dict[str, float]]) -> list[float]:
    """Every loss and gradient norm that was logged, in order."""
    return [entry[key] for entry in history for key in ("loss", "grad_norm", "eval_loss") if key in entry]


def run(prepare: Prepare, folder: Path, **changes: Any) -> tuple[list[float], Any]:
    model = prepare(make("llama", dtype=torch.float32))
    made = trainer(model, arguments(folder, **changes))
    made.train()
    made.evaluate()
    return numbers(made.state.log_history), model


def assert_same(got: list[float], want: list[float], tolerance: float = 1e-6) -> None:
    assert len(got) == len(want) > 3
    assert got == pytest.approx(want, rel=tolerance)


@pytest.fixture(scope="module")
def unwrapped(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[float], Any]:
    """Numbers and model of the run that the others are compared with."""
    return run(lambda model: model, tmp_path_factory.mktemp("unwrapped"))


@pytest.mark.parametrize("how", WRAPPED)
def test_accumulation_and_evaluation(how: str, unwrapped: tuple[list[float], Any], tmp_path: Path) -> None:
    want, plain = unwrapped
    got, wrapped = run(WRAPPED[how], tmp_path)
    assert_same(got, want)
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(wrapped.state_dict()[name], value, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize(
    ("how", "changes", "tolerance"),
    [
        ("memo", {"label_smoothing_factor": 0.1}, 1e-6),
        ("loss alone", {"bf16": True}, 2e-2),
        ("swap", {"bf16": True}, 2e-2),
    ],
    ids=["label smoothing", "bf16", "bf16 swapped"],
)
def test_options_of_the_trainer(how: str, changes: dict[str, Any], tolerance: float, tmp_path: Path) -> None:
    want, _ = run(lambda model: model, tmp_path / "unwrapped", **changes)
    got, _ = run(WRAPPED[how], tmp_path / "wrapped", **changes)
    assert_same(got, want, tolerance)


def test_save_and_resume(unwrapped: tuple[list[float], Any], tmp_path: Path) -> None:
    saving, prepare = {"save_strategy": "steps", "save_steps": 2}, by_memo
    trainer(prepare(make("llama", dtype=torch.float32)), arguments(tmp_path, **saving)).train()
    checkpoint = tmp_path / "checkpoint-2"
    model = prepare(make("llama", dtype=torch.float32, seed=99))
    resumed = trainer(model, arguments(tmp_path, **saving))
    resumed.train(resume_from_checkpoint=str(checkpoint))
    resumed.evaluate()
    assert_same(numbers(resumed.state.log_history), unwrapped[0])
    resumed.save_model(str(tmp_path / "saved"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)


def test_metrics_get_the_logits_of_the_unwrapped_run(tmp_path: Path) -> None:
    seen: list[Any] = []

    def metrics(prediction: Any) -> dict[str, float]:
        seen.append(torch.as_tensor(prediction.predictions))
        return {"shape": float(prediction.predictions.size)}

    for prepare in (lambda model: model, by_install):
        model = prepare(make("llama", dtype=torch.float32))
        trainer(model, arguments(tmp_path), compute_metrics=metrics).evaluate()
    assert seen[0].shape == (7, 15, VOCABULARY)
    torch.testing.assert_close(seen[1], seen[0])


class Watching(Trainer):
    """Keeps what the model returned in each micro-batch."""

    outputs: list[Any]

    def compute_loss(self, *args: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        loss, outputs = super().compute_loss(*args, return_outputs=True, **kwargs)
        self.outputs.append(outputs["logits"])
        return (loss, outputs) if return_outputs else loss


@pytest.mark.parametrize("bf16", [False, True])
def test_no_logits_are_computed_in_training_and_evaluation(bf16: bool, tmp_path: Path) -> None:
    model = by_install(make("gemma2", dtype=torch.float32))
    made = Watching(model=model, args=arguments(tmp_path, bf16=bf16), train_dataset=Texts(32), eval_dataset=Texts(7))
    made.outputs = []
    made.train()
    made.evaluate()
    assert len(made.outputs) == 3 * 4 + 3
    assert all(isinstance(logits, LazyLogits) and logits._real is None for logits in made.outputs)
