"""``fewstep lora train`` and ``fewstep lora adapter``: recipes, training sets and models that do not fit."""

from pathlib import Path

from PIL import Image

from bad_inputs.files import PROMPTS
from bad_inputs.table import Case, Content, Message, Section

LORA = """\
kind: lora
name: mine
model: tiny
data: {images: set}
method: {name: flow_matching}
models: {frozen_dtype: fp32}
optim: {lora: {lr: 0.01}}
train: {steps: 1, batch_size: 2}
"""
_ROW = '{"file_name": "a.png", "text": "a fox", "width": 64, "height": 64}\n'
_INDEX = "{kind: lora_dataset, metadata: metadata.jsonl, resolution: 64, fit: square}\n"


def _image(path: Path) -> None:
    Image.new("RGB", (64, 64), "red").save(path)


SET: dict[str, Content] = {"set/a.png": _image, "set/dataset.yaml": _INDEX, "set/metadata.jsonl": _ROW}
_FILES: dict[str, Content] = {"lora.yaml": LORA, **SET}
#: A run with one checkpoint and a training set of two images.
LORA_RUN: dict[str, Content] = SET | {
    "run/recipe.yaml": LORA,
    "run/lora/mine-00000002.safetensors": b"",
    "set/b.png": _image,
    "set/metadata.jsonl": _ROW + _ROW.replace("a.png", "b.png"),
}


def _with(expected: str, changed: dict[str, Content], *overrides: str) -> Case:
    return Case("lora train lora.yaml" + "".join(f" -s '{one}'" for one in overrides), expected, _FILES | changed)


def _set(expected: str, *overrides: str) -> Case:
    return _with(expected, {}, *overrides)


