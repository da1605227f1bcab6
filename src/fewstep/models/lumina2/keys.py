"""Names of Lumina-Image-2.0's tensors in single files: the original release's, and ComfyUI's with a prefix.

Queries, keys and values are fused; with grouped queries, keys and values are smaller. Files with diffusers' names are
read too.
"""

from dataclasses import replace

from fewstep.models.key_layout import KeyLayout

REFINERS = 8  # at most so many blocks of each refiner; released models have 2

ORIGINAL = KeyLayout(
    renamed={
        "time_caption_embed.caption_embedder.": "cap_embedder.",
        "time_caption_embed.timestep_embedder.linear_1.": "t_embedder.mlp.0.",
        "time_caption_embed.timestep_embedder.linear_2.": "t_embedder.mlp.2.",
        "norm_out.linear_1.": "final_layer.adaLN_modulation.1.",
        "norm_out.linear_2.": "final_layer.linear.",
        # these blocks have no modulation, and their norm is no part of one
        **{f"context_refiner.{i}.norm1.": f"context_refiner.{i}.attention_norm1." for i in range(REFINERS)},
        ".attn.to_out.0.": ".attention.out.",
        ".attn.norm_q.": ".attention.q_norm.",
        ".attn.norm_k.": ".attention.k_norm.",
        ".feed_forward.linear_1.": ".feed_forward.w1.",
        ".feed_forward.linear_2.": ".feed_forward.w2.",
        ".feed_forward.linear_3.": ".feed_forward.w3.",
        ".norm1.linear.": ".adaLN_modulation.1.",
        ".norm1.norm.": ".attention_norm1.",
        ".norm2.": ".attention_norm2.",
    },
    fused={".attention.qkv.": (".attn.to_q.", ".attn.to_k.", ".attn.to_v.")},
    unequal=True,
    read_prefixes=("model.diffusion_model.", "diffusion_model.", "model."),
    ignored=("norm_final.weight", "scaled_fp8"),
    other_components=("vae.", "first_stage_model.", "text_encoders.", "cond_stage_model."),
)
KEY_LAYOUTS = {"original": ORIGINAL, "comfyui": replace(ORIGINAL, prefix="model.diffusion_model.")}
