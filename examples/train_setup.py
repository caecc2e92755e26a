"""From options to everything a run needs, checked as far as possible before a model exists."""

from __future__ import annotations

import os
from collections import Counter
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import checkout  # noqa: F401
import torch
from geometries import (
    GEOMETRIES,
    Geometry,
    GeometryError,
    attention_width,
    find_geometry,
    make_config,
    matmul_parameters,
    parameter_count,
)
from text_data import ByteEncoder, Corpus, FolderEncoder, StandardLibrary, TextFile, read_corpus
from torch.nn.attention import SDPBackend, sdpa_kernel
from train_options import OptionError, Options, check_writable
from train_progress import Workload

import memo_runtime as memo
from memo_runtime.errors import DeviceUnavailableError
from memo_runtime.persist import load_plan
from memo_runtime.rehearsal.positions import positions_name
from memo_runtime.reporting.mfu import model_flops

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

_BACKENDS = {
    "cudnn": [SDPBackend.CUDNN_ATTENTION],
    "flash": [SDPBackend.FLASH_ATTENTION],
    "efficient": [SDPBackend.EFFICIENT_ATTENTION],
    "math": [SDPBackend.MATH],
}
#: Kernels whose backward gives the same bits every time, when asked to.
_REPEATABLE = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """Everything that both runs share."""

    options: Options
    geometry: Geometry
    config: PreTrainedConfig
    corpus: Corpus
    device: torch.device
    dtype: torch.dtype
    seq_len: int
    learning_rate: float
    plan: memo.Plan | None

    def batch(self, index: int) -> dict[str, torch.Tensor]:
        """Arguments of forward number ``index``, on the device.

        Of packed documents no token is asked to say the first one of the next: it has no label.
        """
        rows, length = self.options.batch_size, self.seq_len
        ids = self.corpus.batch(index, rows=rows, length=length).to(self.device)
        if self.options.documents == "one":
            return {"input_ids": ids, "labels": ids}
        positions = self.corpus.positions(index, rows=rows, length=length).to(self.device)
        return {"input_ids": ids, "labels": ids.masked_fill(positions == 0, -100), "position_ids": positions}

    def documents(self) -> list[int]:
        """Tokens of each document of the first optimizer step; of others where steps have other documents."""
        rows, length, parts = self.options.batch_size, self.seq_len, self.options.accumulate
        if self.options.documents == "one":
            return [length] * rows * parts
        begins = [self.corpus.positions(part, rows=rows, length=length).flatten() == 0 for part in range(parts)]
        starts = torch.cat(begins).nonzero().flatten()
        ends = torch.cat([starts[1:], torch.tensor([rows * length * parts])])
        return (ends - starts).tolist()

    @property
    def tokens(self) -> int:
        """Tokens that all steps together train on."""
        return self.options.sequences * self.seq_len

    def attention(self) -> AbstractContextManager[Any]:
        """The attention kernels to choose from."""
        if self.options.sdpa_backend != "auto":
            return sdpa_kernel(_BACKENDS[self.options.sdpa_backend])
        if self.options.compare and self.device.type == "cuda":
            return sdpa_kernel(_REPEATABLE)
        return nullcontext()


def prepare(options: Options) -> Setup:
    """Checks everything that can be checked before a model exists."""
    check_writable(options.json_out, "--json-out")
    check_writable(options.save_plan, "--save-plan")
    plan = load_plan(options.plan) if options.plan is not None else None
    device = _device(options)
    geometry = find_geometry(options.geometry)
    seq_len = options.seq_len or geometry.seq_len
    if not options.extend_positions:
        _check_positions(geometry, seq_len)
    config = make_config(geometry, tokens=seq_len, layers=options.layers)
    dtype = options.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    if device.type == "cpu" and geometry.threads is not None and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(geometry.threads)
    return Setup(
        options=options,
        geometry=geometry,
        config=config,
        corpus=_corpus(options, seq_len, vocabulary=config.get_text_config().vocab_size),
        device=device,
        dtype=getattr(torch, dtype),
        seq_len=seq_len,
        learning_rate=options.lr or geometry.learning_rate,
        plan=plan,
    )


def _check_positions(geometry: Geometry, seq_len: int) -> None:
    """A shape that was published for shorter sequences is trained at longer ones only if that was asked for."""
    config = make_config(geometry, tokens=1)
    there = getattr(config, "max_position_embeddings", seq_len)
    if geometry.name not in GEOMETRIES and there < seq_len:
        raise GeometryError(
            f"--geometry {geometry.name} has positions for {there:,} tokens and --seq-len asks for {seq_len:,}: give "
            f"--extend-positions, which raises {positions_name(config)} (rotary tables go on, and for trained weights "
            f"also set rope_parameters in the config; a learned table is longer then), or --seq-len {there}"
        )


def _device(options: Options) -> torch.device:
    there = torch.cuda.is_available()
    if options.device == "cuda" and not there:
        why = "this PyTorch is built without it" if torch.version.cuda is None else "no device is found"
        raise DeviceUnavailableError(f"--device cuda: there is no CUDA here ({why}); use --device cpu")
    device = torch.device("cuda" if there and options.device != "cpu" else "cpu")
    if device.type == "cpu" and options.sdpa_backend in ("cudnn", "efficient"):
        raise OptionError(f"--sdpa-backend {options.sdpa_backend} needs CUDA; the CPU has flash and math")
    return device


def _corpus(options: Options, seq_len: int, *, vocabulary: int) -> Corpus:
    encoder = ByteEncoder() if options.tokenizer is None else FolderEncoder(options.tokenizer)
    if encoder.vocabulary > vocabulary:
        what = f"the text has up to {encoder.vocabulary:,} different tokens"
        raise GeometryError(
            f"{what} and the geometry's vocabulary is {vocabulary:,}; choose another of the two"
        )
    source = StandardLibrary() if options.text is None else TextFile(options.text)
    return read_corpus(source, encoder, needed=options.sequences * seq_len, length=seq_len)


def make_workload(setup: Setup, model: PreTrainedModel) -> Workload:
    """What one optimizer step is."""
    config, options = setup.config.get_text_config(), setup.options
    lengths = Counter(setup.documents())
    cuda = setup.device.type == "cuda"
    return Workload(
        tokens=options.batch_size * options.accumulate * setup.seq_len,
        flops=sum(
            model_flops(
                parameters=matmul_parameters(model),
                layers=config.num_hidden_layers,
                attention_width=attention_width(config),
                tokens=tokens,
                sequences=count,
            )
            for tokens, count in lengths.items()
        ),
        passes=options.accumulate,
        device_name=torch.cuda.get_device_name(setup.device) if cuda else "cpu",
    )


def describe_model(setup: Setup, model: PreTrainedModel, *, wrapped: bool) -> str:
    """Model, device and batch in one line."""
    options = setup.options
    kind = str(setup.dtype).removeprefix("torch.")
    blocks = setup.config.get_text_config().num_hidden_layers
    size = f"{parameter_count(model) / 1e6:,.1f} M parameters"
    tokens = f"{options.batch_size * options.accumulate} x {setup.seq_len:,} tokens a step"
    name = setup.geometry.name if wrapped else f"{setup.geometry.name}, not wrapped"
    return f"\nmodel: {name}, {blocks} blocks, {size}, {kind} on {setup.device}; {tokens}"


def make_repeatable() -> None:
    """Have CUDA operators give the same bits every time, as far as they can."""
    # cuBLAS reads this when it starts. Operators without a repeatable kernel still run, with a warning.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    # Writing NaN into all new memory finds bugs, and costs time and nothing else here.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
