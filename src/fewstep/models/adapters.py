"""Several roles on one frozen base: a LoRA stack (arXiv 2106.09685) for each, switched while it speaks.

Teacher, student and fake of a 6B model do not fit side by side on most cards; one base with two small stacks does. A
role is a denoiser like any other, whose parameters are its stack's alone: methods don't see the difference.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import torch
from diffusers import ZImageTransformer2DModel
from huggingface_hub import split_torch_state_dict_into_shards
from peft import LoraConfig, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import Tensor, nn

from fewstep.core.conditioning import EncodedPrompts
from fewstep.errors import UserError
from fewstep.models.zimage.denoiser import ZImageDenoiser

#: Which stacks are active in a layer, and whether none is.
State = tuple[str | list[str], bool]

#: The linear layers of a block: attention's four and the feed-forward's three.
TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "w1", "w2", "w3")


def add_adapter(
    transformer: ZImageTransformer2DModel, name: str, rank: int, scale: float, targets: Sequence[str] = TARGETS
) -> None:
    """Put a LoRA stack that changes nothing yet on the transformer; the base's own weights are frozen.

    Args:
        scale: of what the stack adds: ``W + scale B A``.
        targets: endings of the linear layers' names.

    Raises:
        UserError: there are no such layers.
    """
    transformer.requires_grad_(False)
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(targets), init_lora_weights=True)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # a second stack is meant
            transformer.add_adapter(config, adapter_name=name)
    except ValueError as error:
        raise UserError(f"roles.targets {', '.join(targets)}: no such layers in the transformer") from error
    for layer in tuner_layers(transformer):
        layer.set_scale(name, scale)
        layer._disable_adapters = True  # unless a role says otherwise, the transformer is its base
    for key, parameter in transformer.named_parameters():
        if ".lora_" in key:
            parameter.data = parameter.data.float()  # what learns is fp32, whatever the base is
            parameter.requires_grad_(True)


def adapter_parameters(transformer: nn.Module, name: str) -> dict[str, nn.Parameter]:
    """A stack's parameters by their names in the transformer."""
    return {key: p for key, p in transformer.named_parameters() if f".{name}." in key and ".lora_" in key}


def tuner_layers(transformer: nn.Module) -> list[LoraLayer]:
    return [module for module in transformer.modules() if isinstance(module, LoraLayer)]


@contextmanager
def active_adapter(transformer: nn.Module, name: str | None) -> Iterator[None]:
    """Inside, the transformer is its base with the named stack, or its base alone.

    Unlike peft's own switches it leaves ``requires_grad`` as it is: a graph that was built with one stack still
    reaches it when another has spoken since.
    """
    layers = tuner_layers(transformer)
    with _switched(layers, [([name] if name else [], name is None)] * len(layers)):
        yield


@contextmanager
def active_adapters(transformer: nn.Module, adapters: Mapping[str, float]) -> Iterator[None]:
    """Inside, these adapters are active together, each with its weights' own scale times the given one.

    Raises:
        ValueError: the transformer has no adapter of one of the names.
    """
    layers = tuner_layers(transformer)
    missing = [name for name in adapters if not any(name in layer.scaling for layer in layers)]
    if missing:
        raise ValueError(f"no LoRA adapter named {', '.join(missing)} in the transformer")
    scales = [dict(layer.scaling) for layer in layers]
    states: list[State] = [([name for name in adapters if name in layer.scaling], not adapters) for layer in layers]
    try:
        for layer in layers:
            layer.scaling.update(
                {name: layer.scaling[name] * adapters[name] for name in adapters if name in layer.scaling}
            )
        with _switched(layers, states):
            yield
    finally:
        for layer, scale in zip(layers, scales, strict=True):
            layer.scaling.update(scale)


