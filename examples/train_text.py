"""Train a Llama- or Qwen-shaped model on real text, its activations swapped and partly rebuilt.

    python examples/train_text.py --compare

What memo_runtime asks of a training script is one line, ``memo.wrap``; the loop in ``train`` is an ordinary
one. With ``--compare`` the same model is trained again without that line, from the same seed, and the losses
are compared. Beside this file: the options (train_options.py), what is made of them (train_setup.py), the
model shapes (geometries.py), the text (text_data.py), and what is said on the way (train_progress.py).
"""

from __future__ import annotations

import gc
import logging
import math
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING

import checkout  # noqa: F401
import torch
from geometries import GeometryError, build_model
from interrupt import Interrupt
from text_data import TextError
from train_options import OptionError, Options, parse_options
from train_progress import HEADER, Outcome, Step, Talk, TalkHandler, result_line, step_line
from train_setup import Setup, describe_model, make_repeatable, make_workload, prepare

import memo_runtime as memo
from memo_runtime.cli.exits import ExitCode, exit_code
from memo_runtime.persist import save

if TYPE_CHECKING:
    from transformers import PreTrainedModel

INTERRUPTED = 130


def train(setup: Setup, model: PreTrainedModel, *, wrapped: bool) -> Iterator[Step]:
    """Trains ``model`` and yields each step when it is done."""
    options = setup.options
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=setup.learning_rate,
        betas=(0.9, 0.95),
        weight_decay=0.1,
        fused=setup.device.type == "cuda",
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, WarmupCosine(options.steps))
    model.train()
    if wrapped:
        wrap(model, optimizer, setup)

    for index in range(options.steps):
        start = time.perf_counter()
        total = 0.0
        for part in range(options.accumulate):
            batch = setup.batch(index * options.accumulate + part)
            with setup.attention():
                loss = model(**batch).loss / options.accumulate
                loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if setup.device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        yield Step(index=index, loss=total, seconds=seconds, report=memo.report(model) if wrapped else None)


def wrap(model: PreTrainedModel, optimizer: torch.optim.Optimizer, setup: Setup) -> None:
    """The line this example is about, in three forms: the plan is read, made and saved, or just made."""
    options = setup.options
    settings = options.settings(setup.device.type)
    if setup.plan is not None:
        memo.wrap(model, plan=setup.plan, optimizer=optimizer)
    elif options.save_plan is not None:
        with setup.attention():
            profile = memo.profile(model, setup.batch(0), optimizer=optimizer)
        plan = memo.plan(profile, **settings)
        save(plan, options.save_plan)
        memo.wrap(model, plan=plan, optimizer=optimizer)
    else:
        memo.wrap(model, optimizer=optimizer, **settings)


