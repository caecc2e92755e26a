"""The command line of train_text.py, checked before anything expensive starts."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import checkout  # noqa: F401

from memo_runtime.arguments import check_budgets
from memo_runtime.config import make_settings
from memo_runtime.units import parse_bytes, parse_tokens

_EXAMPLES = """examples:
  python examples/train_text.py --compare
  python examples/train_text.py --geometry qwen3-tiny --policy swap --steps 10
  python examples/train_text.py --text book.txt --seq-len 4K --budget 200MiB
  python examples/train_text.py --geometry llama-1b-d128 --seq-len 128K --dtype bfloat16 \\
      --budget 60GiB --host-budget 60GiB --steps 5

Talk goes to stderr; stdout gets one JSON line at the end. Exit codes: 0 done, 1 bug, 2 usage, 3 does not fit,
5 the plan is for something else, 130 interrupted."""

_DTYPES = ("float32", "bfloat16", "float64")
_POLICIES = ("auto", "none", "memo", "swap", "recompute", "replay", "tiled")
_BACKENDS = ("auto", "cudnn", "flash", "efficient", "math")


class OptionError(ValueError):
    """Options that do not go together, or a file that cannot be written."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What was asked; None means: choose for the device or the geometry."""

    geometry: str
    layers: int | None
    seq_len: int | None
    batch_size: int
    steps: int
    lr: float | None
    accumulate: int
    dtype: str | None
    device: str
    policy: str | None
    alpha: float | None
    budget: int | None
    host_budget: int | None
    keep_last: int | None
    attention: str
    sdpa_backend: str
    compare: bool
    text: str | None
    documents: str
    extend_positions: bool
    tokenizer: str | None
    seed: int
    plan: str | None
    save_plan: str | None
    json_out: str | None

    def __post_init__(self) -> None:
        if self.sdpa_backend != "auto" and self.attention != "sdpa":
            raise OptionError(f"--sdpa-backend {self.sdpa_backend} goes with --attention sdpa")
        if self.seq_len == 1:
            raise OptionError("--seq-len 1 trains nothing: a token is predicted from those before it; give 2 or more")
        if self.documents == "packed" and self.text is not None:
            raise OptionError(
                "--documents packed packs the files of the standard library, and a --text file is one document; "
                "leave out one of the two"
            )
        fixed = ("policy", "alpha", "budget", "host_budget", "keep_last")
        asked = [name for name in fixed if getattr(self, name) is not None]
        if self.plan is not None and asked:
            flag = "--" + asked[0].replace("_", "-")
            raise OptionError(f"--plan says what happens to each byte already; leave out {flag}")
        if self.plan is not None and self.save_plan is not None:
            raise OptionError(
                "--plan reads a plan and --save-plan writes the one made here; give one of them"
            )
        try:
            settings = make_settings(**self.settings("cpu"))
            if self.save_plan is None:
                check_budgets(settings)
        except ValueError as error:
            raise OptionError(str(error)) from error

    @property
    def sequences(self) -> int:
        """Sequences that all steps together train on."""
        return self.steps * self.accumulate * self.batch_size

    def settings(self, device_type: str) -> dict[str, Any]:
        """The arguments of ``memo.wrap`` that make a plan.

        Without a policy, a GPU gets ``auto``. A CPU has no second memory to swap to, so the best plan there
        would be to do nothing; it gets one that shows the machinery: half swapped, half rebuilt.
        """
        policy, alpha = self.policy, self.alpha
        if policy is None:
            policy = "auto" if device_type == "cuda" and alpha is None else "memo"
            alpha = 0.5 if policy == "memo" and alpha is None else alpha
        return {
            "policy": policy,
            "alpha": alpha,
            "budget": self.budget,
            "host_budget": self.host_budget,
            "keep_last": self.keep_last,
        }


def parse_options(arguments: Sequence[str] | None = None) -> Options:
    """Options from the command line.

    Raises:
        SystemExit: code 2 after a message where an argument is wrong, 0 after ``--help``.
        OptionError: arguments that do not go together.
    """
    return Options(**vars(_parser().parse_args(arguments)))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="train_text.py",
        description="Train a Llama- or Qwen-shaped model on real text, its activations swapped and rebuilt.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    _add_training(parser)
    _add_memory(parser)
    _add_files(parser)
    return parser


