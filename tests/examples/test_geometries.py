"""Geometries have the sizes that are published, grow with the length, and bad ones say what is wrong."""

import json

import pytest
import torch

pytest.importorskip("transformers")

from geometries import (
    GEOMETRIES,
    GeometryError,
    attention_width,
    build_model,
    find_geometry,
    make_config,
    matmul_parameters,
    parameter_count,
)

META = torch.device("meta")


def model_of(name, **settings):
    config = make_config(find_geometry(name), **{"tokens": 128, **settings})
    return config, build_model(config, device=META, dtype=torch.bfloat16, attention="sdpa")


@pytest.mark.parametrize(
    ("name", "parameters", "in_matmuls", "width"),
    [
        ("llama-8b", 8_030_261_248, 8_030_261_248 - 128_256 * 4096, 4096),
        ("llama-1b", 1_235_814_400, 1_235_814_400, 2048),
        ("llama-1b-d128", 1_269_368_832, 1_269_368_832, 2048),
    ],
)
def test_sizes(name, parameters, in_matmuls, width):
    config, model = model_of(name)
    assert parameter_count(model) == parameters
    assert matmul_parameters(model) == in_matmuls
    assert attention_width(config) == width
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("name", ["tiny", "qwen3-tiny"])
def test_tiny_ones_are_tiny(name):
    config, model = model_of(name)
    assert parameter_count(model) < 1e6
    assert config.model_type == GEOMETRIES[name].model_type


@pytest.mark.parametrize("name", GEOMETRIES)
def test_there_is_room_for_the_length(name):
    assert make_config(find_geometry(name), tokens=1 << 20).max_position_embeddings == 1 << 20
    published = GEOMETRIES[name].fields["max_position_embeddings"]
    assert make_config(find_geometry(name), tokens=16).max_position_embeddings == published


@pytest.mark.parametrize("name", ["tiny", "qwen3-tiny"])
@pytest.mark.parametrize("layers", [2, 9])
def test_layers(name, layers):
    config, model = model_of(name, layers=layers)
    assert len(model.model.layers) == layers
    assert len(getattr(config, "layer_types", None) or range(layers)) == layers


def test_the_same_seed_gives_the_same_weights():
    config = make_config(find_geometry("tiny"), tokens=64, layers=1)
    models = []
    for _ in range(2):
        torch.manual_seed(5)
        models.append(build_model(config, device=torch.device("cpu"), dtype=torch.float32, attention="eager"))
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(one, other)
    assert models[0].config._attn_implementation == "eager"


def test_a_config_from_a_file(tmp_path):
    make_config(find_geometry("qwen3-tiny"), tokens=64).save_pretrained(tmp_path)
    for path in (tmp_path, tmp_path / "config.json"):
        config, model = model_of(str(path), tokens=4096, layers=3)
        assert config.model_type == "qwen3"
        assert (config.max_position_embeddings, len(model.model.layers)) == (4096, 3)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not a config.json"),
        ("[]", "no field 'model_type'"),
        (json.dumps({"hidden_size": 8}), "no field 'model_type'"),
        (json.dumps({"model_type": "no-such-model"}), "no config of type 'no-such-model'"),
        (json.dumps({"model_type": "llama", "hidden_size": "wide"}), "no config of type 'llama'"),
        (json.dumps({"model_type": "llama", "hidden_size": 100, "num_attention_heads": 7}), "not a multiple of"),
    ],
)
def test_what_is_wrong_with_a_config(tmp_path, content, message):
    path = tmp_path / "config.json"
    path.write_text(content)
    with pytest.raises(GeometryError, match=message):
        make_config(find_geometry(str(path)), tokens=64)


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(GeometryError, match="llama-1b-d128"):
        find_geometry("llama-70b")


def test_a_config_that_is_no_language_model(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": "vit"}))
    with pytest.raises(GeometryError, match="no causal language model"):
        build_model(
            make_config(find_geometry(str(path)), tokens=64),
            device=META,
            dtype=torch.float32,
            attention="sdpa",
        )
