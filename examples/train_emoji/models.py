"""The parts of the bundled checkpoint, 29 MB in bf16: 256 px are 8 x 8 tokens."""

from diffusers import ModelMixin
from transformers import Gemma2Config, Gemma2Model, PreTrainedTokenizerBase

from diffusers_sana import AutoencoderDC, SanaTransformer2DModel


NO_SCALES: tuple[tuple[int, ...], ...] = ((),) * 6


def make_autoencoder() -> ModelMixin:
    """A DC-AE of convolutions only (as in DC-AE 1.5), 32x, 32 latent channels; nothing runs at full resolution.

    Most of its 8.2 M parameters are in the decoder, which has to know all images by heart. Enlarging by nearest
    neighbors learns faster than pixel shuffle, which begins with noise as fine as the pixels. Residual branches begin
    at a tenth of their scale: at full scale each block adds as much noise as there is signal.
    """
    model = AutoencoderDC(
        latent_channels=32,
        encoder_block_out_channels=(16, 16, 32, 64, 128, 256),
        decoder_block_out_channels=(16, 32, 64, 128, 256, 256),
        encoder_layers_per_block=(0, 1, 1, 1, 1, 1),
        decoder_layers_per_block=(0, 1, 1, 1, 2, 2),
        encoder_qkv_multiscales=NO_SCALES,
        decoder_qkv_multiscales=NO_SCALES,
        downsample_block_type="Conv",
        upsample_block_type="interpolate",
        decoder_conv_act_fn="silu",
    )
    for name, parameter in model.named_parameters():
        if name.endswith(".norm.weight"):
            parameter.data.fill_(0.1)
    return model


def make_transformer() -> ModelMixin:
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
        sample_size=8,
        timestep_scale=0.001,
        qk_norm="rms_norm_across_heads",
    )


def make_text_encoder(tokenizer: PreTrainedTokenizerBase) -> Gemma2Model:
    """A Gemma-2 of 2 layers and width 192, whose first layer sees eight tokens.

    Over the whole instruction, three hundred tokens, attention that has learned nothing yet is uniform, and tells a
    token next to nothing about its neighbors. Trained that way for four hours, the encoder was a bag of words: pairs
    of objects came in either order. With the window their order was learned within minutes.
    """
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
            sliding_window=8,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
