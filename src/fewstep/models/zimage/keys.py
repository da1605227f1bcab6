"""Names of Z-Image's tensors in single files: the original release's, and ComfyUI's with a prefix.

Queries, keys and values are fused into ``attention.qkv``. Files with diffusers' names are read too.
"""

from dataclasses import replace

from fewstep.models.key_layout import KeyLayout

ORIGINAL = KeyLayout(
    renamed={
        "all_x_embedder.2-1.": "x_embedder.",
        "all_final_layer.2-1.": "final_layer.",
        ".attention.to_out.0.": ".attention.out.",
        ".attention.norm_q.": ".attention.q_norm.",
        ".attention.norm_k.": ".attention.k_norm.",
    },
    fused={".attention.qkv.": (".attention.to_q.", ".attention.to_k.", ".attention.to_v.")},
    read_prefixes=("model.diffusion_model.", "diffusion_model.", "model."),
    ignored=("norm_final.weight", "scaled_fp8"),
    other_components=("vae.", "first_stage_model.", "text_encoders.", "cond_stage_model."),
    flat_endings=("pad_token",),
)
KEY_LAYOUTS = {"original": ORIGINAL, "comfyui": replace(ORIGINAL, prefix="model.diffusion_model.")}
