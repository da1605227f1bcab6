"""Names of Stable Diffusion 3's tensors in single files: the original release's, and ComfyUI's with a prefix.

Queries, keys and values are fused in each stream; where a block only modulates by scale and shift, these are exchanged.
Files with diffusers' names are read too.
"""

from dataclasses import replace

from fewstep.models.key_layout import KeyLayout

ORIGINAL = KeyLayout(
    renamed={
        "pos_embed.pos_embed": "pos_embed",
        "pos_embed.proj.": "x_embedder.proj.",
        "time_text_embed.timestep_embedder.linear_1.": "t_embedder.mlp.0.",
        "time_text_embed.timestep_embedder.linear_2.": "t_embedder.mlp.2.",
        "time_text_embed.text_embedder.linear_1.": "y_embedder.mlp.0.",
        "time_text_embed.text_embedder.linear_2.": "y_embedder.mlp.2.",
        "norm_out.linear.": "final_layer.adaLN_modulation.1.",
        "proj_out.": "final_layer.linear.",
        "transformer_blocks.": "joint_blocks.",
        ".attn.norm_q.": ".x_block.attn.ln_q.",
        ".attn.norm_k.": ".x_block.attn.ln_k.",
        ".attn.to_out.0.": ".x_block.attn.proj.",
        ".attn.norm_added_q.": ".context_block.attn.ln_q.",
        ".attn.norm_added_k.": ".context_block.attn.ln_k.",
        ".attn.to_add_out.": ".context_block.attn.proj.",
        ".attn2.norm_q.": ".x_block.attn2.ln_q.",
        ".attn2.norm_k.": ".x_block.attn2.ln_k.",
        ".attn2.to_out.0.": ".x_block.attn2.proj.",
        ".norm1.linear.": ".x_block.adaLN_modulation.1.",
        ".norm1_context.linear.": ".context_block.adaLN_modulation.1.",
        ".ff.net.0.proj.": ".x_block.mlp.fc1.",
        ".ff.net.2.": ".x_block.mlp.fc2.",
        ".ff_context.net.0.proj.": ".context_block.mlp.fc1.",
        ".ff_context.net.2.": ".context_block.mlp.fc2.",
    },
    fused={
        ".x_block.attn.qkv.": (".attn.to_q.", ".attn.to_k.", ".attn.to_v."),
        ".x_block.attn2.qkv.": (".attn2.to_q.", ".attn2.to_k.", ".attn2.to_v."),
        ".context_block.attn.qkv.": (".attn.add_q_proj.", ".attn.add_k_proj.", ".attn.add_v_proj."),
    },
    swapped=("norm_out.linear.", "transformer_blocks.{last}.norm1_context.linear."),
    read_prefixes=("model.diffusion_model.", "diffusion_model."),
    other_components=("vae.", "first_stage_model.", "text_encoders.", "cond_stage_model."),
)
KEY_LAYOUTS = {"original": ORIGINAL, "comfyui": replace(ORIGINAL, prefix="model.diffusion_model.")}
