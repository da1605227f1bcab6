"""A family's transformer as a denoiser: what every family's denoiser offers."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.core.compiler import check_compiler
from fewstep.core.conditioning import EncodedPrompts
from fewstep.core.denoiser import MIDDLE
from fewstep.errors import UserError
from fewstep.models.ahead_of_time import AheadOfTime
from fewstep.models.block import TransformerBlock
from fewstep.models.context_parallel import ContextParallel
from fewstep.models.layer_cache import CacheSettings, LayerCache

RECOMPILE_LIMIT = 64  # compiled versions of the block


class TransformerDenoiser(nn.Module, ABC):
    """``denoiser(x, sigma, prompts) -> velocity`` around a transformer whose blocks are :class:`TransformerBlock`.

    Args:
        transformer: a diffusers model. Its blocks are replaced in place by modules with the same parameters under the
            same names; ``export.diffusers.to_diffusers`` gives a plain one back.

    Attributes:
        can_reuse_layers: whether ``forward`` uses ``layer_cache``.
        can_split_tokens: whether ``forward`` and ``features`` use ``context_parallel``.
        context_parallel: the processes that share each sample, see :meth:`enable_context_parallel`.
        layer_cache: of the sampling at work, see :meth:`reuse_layers`.
        ahead_of_time: the compiled package that ``forward`` uses, see ``ahead_of_time.load_package``.
    """

    can_reuse_layers = False
    can_split_tokens = False

    def __init__(self, transformer: Any) -> None:
        super().__init__()
        self.transformer = transformer
        self.layer_cache: LayerCache | None = None
        self.ahead_of_time: AheadOfTime | None = None
        self.context_parallel: ContextParallel | None = None

    @abstractmethod
    def forward(self, x: Tensor, sigma: Tensor, prompts: EncodedPrompts) -> Tensor:
        """x [B, C, ..., H, W], sigma [B] in [0, 1], B prompts -> velocity in the shape of x, in fp32."""

    @abstractmethod
    def features(self, x: Tensor, sigma: Tensor, prompts: EncodedPrompts, depths: Sequence[float] = MIDDLE) -> Tensor:
        """Features of the image tokens after some layers, [B, L, len(depths) D] in fp32. Arguments as for ``forward``.

        Args:
            depths: shares of the layers, ascending, in (0, 1]; each is rounded up to a layer.
        """

    @property
    @abstractmethod
    def feature_dim(self) -> int:
        """Dimension D of the ``features`` of one layer."""

    @property
    def heads(self) -> int:
        """Attention heads of a block."""
        return int(self.transformer.config["num_attention_heads"])

    @property
    def split_modules(self) -> nn.Module:
        """The part of the transformer that computes divided tokens with ``context_parallel``."""
        return self.transformer

    @contextmanager
    def cache_text_tokens(self) -> Iterator[None]:
        """Inside, what depends on the prompts alone may be computed once for each batch of them. For sampling only:
        weights and active adapters must not change, and no gradient reaches what is cached."""
        yield

    @contextmanager
    def reuse_layers(self, settings: CacheSettings | None) -> Iterator[None]:
        """Inside, the calls are the steps of one sampling, and layers are reused between them; None: are not.

        To be used inside ``cache_text_tokens``, with the same prompts at each step.

        Raises:
            UserError: the family cannot do that.
        """
        if settings is not None and not self.can_reuse_layers:
            raise UserError(f"cache {settings.method}: {type(self).__name__} cannot reuse layers; leave it out")
        if settings is not None and self.ahead_of_time is not None:
            raise UserError(f"cache {settings.method}: a package computes all layers at once; leave out one of the two")
        self.layer_cache = None if settings is None else LayerCache(settings)
        try:
            yield
        finally:
            self.layer_cache = None

    def velocity_from_text(self, x: Tensor, sigma: Tensor, text: Tensor, freqs: Tensor) -> Tensor:
        """``forward`` after the work that depends on the prompts alone, for samples of one padded caption length.

        Args:
            text: caption tokens [B, L', D] as the transformer's layers take them.
            freqs: of the position embedding, of all tokens.

        Raises:
            UserError: the family has no such part.
        """
        raise UserError(f"aot: {type(self).__name__} cannot be compiled ahead of time; use compile")

    def graph_example(self, batch: int, shape: Sequence[int]) -> tuple[tuple[Tensor, ...], tuple[Any, ...]]:
        """Inputs of ``velocity_from_text`` for latents of a shape, and their dynamic dimensions for ``torch.export``.

        Raises:
            UserError: as for ``velocity_from_text``.
        """
        raise UserError(f"aot: {type(self).__name__} cannot be compiled ahead of time; use compile")

    def enable_context_parallel(self, context: ContextParallel) -> None:
        """Compute a part of each sample's tokens; all processes of the group call the denoiser with equal inputs.

        Raises:
            UserError: the family cannot do that, or its heads cannot be divided evenly.
        """
        self.check_context_parallel(context.size)
        context.apply(self.split_modules)
        self.context_parallel = context

    def check_context_parallel(self, size: int) -> None:
        """Raises: UserError if ``size`` processes cannot share a sample."""
        if not self.can_split_tokens:
            raise UserError(
                f"models.context_parallel: {type(self.transformer).__name__} cannot divide its tokens; leave it out"
            )
        if self.heads % size:
            raise UserError(
                f"models.context_parallel {size} does not divide the transformer's {self.heads} attention heads"
            )

    def get_blocks(self) -> list[TransformerBlock]:
        """The units of sharding, offloading, checkpointing and compilation, in the transformer's order."""
        return [module for module in self.transformer.modules() if isinstance(module, TransformerBlock)]

    def enable_gradient_checkpointing(self) -> None:
        """Keep only each block's inputs for the backward pass, which recomputes the block: less memory, more time."""
        for block in self.get_blocks():
            block.gradient_checkpointing = True

    def compile_repeated_blocks(self) -> None:
        """Compile the computation of repeated blocks, one graph for each shape: seconds for each at first, then 1.3
        times the speed. A list of one block is left as it is: its own graph costs more than it saves.

        Raises:
            UserError: a compiler is missing.
        """
        check_compiler(next(self.parameters()).device, "compile")
        # One base with several LoRA adapters has a graph for each adapter, with and without gradient, at each shape.
        # Beyond the limit the compiler falls back to eager execution without an error.
        from torch._dynamo import config

        config.recompile_limit = max(config.recompile_limit, RECOMPILE_LIMIT)
        lists: dict[str, list[TransformerBlock]] = {}
        for name, module in self.transformer.named_modules():
            if isinstance(module, TransformerBlock):
                lists.setdefault(name.rpartition(".")[0], []).append(module)
        compiled = {}
        for block in itertools.chain.from_iterable(blocks for blocks in lists.values() if len(blocks) > 1):
            if block.compute not in compiled:
                compiled[block.compute] = torch.compile(block.compute, dynamic=False)
            block.compute = compiled[block.compute]