def capture_adapter_state(module: nn.Module) -> Callable[[], AbstractContextManager[None]]:
    """Makes contexts in which the module's stacks are switched as they are now: a block that is run again for the
    backward pass must speak with the stack it spoke with."""
    layers = tuner_layers(module)
    states = [_state(layer) for layer in layers]
    return lambda: _switched(layers, states)


@contextmanager
def _switched(layers: Sequence[LoraLayer], states: Sequence[State]) -> Iterator[None]:
    """Inside, each layer has its state of these."""
    before = [_state(layer) for layer in layers]
    try:
        for layer, state in zip(layers, states, strict=True):
            layer._active_adapter, layer._disable_adapters = state
        yield
    finally:
        for layer, state in zip(layers, before, strict=True):
            layer._active_adapter, layer._disable_adapters = state


def _state(layer: LoraLayer) -> State:
    return layer._active_adapter, layer._disable_adapters


class AdapterDenoiser(nn.Module):
    """A denoiser that is the shared base with one stack (None: the base alone). Its parameters are the stack's."""

    def __init__(self, base: ZImageDenoiser, stack: str | None) -> None:
        super().__init__()
        self._base, self.stack = [base], stack  # in a list: the base is shared, not a part
        if stack is not None:
            for name, parameter in adapter_parameters(base.transformer, stack).items():
                self.register_parameter(name.replace(".", "/"), parameter)

    @property
    def base(self) -> ZImageDenoiser:
        return self._base[0]

    def forward(self, x: Tensor, sigma: Tensor, prompts: EncodedPrompts) -> Tensor:
        with active_adapter(self.base.transformer, self.stack):
            return self.base(x, sigma, prompts)

    def cache_text_tokens(self) -> AbstractContextManager[None]:
        """As the base's: inside, no other stack of it may speak."""
        return self.base.cache_text_tokens()

    def features(self, x: Tensor, sigma: Tensor, prompts: EncodedPrompts) -> Tensor:
        with active_adapter(self.base.transformer, self.stack):
            return self.base.features(x, sigma, prompts)


@torch.no_grad()
def write_merged(
    folder: Path,
    transformer: ZImageTransformer2DModel,
    name: str,
    base: ZImageTransformer2DModel | None = None,
    shard: str = "4GB",
) -> None:
    """Write a plain transformer with the stack added into the weights, a shard at a time: what learned on one card of
    a PC must not need twice the PC's memory at the end.

    Args:
        base: whose weights the stack is added to; unset, the transformer's own.
        shard: how large a file may be.
    """
    own = (base or transformer).state_dict()
    weights = {key.replace(".base_layer.", "."): tensor for key, tensor in own.items() if ".lora_" not in key}
    layers = {f"{path}.weight": part for path, part in transformer.named_modules() if isinstance(part, LoraLayer)}

    def whole(key: str) -> Tensor:
        if key not in layers:
            return weights[key].cpu().contiguous()
        added: Tensor = layers[key].get_delta_weight(name)  # type: ignore[attr-defined]  # scaled
        return (weights[key].to(added) + added).to("cpu", weights[key].dtype).contiguous()

    folder.mkdir(parents=True)
    transformer.save_config(folder)
    split = split_torch_state_dict_into_shards(
        weights, filename_pattern="diffusion_pytorch_model{suffix}.safetensors", max_shard_size=shard
    )
    for file, keys in split.filename_to_tensors.items():
        save_file({key: whole(key) for key in keys}, folder / file, {"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        content = json.dumps(index, indent=2) + "\n"
        (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(content, encoding="utf-8")


def adapter_state_dict(transformer: ZImageTransformer2DModel, name: str) -> dict[str, Tensor]:
    """The stack as ``ZImagePipeline.save_lora_weights`` takes it; its scale goes into B, so that readers need none."""
    scales = {layer.scaling[name] for layer in tuner_layers(transformer)}
    (scale,) = scales
    weights = get_peft_model_state_dict(transformer, adapter_name=name)
    return {key: tensor * scale if "lora_B" in key else tensor for key, tensor in weights.items()}
