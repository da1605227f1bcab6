"""LoRA adapters (arXiv 2106.09685) on one frozen base: one model in memory serves as teacher, student and fake score.

Three 6B models do not fit side by side on most GPUs; one base with two small adapters does. An adapter is active during
the forward pass of its denoiser, whose parameters are the adapter's alone, so that methods treat it as any other.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Literal

import torch
from peft import LoKrConfig, LoraConfig, PeftConfig, inject_adapter_in_model
from peft.tuners.lokr import LoKrLayer
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from fewstep.core.conditioning import EncodedPrompts
from fewstep.core.denoiser import MIDDLE
from fewstep.models.layer_cache import CacheSettings
from fewstep.models.linear_layers import matching_linears

if TYPE_CHECKING:
    from fewstep.models.denoiser import TransformerDenoiser

AdapterKind = Literal["lora", "dora", "lokr"]

#: A layer with adapters, which are all of one of these kinds.
AdapterLayer = LoraLayer | LoKrLayer

#: A factor of an adapter. Compiled code is made anew for each number, and once for all tensors without dimensions.
Scale = float | Tensor

#: A layer's active adapters, whether it is its base alone, and the factor of each adapter.
LayerState = tuple[list[str], bool, dict[str, Scale]]

#: An adapter's parameter in a transformer: its layer, its part, and the adapter's name.
_PARAMETER = re.compile(r"(?P<layer>.+)\.(?P<part>lora_\w+|lokr_\w+)\.(?P<name>[^.]+)(\.weight)?")


def add_adapter(
    transformer: nn.Module,
    name: str,
    rank: int,
    alpha: float | None = None,
    *,
    target_modules: Sequence[str],
    kind: AdapterKind = "lora",
    factor: int | None = None,
) -> None:
    """Add an adapter that changes nothing yet, in fp32 whatever the base's dtype; the base's weights are frozen.

    The adapted weight is ``W + alpha / rank * B A``. Outside of :func:`active_adapters` the transformer is its base.

    Args:
        alpha: over the rank it is the scale; unset, the rank.
        target_modules: endings of the linear layers' names.
        kind: dora also trains the norms of the weights' rows (arXiv 2402.09353). lokr adds ``alpha / rank * kron(C, B
            A)`` in place of ``B A`` (arXiv 2309.14859); the second factor is one matrix where a product of this rank
            would not be smaller. All adapters of a transformer are LoKr, or none is.
        factor: of lokr: the size of C is this at most, or its nearest divisor; unset, about the root of the weight's.

    Raises:
        UserError: an ending matches no linear layer.
    """
    # names, as peft takes an ending for that of any module
    linears = matching_linears(transformer, target_modules, "target_modules")
    targets = [name.removesuffix(".base_layer") for name in linears]
    trained = {key for key, p in transformer.named_parameters() if p.requires_grad and is_adapter_key(key)}
    transformer.requires_grad_(False)
    config = _peft_config(kind, rank, rank if alpha is None else alpha, factor, targets)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # a second adapter is intended
        inject_adapter_in_model(config, transformer, name)
    for layer in adapter_layers(transformer):
        layer._disable_adapters = True
    own = adapter_parameters(transformer, name)
    for key, parameter in transformer.named_parameters():
        if is_adapter_key(key):
            parameter.data = parameter.data.float()
            parameter.requires_grad_(key in trained or key in own)  # others stay as they are


def _peft_config(kind: AdapterKind, rank: int, alpha: float, factor: int | None, targets: list[str]) -> PeftConfig:
    """Arguments as for :func:`add_adapter`; targets are whole names."""
    if kind == "lokr":
        return LoKrConfig(
            r=rank,
            alpha=alpha,  # type: ignore[arg-type]  # any number works
            target_modules=targets,
            init_weights="lycoris",
            decompose_factor=-1 if factor is None else factor,
        )
    return LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]  # any number works
        target_modules=targets,
        init_lora_weights=True,
        use_dora=kind == "dora",
    )


def is_adapter_key(key: str) -> bool:
    """Whether a parameter's name in a transformer is that of an adapter's part."""
    return ".lora_" in key or ".lokr_" in key


def adapter_parameters(transformer: nn.Module, name: str) -> dict[str, nn.Parameter]:
    """An adapter's parameters by their names in the transformer."""
    return {
        key: parameter
        for key, parameter in transformer.named_parameters()
        if (match := _PARAMETER.fullmatch(key)) is not None and match["name"] == name
    }


