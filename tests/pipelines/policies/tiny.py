"""Pipelines of the real classes in miniature: 30 to 200 thousand random parameters, made on the spot, without a network.

What is published at each family's hub is kept: classes, schedulers, tokenizers with their special tokens, guidance-distilled
or not. Every parameter is random, also those that are zero at the start of training: a zero would hide a wrong input.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers

from pipelines.policies.loading import quiet_libraries
from tests.pipelines.policies.randomised import randomised
from tests.pipelines.policies.tiny_text import FEATURES, clip, clip_tokenizer, qwen, qwen_tokenizer, t5, t5_tokenizer

LATENT_CHANNELS = 4


def tiny_sd3(folder: Path, with_t5: bool = True) -> Path:
    """Stable Diffusion 3 with or without its T5 encoder: 2x2 patches, 8x8 latents, 4 pixels a latent, shift 3."""
    text = {
        "text_encoder": clip("CLIPTextModelWithProjection", 1),
        "text_encoder_2": clip("CLIPTextModelWithProjection", 2),
        "text_encoder_3": t5("T5EncoderModel", 2 * FEATURES, 3) if with_t5 else None,
        "tokenizer": clip_tokenizer(),
        "tokenizer_2": clip_tokenizer(),
        "tokenizer_3": t5_tokenizer() if with_t5 else None,
    }
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=2 * FEATURES,
        caption_projection_dim=32,
        pooled_projection_dim=2 * FEATURES,
        pos_embed_max_size=8,
        qk_norm="rms_norm",
    )
    return _saved(
        diffusers.StableDiffusion3Pipeline(
            transformer=randomised(transformer, 0),
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=_image_autoencoder(),
            **text,
        ),
        folder,
    )


def tiny_flux(folder: Path, schnell: bool = False) -> Path:
    """FLUX.1-dev: guidance-distilled, 4 pixels a latent. schnell: FLUX.1-schnell, which takes no guidance and never shifts."""
    dynamic = _dynamic_scheduler(max_image_seq_len=4096, max_shift=1.15, shift=3.0)
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=4 * LATENT_CHANNELS,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=FEATURES,
        pooled_projection_dim=FEATURES,
        guidance_embeds=not schnell,
        axes_dims_rope=(4, 4, 8),
    )
    return _saved(
        diffusers.FluxPipeline(
            transformer=randomised(transformer, 0),
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=1.0) if schnell else dynamic,
            vae=_image_autoencoder(),
            text_encoder=clip("CLIPTextModel", 1),
            tokenizer=clip_tokenizer(),
            text_encoder_2=t5("T5EncoderModel", FEATURES, 2),
            tokenizer_2=t5_tokenizer(),
        ),
        folder,
    )


def tiny_wan(folder: Path) -> Path:
    """Wan 2.1 text-to-video: 8x8 pixels and 4 frames a latent, UniPC of shift 3."""
    transformer = diffusers.WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        text_dim=FEATURES,
        freq_dim=32,
        ffn_dim=32,
        num_layers=2,
    )
    vae = diffusers.AutoencoderKLWan(base_dim=4, dim_mult=[1, 1, 1, 1], **_video_statistics())
    scheduler = diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    return _saved(
        diffusers.WanPipeline(
            transformer=randomised(transformer, 0),
            scheduler=scheduler,
            vae=randomised(vae, 1),
            text_encoder=t5("UMT5EncoderModel", FEATURES, 2),
            tokenizer=t5_tokenizer(),
        ),
        folder,
    )


def tiny_qwen_image(folder: Path) -> Path:
    """Qwen-Image: 4 pixels a latent, prompts of as many tokens as they have words."""
    transformer = diffusers.QwenImageTransformer2DModel(
        in_channels=4 * LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=FEATURES,
        axes_dims_rope=(4, 4, 8),
    )
    vae = diffusers.AutoencoderKLQwenImage(
        base_dim=4, dim_mult=[1, 1, 1], temperal_downsample=[False, True], **_video_statistics()
    )
    return _saved(
        diffusers.QwenImagePipeline(
            transformer=randomised(transformer, 0),
            scheduler=_dynamic_scheduler(max_image_seq_len=8192, max_shift=0.9, shift=1.0, shift_terminal=0.02),
            vae=randomised(vae, 1),
            text_encoder=qwen(2),
            tokenizer=qwen_tokenizer(),
        ),
        folder,
    )


def _saved(pipeline: Any, folder: Path) -> Path:
    quiet_libraries()
    pipeline.save_pretrained(folder)
    return folder


def _dynamic_scheduler(**settings: Any) -> Any:
    return diffusers.FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_image_seq_len=256, base_shift=0.5, **settings
    )


def _image_autoencoder() -> Any:
    """4 pixels a latent."""
    vae = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(4, 8, 8),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=4,
        sample_size=32,
        scaling_factor=0.7,
        shift_factor=0.1,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    return randomised(vae, 9)


def _video_statistics() -> dict[str, Any]:
    return {
        "z_dim": LATENT_CHANNELS,
        "num_res_blocks": 1,
        "latents_mean": [-0.3, 0.2, 0.1, -0.1],
        "latents_std": [0.9, 1.3, 1.1, 0.8],
    }
