"""Compilation of a transformer ahead of time, by torch.export and AOTInductor."""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import torch

from fewstep.atomic import atomic_file
from fewstep.core.compiler import check_compiler
from fewstep.models.ahead_of_time import TransformerGraph, describe
from fewstep.models.pipeline import TextToImagePipeline


def export_package(pipeline: TextToImagePipeline, file: Path, size: int, batch: int) -> None:
    """Write a package for square images of ``size`` pixels and any prompts, without weights.

    Args:
        batch: samples of one call; other numbers are filled up. A guided image takes two.

    Raises:
        UserError: the size is impossible, the family cannot be compiled, a compiler is missing, or the file cannot be
            written.
    """
    shape = pipeline.latent_shape(size, size)
    check_compiler(pipeline.device, "aot")
    denoiser = pipeline.denoiser
    inputs, dynamic = denoiser.graph_example(batch, shape)
    # not before it is needed: it takes seconds to import
    from torch._inductor import aoti_compile_and_package

    package = io.BytesIO()
    settings = {
        "aot_inductor.package_constants_in_so": False,  # weights stay the model's
        "aot_inductor.metadata": describe(denoiser, batch, shape),
    }
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # about torch's own use of its interfaces
        exported = torch.export.export(TransformerGraph(denoiser).eval(), inputs, dynamic_shapes=dynamic)
        aoti_compile_and_package(exported, package_path=package, inductor_configs=settings)
    with atomic_file(file) as aside:
        aside.write_bytes(package.getvalue())
