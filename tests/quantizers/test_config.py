"""What `SVDQuantConfig` accepts, and its way through JSON and both libraries."""

import json
import logging

import pytest
from diffusers.quantizers.auto import DiffusersAutoQuantizer
from transformers.quantizers.auto import AutoQuantizationConfig

from diffusers_sana import SVDQuantConfig


CUSTOM = SVDQuantConfig(
    precision="nvfp4",
    rank=8,
    smoothing="none",
    quality="best",
    refinements=2,
    compute_mode="w4a16",
    modules={"blocks.*.ff": "w4a16"},
    modules_to_not_convert=["proj_out"],
    seed=3,
)


def test_json_round_trip():
    again = SVDQuantConfig.from_dict(json.loads(json.dumps(CUSTOM.to_dict())))
    assert again == CUSTOM
    assert CUSTOM.to_dict()["quant_method"] == "svdquant"
    assert SVDQuantConfig.from_dict(json.loads(CUSTOM.to_json_string())) == CUSTOM  # only what differs


def test_both_libraries_read_it():
    described = CUSTOM.to_dict()
    assert DiffusersAutoQuantizer.from_dict(described) == CUSTOM
    assert AutoQuantizationConfig.from_dict(described) == CUSTOM


def test_unknown_fields_are_left_out_with_a_warning(caplog):
    assert SVDQuantConfig.from_dict({**CUSTOM.to_dict(), "_private": 0}) == CUSTOM
    assert not caplog.messages
    assert SVDQuantConfig.from_dict({**CUSTOM.to_dict(), "of_the_future": 1}) == CUSTOM
    assert caplog.messages == ["SVDQuantConfig does not know ['of_the_future'] and ignores them."]


def test_layout():
    described = CUSTOM.to_dict()
    assert described["layout"] == json.loads(CUSTOM.to_json_string())["layout"] == "diffusers_sana/1"
    del described["layout"]  # before layouts had names, `modules` was always there
    assert SVDQuantConfig.from_dict(described) == CUSTOM
    del described["modules"]
    assert SVDQuantConfig.from_dict(described).layout is None
    with pytest.raises(ValueError, match=r"`layout` must be one of .*, got 'diffusers_sana/9'. Upgrade"):
        SVDQuantConfig(layout="diffusers_sana/9")
    with pytest.raises(ValueError, match=r"got 'other/1'. The model was quantized by another runtime"):
        SVDQuantConfig.from_dict(described | {"layout": "other/1"})


def test_keyword_arguments():
    config, unused = SVDQuantConfig.from_dict({"rank": 8}, return_unused_kwargs=True, seed=5, other=1)
    assert (config.rank, config.seed, unused) == (8, 5, {"other": 1})


def test_repr_says_what_differs(caplog):
    assert '"rank": 8' in repr(CUSTOM)
    assert "rank" not in repr(SVDQuantConfig())
    with caplog.at_level(logging.INFO):
        logging.getLogger("a.user").info("%s", CUSTOM)  # as both libraries do
    assert "SVDQuantConfig" in caplog.text


def test_lists_are_not_shared():
    first, second = SVDQuantConfig(), SVDQuantConfig(modules_to_not_convert=None)
    first.modules_to_not_convert.append("x")
    assert second.modules_to_not_convert == SVDQuantConfig().modules_to_not_convert == []


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"precision": "int3"}, ValueError, "`precision` must be one of .*'nvfp4'.*, got 'int3'"),
        ({"compute_mode": "w8a4"}, ValueError, "`compute_mode` must be one of .*, got 'w8a4'"),
        ({"smoothing": "yes"}, ValueError, "`smoothing` must be one of .*, got 'yes'"),
        ({"rank": -1}, ValueError, "`rank` must be an integer of at least 0, got -1"),
        ({"rank": 8.0}, ValueError, "`rank` must be an integer of at least 0, got 8.0"),
        ({"refinements": True}, ValueError, "`refinements` must be an integer"),
        ({"seed": None}, ValueError, "`seed` must be an integer"),
        ({"gptq": "no"}, TypeError, "`gptq` must be True, False or None, got 'no'"),
        ({"quality": "good"}, ValueError, "`quality` must be one of .*'best'.*, got 'good'"),
        ({"budget": "30%"}, ValueError, "`budget` must be a share .*, got '30%'"),
        ({"budget": "1.2x"}, ValueError, "`budget` must be a share"),
        ({"modules": {}}, ValueError, "`modules` must name at least one pattern"),
        ({"modules": {"a": "w4a8"}}, ValueError, r"`modules\['a'\]` must be .*'w8a8'.*, got 'w4a8'"),
        ({"modules": ["a"]}, TypeError, "`modules` must be a dictionary"),
        ({"modules_to_not_convert": [1]}, TypeError, "must be strings, got 1"),
        ({"modules_to_not_convert": "proj_out"}, TypeError, "`modules_to_not_convert` must be a list"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        SVDQuantConfig(**arguments)


@pytest.mark.parametrize(
    ("arguments", "module", "mode"),
    [
        ({}, "w4a4", "w4a8"),
        ({"precision": "nvfp4"}, "w4a4", "w4a4"),
        ({"compute_mode": "w4a4"}, "w4a4", "w4a4"),
        ({"compute_mode": "w4a16"}, "w4a4", "w4a16"),
        ({"compute_mode": "w4a4"}, "w4a16", "w4a16"),
        ({}, "w8a8", "w8a8"),
        ({"compute_mode": "w4a16"}, "w8a8", "w8a16"),
        ({"compute_mode": "w4a4"}, "w8a8", "w8a8"),
        ({"compute_mode": "w8a8"}, "w4a4", "w4a8"),
        ({"compute_mode": "w8a16"}, "w4a4", "w4a16"),
        ({"compute_mode": "w4a4"}, "w8a16", "w8a16"),
    ],
)
def test_layers_are_fitted_for_the_mode_that_will_run(arguments, module, mode):
    assert SVDQuantConfig(**arguments).for_layer(module).mode == mode


def test_precision_and_rank_of_a_layer():
    """int8 layers have no branch unless one is asked for; 4-bit layers with 16-bit activations are int4."""

    def chosen(module, **arguments):
        layer = SVDQuantConfig(**arguments).for_layer(module)
        return layer.precision, layer.rank

    assert chosen("w4a4", precision="nvfp4") == ("nvfp4", 32)
    assert chosen("w4a16", precision="nvfp4") == ("int4", 32)
    assert chosen("w4a4", precision="int8") == ("int4", 32)
    assert chosen("w8a8") == chosen("w8a16") == ("int8", 0)
    assert chosen("w8a8", precision="int8", rank=4) == ("int8", 4)
