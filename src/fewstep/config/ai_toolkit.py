"""A configuration of ai-toolkit (github.com/ostris/ai-toolkit) as a LoRA recipe.

Its keys were read from the project's examples for Z-Image and from the defaults of its user interface. What cannot be
carried over is named; keys that are off, or without a meaning here, are passed over.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from fewstep.errors import UserError

JOB_TYPES = ("diffusion_trainer", "sd_trainer", "ui_trainer")
MAX_PROMPTS = 64
WHOLE_RANK = 65_536  # no factor of a LoKr has so many rows

_DTYPES = {"bf16": "bf16", "bfloat16": "bf16", "fp16": "fp16", "float16": "fp16", "fp32": "fp32", "float32": "fp32"}
_TIMESTEPS = {"sigmoid": "sigmoid", "linear": "uniform", "weighted": "weighted", "shift": "shift"}
_SCHEDULES = {"constant": "constant", "constant_with_warmup": "constant", "cosine": "cosine", "linear": "linear"}
_FP8 = ("qfloat8", "float8", "fp8", "qint8")
_NF4 = ("nf4", "uint4", "qint4")

#: Keys that have no meaning here, or that are always so; with a tuple, only these values.
_PASSED: dict[str, tuple[object, ...] | None] = {
    **dict.fromkeys(
        (
            "device",
            "training_folder",
            "sqlite_db_path",
            "performance_log_every",
            "type",
            "monitoring",
            "logging.log_every",
        )
    ),
    **dict.fromkeys(("model.arch", "model.quantize_te", "model.qtype_te", "network.conv", "network.conv_alpha")),
    **dict.fromkeys(("network.lokr_full_rank", "network.lokr_factor", "network.transformer_only", "save.hf_private")),
    **dict.fromkeys(("datasets.cache_latents_to_disk", "datasets.cache_latents", "datasets.mask_min_value")),
    **dict.fromkeys(("datasets.shrink_video_to_frames", "datasets.do_i2v", "sample.num_frames", "sample.fps")),
    **dict.fromkeys(("train.skip_first_sample", "train.force_first_sample", "train.unload_text_encoder")),
    **dict.fromkeys(("train.cache_text_embeddings", "train.bypass_guidance_embedding", "train.switch_boundary_every")),
    **dict.fromkeys(("train.diff_output_preservation_class", "train.diff_output_preservation_multiplier")),
    **dict.fromkeys(
        ("train.auto_scale_batch_size", "sample.walk_seed", "sample.sample_start_step", "logging.use_ui_logger")
    ),
    "datasets.caption_ext": ("txt", ".txt"),
    "datasets.num_frames": (1,),
    "datasets.num_repeats": (1,),
    "datasets.network_weight": (1,),
    "save.save_format": ("diffusers", "safetensors"),
    "sample.sampler": ("flowmatch",),
    "train.content_or_style": ("balanced",),
    "train.loss_type": ("mse",),
    "train.noise_scheduler": ("flowmatch",),
    "train.train_unet": (True,),
}


@dataclass(frozen=True)
class Imported:
    """
    Attributes:
        recipe: the keys of a recipe; its training set has yet to be made.
        folder: of the images. trigger: the word that captions need; "" is none.
        remarks: what has no equivalent, or another meaning.
    """

    recipe: dict[str, Any]
    folder: str
    trigger: str
    remarks: list[str]


@dataclass
class _Section:
    """Keys that are taken one by one; the others are left."""

    name: str
    tree: dict[str, Any]
    remarks: list[str] = field(default_factory=list)

    def take(self, key: str, default: Any = None) -> Any:
        value = self.tree.pop(key, None)
        return default if value is None else value

    def remark(self, key: str, value: object, text: str) -> None:
        self.remarks.append(f"{self.name}.{key} {value}: {text}")

    def look_up(self, key: str, known: Mapping[str, str], default: str) -> str:
        """The value that stands for another; a remark and the default where none does."""
        given = self.take(key, None)
        if given is None:
            return default
        if str(given) not in known:
            self.remark(key, given, f"no equivalent; {default} is taken")
        return known.get(str(given), default)

    def left(self) -> Iterator[str]:
        """Remarks on keys that nothing took and that are on."""
        for key, value in _flat(self.tree):
            name = f"{self.name}.{key}" if self.name else key
            passed = _PASSED.get(name, ())
            off = value is None or value is False or value in ("", [], {})
            if not off and passed is not None and value not in passed:
                yield f"{name} {value}: no equivalent; left out"


def import_ai_toolkit(tree: Mapping[str, Any]) -> Imported:
    """The recipe of a configuration.

    Raises:
        UserError: it is no configuration of a LoRA training, or of another model family.
    """
    config = tree.get("config")
    jobs = config.get("process") if isinstance(config, dict) else None
    job = jobs[0] if isinstance(jobs, list) and jobs and isinstance(jobs[0], dict) else None
    if not isinstance(config, dict) or job is None or not isinstance(job.get("network"), dict):
        raise UserError("no LoRA training of ai-toolkit: config.process with a network is missing")
    if job.get("type") not in JOB_TYPES:
        raise UserError(f"config.process type {job.get('type')}: only trainings are imported: {', '.join(JOB_TYPES)}")
    top = _Section("", dict(job))
    parts = {name: _Section(name, dict(top.take(name, {}))) for name in ("network", "save", "train", "model", "sample")}
    network, save, train, model, sample = parts.values()
    name, trigger = str(config.get("name") or "imported"), str(top.take("trigger_word", ""))
    remarks = (
        [f"config.process: {len(jobs)} jobs; the first is imported"] if isinstance(jobs, list) and jobs[1:] else []
    )
    data, dataset = _data(top.take("datasets", []), name)
    folder = str(dataset.take("folder_path", ""))
    distilled = "turbo" in f"{model.tree.get('name_or_path')} {model.tree.get('arch')}".lower()
    recipe: dict[str, Any] = {
        "kind": "lora",
        "name": name,
        "model": _model(model),
        "data": data,
        "method": _method(model),
        "adapter": _adapter(network, save),
        "models": _frozen(model, bool(train.take("gradient_checkpointing", True))),
        "timesteps": {"distribution": train.look_up("timestep_type", _TIMESTEPS, "sigmoid")},
        "preview": _preview(sample, trigger, distilled),
        "keep_files": int(save.take("max_step_saves_to_keep", 4)),
        "optim": {"lora": _optimizer(train)},
        "train": _train(train, save, sample),
    }
    sections = [*parts.values(), dataset, top]
    for section in sections:
        remarks += [*section.remarks, *section.left()]
    return Imported(recipe, folder, trigger, remarks)


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict) and value and f"{prefix}{key}" != "monitoring":
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _data(given: object, name: str) -> tuple[dict[str, Any], _Section]:
    """The section ``data``, and what is left of the first data set."""
    sets = [one for one in given if isinstance(one, dict)] if isinstance(given, list) else []
    if not sets:
        raise UserError("no LoRA training of ai-toolkit: config.process has no datasets")
    first = _Section("datasets", dict(sets[0]))
    if sets[1:]:
        others = ", ".join(str(one.get("folder_path")) for one in sets[1:])
        first.remarks.append(f"datasets: one set is trained on; put the images of the others into its folder: {others}")
    resolution = first.take("resolution", [512])
    sides = resolution if isinstance(resolution, list) else [resolution]
    found: dict[str, Any] = {"images": f"runs/{name}-set", "resolutions": [int(side) for side in sides]}
    if first.tree.get("default_caption"):
        caption = first.take("default_caption")
        first.remark("default_caption", caption, "give it to fewstep lora prepare as --template and --name")
    return found | {"caption_dropout": float(first.take("caption_dropout_rate", 0.0))}, first


def _model(model: _Section) -> str:
    """Raises: UserError for another family's."""
    arch, name = str(model.tree.get("arch") or ""), str(model.take("name_or_path", ""))
    if arch and not arch.startswith("zimage"):
        raise UserError(f"model.arch {arch}: no such model family here; Z-Image's are zimage and zimage:...")
    if not name:
        raise UserError("model.name_or_path is missing: name the model's folder or hub id")
    return name


