"""Names of FLUX.2's tensors in single files: the original release's, and ComfyUI's with a prefix.

Queries, keys and values of blocks with two streams are fused. Files with diffusers' names are read too.
"""

from dataclasses import replace

from fewstep.models.key_layout import KeyLayout

SINGLE_BLOCKS = 64  # at most; released models have 20 to 48

ORIGINAL = KeyLayout(
    renamed={
        "x_embedder.": "img_in.",
        "context_embedder.": "txt_in.",
        "time_guidance_embed.timestep_embedder.linear_1.": "time_in.in_layer.",
        "time_guidance_embed.timestep_embedder.linear_2.": "time_in.out_layer.",
        "double_stream_modulation_img.linear.": "double_stream_modulation_img.lin.",
        "double_stream_modulation_txt.linear.": "double_stream_modulation_txt.lin.",
        "single_stream_modulation.linear.": "single_stream_modulation.lin.",
        "norm_out.linear.": "final_layer.adaLN_modulation.1.",
        "proj_out.": "final_layer.linear.",
        # the norms of both kinds of blocks have equal names in diffusers
        **{
            f"single_transformer_blocks.{i}.attn.norm_{ours}.weight": f"single_blocks.{i}.norm.{theirs}_norm.scale"
            for i in range(SINGLE_BLOCKS)
            for ours, theirs in (("q", "query"), ("k", "key"))
        },
        "single_transformer_blocks.": "single_blocks.",
        "transformer_blocks.": "double_blocks.",
        ".attn.to_qkv_mlp_proj.": ".linear1.",
        ".attn.to_out.0.": ".img_attn.proj.",
        ".attn.to_out.": ".linear2.",
        ".attn.to_add_out.": ".txt_attn.proj.",
        ".attn.norm_q.weight": ".img_attn.norm.query_norm.scale",
        ".attn.norm_k.weight": ".img_attn.norm.key_norm.scale",
        ".attn.norm_added_q.weight": ".txt_attn.norm.query_norm.scale",
        ".attn.norm_added_k.weight": ".txt_attn.norm.key_norm.scale",
        ".ff.linear_in.": ".img_mlp.0.",
        ".ff.linear_out.": ".img_mlp.2.",
        ".ff_context.linear_in.": ".txt_mlp.0.",
        ".ff_context.linear_out.": ".txt_mlp.2.",
    },
    fused={
        ".img_attn.qkv.": (".attn.to_q.", ".attn.to_k.", ".attn.to_v."),
        ".txt_attn.qkv.": (".attn.add_q_proj.", ".attn.add_k_proj.", ".attn.add_v_proj."),
    },
    swapped=("norm_out.linear.",),
    read_prefixes=("model.diffusion_model.", "diffusion_model."),
    other_components=("vae.", "first_stage_model.", "text_encoders.", "cond_stage_model."),
)
KEY_LAYOUTS = {"original": ORIGINAL, "comfyui": replace(ORIGINAL, prefix="model.diffusion_model.")}
