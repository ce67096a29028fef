"""Our classes against outputs that the authors' own code computed; see `tests/recorded.py`."""

import pytest
import torch

from diffusers_sana import AutoencoderDC, SanaControlNetModel, SanaTransformer2DModel
from diffusers_sana.models.controlnets.controlnet_sana import control
from tests.recorded import Recording, numbers, relative_error, weights


SANA = Recording("sana")
FIELDS = {"num_cross_attention_heads": 4, "sample_size": 8}
CASES = {
    "sana": {},
    "sana_positions": {"sample_size": 6, "interpolation_scale": 2.0},
    "sana_patches": {"sample_size": 12},
    "sana_1.5": {},
    "sprint_teacher": {"timestep_scale": 0.001},
}
LATENTS, TEXT, HINT = numbers((3, 4, 6, 10), 1001) * 1.5, numbers((3, 20, 24), 1002) * 3, numbers((3, 4, 6, 10), 1003)
MASK = torch.arange(20)[None] < torch.tensor([7, 1, 20])[:, None]
TIMES = torch.tensor([999.0, 500.0, 20.0])


def sana(name, cls=SanaTransformer2DModel, **fields):
    return cls.from_single_file(weights(SANA.shapes[name]), **{**FIELDS, **CASES.get(name, {}), **fields})


@pytest.mark.parametrize("name", CASES)
def test_sana(name):
    model = sana(name)
    times = TIMES * model.config.timestep_scale  # as the pipelines do
    with torch.no_grad():
        out = model(LATENTS, encoder_hidden_states=TEXT, timestep=times, encoder_attention_mask=MASK).sample
    assert relative_error(out, SANA.outputs[name]) < 5e-6


def test_sprint():
    """The authors' class also converts between the two flows: angles in, predictions of TrigFlow out."""
    angles, guidance = torch.tensor([1.5708, 1.3, 0.6]), torch.tensor([4.5, 1.0, 3.0])
    times = angles.sin() / (angles.cos() + angles.sin())
    tau = times.view(-1, 1, 1, 1)
    norm = torch.sqrt(tau**2 + (1 - tau) ** 2)
    model = sana("sprint")
    with torch.no_grad():
        velocity = model(
            LATENTS * norm,
            encoder_hidden_states=TEXT,
            timestep=times,
            guidance=guidance * model.config.guidance_embeds_scale,
            encoder_attention_mask=MASK,
        ).sample
    out = ((1 - 2 * tau) * LATENTS * norm + (1 - 2 * tau + 2 * tau**2) * velocity) / norm
    assert relative_error(out, SANA.outputs["sprint"]) < 5e-6


@pytest.mark.parametrize("wiring", ["nvlabs", "diffusers"])
def test_controlnet(wiring):
    """The wiring of the authors' files gives the authors' numbers; the other one is far off."""
    checkpoint = weights(SANA.shapes["controlnet"])
    given = {} if wiring == "nvlabs" else {"wiring": wiring}
    controlnet = SanaControlNetModel.from_single_file(checkpoint, **FIELDS, **given)
    branch = [key for key in checkpoint if key.startswith("controlnet.")]
    transformer = SanaTransformer2DModel.from_single_file(
        {key: value for key, value in checkpoint.items() if key not in branch}, **FIELDS
    )
    text = {"encoder_hidden_states": TEXT, "encoder_attention_mask": MASK, "timestep": TIMES}
    with torch.no_grad():
        samples = control(controlnet, LATENTS, torch.float32, controlnet_cond=HINT, **text)
        out = transformer(LATENTS, controlnet_block_samples=samples, **text).sample
    error = relative_error(out, SANA.outputs["controlnet"])
    assert error < 1e-6 if wiring == "nvlabs" else error > 0.1


DC_AE = {
    "f32c32-in": ("dc_ae_efficientvit", {"scaling_factor": 0.3189}),
    "f32c32-sana": ("dc_ae_efficientvit", {}),
    "f64c128-in": ("dc_ae_efficientvit", {"scaling_factor": 0.2889}),
    "f32c32-lite": ("dc_ae_dc_gen", {"scaling_factor": 0.41407}),
    "f32c128-1.5": ("dc_ae_dc_gen", {"scaling_factor": 1.0}),
    "f64c128-1.5": ("dc_ae_dc_gen", {}),
}


@pytest.mark.parametrize("name", DC_AE)
def test_dc_ae(name):
    """Encoder and decoder, from one file; of 64 pixels a latent, every fourth pixel is recorded."""
    fixture, fields = DC_AE[name]
    recording = Recording(fixture)
    model = AutoencoderDC.from_single_file(weights(recording.shapes[name]), **fields)
    latents, image = recording.outputs[f"{name}.latents"], recording.outputs[f"{name}.image"]
    ratio = 64 if name.startswith("f64") else 32
    with torch.no_grad():
        encoded = model.encode(numbers((1, 3, 2 * ratio, ratio), 2001)).latent
        decoded = model.decode(numbers(tuple(latents.shape), 2002)).sample
    assert relative_error(encoded, latents) < 5e-6
    step = decoded.shape[-1] // image.shape[-1]
    assert relative_error(decoded[..., ::step, ::step], image) < 5e-6