@torch.no_grad()
def copy_adapter(transformer: nn.Module, source: str, target: str) -> None:
    """Give an adapter the weights of another one of its kind, rank and layers, and freeze it."""
    weights = {_place(key): parameter for key, parameter in adapter_parameters(transformer, source).items()}
    for key, parameter in adapter_parameters(transformer, target).items():
        parameter.copy_(weights[_place(key)])
        parameter.requires_grad_(False)


def _place(key: str) -> tuple[str, str]:
    """The layer and the part of an adapter's parameter."""
    match = _PARAMETER.fullmatch(key)
    assert match is not None
    return match["layer"], match["part"]


def adapter_layers(module: nn.Module) -> list[AdapterLayer]:
    """The layers of a module that have adapters."""
    return [child for child in module.modules() if isinstance(child, AdapterLayer)]


def adapter_scale(layer: AdapterLayer, name: str) -> float:
    """Alpha over rank of an adapter."""
    alphas = layer.lora_alpha if isinstance(layer, LoraLayer) else layer.alpha
    return float(alphas[name] / layer.r[name])


@contextmanager
def active_adapters(transformer: nn.Module, adapters: Mapping[str, Scale]) -> Iterator[None]:
    """Inside, the weights are ``W + sum of scale * alpha / rank * B A`` over ``adapters``, {name: scale}; with none,
    the base's.

    Unlike peft's own methods it leaves ``requires_grad`` as it is: a graph built with one adapter still reaches it
    after another was active.

    Raises:
        ValueError: the transformer has no adapter of one of the names.
    """
    layers = adapter_layers(transformer)
    missing = [name for name in adapters if not any(name in layer.scaling for layer in layers)]
    if missing:
        raise ValueError(f"no LoRA adapter named {', '.join(missing)} in the transformer")
    with _with_states(layers, [_scaled_state(layer, adapters) for layer in layers]):
        yield


def capture_adapter_state(module: nn.Module) -> Callable[[], AbstractContextManager[None]]:
    """Makes contexts in which the module's adapters are as active as now, for recomputation in a backward pass."""
    layers = adapter_layers(module)
    states = [_state(layer) for layer in layers]
    return lambda: _with_states(layers, states)


@contextmanager
def _with_states(layers: Sequence[AdapterLayer], states: Sequence[LayerState]) -> Iterator[None]:
    """Inside, each layer has its state from ``states``."""
    before = [_state(layer) for layer in layers]
    try:
        for layer, state in zip(layers, states, strict=True):
            _set_state(layer, state)
        yield
    finally:
        for layer, state in zip(layers, before, strict=True):
            _set_state(layer, state)


def _state(layer: AdapterLayer) -> LayerState:
    return list(layer.active_adapters), layer._disable_adapters, dict(layer.scaling)


def _scaled_state(layer: AdapterLayer, adapters: Mapping[str, Scale]) -> LayerState:
    """The state with these adapters active. Nested contexts do not multiply: scales refer to ``alpha / rank``."""
    names = [name for name in adapters if name in layer.scaling]
    scaling = {name: adapters[name] * adapter_scale(layer, name) for name in names}
    return names, not names, {**layer.scaling, **scaling}


def _set_state(layer: AdapterLayer, state: LayerState) -> None:
    layer._active_adapter, layer._disable_adapters, scaling = state
    layer.scaling.update(scaling)


class AdapterDenoiser(nn.Module):
    """A denoiser that is the shared base with adapters {name: scale}. Its parameters are those of the adapters."""

    def __init__(self, base: TransformerDenoiser, adapters: Mapping[str, Scale]) -> None:
        super().__init__()
        self._base = [base]  # in a list, because a submodule's parameters would count as this module's
        self.adapters = dict(adapters)
        for adapter in adapters:
            for name, parameter in adapter_parameters(base.transformer, adapter).items():
                self.register_parameter(name.replace(".", "/"), parameter)

    @property
    def base(self) -> TransformerDenoiser:
        return self._base[0]

    def forward(self, x: Tensor, sigma: Tensor, prompts: EncodedPrompts) -> Tensor:
        with active_adapters(self.base.transformer, self.adapters):
            return self.base(x, sigma, prompts)

    def features(self, x: Tensor, sigma: Tensor, prompts: EncodedPrompts, depths: Sequence[float] = MIDDLE) -> Tensor:
        with active_adapters(self.base.transformer, self.adapters):
            return self.base.features(x, sigma, prompts, depths)

    def cache_text_tokens(self) -> AbstractContextManager[None]:
        """As the base's. Inside, the base and its other adapters must not be used: they share the cache."""
        return self.base.cache_text_tokens()

    def reuse_layers(self, settings: CacheSettings | None) -> AbstractContextManager[None]:
        """As the base's."""
        return self.base.reuse_layers(settings)
