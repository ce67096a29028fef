"""The official checkpoint of VILA-U into our folder and back: every tensor once, every contradiction an error."""

import json
import logging
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffusers_sana.loaders.vila_u.convert import convert_vila_u, full_shapes, plan_vila_u
from diffusers_sana.loaders.vila_u.export import export_vila_u
from diffusers_sana.loaders.vila_u.names import PARTS, official_weights
from diffusers_sana.loaders.weight_files import WeightFiles
from diffusers_sana.models.vila_u.configuration_vila_u import VilaUConfig
from diffusers_sana.models.vila_u.modeling_vila_u import VilaUForConditionalGeneration
from diffusers_sana.models.vila_u.processing_vila_u import VilaUProcessor
from tests.loaders.vila_u.vila_u_checkpoint import (
    TINY,
    Sizes,
    llm_shapes,
    projector_shapes,
    tower_shapes,
    write_checkpoint,
)


TOLD = {"encoder_heads": 4, "any_vocabulary": True}  # what a checkpoint of this size does not say
TOWER_FILE = "vision_tower/model.safetensors"


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("vila_u") / "official")


@pytest.fixture
def copied(tmp_path):
    """A checkpoint that the test may spoil."""
    return write_checkpoint(tmp_path / "official")


def edit_tensors(folder, file, edit):
    tensors = load_file(folder / file)
    edit(tensors)
    save_file(tensors, folder / file)


def edit_json(folder, file, edit):
    content = json.loads((folder / file).read_text())
    edit(content)
    (folder / file).write_text(json.dumps(content))


def test_keys_of_the_released_model():
    """On shapes alone: the official numbers of tensors and of elements."""
    shapes = full_shapes(VilaUConfig())
    weights = list(official_weights(shapes, 24, 4))
    ours = {part: {item.key: item.shape for item in weights if item.part == part} for part in PARTS}
    assert len(weights) == sum(map(len, ours.values()))  # none twice
    assert {part: len(keys) for part, keys in ours.items()} == {"llm": 291, "mm_projector": 4, "vision_tower": 1107}
    assert ours["llm"] == llm_shapes(Sizes())
    assert ours["mm_projector"] == projector_shapes(Sizes())
    assert ours["vision_tower"] == tower_shapes(Sizes())
    elements = {part: sum(torch.Size(shape).numel() for shape in keys.values()) for part, keys in ours.items()}
    assert elements == {"llm": 6_738_448_384, "mm_projector": 20_979_712, "vision_tower": 1_356_296_327}
    core = {item.name for item in weights if item.group == "core" and item.name}
    assert sum(torch.Size(shapes[name]).numel() for name in core) == 7_636_826_243


def test_plan_reads_no_weights(official, monkeypatch):
    monkeypatch.setattr(WeightFiles, "tensor", None)
    plan = plan_vila_u(official, **TOLD)
    assert {(item.part, item.key) for item in plan.weights} == {
        (part, key) for part in PARTS for key in plan.sources[part].shapes
    }
    assert plan.left_out == ("ema", "semantic head", "text tower")
    assert "converted: llm, core: 21 tensors" in str(plan)
    config = plan.config
    assert config.text_config.rope_parameters == {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    assert config.depth_config.num_attention_heads == 4
    assert (config.image_start_token_id, config.video_end_token_id, config.image_token_id) == (124, 127, 128)
    assert config.num_video_frames == 8


def test_converted_folder(official, tmp_path):
    convert_vila_u(official, tmp_path / "ours", max_shard_bytes=300_000, **TOLD)
    assert len(list((tmp_path / "ours").glob("model-*.safetensors"))) > 2
    model, report = VilaUForConditionalGeneration.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report.values())
    assert model.dtype == torch.bfloat16
    assert model.generation_config.temperature == 0.6
    state, tower = model.state_dict(), load_file(official / TOWER_FILE)
    depth = "rqtransformer.head_transformer.blocks.1"
    assert torch.equal(state["depth_transformer.layers.1.self_attn.k_proj.weight"], tower[f"{depth}.attn.key.weight"])
    assert torch.equal(state["depth_transformer.layers.1.mlp.fc2.weight"], tower[f"{depth}.mlp.2.weight"])
    codebook = tower["rqvaesiglip.quantizer.codebooks.0.weight"]
    assert torch.equal(state["model.vision_tower.quantizer.embedding.weight"], codebook[:-1])
    processor = VilaUProcessor.from_pretrained(tmp_path / "ours")
    assert processor.num_image_tokens == 16
    assert processor.image_token_id == model.config.image_token_id
    assert processor.image_processor.size == {"height": 32, "width": 32}
    assert processor.tokenizer.padding_side == "left"


