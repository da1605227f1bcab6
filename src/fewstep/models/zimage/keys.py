"""Names of Z-Image's tensors in single files: the original release's, and ComfyUI's with a prefix; those of its Qwen3
text encoder in transformers and llama.cpp.

Queries, keys and values are fused into ``attention.qkv``. Files with diffusers' names are read too.
"""

from dataclasses import replace

from fewstep.models.key_layout import KeyLayout, ProgramNames

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

_LLAMA_CPP = KeyLayout(
    renamed={
        "embed_tokens.": "token_embd.",
        "layers.": "blk.",
        "norm.": "output_norm.",
        ".self_attn.q_proj.": ".attn_q.",
        ".self_attn.k_proj.": ".attn_k.",
        ".self_attn.v_proj.": ".attn_v.",
        ".self_attn.o_proj.": ".attn_output.",
        ".self_attn.q_norm.": ".attn_q_norm.",
        ".self_attn.k_norm.": ".attn_k_norm.",
        ".input_layernorm.": ".attn_norm.",
        ".post_attention_layernorm.": ".ffn_norm.",
        ".mlp.gate_proj.": ".ffn_gate.",
        ".mlp.up_proj.": ".ffn_up.",
        ".mlp.down_proj.": ".ffn_down.",
    }
)
#: ComfyUI knows Z-Image as a variant of Lumina 2, in GGUF files too (ComfyUI-GGUF, tools/convert.py).
PROGRAMS = ProgramNames(
    transformer="comfyui",
    gguf_transformer="original",
    text_encoder=KeyLayout(prefix="model."),
    gguf_text_encoder=_LLAMA_CPP,
    gguf_architecture="lumina2",
    gguf_text_architecture="qwen3",
    clip_type="lumina2",
)
