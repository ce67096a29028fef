"""Bad configurations and inputs are refused, naming the argument."""

import pytest
import torch

from diffusers_sana.models.transformers.transformer_sana import SanaTransformer2DModel
from tests.models.sana_transformers import tiny_config, tiny_inputs, tiny_model


@pytest.mark.parametrize(
    ("overrides", "match"),
    [
        ({"cross_attention_dim": None}, "`cross_attention_dim` must be given.*None.*`cross_attention_dim=32`"),
        ({"num_cross_attention_heads": None}, "`num_cross_attention_heads`.*must be given"),
        ({"cross_attention_head_dim": None}, "`cross_attention_head_dim`.*must be given"),
        ({"cross_attention_dim": 48}, "`cross_attention_dim` must be.*32.*got 48"),
        (
            {"cross_attention_head_dim": 8},
            r"`num_cross_attention_heads \* cross_attention_head_dim`.*32.*got 2 \* 8 = 16",
        ),
        ({"qk_norm": "rms_norm"}, "`qk_norm` must be None or \"rms_norm_across_heads\", got 'rms_norm'"),
        (
            {"attention_head_dim": 5, "cross_attention_head_dim": 5, "num_attention_heads": 2}
            | {"cross_attention_dim": 10, "interpolation_scale": 1.0},
            "multiple of 4 for a positional table, got 10",
        ),
    ],
)
def test_bad_configurations(overrides, match):
    with pytest.raises(ValueError, match=match):
        SanaTransformer2DModel(**tiny_config(**overrides))


BAD_INPUTS = {
    "channels": ({"hidden_states": torch.zeros(2, 3, 8, 6)}, r"`hidden_states`.*\[batch, 4, .*got \(2, 3, 8, 6\)"),
    "three_axes": ({"hidden_states": torch.zeros(4, 8, 6)}, r"`hidden_states`.*got \(4, 8, 6\)"),
    "text_width": ({"encoder_hidden_states": torch.zeros(2, 7, 8)}, r"`encoder_hidden_states`.*12.*got \(2, 7, 8\)"),
    "text_axes": ({"encoder_hidden_states": torch.zeros(7, 12)}, r"`encoder_hidden_states`.*got \(7, 12\)"),
    "text_missing": ({"encoder_hidden_states": None}, "`encoder_hidden_states` must be given"),
    "text_batch": (
        {"encoder_hidden_states": torch.zeros(3, 7, 12), "encoder_attention_mask": None},
        "`hidden_states` and the text must have the same batch size, got 2 and 3",
    ),
    "mask_length": ({"encoder_attention_mask": torch.ones(2, 6)}, r"`encoder_attention_mask`.*\(2, 7\).*got \(2, 6\)"),
    "mask_batch": ({"encoder_attention_mask": torch.ones(1, 7)}, r"`encoder_attention_mask`.*got \(1, 7\)"),
    "mask_axes": ({"encoder_attention_mask": torch.ones(2, 1, 1, 7)}, "`encoder_attention_mask`"),
    "self_mask": ({"attention_mask": torch.ones(2, 48)}, "`attention_mask` must be None.*`encoder_attention_mask`"),
    "timestep_scalar": ({"timestep": torch.tensor(5.0)}, r"`timestep` must have shape \(2,\) or \(1,\), got \(\)"),
    "timestep_batch": ({"timestep": torch.zeros(3)}, r"`timestep`.*got \(3,\).*expand\(2\)"),
    "guidance_unused": ({"guidance": torch.ones(2)}, "`guidance` must be None.*`guidance_embeds=False`"),
    "attention_kwargs": (
        {"attention_kwargs": {"gligen": 1}},
        r"`attention_kwargs` may only hold `scale`.*\['gligen'\]",
    ),
}


@pytest.mark.parametrize("case", BAD_INPUTS)
def test_bad_inputs(case):
    changes, match = BAD_INPUTS[case]
    model = tiny_model()
    with pytest.raises(ValueError, match=match):
        model(**tiny_inputs(model) | changes)


@pytest.mark.parametrize(
    ("guidance", "match"),
    [
        (None, "`guidance` must be given.*`guidance_embeds=True`.*got None"),
        (torch.ones(3), r"`guidance` must have shape.*got \(3,\)"),
    ],
)
def test_bad_guidance(guidance, match):
    model = tiny_model("sprint")
    with pytest.raises(ValueError, match=match):
        model(**tiny_inputs(model) | {"guidance": guidance})


def test_sides_must_hold_whole_patches():
    model = tiny_model(patch_size=2)
    with pytest.raises(ValueError, match=r"divisible by `patch_size` 2, got \(2, 4, 8, 7\)"):
        model(**tiny_inputs(model, 2, 8, 7))


def test_context_and_text_exclude_each_other():
    model = tiny_model()
    inputs = tiny_inputs(model)
    text = (inputs.pop("encoder_hidden_states"), inputs.pop("encoder_attention_mask"))
    context = model.encode_text(*text)
    for extra in (
        {"encoder_hidden_states": text[0]},
        {"encoder_hidden_states": None, "encoder_attention_mask": text[1]},
    ):
        with pytest.raises(ValueError, match="`text_context` replaces `encoder_hidden_states`"):
            model(**inputs, **extra, text_context=context)
    with pytest.raises(ValueError, match="same batch size, got 1 and 2"):
        model(inputs["hidden_states"][:1], None, inputs["timestep"][:1], text_context=context)


def test_encode_text_checks_its_inputs():
    model = tiny_model()
    with pytest.raises(ValueError, match="`encoder_hidden_states`"):
        model.encode_text(torch.zeros(2, 7, 8))
    with pytest.raises(ValueError, match="`encoder_attention_mask`"):
        model.encode_text(torch.zeros(2, 7, 12), torch.ones(2, 8))
    with pytest.raises(ValueError, match="`attention_kwargs`"):
        model.encode_text(torch.zeros(2, 7, 12), attention_kwargs={"mask": 1})


def test_attention_kwargs_beside_encoded_text():
    model = tiny_model()
    inputs = tiny_inputs(model)
    text = {name: inputs.pop(name) for name in ("encoder_hidden_states", "encoder_attention_mask")}
    context = model.encode_text(**text)
    with pytest.raises(ValueError, match=r"`attention_kwargs` may only hold `scale`.*\['gligen'\]"):
        model(encoder_hidden_states=None, text_context=context, **inputs, attention_kwargs={"gligen": 1})


@torch.no_grad()
def test_checks_read_nothing_from_the_device():
    """Values that a fake tensor does not have are not asked for: no synchronization in `forward`."""
    model = tiny_model().to("meta")
    inputs = {name: value.to("meta") for name, value in tiny_inputs(model).items()}
    assert model(**inputs).sample.shape == inputs["hidden_states"].shape