@pytest.mark.parametrize(
    "options", [{}, {"semantic_head": True}, {"text_tower": True}, {"semantic_head": True, "text_tower": True}]
)
def test_round_trip(official, tmp_path, options):
    convert_vila_u(official, tmp_path / "ours", keep_rest=True, **TOLD, **options)
    model = VilaUForConditionalGeneration.from_pretrained(tmp_path / "ours")
    assert (model.model.vision_tower.text_model is not None) == options.get("text_tower", False)
    assert (model.model.vision_tower.semantic_head is not None) == options.get("semantic_head", False)
    assert export_vila_u(tmp_path / "ours", tmp_path / "again") == []
    for part in PARTS:
        before, after = WeightFiles(official / part), WeightFiles(tmp_path / "again" / part)
        assert before.shapes == after.shapes
        assert before.dtypes == after.dtypes
        assert all(torch.equal(before.tensor(key), after.tensor(key)) for key in before.shapes)
    for path in (path for path in official.rglob("*.json") if "index" not in path.name):
        assert path.read_text() == (tmp_path / "again" / path.relative_to(official)).read_text()


@pytest.mark.parametrize("kept", ["first", "last"])
def test_saved_again_by_the_authors_code(official, copied, tmp_path, kept):
    """`save_pretrained` of transformers 4.36 writes a tensor with several names under one of them."""

    def write_once(tensors):
        groups = [
            [f"rqvaesiglip.{inner}logit_{name}" for inner in ("", "siglip_model.")] for name in ("scale", "bias")
        ]
        for name in ("weight", "cluster_size_ema", "embed_ema"):
            places = [f"rqvaesiglip.quantizer.codebooks.{index}.{name}" for index in range(3)]
            groups.append([place for place in places if place in tensors])
        for group in groups:
            assert len(group) > 1
            for key in group[1:] if kept == "first" or "ema" in group[0] else group[:-1]:
                del tensors[key]

    edit_tensors(copied, TOWER_FILE, write_once)
    convert_vila_u(copied, tmp_path / "again", text_tower=True, keep_rest=True, **TOLD)
    convert_vila_u(official, tmp_path / "ours", text_tower=True, **TOLD)
    again, ours = (load_file(tmp_path / name / "model.safetensors") for name in ("again", "ours"))
    assert again.keys() == ours.keys()
    assert all(again[name].equal(tensor) for name, tensor in ours.items())
    export_vila_u(tmp_path / "again", tmp_path / "exported")
    exported, released = (load_file(folder / TOWER_FILE) for folder in (tmp_path / "exported", official))
    assert released.keys() - exported.keys() == {key for key in released if "ema" in key and ".0." not in key}
    assert all(exported[key].equal(released[key]) for key in exported)


def test_export_of_a_trained_model(official, tmp_path):
    """`save_pretrained` keeps no official files and the model no EMA: the first are asked for, the others reported."""
    convert_vila_u(official, tmp_path / "ours", **TOLD)
    model = VilaUForConditionalGeneration.from_pretrained(tmp_path / "ours")
    with torch.no_grad():
        model.lm_head.weight.add_(1)
    model.save_pretrained(tmp_path / "trained")
    with pytest.raises(ValueError, match="`like` must be the converted or official folder"):
        export_vila_u(tmp_path / "trained", tmp_path / "again")
    for like in (tmp_path / "ours", official):
        lost = export_vila_u(tmp_path / "trained", tmp_path / f"like_{like.name}", like=like)
        assert len(lost) == 40 + 2 + 29 + 6  # text tower, its copies, semantic head, EMA
        assert not any("rqtransformer" in key or "decoder" in key for key in lost)
        weights = WeightFiles(tmp_path / f"like_{like.name}" / "llm")
        assert torch.equal(weights.tensor("lm_head.weight"), model.lm_head.weight)