def _add_training(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("training").add_argument
    add(
        "--geometry",
        default="tiny",
        metavar="NAME|FILE",
        help="tiny, qwen3-tiny, llama-1b-d128, llama-1b, llama-8b or a config.json (default: tiny)",
    )
    add(
        "--extend-positions",
        action="store_true",
        help="train a config.json at more positions than it has",
    )
    add("--layers", type=_count, metavar="N", help="number of blocks (default: the geometry's)")
    add(
        "--seq-len",
        type=_checked(parse_tokens),
        metavar="N",
        help="tokens per sequence, such as 128K (default: 512 tiny, 8K)",
    )
    add("--batch-size", type=_count, default=1, metavar="N", help="sequences per forward (default: 1)")
    add(
        "--accumulate",
        type=_count,
        default=1,
        metavar="N",
        help="forwards per optimizer step (default: 1)",
    )
    add("--steps", type=_count, default=24, metavar="N", help="optimizer steps (default: 24)")
    add("--lr", type=_rate, metavar="X", help="peak learning rate (default: 3e-3 tiny, 3e-4)")
    add("--seed", type=int, default=0, metavar="N", help="of the weights (default: 0)")
    add(
        "--dtype",
        choices=_DTYPES,
        help="of weights, states and compute (default: float32 on CPU, else bfloat16)",
    )
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: cuda where there is one")
    add("--attention", choices=("sdpa", "eager"), default="sdpa", help="default: sdpa")
    add(
        "--sdpa-backend",
        choices=_BACKENDS,
        default="auto",
        help="attention kernel (default: PyTorch's choice)",
    )
    add(
        "--compare",
        action="store_true",
        help="train the unwrapped model too and print the largest relative loss difference",
    )


def _add_memory(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("memory").add_argument
    add("--policy", choices=_POLICIES, help="default: auto on CUDA; memo with alpha 0.5 on CPU")
    add("--alpha", type=float, metavar="X", help="share of tokens swapped, 0 to 1; the others are rebuilt")
    add("--budget", type=_checked(parse_bytes), metavar="SIZE", help="device memory, such as 60GiB")
    add("--host-budget", type=_checked(parse_bytes), metavar="SIZE", help="host memory for activations")
    add("--keep-last", type=int, metavar="N", help="last blocks that stay on the device (default: planned)")


def _add_files(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("files").add_argument
    add(
        "--text",
        metavar="FILE",
        help="UTF-8 text to train on (default: the standard library's docs and sources)",
    )
    add(
        "--documents",
        choices=("one", "packed"),
        default="one",
        help="a sequence is one long document, or packs shorter ones: positions start anew with each, and attention "
        "stays inside it (default: one)",
    )
    add("--tokenizer", metavar="FOLDER", help="Hugging Face tokenizer (default: bytes are the tokens)")
    add("--plan", metavar="FILE", help="run this saved plan")
    add("--save-plan", metavar="FILE", help="save the plan that is made here")
    add("--json-out", metavar="FILE", help="write the JSON line to this file too")


def _checked(parse: Callable[[str], int]) -> Callable[[str], int]:
    def parsed(text: str) -> int:
        try:
            return parse(text)
        except ValueError as error:
            # argparse shows the text of this error only.
            raise argparse.ArgumentTypeError(str(error)) from None

    return parsed


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def _rate(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a learning rate: give a number above 0, such as 3e-4"
        )
    return value


def check_writable(path: str | None, flag: str) -> None:
    """Find out now, and not after hours of training, whether the file can be written.

    Raises:
        OptionError: it cannot; nothing was changed.
    """
    if path is None:
        return
    target = Path(path)
    there = target.exists()
    try:
        target.open("ab").close()
    except OSError as error:
        why = error.strerror or error
        raise OptionError(
            f"{flag} {path} cannot be written: {why}; give a file in an existing folder"
        ) from error
    if not there:
        target.unlink()
