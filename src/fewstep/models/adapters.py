"""LoRA adapters (arXiv 2106.09685) on one frozen base: one model in memory serves as teacher, student and fake score.

Three 6B models do not fit side by side on most GPUs; one base with two small adapters does. An adapter is active during
the forward pass of its denoiser, whose parameters are the adapter's alone, so that methods treat it as any other.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from fewstep.core.conditioning import EncodedPrompts
from fewstep.core.denoiser import MIDDLE
from fewstep.models.layer_cache import CacheSettings
from fewstep.models.linear_layers import matching_linears

if TYPE_CHECKING:
    from fewstep.models.denoiser import TransformerDenoiser

#: A layer's active adapters, whether it is its base alone, and the factor of each adapter.
LayerState = tuple[list[str], bool, dict[str, float]]


def add_adapter(
    transformer: nn.Module,
    name: str,
    rank: int,
    alpha: float | None = None,
    *,
    target_modules: Sequence[str],
    dora: bool = False,
) -> None:
    """Add a LoRA adapter that changes nothing yet, in fp32 whatever the base's dtype; the base's weights are frozen.

    The adapted weight is ``W + alpha / rank * B A``. Outside of :func:`active_adapters` the transformer is its base.

    Args:
        alpha: peft's ``lora_alpha``; unset, the rank.
        target_modules: endings of the linear layers' names.
        dora: also train the norms of the weights' rows (DoRA, arXiv 2402.09353).

    Raises:
        UserError: an ending matches no linear layer.
    """
    matching_linears(transformer, target_modules, "target_modules")
    trained = {key for key, p in transformer.named_parameters() if p.requires_grad and ".lora_" in key}
    transformer.requires_grad_(False)
    config = LoraConfig(
        r=rank,
        lora_alpha=rank if alpha is None else alpha,  # type: ignore[arg-type]  # any number works
        target_modules=list(target_modules),
        init_lora_weights=True,
        use_dora=dora,
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # a second adapter is intended
        inject_adapter_in_model(config, transformer, name)
    for layer in lora_layers(transformer):
        layer._disable_adapters = True
    for key, parameter in transformer.named_parameters():
        if ".lora_" in key:
            parameter.data = parameter.data.float()
            parameter.requires_grad_(key in trained or f".{name}." in key)  # others stay as they are


def adapter_parameters(transformer: nn.Module, name: str) -> dict[str, nn.Parameter]:
    """An adapter's parameters by their names in the transformer."""
    return {key: p for key, p in transformer.named_parameters() if f".{name}." in key and ".lora_" in key}


@torch.no_grad()
def copy_adapter(transformer: nn.Module, source: str, target: str) -> None:
    """Give an adapter the weights of another one of its rank and layers, and freeze it."""
    weights = adapter_parameters(transformer, source)
    for key, parameter in adapter_parameters(transformer, target).items():
        parameter.copy_(weights[key.replace(f".{target}.", f".{source}.")])
        parameter.requires_grad_(False)


def lora_layers(module: nn.Module) -> list[LoraLayer]:
    """The layers of a module that have LoRA adapters."""
    return [child for child in module.modules() if isinstance(child, LoraLayer)]


@contextmanager
def active_adapters(transformer: nn.Module, adapters: Mapping[str, float]) -> Iterator[None]:
    """Inside, the weights are ``W + sum of scale * alpha / rank * B A`` over ``adapters``, {name: scale}; with none,
    the base's.

    Unlike peft's own methods it leaves ``requires_grad`` as it is: a graph built with one adapter still reaches it
    after another was active.

    Raises:
        ValueError: the transformer has no adapter of one of the names.
    """
    layers = lora_layers(transformer)
    missing = [name for name in adapters if not any(name in layer.scaling for layer in layers)]
    if missing:
        raise ValueError(f"no LoRA adapter named {', '.join(missing)} in the transformer")
    with _with_states(layers, [_scaled_state(layer, adapters) for layer in layers]):
        yield


def capture_adapter_state(module: nn.Module) -> Callable[[], AbstractContextManager[None]]:
    """Makes contexts in which the module's adapters are as active as now, for recomputation in a backward pass."""
    layers = lora_layers(module)
    states = [_state(layer) for layer in layers]
    return lambda: _with_states(layers, states)


@contextmanager
def _with_states(layers: Sequence[LoraLayer], states: Sequence[LayerState]) -> Iterator[None]:
    """Inside, each layer has its state from ``states``."""
    before = [_state(layer) for layer in layers]
    try:
        for layer, state in zip(layers, states, strict=True):
            _set_state(layer, state)
        yield
    finally:
        for layer, state in zip(layers, before, strict=True):
            _set_state(layer, state)


def _state(layer: LoraLayer) -> LayerState:
    return list(layer.active_adapters), layer._disable_adapters, dict(layer.scaling)


def _scaled_state(layer: LoraLayer, adapters: Mapping[str, float]) -> LayerState:
    """The state with these adapters active. Nested contexts do not multiply: scales refer to ``alpha / rank``."""
    names = [name for name in adapters if name in layer.scaling]
    scaling = {name: adapters[name] * layer.lora_alpha[name] / layer.r[name] for name in names}
    return names, not names, {**layer.scaling, **scaling}


def _set_state(layer: LoraLayer, state: LayerState) -> None:
    layer._active_adapter, layer._disable_adapters, scaling = state
    layer.scaling.update(scaling)


class AdapterDenoiser(nn.Module):
    """A denoiser that is the shared base with adapters {name: scale}. Its parameters are those of the adapters."""

    def __init__(self, base: TransformerDenoiser, adapters: Mapping[str, float]) -> None:
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
