"""A whole model, transformer, text encoder and VAE, as files for ComfyUI and stable-diffusion.cpp."""

from __future__ import annotations

import json
import shlex
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import nn

from fewstep.atomic import atomic_folder
from fewstep.errors import UserError
from fewstep.export.comfyui import WorkflowFiles, comfyui_workflow
from fewstep.export.quantization_error import ExportedComponent
from fewstep.export.weights_file import NamedWeights, write_gguf, write_safetensors
from fewstep.models.components import load_component, resolve_model
from fewstep.models.family import ModelFamily, resolve_family
from fewstep.models.generation_config import GenerationConfig, load_generation_config
from fewstep.models.key_layout import KeyLayout, ProgramNames
from fewstep.models.linear_layers import matching_linears
from fewstep.models.single_file import import_gguf
from fewstep.models.step_adapters import check_one_transformer
from fewstep.models.weight_files import check_finite
from fewstep.progress import progress_bar

Program = Literal["comfyui", "gguf", "sd.cpp"]
Quantize = Literal["fp8", "q8_0", "q4_k"]

#: What each program reads.
QUANTIZATIONS: dict[Program, tuple[Quantize, ...]] = {
    "comfyui": ("fp8",),
    "gguf": ("q8_0", "q4_k"),
    "sd.cpp": ("q8_0", "q4_k"),
}
#: The names of ComfyUI's folders of models.
FOLDERS = {"transformer": "diffusion_models", "text_encoder": "text_encoders", "vae": "vae"}
REPORT, WORKFLOW = "export.json", "workflow.json"


@dataclass(frozen=True)
class Export:
    """What was written.

    Attributes:
        components: with the error of each tensor.
        command: of stable-diffusion.cpp, without a prompt; None for ComfyUI.
    """

    folder: Path
    components: Sequence[ExportedComponent]
    command: str | None


def check_export(model: str | Path, program: Program, quantize: Quantize | None) -> None:
    """Check what can be checked without weights.

    Raises:
        UserError: no such model; a family or sampler that the program does not have; or a quantization it does not
            read.
    """
    if quantize is not None and quantize not in QUANTIZATIONS[program]:
        known = ", ".join(QUANTIZATIONS[program])
        raise UserError(f"--quantize {quantize}: --to {program} takes {known}, or nothing for bf16")
    folder = resolve_model(model)
    _program_names(folder, resolve_family(folder))
    config = load_generation_config(folder)
    if config.sampler == "sde" and config.eta != 1:
        raise UserError(f"{folder}: its sampler is sde with eta {config.eta:g}, which {program} does not have")
    if program != "comfyui":
        import_gguf(folder)


def export_model(model: str | Path, program: Program, out: Path, quantize: Quantize | None = None) -> Export:
    """Write a folder with a file for each component, ``export.json`` with the errors of quantization, and for ComfyUI
    a workflow. It appears complete or not at all.

    Args:
        program: "comfyui": safetensors; "gguf": GGUF for ComfyUI with the custom nodes ComfyUI-GGUF; "sd.cpp": GGUF for
            stable-diffusion.cpp. The VAE is safetensors everywhere.
        out: the files have its name.
        quantize: of the matrices of repeated blocks; unset, all weights are bf16.

    Raises:
        UserError: as in :func:`check_export`; weights that are missing, damaged or not finite; or the folder cannot be
            written.
    """
    check_export(model, program, quantize)
    folder = resolve_model(model)
    check_one_transformer(folder, program)
    family, config = resolve_family(folder), load_generation_config(folder)
    names = _program_names(folder, family)
    if config.system_prompt:
        warnings.warn(f"{folder}: has a system prompt, which {program} does not add: put it into prompts", stacklevel=2)
    gguf = program != "comfyui"
    with atomic_folder(out) as aside:
        components = []
        for component in FOLDERS:
            check_finite(folder / component)
            module = load_component(folder, component, family=family)
            weights = _named_weights(component, module, family, names, gguf)
            as_gguf = gguf and component != "vae"
            file = _file_name(out, component, as_gguf, quantize)
            (aside / file).parent.mkdir()
            with progress_bar(len(weights.tensors), f"writing {component}") as advance:
                if as_gguf:
                    kind = names.gguf_architecture if component == "transformer" else names.gguf_text_architecture
                    stored = write_gguf(aside / file, kind, weights, quantize, advance)
                else:
                    stored = write_safetensors(aside / file, weights, quantize == "fp8", advance)
            components.append(ExportedComponent(component, file, stored))
        files = {each.component: each.file for each in components}
        scheduler = {"scheduler": load_component(folder, "scheduler", family=family)}
        sigmas = config.sigmas or family.sigmas(scheduler, config.steps)
        shift, command = family.shift(scheduler), None
        if program == "sd.cpp":
            command = _sd_cpp_command({name: out / file for name, file in files.items()}, config, sigmas)
        else:
            transformer, text_encoder, vae = (Path(files[name]).name for name in FOLDERS)
            placed = WorkflowFiles(transformer, text_encoder, vae, gguf)
            workflow = comfyui_workflow(placed, config, sigmas, shift, names.clip_type)
            _write_json(aside / WORKFLOW, workflow)
        report: dict[str, Any] = {"program": program, "quantize": quantize, "command": command}
        _write_json(aside / REPORT, report | {"components": [each.as_dict() for each in components]})
    return Export(out, components, command)


def _program_names(folder: Path, family: ModelFamily) -> ProgramNames:
    if family.programs is None:
        raise UserError(f"{folder}: the names of {family.pipeline_class} in other programs are not known; use Z-Image")
    return family.programs


def _named_weights(
    component: str, module: nn.Module, family: ModelFamily, names: ProgramNames, gguf: bool
) -> NamedWeights:
    layout, linears = KeyLayout(), dict[str, nn.Linear]()  # a VAE: both programs read diffusers' names
    if component == "transformer":
        layout = family.key_layouts[names.gguf_transformer if gguf else names.transformer]
        linears = matching_linears(module, family.quantizable_modules, "quantizable_modules")
    elif component == "text_encoder":
        layout = names.gguf_text_encoder if gguf else names.text_encoder
        linears = {name: part for name, part in module.named_modules() if isinstance(part, nn.Linear)}
    matrices = {layout.prefix + layout.from_diffusers(f"{name}.weight")[0] for name in linears}
    return NamedWeights(layout.to_format(module.state_dict()), frozenset(matrices))


def _file_name(out: Path, component: str, gguf: bool, quantize: Quantize | None) -> str:
    """Its path in the folder. Components have different names, so that they can lie in one folder too."""
    kind = "" if component == "transformer" else f"-{component}"
    form = "bf16" if quantize is None or component == "vae" else quantize
    return f"{FOLDERS[component]}/{out.name}{kind}-{form}.{'gguf' if gguf else 'safetensors'}"


def _sd_cpp_command(files: dict[str, Path], config: GenerationConfig, sigmas: Sequence[float]) -> str:
    words: list[Any] = ["sd-cli", "--diffusion-model", files["transformer"], "--llm", files["text_encoder"]]
    words += ["--vae", files["vae"], "--cfg-scale", f"{config.guidance_scale + 1:g}", "--steps", config.steps]
    words += ["--sampling-method", "lcm" if config.sampler == "sde" else "euler"]
    words += ["--sigmas", ",".join(f"{sigma:.6f}" for sigma in sigmas), "-W", config.width, "-H", config.height]
    return shlex.join(map(str, words))


def _write_json(file: Path, content: Any) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