def test_memory_is_bounded_by_the_shards(official, tmp_path, monkeypatch):
    """Reads every weight of the model when its shard is written, and never all of them at once."""
    from diffusers_sana.loaders import weight_files

    written = []
    monkeypatch.setattr(
        weight_files, "save_file", lambda tensors, path, **_: written.append(sum(t.nbytes for t in tensors.values()))
    )
    plan = convert_vila_u(official, tmp_path / "ours", max_shard_bytes=200_000, **TOLD)
    assert max(written) <= 200_000
    codebook = plan.taken["model.vision_tower.quantizer.embedding.weight"]
    padding = codebook.shape[1] * 2
    assert sum(written) == sum(plan.nbytes(item) for item in plan.taken.values()) - padding


class TestRefused:
    @pytest.mark.parametrize(
        ("edit", "message"),
        [
            (
                lambda t: t.pop("rqtransformer.pos_emb_d"),
                r"rqtransformer.pos_emb_d must have the shape .* is missing",
            ),
            (lambda t: t.update(extra=torch.ones(2)), r"1 tensors are not in the model, such as 'vision_tower/extra'"),
            (
                lambda t: t.update({"rqtransformer.in_mlp_1.bias": torch.ones(3)}),
                r"in_mlp_1.bias must have the shape \[64\].*has \[3\]",
            ),
            (
                lambda t: t.update({"rqtransformer.in_mlp_1.bias": torch.ones(64, dtype=torch.int32)}),
                r"'rqtransformer.in_mlp_1.bias' must be one of .*got I32",
            ),
        ],
        ids=["missing", "unknown", "shape", "dtype"],
    )
    def test_tensor(self, copied, edit, message):
        edit_tensors(copied, TOWER_FILE, edit)
        with pytest.raises(ValueError, match=message):
            plan_vila_u(copied, **TOLD)

    @pytest.mark.parametrize(
        "key", ["rqvaesiglip.quantizer.codebooks.2.weight", "rqvaesiglip.siglip_model.logit_bias"]
    )
    def test_copies_that_differ(self, copied, tmp_path, key):
        edit_tensors(copied, TOWER_FILE, lambda t: t[key].view(-1)[0].add_(1))
        with pytest.raises(ValueError, match=rf"{key} is stored as a copy of "):
            convert_vila_u(copied, tmp_path / "ours", **TOLD)

    def test_padding_row_is_a_warning(self, copied, tmp_path, caplog):
        def spoil(tensors):
            for index in range(TINY.depth):
                tensors[f"rqvaesiglip.quantizer.codebooks.{index}.weight"][-1] = 1

        edit_tensors(copied, TOWER_FILE, spoil)
        with caplog.at_level(logging.WARNING, logger="diffusers_sana.loaders.vila_u.convert"):
            convert_vila_u(copied, tmp_path / "ours", **TOLD)
        assert "padding row" in caplog.text

    @pytest.mark.parametrize("file", [TOWER_FILE, "llm/model-00002-of-00002.safetensors"])
    def test_file_cut_short(self, copied, file):
        content = (copied / file).read_bytes()
        (copied / file).write_bytes(content[:-100])
        with pytest.raises(ValueError, match=rf"{file} is incomplete"):
            plan_vila_u(copied, **TOLD)

    def test_shard_not_there(self, copied):
        (copied / "llm/model-00001-of-00002.safetensors").unlink()
        with pytest.raises(ValueError, match=r"must have the file 'model-00001-of-00002\.safetensors'"):
            plan_vila_u(copied, **TOLD)

    def test_index_that_names_too_much(self, copied):
        file = "llm/model.safetensors.index.json"
        edit_json(copied, file, lambda c: c["weight_map"].update(more="model-00001-of-00002.safetensors"))
        with pytest.raises(ValueError, match="lists 'more'"):
            plan_vila_u(copied, **TOLD)

    @pytest.mark.parametrize(
        ("file", "edit", "message"),
        [
            (
                "vision_tower/config.json",
                lambda c: c["rqtransformer"]["head"].pop("block"),
                "'rqtransformer.head.block",
            ),
            ("vision_tower/config.json", lambda c: c["rqtransformer"]["block_size"].append(2), "num_codebooks"),
            ("vision_tower/config.json", lambda c: c["rqvaesiglip"].update(shared_codebook=False), "shared_codebook"),
            ("mm_projector/config.json", lambda c: c.update(mm_projector_type="linear"), "mlp2x_gelu"),
            ("llm/config.json", lambda c: c.update(vocab_size=7), "'vocab_size' must be 128, got 7"),
            ("llm/config.json", lambda c: c.update(model_type="another"), "'model_type' must be one"),
            ("llm/added_tokens.json", lambda c: c.pop("<vi_end>"), r"must have \['<vi_end>'\]"),
            ("llm/added_tokens.json", lambda c: c.update({"<vi_end>": 200}), "<vi_end> within the vocabulary"),
        ],
    )
    def test_config(self, copied, file, edit, message):
        edit_json(copied, file, edit)
        with pytest.raises(ValueError, match=message):
            plan_vila_u(copied, **TOLD)

    def test_tokenizer_with_other_ids(self, copied, tmp_path):
        edit_json(copied, "llm/added_tokens.json", lambda c: c.update({"<vi_end>": 126, "<vi_start>": 127}))
        with pytest.raises(ValueError, match="must have the ids"):
            convert_vila_u(copied, tmp_path / "ours", **TOLD)

    def test_preprocessor_of_another_size(self, copied, tmp_path):
        edit_json(copied, "vision_tower/preprocessor_config.json", lambda c: c.update(size={"shortest_edge": 64}))
        with pytest.raises(ValueError, match="'size' must be 32"):
            convert_vila_u(copied, tmp_path / "ours", **TOLD)

    def test_json_not_there(self, copied):
        (copied / "vision_tower/config.json").unlink()
        with pytest.raises(ValueError, match=r"vision_tower/config.json is missing"):
            plan_vila_u(copied, **TOLD)

    def test_what_must_be_told(self, official, tmp_path):
        with pytest.raises(ValueError, match="the vocabulary must be 32004"):
            plan_vila_u(official, encoder_heads=4)
        other = replace(TINY, width=32)
        folder = write_checkpoint(tmp_path / "other", other)
        edit_json(folder, "vision_tower/config.json", lambda c: c["rqvaesiglip"].update(pretrained_model="mine"))
        with pytest.raises(ValueError, match="`encoder_heads` must be given"):
            plan_vila_u(folder, any_vocabulary=True)

    def test_target_with_files(self, official, tmp_path):
        (tmp_path / "file").write_text("")
        for function in (convert_vila_u, export_vila_u):
            with pytest.raises(FileExistsError, match="must be a new folder"):
                function(official, tmp_path)

    def test_export_without_a_weight(self, official, tmp_path):
        convert_vila_u(official, tmp_path / "ours", **TOLD)
        edit_tensors(tmp_path / "ours", "model.safetensors", lambda t: t.pop("lm_head.weight"))
        with pytest.raises(ValueError, match=r"lacks the weight 'lm_head.weight' and 0 more"):
            export_vila_u(tmp_path / "ours", tmp_path / "again")
        edit_tensors(tmp_path / "ours", "model.safetensors", lambda t: t.update(lora=torch.ones(1)))
        with pytest.raises(ValueError, match="the official checkpoint does not have: 'lora'"):
            export_vila_u(tmp_path / "ours", tmp_path / "again")

    def test_export_of_a_decoder_that_the_official_code_cannot_build(self, official, tmp_path):
        convert_vila_u(official, tmp_path / "ours", **TOLD)
        file = tmp_path / "ours" / "config.json"
        file.write_text(file.read_text().replace('"decoder_norm_groups": 32', '"decoder_norm_groups": 8'))
        with pytest.raises(ValueError, match="`decoder_norm_groups` must be 32"):
            export_vila_u(tmp_path / "ours", tmp_path / "again")
