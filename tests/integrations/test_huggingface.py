"""Hugging Face models with head and loss by tiles, against the same models as they come."""

from __future__ import annotations

import copy
import io
import logging
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from memo_runtime.config import Loss
from memo_runtime.integrations.causal_loss import CausalLoss
from memo_runtime.integrations.huggingface import install
from memo_runtime.losses import tiles
from memo_runtime.losses.lazy_logits import LazyLogits, LogitsUnavailableError
from tests.integrations.exact_loss import exact_causal_loss
from tests.integrations.models import FAMILIES, VOCABULARY, batch, gradients, make, worst_error


def pair(family: str = "llama", **how: Any) -> tuple[Any, Any]:
    """The model as it comes (its loss without the way down to float32), and an equal one to install in."""
    plain, tiled = make(family, **how), make(family, **how)
    plain.loss_function = exact_causal_loss
    return plain, tiled


def assert_same_step(plain: Any, tiled: Any, tolerance: float = 1e-12, **inputs: Any) -> None:
    want, got = plain(**inputs), tiled(**inputs)
    want.loss.backward()
    got.loss.backward()
    assert got.logits._real is None, "the logits were computed"
    assert got.loss.dtype is want.loss.dtype
    assert abs(got.loss.item() - want.loss.item()) <= tolerance * abs(want.loss.item())
    assert worst_error(gradients(tiled), gradients(plain)) <= tolerance


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_of_every_family(family: str) -> None:
    plain, tiled = pair(family)
    assert install(tiled, loss=Loss.TILED).active
    assert_same_step(plain, tiled, **batch())
    assert_same_step(plain, tiled, **batch(rows=1, tokens=7))


