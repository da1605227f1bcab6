"""Names of Wan 2.1's tensors in single files: the original release's, and ComfyUI's with a prefix.

The original numbers a block's norms by their place in its code: the one before cross-attention is its third. Files with
diffusers' names are read too.
"""

from dataclasses import replace

from fewstep.models.key_layout import KeyLayout

ORIGINAL = KeyLayout(
    renamed={
        "condition_embedder.time_embedder.linear_1.": "time_embedding.0.",
        "condition_embedder.time_embedder.linear_2.": "time_embedding.2.",
        "condition_embedder.text_embedder.linear_1.": "text_embedding.0.",
        "condition_embedder.text_embedder.linear_2.": "text_embedding.2.",
        "condition_embedder.time_proj.": "time_projection.1.",
        "scale_shift_table": "head.modulation",
        "proj_out.": "head.head.",
        ".scale_shift_table": ".modulation",
        ".attn1.": ".self_attn.",
        ".attn2.": ".cross_attn.",
        ".to_q.": ".q.",
        ".to_k.": ".k.",
        ".to_v.": ".v.",
        ".to_out.0.": ".o.",
        ".norm2.": ".norm3.",
        ".ffn.net.0.proj.": ".ffn.0.",
        ".ffn.net.2.": ".ffn.2.",
    },
    read_prefixes=("model.diffusion_model.", "diffusion_model."),
    other_components=("vae.", "first_stage_model.", "text_encoders.", "cond_stage_model."),
)
KEY_LAYOUTS = {"original": ORIGINAL, "comfyui": replace(ORIGINAL, prefix="model.diffusion_model.")}
