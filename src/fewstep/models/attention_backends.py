"""Names of diffusers' attention backends."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn

from fewstep.errors import UserError
from fewstep.models.library_logs import silence_loggers

USUAL = ("native", "flash", "sage", "xformers", "flex")
_ALL = "https://huggingface.co/docs/diffusers/optimization/attention_backends"


def check_attention_backend(name: str) -> AttentionBackendName:
    """The backend of a name; whether it runs here is found when a model uses it. Raises: UserError."""
    try:
        return AttentionBackendName(name)
    except ValueError:
        raise UserError(f"attention {name}: no such backend; usual: {', '.join(USUAL)}; all: {_ALL}") from None


def use_attention_backend(transformer: Any, backend: str, device: torch.device, dtype: torch.dtype) -> None:
    """Compute a transformer's attention with a backend, after a trial on ``device``.

    Raises:
        UserError: there is no such backend, or it does not run here; the transformer has PyTorch's then.
    """
    name = check_attention_backend(backend)
    with silence_loggers():
        try:
            transformer.set_attention_backend(backend)
            tokens = torch.ones(1, 32, 1, 64, device=device, dtype=dtype)
            dispatch_attention_fn(tokens, tokens, tokens, backend=name)  # some fail in use
        except (ImportError, RuntimeError, ValueError) as error:
            transformer.set_attention_backend("native")
            raise UserError(f"attention {backend}: {str(error).splitlines()[0]}") from error