class WarmupCosine:
    """Learning rate as a share of its peak: up for a tenth of the steps, then down to a tenth by a cosine."""

    def __init__(self, steps: int) -> None:
        self._warmup = max(1, steps // 10)
        self._steps = steps

    def __call__(self, step: int) -> float:
        """The share at ``step``."""
        if step < self._warmup:
            return (step + 1) / self._warmup
        done = (step - self._warmup) / max(1, self._steps - self._warmup)
        return 0.1 + 0.45 * (1 + math.cos(math.pi * min(1.0, done)))


class Run:
    """The training run and, with ``--compare``, the one it is compared with."""

    def __init__(self, options: Options, talk: Talk, interrupt: Interrupt) -> None:
        self.outcome = Outcome(options=options)
        self._talk = talk
        self._interrupt = interrupt

    def __call__(self) -> ExitCode:
        """Trains; ``outcome`` is complete up to the step that fails or is interrupted."""
        options, talk, outcome = self.outcome.options, self._talk, self.outcome
        setup = prepare(options)
        outcome.seq_len = setup.seq_len
        talk.line(setup.corpus.describe(setup.tokens))
        if options.compare and setup.device.type == "cuda":
            make_repeatable()
        self._train(setup, outcome.steps, wrapped=True)
        talk.line(f"\n{outcome.steps[-1].report}\n")
        if not options.compare:
            return ExitCode.OK

        # Nothing refers to the wrapped model any more, but for what only the cycle collector finds.
        gc.collect()
        if setup.device.type == "cuda":
            torch.cuda.empty_cache()
        try:
            self._train(setup, outcome.reference, wrapped=False)
        except torch.OutOfMemoryError as error:
            why = str(error).partition(". ")[0]
            talk.line(f"nothing to compare with, the unwrapped model does not fit: {why}; lower --seq-len")
            return ExitCode.INFEASIBLE
        difference = outcome.difference()
        shown = "not a number" if difference is None else f"{difference:.1e}"
        talk.line(f"\nlargest relative loss difference to the unwrapped model: {shown}")
        return ExitCode.OK

    def _train(self, setup: Setup, done: list[Step], *, wrapped: bool) -> None:
        options, talk = setup.options, self._talk
        torch.manual_seed(options.seed)
        model = build_model(setup.config, device=setup.device, dtype=setup.dtype, attention=options.attention)
        workload = self.outcome.workload = make_workload(setup, model)
        talk.line(describe_model(setup, model, wrapped=wrapped))
        talk.line(HEADER)
        talk.phase("wrapped" if wrapped else "unwrapped")
        for step in train(setup, model, wrapped=wrapped):
            done.append(step)
            talk.line(step_line(step, workload))
            talk.advance()
            self._interrupt.check()


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the example and returns its exit code."""
    try:
        options = parse_options(arguments)
    except OptionError as error:
        print(f"error: {error}", file=sys.stderr)
        return ExitCode.USAGE
    with Interrupt() as interrupt:
        # Whatever a library prints is talk too: stdout is for the result.
        with redirect_stdout(sys.stderr), Talk(options.steps * (2 if options.compare else 1)) as talk:
            run = Run(options, talk, interrupt)
            code = _guarded(run, talk, interrupt)
        if code in (ExitCode.OK, INTERRUPTED) or run.outcome.steps:
            line = result_line(run.outcome)
            print(line, flush=True)
            if options.json_out is not None:
                Path(options.json_out).write_text(line + "\n", encoding="utf-8")
    return code


def _guarded(run: Run, talk: Talk, interrupt: Interrupt) -> int:
    """``run``, with what its user can do something about as one message and a code."""
    options = run.outcome.options
    logger = logging.getLogger("memo_runtime")
    handler = TalkHandler(talk)
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        return run()
    except KeyboardInterrupt:
        interrupt.ignore()
        talk.line(f"interrupted after {len(run.outcome.steps)} of {options.steps} steps")
        return INTERRUPTED
    except memo.MemoError as error:
        talk.line(f"error: {error}")
        return exit_code(error)
    except (OptionError, TextError, GeometryError) as error:
        talk.line(f"error: {error}")
        return ExitCode.USAGE
    except RuntimeError as error:
        failure = _runtime_failure(error, options)
        if failure is None:
            raise
        code, text = failure
        talk.line(f"error: {text}")
        return code
    finally:
        logger.removeHandler(handler)


def _runtime_failure(error: RuntimeError, options: Options) -> tuple[ExitCode, str] | None:
    """Code and message of the errors of torch that a user can do something about; None: any other."""
    text = str(error)
    if isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in text:
        # A plan that was accepted should have fitted: this is a bug, or memory that somebody else took.
        notes = "".join(f"\n{note}" for note in getattr(error, "__notes__", ()))
        return ExitCode.BUG, f"out of memory; lower --seq-len, --batch-size or --budget\n{text}{notes}"
    if options.sdpa_backend != "auto" and "No available kernel" in text:
        return ExitCode.USAGE, f"--sdpa-backend {options.sdpa_backend} cannot take this dtype and shape here"
    return None


if __name__ == "__main__":
    sys.exit(main())