def _method(model: _Section) -> dict[str, Any]:
    adapter = model.take("assistant_lora_path")
    if adapter is None:
        return {"name": "flow_matching"}
    text = "a training adapter; files are not fetched: download it, and set method.training_adapter to its path"
    model.remark("assistant_lora_path", adapter, text)
    return {"name": "flow_matching", "training_adapter": str(adapter)}


def _adapter(network: _Section, save: _Section) -> dict[str, Any]:
    kind = network.look_up("type", {"lora": "lora", "dora": "dora", "lokr": "lokr"}, "lora")
    rank = int(network.take("linear", network.take("rank", 4)))
    alpha = float(network.take("linear_alpha", network.take("alpha", rank)))
    found = {"kind": kind, "rank": rank, "alpha": alpha, "save_dtype": save.look_up("dtype", _DTYPES, "bf16")}
    return found | _lokr(network) if kind == "lokr" else found


def _lokr(network: _Section) -> dict[str, Any]:
    """Its own keys. With both factors whole, which ai-toolkit's default is, it has no scale there."""
    factor, full = int(network.take("lokr_factor", -1)), bool(network.take("lokr_full_rank", True))
    own: dict[str, Any] = {"factor": factor if factor > 1 else None}
    return own | {"rank": WHOLE_RANK, "alpha": None} if full else own