class _Largest(TorchDispatchMode):
    """The largest tensor that an operator made; lazy logits have no bytes and do not count."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and not isinstance(leaf, LazyLogits):
                self.elements = max(self.elements, leaf.numel(), leaf.untyped_storage().nbytes() // leaf.itemsize)
        return result


@pytest.mark.parametrize("family", ["llama", "gemma2", "cohere", "gpt2"])
@pytest.mark.parametrize("training", [True, False])
def test_no_tensor_of_vocabulary_times_tokens_exists(family: str, training: bool, monkeypatch: Any) -> None:
    monkeypatch.setitem(tiles.TILE_BYTES, "cpu", 16 * VOCABULARY * 8)
    plain, tiled = pair(family)
    install(tiled, loss=Loss.AUTO)
    inputs = batch(rows=8, tokens=21)  # attention scores are smaller than logits
    logits = 8 * 21 * VOCABULARY
    largest = []
    for model in (plain, tiled):
        with _Largest() as seen, torch.set_grad_enabled(training):
            loss = model(**inputs).loss
            if training:
                loss.backward()
        largest.append(seen.elements)
    assert largest[0] >= logits
    assert largest[1] < logits


@pytest.mark.parametrize("count", [23, torch.tensor(23), torch.tensor([23])], ids=str)
def test_num_items_in_batch(count: Any) -> None:
    plain, tiled = pair()
    install(tiled, loss=Loss.AUTO)
    assert_same_step(plain, tiled, **batch(), num_items_in_batch=count)


def test_shift_labels_ignore_index_and_logits_to_keep() -> None:
    plain, tiled = pair()
    install(tiled, loss=Loss.AUTO)
    inputs = batch()
    assert_same_step(plain, tiled, **inputs, shift_labels=inputs["labels"].roll(-2, 1))
    ignored = int(inputs["input_ids"][0, 7])
    others = inputs | {"labels": inputs["labels"].clamp(min=ignored)}
    assert_same_step(plain, tiled, **others, ignore_index=ignored)
    inputs["labels"] = inputs["labels"][:, -5:]
    assert_same_step(plain, tiled, **inputs, logits_to_keep=5)


def test_counts_per_replica_divide_as_in_transformers() -> None:
    plain, tiled = pair()
    install(tiled, loss=Loss.AUTO)
    counts = torch.tensor([20, 25])
    want, got = (model(**batch(), num_items_in_batch=counts).loss for model in (plain, tiled))
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)


def test_labels_that_do_not_match_are_the_same_error() -> None:
    plain, tiled = pair()
    install(tiled, loss=Loss.AUTO)
    messages = []
    for model in (plain, tiled):
        with pytest.raises(ValueError, match="to match target batch_size") as error:
            model(**batch(), logits_to_keep=5)
        messages.append(str(error.value))
    assert messages[0] == messages[1]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("return_dict", [True, False])
def test_evaluation(mode: Any, return_dict: bool) -> None:
    plain, tiled = pair()
    install(tiled, loss=Loss.AUTO)
    with mode():
        want, got = (model.eval()(**batch(), return_dict=return_dict) for model in (plain, tiled))
        assert isinstance(got[1], LazyLogits)
        assert got[1]._real is None
        torch.testing.assert_close(got[0], want[0], rtol=1e-12, atol=0)
        assert torch.equal(got[1].argmax(-1), want[1].argmax(-1))


def test_accumulation_and_a_scaled_loss() -> None:
    plain, tiled = pair()
    install(tiled, loss=Loss.AUTO)
    for model in (plain, tiled):
        for seed in range(3):
            (model(**batch(seed=seed)).loss * 65536.0 / 3).backward()
    assert worst_error(gradients(tiled), gradients(plain)) <= 1e-12


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_autocast_and_the_outputs_that_accelerate_converts(family: str) -> None:
    from accelerate.utils import convert_outputs_to_fp32

    plain, tiled = pair(family, dtype=torch.float32)
    install(tiled, loss=Loss.AUTO)
    results = []
    for model in (plain, tiled):
        model.forward = convert_outputs_to_fp32(torch.autocast("cpu", dtype=torch.bfloat16)(model.forward))
        results.append(model(**batch()))
        results[-1].loss.backward()
    want, got = results
    assert isinstance(got.logits, LazyLogits)
    assert got.logits._real is None
    assert got.logits.dtype is torch.float32
    torch.testing.assert_close(got.loss, want.loss, rtol=2e-3, atol=0)
    assert worst_error(gradients(tiled), gradients(plain)) <= 0.1
    assert torch.equal(got.logits + 0, want.logits) or family == "gemma2"


def test_bf16_gradients_are_no_worse_than_those_of_the_model_as_it_comes() -> None:
    exact = make("llama", dtype=torch.bfloat16).double()
    exact.loss_function = exact_causal_loss
    plain, tiled = make("llama", dtype=torch.bfloat16), make("llama", dtype=torch.bfloat16)
    install(tiled, loss=Loss.AUTO)
    made = []
    for model in (exact, plain, tiled):
        model(**batch(rows=4, tokens=32)).loss.backward()
        made.append(torch.cat([value.double().flatten() for value in gradients(model).values()]))
    errors = [float((vector - made[0]).norm() / made[0].norm()) for vector in made[1:]]
    assert errors[1] <= 1.1 * errors[0]


# What is in the model, and what is not in its copies.


def test_names_and_state_are_untouched_and_remove_restores() -> None:
    model = make("llama")
    before = set(vars(model)), set(vars(model.lm_head)), list(model.state_dict())
    installation = install(model, loss=Loss.AUTO)
    assert isinstance(model.loss_function, CausalLoss)
    assert list(model.state_dict()) == before[2]
    for _ in range(2):
        installation.remove()
        assert (set(vars(model)), set(vars(model.lm_head))) == before[:2]
        assert not model._forward_pre_hooks
    assert type(model(**batch()).logits) is Tensor
    assert install(model, loss=Loss.AUTO).active


def test_copies_are_ordinary_models_with_their_own_weights() -> None:
    model = make("llama")
    install(model, loss=Loss.AUTO)
    inputs = batch()
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    copies = copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False)
    with torch.no_grad():
        want = model(**inputs).logits + 0
        model.lm_head.weight.zero_()
    for copied in copies:
        assert not isinstance(copied.loss_function, CausalLoss)
        logits = copied(**inputs).logits
        assert type(logits) is Tensor
        assert torch.equal(logits, want)
    assert isinstance(model(**inputs).logits, LazyLogits)


def test_generate_and_forwards_without_labels_are_unaffected(caplog: Any) -> None:
    plain, tiled = pair()
    install(tiled, loss=Loss.AUTO)
    prompt = batch()["input_ids"]
    with caplog.at_level(logging.WARNING, logger="memo_runtime"):
        want, got = (
            model.generate(prompt, max_new_tokens=4, do_sample=False, pad_token_id=0) for model in (plain, tiled)
        )
        assert torch.equal(got, want)
        assert type(tiled(prompt).logits) is Tensor
        tiled(**batch())
        assert type(tiled(prompt, labels=None).logits) is Tensor
    assert not caplog.records


def test_labels_by_position_are_seen() -> None:
    model = make("llama")
    install(model, loss=Loss.AUTO)
    inputs = batch()
    output = model(inputs["input_ids"], inputs["attention_mask"], None, None, None, inputs["labels"])
    assert isinstance(output.logits, LazyLogits)


def test_own_loss_beside_the_models_loss_is_right_with_one_warning(caplog: Any) -> None:
    plain, tiled = pair()
    install(tiled, loss=Loss.AUTO)
    with caplog.at_level(logging.WARNING, logger="memo_runtime"):
        for model in (plain, tiled):
            output = model(**batch())
            (output.loss + 1e-3 * output.logits.logsumexp(-1).square().mean()).backward()
        assert worst_error(gradients(tiled), gradients(plain)) <= 1e-12
        tiled(**batch()).logits.argmax(-1)
    assert len(caplog.records) == 1
    assert "logits (3, 13, 97) were read, so" in caplog.text


def test_logits_read_after_the_optimizer_step_are_an_error_not_other_logits() -> None:
    model = make("llama")
    install(model, loss=Loss.AUTO)
    optimizer = torch.optim.AdamW(model.parameters())
    output = model(**batch())
    output.loss.backward()
    optimizer.step()
    with pytest.raises(LogitsUnavailableError, match="the weight changed"):
        output.logits.argmax(-1)


@pytest.mark.parametrize("watch", [lambda logits: logits.register_hook(print), lambda logits: logits.retain_grad()])
def test_watching_the_gradient_of_logits_is_an_error_not_silence(watch: Any) -> None:
    model = make("llama")
    install(model, loss=Loss.AUTO)
    output = model(**batch())
    with pytest.raises(LogitsUnavailableError, match="loss='native'"):
        watch(output.logits)
    output.loss.backward()


def test_a_hook_on_what_is_made_of_the_logits_afterwards_sees_its_own_gradient() -> None:
    model, seen = make("llama"), []
    install(model, loss=Loss.AUTO)
    output = model(**batch())
    single = output.logits.float()
    single.register_hook(seen.append)
    (output.loss + single.sum()).backward()
    assert torch.equal(seen[0], torch.ones_like(seen[0]))


# Wrappers around the model.


def test_peft_model_with_adapters_in_the_blocks() -> None:
    from peft import LoraConfig, get_peft_model

    plain, tiled = (
        get_peft_model(model, LoraConfig(target_modules=["q_proj"], init_lora_weights=False)) for model in pair()
    )
    tiled.load_state_dict(plain.state_dict())
    assert install(tiled, loss=Loss.AUTO).active
    assert_same_step(plain, tiled, **batch())


def test_adapter_on_the_head_stays_native_with_a_log_line(caplog: Any) -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(make("llama"), LoraConfig(target_modules=["lm_head"]))
    with caplog.at_level(logging.INFO, logger="memo_runtime"):
        installation = install(model, loss=Loss.AUTO)
    assert not installation.active
    assert "forward of its own, not a plain nn.Linear" in caplog.text
    assert type(model(**batch()).logits) is Tensor
    with pytest.raises(ValueError, match=r"loss='tiled' is not possible .* loss='auto' leaves it as it is"):
        install(model, loss=Loss.TILED)


@pytest.fixture
def one_process() -> Any:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("options", [{"find_unused_parameters": True}, {"static_graph": True}], ids=str)
@pytest.mark.parametrize("inside", [True, False])
def test_distributed_data_parallel(options: dict[str, bool], inside: bool, one_process: None) -> None:
    plain, tiled = pair()
    for model in (plain, tiled):
        model.unused = nn.Linear(2, 2).double()
    if inside:
        install(tiled, loss=Loss.AUTO)
    plain, tiled = (nn.parallel.DistributedDataParallel(model, **options) for model in (plain, tiled))
    if not inside:
        install(tiled, loss=Loss.AUTO)
    for _ in range(2):
        assert_same_step(plain, tiled, **batch())


@pytest.mark.parametrize("own_group", [False, True])
def test_fully_sharded(own_group: bool, one_process: None, caplog: Any) -> None:
    from torch.distributed.fsdp import fully_shard

    plain, tiled = pair()
    mesh = torch.distributed.init_device_mesh("cpu", (1,))
    for model in (plain, tiled):
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        if own_group:
            fully_shard(model.lm_head, mesh=mesh)
        fully_shard(model, mesh=mesh)
    install(tiled, loss=Loss.AUTO)
    with caplog.at_level(logging.INFO, logger="memo_runtime"):
        want, got = plain(**batch()), tiled(**batch())
    assert isinstance(got.logits, LazyLogits) != own_group
    assert ("hooks on its output" in caplog.text) == own_group
    want.loss.backward()
    got.loss.backward()
    if not own_group:
        assert got.logits._real is None
    made = [{name: g.full_tensor() for name, g in gradients(model).items()} for model in (tiled, plain)]
    assert worst_error(*made) <= (1e-6 if own_group else 1e-12)  # transformers' own loss is float32


@pytest.mark.parametrize("first", ["wrap", "compile"])
def test_torch_compile_is_right_with_the_logits_of_its_graph(first: str, caplog: Any) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    plain, tiled = pair("gemma2", dtype=torch.float32, num_hidden_layers=1)
    if first == "wrap":
        install(tiled, loss=Loss.AUTO)
    compiled: Any = torch.compile(tiled, backend="eager")
    if first == "compile":
        install(compiled, loss=Loss.AUTO)
    with caplog.at_level(logging.INFO, logger="memo_runtime"):
        want, got = plain(**batch()).loss, compiled(**batch()).loss
    torch.testing.assert_close(got, want)
    assert caplog.text.count("it is compiled") == 1
    assert not torch._dynamo.utils.counters["graph_break"]
    assert isinstance(tiled(**batch()).logits, LazyLogits)


# What is left alone.


def test_head_with_hooks_stays_native_with_one_log_line(caplog: Any) -> None:
    model = make("llama")
    install(model, loss=Loss.AUTO)
    seen: list[Tensor] = []
    model.lm_head.register_forward_hook(lambda module, args, output: seen.append(output))
    with caplog.at_level(logging.INFO, logger="memo_runtime"):
        for _ in range(2):
            model(**batch())
    assert [type(output) for output in seen] == [Tensor, Tensor]
    assert [record.message for record in caplog.records if "hooks" in record.message] == [
        "full logits in this forward: the output head has hooks on its output"
    ]


def test_own_loss_function_is_left_alone(caplog: Any) -> None:
    model = make("llama")
    model.loss_function = own = lambda logits, labels, **kwargs: logits.sum() * 0 + 7.0
    with caplog.at_level(logging.INFO, logger="memo_runtime"):
        assert not install(model, loss=Loss.AUTO).active
    assert "loss_function is <lambda>, not ForCausalLMLoss" in caplog.text
    assert model.loss_function is own
    assert model(**batch()).loss.item() == 7.0


def test_own_loss_function_set_after_wrap_is_called_and_survives_remove() -> None:
    model = make("llama")
    installation = install(model, loss=Loss.AUTO)
    seen: list[type] = []

    def own(logits: Tensor, labels: Tensor, **kwargs: Any) -> Tensor:
        seen.append(type(logits))
        return logits.sum()

    model.loss_function = own
    model(**batch())
    assert seen == [Tensor]
    installation.remove()
    assert model.loss_function is own


def test_model_that_computes_its_own_loss_is_right_with_one_warning(caplog: Any) -> None:
    from transformers import GPT2Config, GPT2DoubleHeadsModel

    def made() -> Any:
        torch.manual_seed(0)
        return GPT2DoubleHeadsModel(GPT2Config(**FAMILIES["gpt2"])).double().train()

    plain, tiled = made(), made()
    with caplog.at_level(logging.WARNING, logger="memo_runtime"):
        install(tiled, loss=Loss.AUTO)
        for _ in range(2):
            want, got = plain(**batch()), tiled(**batch())
            want.loss.backward()
            got.loss.backward()
            assert worst_error(gradients(tiled), gradients(plain)) <= 1e-12
    assert len([record for record in caplog.records if record.name == "memo_runtime"]) == 1


@pytest.mark.parametrize("loss", [Loss.AUTO, Loss.NATIVE])
def test_other_modules_are_left_alone(loss: Loss, caplog: Any) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    with caplog.at_level(logging.INFO, logger="memo_runtime"):
        installation = install(model, loss=loss)
    assert not installation.active
    assert installation.note
    assert not caplog.records
    installation.remove()
    with pytest.raises(ValueError, match="no Hugging Face model with an output head"):
        install(model, loss=Loss.TILED)


def test_float32_loss_equals_transformers_own_loss() -> None:
    plain, tiled = make("llama", dtype=torch.float32), make("llama", dtype=torch.float32)
    install(tiled, loss=Loss.AUTO)
    assert_same_step(plain, tiled, 1e-5, **batch())


def test_exact_loss_is_transformers_loss_in_float32() -> None:
    from transformers.loss.loss_utils import ForCausalLMLoss

    logits, labels = torch.randn(2, 5, VOCABULARY), batch(rows=2, tokens=5)["labels"]
    for options in ({}, {"num_items_in_batch": 4}, {"shift_labels": labels}):
        want = ForCausalLMLoss(logits, labels, VOCABULARY, **options)
        assert torch.equal(exact_causal_loss(logits, labels, VOCABULARY, **options), want)