SECTION = Section(
    "LoRA training",
    "[LoRA](../lora.md#training) describes `fewstep lora train`.",
    (
        Message(
            "data.images: {folder} is no training set (no dataset.yaml); make one: fewstep lora prepare DIR --out SET "
            "(sets by name: {names})",
            "A folder of photos is not enough: captions and crops are made first.",
            _set("data.images: nowhere", "data.images=nowhere"),
        ),
        Message(
            "{file}: cannot be read ({reason}); make the set again with fewstep lora prepare",
            "The set was changed by hand.",
            _with("'resolution'", {"set/dataset.yaml": "kind: lora_dataset\n"}),
            _with("'text'", {"set/metadata.jsonl": '{"file_name": "a.png", "width": 64, "height": 64}\n'}),
            _with("dataset.yaml", {"set/metadata.jsonl": "a.png, a fox\n"}),
        ),
        Message(
            "{file}: no index of a training set; make one with fewstep lora prepare",
            "The file is of another program.",
            _with("set/dataset.yaml", {"set/dataset.yaml": _INDEX.replace("lora_dataset", "images")}),
        ),
        Message(
            "{file}: the set has no images",
            "The metadata is empty.",
            _with("set/dataset.yaml", {"set/metadata.jsonl": ""}),
        ),
        Message(
            "{file}: in the set's metadata, but there is no such file",
            "The image was deleted; make the set again.",
            _with("set/b.png", {"set/metadata.jsonl": _ROW.replace("a.png", "b.png")}),
        ),
        Message(
            "{file}: {size} pixels: {side} is not a multiple of {number}; make the set again",
            "`fewstep lora prepare` crops to multiples of 32; very small images are left as they are.",
            _with("set/a.png", {"set/metadata.jsonl": _ROW.replace("64", "20")}),
        ),
        Message(
            "{recipe}: data: give images, or own_images",
            "A LoRA is trained on one of the two.",
            _set("give images", "data={caption_dropout: 0.1}"),
            _set("or own_images", "data.own_images={count: 4}"),
        ),
        Message(
            "{recipe}: data: preservation: own_images are the model's already; leave one out",
            "A training adapter is trained on the model's own images alone.",
            _set("own_images are the model's already", "data={own_images: {count: 4}, preservation: {count: 4}}"),
        ),
        Message(
            "{recipe}: timesteps: shift: no effect on {distribution}; set distribution: shift, or leave it out",
            "Only the distribution shift has one.",
            _set("sigmoid", "timesteps.shift=3"),
        ),
        Message(
            "{recipe}: adapter.kind dora needs the norms of the weights: set models.frozen_dtype to bf16 or fp32",
            "DoRA divides by the norms of the weights' rows, which fp8 does not keep exactly.",
            _set("adapter.kind dora", "adapter.kind=dora", "models.frozen_dtype=fp8"),
        ),
        Message(
            "{recipe}: adapter.factor: no effect on {kind}; set adapter.kind to lokr, or leave it out",
            "Only a LoKr has a small matrix beside its low-rank one.",
            _set("adapter.factor: no effect on lora", "adapter.factor=8"),
        ),
        Message(
            "{recipe}: adapter.init: a lokr starts from no change; leave it out, or set adapter.kind to lora",
            "Only plain LoRA files can be continued.",
            _set("a lokr starts from no change", "adapter={kind: lokr, rank: 4, init: a.safetensors}"),
        ),
        Message(
            "{recipe}: adapter.kind lokr: {file} would be a LoRA on the same model; set adapter.kind to lora",
            "All adapters of a model are LoKr, or none is.",
            _set("a.safetensors would be a LoRA", "adapter.kind=lokr", "method.training_adapter=a.safetensors"),
        ),
        Message(
            "{recipe}: method.vision_language_model needs the images of a set: name one in data.images",
            "Own images are made while the training begins.",
            _set(
                "method.vision_language_model needs", "method={name: self_distillation, vision_language_model: vl}",
                "data={own_images: {count: 4}}",
            ),
        ),
        Message(
            "{recipe}: method.vision_language_model: it describes no images of data.preservation; leave one out",
            "Only images of the training set are encoded with their captions.",
            _set(
                "it describes no images of data.preservation", "data.preservation={count: 4}",
                "method={name: self_distillation, vision_language_model: vl}",
            ),
        ),
        Message(
            "{folder}: no vision-language model found (config.json is missing); give a folder of Qwen3-VL",
            "The path of `method.vision_language_model` is mistyped, or the download is not complete.",
            _set(
                "vl: no vision-language model found", "model=micro-turbo",
                "method={name: self_distillation, vision_language_model: vl}",
            ),
        ),
        Message(
            "{recipe}: adapter.kind lokr: not on weights in nf4; set models.frozen_dtype to fp8, bf16 or fp32",
            "A LoKr's product is formed in the shape of the weight, which nf4 does not have.",
            _set("adapter.kind lokr: not on weights in nf4", "adapter.kind=lokr", "models.frozen_dtype=nf4"),
        ),
        Message(
            "{recipe}: models: offload_blocks: the backward pass would keep all blocks; set gradient_checkpointing too",
            "Checkpointed blocks are computed again in the backward pass, one after the other.",
            _set(
                "offload_blocks: the backward pass", "models={offload_blocks: true, gradient_checkpointing: false}",
            ),
        ),
        Message(
            "{recipe}: train.keep_best: LoRA files are kept by keep_files; leave it out",
            "There are no validation metrics to choose by.",
            _set("train.keep_best", "train.keep_best.metric=lora/loss"),
        ),
        Message(
            "{recipe}: train.fsdp_shard_size: a LoRA is trained by one process; leave it out",
            "One GPU holds the model.",
            _set("train.fsdp_shard_size", "train.fsdp_shard_size=2"),
        ),
        Message(
            "{recipe}: method.student_start: the student would not be trained",
            "It lies after the last step.",
            _set("student_start", "method={name: decoupled_dmd, teacher: tiny, student_start: 1}", *(
                f"optim.{part}.lr=0.01" for part in ("teacher", "fake_score")
            )),
        ),
        Message(
            "preview.guidance_scale {number}: {model} is a distilled model, whose guidance is in its weights; guided "
            "again it overbakes, in training as in previews; leave it out",
            "Few-step models are sampled without guidance.",
            _set("micro-turbo is a distilled model", "model=micro-turbo", "preview.guidance_scale=2"),
        ),
        Message(
            "{key}: {model} is a multi-step model, it has no distillation to undo; leave it out",
            "Training adapters are for few-step models.",
            _set("method.training_adapter: tiny", "method.training_adapter=a.safetensors"),
            Case(
                "lora adapter tiny --out a.safetensors --prompts prompts.txt",
                "data.own_images: tiny",
                {"prompts.txt": PROMPTS},
            ),
        ),
        Message(
            "method.teacher {model}: a distilled model has no guidance left to distill; name the multi-step model that "
            "the student was distilled from",
            "The teacher of a few-step model is sampled in many steps.",
            _set("method.teacher micro-turbo", "method={name: decoupled_dmd, teacher: micro-turbo}", *(
                f"optim.{part}.lr=0.01" for part in ("teacher", "fake_score")
            )),
        ),
        Message(
            "model {model}: no few-step model; for a multi-step one take method flow_matching",
            "The method keeps the few-step ability of a student.",
            _set("model tiny", "method={name: self_distillation}"),
            _set("model tiny", "method={name: decoupled_dmd, teacher: micro}", *(
                f"optim.{part}.lr=0.01" for part in ("teacher", "fake_score")
            )),
        ),
        Message(
            "method.teacher: {model} has other latents: {key} is {value} in its vae/config.json, expected {value}; "
            "take a model with the same autoencoder",
            "Teacher and student are trained on the same latents.",
            Case(
                "lora train lora.yaml -s model=micro-turbo -s 'method={name: decoupled_dmd, teacher: tiny}' "
                "-s optim.teacher.lr=0.01 -s optim.fake_score.lr=0.01",
                "method.teacher: tiny",
                _FILES,
            ),
        ),
        Message(
            "--gpus {count}: a LoRA is trained by one process, on one GPU",
            "Distillations are sharded, LoRA training is not.",
            Case("plan lora.yaml --gpus 2", "--gpus 2", _FILES),
        ),
    ),
)  # fmt: skip