def _frozen(model: _Section, checkpointing: bool) -> dict[str, Any]:
    quantized, qtype = bool(model.take("quantize", False)), str(model.take("qtype", "qfloat8"))
    kind = "nf4" if qtype.partition("|")[0] in _NF4 else "fp8"
    if quantized and kind == "fp8" and qtype.partition("|")[0] not in _FP8:
        model.remark("qtype", qtype, "frozen weights are held in bf16, fp8 or nf4; fp8 is taken")
    if model.take("low_vram", False):
        model.remark("low_vram", True, "no equivalent; fewstep plan shows whether the recipe fits the memory")
    found = {"frozen_dtype": kind if quantized else "bf16", "gradient_checkpointing": checkpointing}
    if model.take("layer_offloading", False):
        found |= {"offload_blocks": True, "gradient_checkpointing": True}
    return found


def _optimizer(train: _Section) -> dict[str, Any]:
    given = str(train.take("optimizer", "adamw"))
    known = {"adamw": "adamw", "adamw8bit": "adamw8bit", "adamw8": "adamw8bit"}
    if given.lower() not in known:
        rate = train.take("lr")
        train.remark("optimizer", f"{given} (lr {rate})", "no equivalent; adamw with a rate of 1e-4 is taken")
    params = _Section("train.optimizer_params", dict(train.take("optimizer_params", {})))
    found: dict[str, Any] = {
        "lr": float(train.take("lr", 1e-4)),
        "optimizer": known.get(given.lower(), "adamw"),
        "weight_decay": float(params.take("weight_decay", 0.0)),
        "max_grad_norm": float(train.take("max_grad_norm", 1.0)),
        "lr_schedule": train.look_up("lr_scheduler", _SCHEDULES, "constant"),
    }
    if betas := params.take("betas"):
        found["betas"] = [float(beta) for beta in betas]
    ema = _Section("train.ema_config", dict(train.take("ema_config", {})))
    if ema.take("use_ema", False):
        found["ema_decay"] = float(ema.take("ema_decay", 0.99))
    ema.take("ema_decay")
    train.remarks += [*params.left(), *ema.left()]
    return found


def _train(train: _Section, save: _Section, sample: _Section) -> dict[str, Any]:
    precision = train.look_up("dtype", _DTYPES, "bf16")
    if precision == "fp16":
        train.remark("dtype", "fp16", "it overflows in Z-Image; bf16 is taken")
    if train.take("diff_output_preservation", False):
        text = "left out; data.preservation is the nearest: the model's own images of other prompts beside the set"
        train.remark("diff_output_preservation", True, text)
    every = int(sample.take("sample_every", 250))
    accumulation = train.take("gradient_accumulation", train.take("gradient_accumulation_steps", 1))
    train.take("gradient_accumulation_steps")
    return {
        "steps": int(train.take("steps", 3000)),
        "batch_size": int(train.take("batch_size", 1)),
        "gradient_accumulation_steps": int(accumulation),
        "precision": "fp32" if precision == "fp32" else "bf16",
        "sample_every": 0 if train.take("disable_sampling", False) else every,
        "save_every": int(save.take("save_every", 250)),
    }


def _preview(sample: _Section, trigger: str, distilled: bool) -> dict[str, Any]:
    rows = [*sample.take("prompts", []), *sample.take("samples", [])]
    texts = [str(row.get("prompt") if isinstance(row, dict) else row).replace("[trigger]", trigger) for row in rows]
    texts = list(dict.fromkeys(text for text in texts if text.strip()))
    if len(texts) > MAX_PROMPTS:
        sample.remark("prompts", len(texts), f"the first {MAX_PROMPTS} are taken")
    found: dict[str, Any] = {"prompts": texts[:MAX_PROMPTS]} if texts else {}
    scale = float(sample.take("guidance_scale", 1.0))
    if distilled and scale > 1:
        sample.remark("guidance_scale", f"{scale:g}", "a distilled model is sampled without guidance; left out")
    elif not distilled:
        found["guidance_scale"] = max(0.0, scale - 1)  # there it is x_null + g (x_cond - x_null)
    left = [key for key in ("width", "height", "sample_steps", "seed") if sample.take(key) is not None]
    if left:
        names = ", ".join(left)
        sample.remarks.append(f"sample.{names}: previews have the training's size, the model's own steps and own seeds")
    return found
