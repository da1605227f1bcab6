"""Names of diffusers' attention backends."""

from __future__ import annotations

from diffusers.models.attention_dispatch import AttentionBackendName

from fewstep.errors import UserError

USUAL = ("native", "flash", "sage", "xformers", "flex")
_ALL = "https://huggingface.co/docs/diffusers/optimization/attention_backends"


def check_attention_backend(name: str) -> AttentionBackendName:
    """The backend of a name; whether it runs here is found when a model uses it. Raises: UserError."""
    try:
        return AttentionBackendName(name)
    except ValueError:
        raise UserError(f"attention {name}: no such backend; usual: {', '.join(USUAL)}; all: {_ALL}") from None
