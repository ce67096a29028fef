"""The sizes of the bundled checkpoint: 30 MB of bf16 weights in all."""

from diffusers import ModelMixin
from transformers import Gemma2Config, Gemma2Model, PreTrainedTokenizerBase

from diffusers_sana import AutoencoderDC, SanaTransformer2DModel


RESOLUTION = 128
# Sixteen tokens carry less redundancy than the thousand of a 1024 px image, and want less shift towards noise.
FLOW_SHIFT = 1.0
NO_SCALES: tuple[tuple[int, ...], ...] = ((),) * 6


def _autoencoder(
    encoder_widths: tuple[int, ...], decoder_widths: tuple[int, ...], decoder_layers: tuple[int, ...]
) -> ModelMixin:
    """A DC-AE of convolutions only (as in DC-AE 1.5), 32x, 32 latent channels; nothing runs at full resolution."""
    return AutoencoderDC(
        latent_channels=32,
        encoder_block_out_channels=encoder_widths,
        decoder_block_out_channels=decoder_widths,
        encoder_layers_per_block=(0, 1, 1, 1, 1, 1),
        decoder_layers_per_block=decoder_layers,
        encoder_qkv_multiscales=NO_SCALES,
        decoder_qkv_multiscales=NO_SCALES,
        downsample_block_type="Conv",
        upsample_block_type="interpolate",
        decoder_conv_act_fn="silu",
    )


def make_autoencoder() -> ModelMixin:
    """The DC-AE for 128 px."""
    widths = (16, 32, 64, 128, 256, 256)
    return _autoencoder(widths, widths, decoder_layers=(0, 1, 1, 1, 1, 2))


def make_autoencoder_256() -> ModelMixin:
    """The DC-AE for 256 px, 8.2 M parameters: most of them in the decoder, which has to know all images by heart.

    Enlarging by nearest neighbours learns faster than pixel shuffle, which begins with noise as fine as the pixels.
    Residual branches begin at a tenth of their scale: at full scale each block adds as much noise as there is signal.
    """
    model = _autoencoder((16, 16, 32, 64, 128, 256), (16, 32, 64, 128, 256, 256), decoder_layers=(0, 1, 1, 1, 2, 2))
    for name, parameter in model.named_parameters():
        if name.endswith(".norm.weight"):
            parameter.data.fill_(0.1)
    return model


def make_transformer(sample_size: int = RESOLUTION // 32) -> ModelMixin:
    """A Sana of 8 blocks and width 192, with the query and key norms of SANA-1.5.

    It is given the noise level in [0, 1], as the published teachers of SANA-Sprint are, so that it can be distilled.
    """
    return SanaTransformer2DModel(
        num_attention_heads=6,
        attention_head_dim=32,
        num_layers=8,
        num_cross_attention_heads=4,
        cross_attention_head_dim=48,
        cross_attention_dim=192,
        caption_channels=192,
        sample_size=sample_size,
        timestep_scale=0.001,
        qk_norm="rms_norm_across_heads",
    )


def make_text_encoder(tokenizer: PreTrainedTokenizerBase) -> Gemma2Model:
    """A Gemma-2 of 2 layers and width 192."""
    return Gemma2Model(
        Gemma2Config(
            vocab_size=len(tokenizer),
            hidden_size=192,
            intermediate_size=512,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=48,
            query_pre_attn_scalar=48,
            max_position_embeddings=1024,
            sliding_window=1024,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
