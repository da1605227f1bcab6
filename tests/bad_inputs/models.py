"""Models that are missing, incomplete or damaged."""

from collections.abc import Mapping
from shutil import rmtree

from bad_inputs.files import CACHE, DISTILL, PROMPTS, TRANSFORMER, deleted, folder, json_with, link_loop, truncated
from bad_inputs.table import Case, Content, Message, Section
from bad_inputs.weights import lora, not_finite, renamed, with_a_tensor, without_a_tensor

_PROMPTS = {"prompts.txt": PROMPTS}
_SCHEDULER = "tiny/scheduler/scheduler_config.json"
_RUN = {"old/metrics.jsonl": '{"step": 1, "seconds": 1.0}\n', "old/recipe.yaml": DISTILL}
_INDEX = f"{TRANSFORMER}.index.json"


def _generate(expected: str, files: Mapping[str, Content], model: str = "tiny") -> Case:
    return Case(f"generate {model} 'a fox'", expected, files)


_VAE, _TEXT = "tiny/vae/diffusion_pytorch_model.safetensors", "tiny/text_encoder/model.safetensors"

SECTION = Section(
    "Models",
    "`MODEL` is a folder in diffusers' layout, a Hugging Face hub id, or the name of a bundled model (`micro`).",
    (
        Message(
            "{model}: no model found (model_index.json is missing); give a folder, a hub id, or one of: {names}",
            "Check the path: it is that of the folder with `model_index.json`.",
            _generate("nowhere: no model", {}, "nowhere"),
            _generate("old: no model", {"old": folder}, "old"),
            _generate("notes.md: no model", {"notes.md": "mine"}, "notes.md"),
            _generate("loop: no model", {"loop": link_loop}, "loop"),
            Case("evaluate nowhere --prompts prompts.txt", "nowhere: no model", _PROMPTS),
            Case("evaluate tiny --prompts prompts.txt --teacher nowhere", "nowhere: no model", _PROMPTS),
            Case("evaluate tiny --prompts prompts.txt --compare a=nowhere", "nowhere: no model", _PROMPTS),
            Case("encode-prompts prompts.txt --out shards --model nowhere", "nowhere: no model", _PROMPTS),
            *(Case(f"{words} nowhere", "nowhere: no model") for words in ("convert --out m", "lora choose r --model")),
            Case("distill mine.yaml -s teacher=nowhere", "nowhere: no model", _PROMPTS | {"mine.yaml": DISTILL}),
            Case(
                "distill mine.yaml -s evaluate.enabled=true -s evaluate.compare.a=nowhere",
                "evaluate.compare.a: nowhere: no model",
                _PROMPTS | {"mine.yaml": DISTILL},
            ),
            Case("distill mine.yaml -s init=nowhere", "init: nowhere: no model", _PROMPTS | {"mine.yaml": DISTILL}),
            Case("plan mine.yaml -s teacher=nowhere", "nowhere: no model", _PROMPTS | {"mine.yaml": DISTILL}),
            Case("cache-trajectories cache.yaml -s teacher=nowhere", "nowhere", _PROMPTS | {"cache.yaml": CACHE}),
            Case("emoji train micro-decoder -s init=nowhere", "nowhere: no model"),
            Case("emoji publish old --out model --model nowhere", "nowhere: no model", _RUN),
        ),
        Message(
            "{model}: no such folder; did you mean the bundled model {name}?",
            "Check the spelling.",
            _generate("mirco: no such folder", {}, "mirco"),
            _generate("Micro: no such folder", {}, "Micro"),
        ),
        Message(
            "the name of the model is empty; give a folder, a hub id, or one of: {names}",
            "Often a shell variable that is not set.",
            Case("generate '' 'a fox'", "is empty"),
            Case("convert '' --out model", "is empty"),
        ),
        Message(
            "{model}: no such folder, and the download from the Hugging Face hub failed: {reason}",
            "A name with one slash is a hub id, unless there is a folder of this name.",
            _generate("some/model: no such folder", {}, "some/model"),
            Case("evaluate tiny --prompts prompts.txt --scorer clip_score:some/model", "some/model: no", _PROMPTS),
        ),
        Message(
            "{folder}: a folder of models; name one of them: {names}",
            "Add the model's name to the path.",
            _generate(".: a folder of models", {"mine.yaml": DISTILL}, "."),
        ),
        Message(
            "{file}: a recipe, not a model; fewstep distill makes a model of it",
            "Run the recipe first, and give the `student` folder of its run.",
            _generate("mine.yaml: a recipe", {"mine.yaml": DISTILL}, "mine.yaml"),
        ),
        Message(
            "{folder}: one component of a model; the model is {model}",
            "Give the folder above.",
            _generate("the model is tiny", {}, "tiny/transformer"),
            Case("convert tiny/vae --out model", "the model is tiny"),
        ),
        Message(
            "{file}: a single file; convert it to a folder first: {command}",
            "A single file holds the transformer alone.",
            _generate("fewstep convert tiny", {}, TRANSFORMER),
        ),
        Message(
            "{file}: a zip archive, such as a pickled PyTorch checkpoint, which could run code; save it as safetensors",
            "Pickled files are never opened.",
            _generate("model.ckpt", {"model.ckpt": b"PK\x03\x04...."}, "model.ckpt"),
        ),
        Message(
            "{folder}: no such folder; the model is incomplete, download or save it again",
            "A component that `model_index.json` names is missing.",
            _generate("tiny/vae", {"tiny/vae": rmtree}),
            _generate("tiny/tokenizer", {"tiny/tokenizer": rmtree}),
            _generate("tiny/scheduler", {"tiny/scheduler": rmtree}),
            Case("emoji train micro-text-encoder -s vae=old", "old/vae", {"old": folder}),
        ),
        Message(
            "{folder}: no such folder; give that of a model, or one of: {names}",
            "Check the path. An autoencoder's or text encoder's is that of the model or run that has it.",
            Case("emoji train micro-vae -s init=nowhere", "nowhere: no such folder"),
            Case("emoji train micro-text-encoder -s vae=nowhere", "nowhere: no such folder"),
            Case("emoji train micro-teacher -s vae=nowhere", "nowhere: no such folder"),
            Case("emoji train micro-teacher -s vae=micro -s text_encoder=nowhere", "nowhere: no such folder"),
        ),
        Message(
            "{file}: {tensor}: {count} of its {total} numbers are infinite or NaN; the weights are damaged",
            "A training that diverged, or a conversion to fp16, can leave such weights. Images would be noise.",
            Case("convert tiny --out model", "x_pad_token: 1 of its 48", {TRANSFORMER: not_finite}),
            Case("convert tiny --out model --dtype bf16", f"{_VAE}: ", {_VAE: not_finite}),
            Case("convert tiny --out model", f"{_TEXT}: ", {_TEXT: not_finite}),
            Case("convert tiny --out a.safetensors --to original", TRANSFORMER, {TRANSFORMER: not_finite}),
            Case(
                "convert a.safetensors --out b --components-from tiny",
                "a.safetensors: ",
                {"a.safetensors": not_finite},
            ),
            Case(
                f"convert {TRANSFORMER} --out b --components-from tiny",
                f"{_TEXT}: ",
                {_TEXT: not_finite},
            ),
        ),
        Message(
            "{folder}: cannot be loaded: {reason}",
            "A file of the component is damaged, or of another model.",
            _generate("tiny/tokenizer: cannot be loaded: its files have no ", {"tiny/tokenizer/tokenizer.json": "{}"}),
            _generate("tiny/vae: cannot be loaded: ", {"tiny/vae/config.json": json_with(latent_channels=4)}),
        ),
        Message(
            "{file}: no such file; give the folder of a whole model",
            "A component has no configuration: download or save the model again.",
            _generate("tiny/transformer/config.json", {"tiny/transformer/config.json": deleted}),
        ),
        Message(
            "{file}: no such file; {reason}",
            "The weights of a component are missing, or have another name than diffusers opens.",
            _generate("only the variant diffusion_pytorch_model.fp16.safetensors", {TRANSFORMER: renamed}),
            _generate(
                "diffusion_pytorch_model.bin is pickled",
                {TRANSFORMER: deleted, TRANSFORMER.replace("safetensors", "bin"): b"x"},
            ),
        ),
        Message(
            "{index}: names {file}, which is not there; download it, or delete an index left over",
            "Weights in several files are found through an index, and one of the files is missing.",
            _generate("names a.safetensors", {_INDEX: '{"weight_map": {"x_pad_token": "a.safetensors"}}'}),
        ),
        Message(
            "{index}: not an index of weight files (no weight_map); download it again",
            "The file is damaged.",
            _generate(_INDEX, {_INDEX: "nothing"}),
            _generate(_INDEX, {_INDEX: "{}"}),
        ),
        Message(
            "{file}: damaged, or not a safetensors file ({reason})",
            "The file is incomplete: download it again.",
            _generate(TRANSFORMER, {TRANSFORMER: truncated}),
            _generate("tiny/vae", {"tiny/vae/diffusion_pytorch_model.safetensors": truncated}),
            _generate("tiny/text_encoder", {"tiny/text_encoder/model.safetensors": truncated}),
        ),
        Message(
            "{file}: empty; download it again",
            "The download or copy was interrupted.",
            _generate(TRANSFORMER, {TRANSFORMER: b""}),
        ),
        Message(
            "{file}: a Git LFS pointer instead of the file; run git lfs pull",
            "The repository was cloned without its large files.",
            _generate(TRANSFORMER, {TRANSFORMER: "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"}),
        ),
        Message(
            "{folder}: one missing tensor: {name}",
            "The weights do not belong to this `config.json`.",
            _generate("x_pad_token", {TRANSFORMER: without_a_tensor}),
        ),
        Message(
            "{file}: one unexpected tensor: {name}",
            "The weights do not belong to this `config.json`.",
            _generate("extra", {TRANSFORMER: with_a_tensor}),
        ),
        Message(
            "{file}: seems to be a LoRA adapter, which is no whole model; {advice}",
            "A model's folder needs all weights.",
            _generate(TRANSFORMER, {TRANSFORMER: lora}),
        ),
        Message(
            "{file}: {name} is {shape}, expected {other} and {count} more",
            "The weights do not belong to this `config.json`.",
            _generate(
                "embed_tokens.weight is (4096, 32), expected (4096, 33)",
                {"tiny/text_encoder/config.json": json_with(hidden_size=33)},
            ),
        ),
        Message(
            "{folder}: shift_factor in its config.json is {value}; the transformer's latents need a finite number",
            "The autoencoder's configuration is damaged, or of another model.",
            _generate("is x", {"tiny/vae/config.json": json_with(shift_factor="x")}),
        ),
        Message(
            "{folder}: scaling_factor in its config.json is {value}; the transformer's latents need a positive number",
            "The autoencoder's configuration is damaged, or of another model.",
            _generate("is 0", {"tiny/vae/config.json": json_with(scaling_factor=0)}),
            _generate("is None", {"tiny/vae/config.json": json_with(scaling_factor=None)}),
        ),
        Message(
            "{file}: {key} {value} is not supported; only {other} is",
            "The model uses a setting that fewstep would not obey.",
            _generate("use_karras_sigmas true", {_SCHEDULER: json_with(use_karras_sigmas=True)}),
            _generate("use_dynamic_shifting true", {_SCHEDULER: json_with(use_dynamic_shifting=True)}),
            _generate("shift_terminal 0.1", {_SCHEDULER: json_with(shift_terminal=0.1)}),
            _generate("num_train_timesteps 500", {_SCHEDULER: json_with(num_train_timesteps=500)}),
            _generate("all_patch_size [4]", {"tiny/transformer/config.json": json_with(all_patch_size=[4])}),
        ),
        Message(
            "{file}: _class_name {name} is not supported; use a model with {other}",
            "The model was made for another sampler.",
            _generate("FlowMatchHeun", {_SCHEDULER: json_with(_class_name="FlowMatchHeunDiscreteScheduler")}),
        ),
        Message(
            "{file}: shift {value} is not a positive number",
            "The scheduler's configuration is damaged.",
            _generate("shift -1", {_SCHEDULER: json_with(shift=-1)}),
            _generate('shift "x"', {_SCHEDULER: json_with(shift="x")}),
        ),
        Message(
            "{file}: sigmas {...}: expected noise levels that descend from 1 to 0",
            "Correct the model's `fewstep.json`.",
            _generate("[1.0, 5.0, 0.0]", {"tiny/fewstep.json": json_with(steps=2, sigmas=[1, 5, 0])}),
        ),
        Message(
            "{file}: step_loras: sigmas is missing; they say which step has which LoRA",
            "Write the levels of its steps.",
            _generate("step_loras: sigmas is missing", {"tiny/fewstep.json": json_with(step_loras=True, sigmas=None)}),
        ),
        Message(
            "{file}: sigmas: {count} levels with steps {steps}; expected one more than steps",
            "Correct the model's `fewstep.json`.",
            _generate("2 levels with steps 6", {"tiny/fewstep.json": json_with(sigmas=[1, 0])}),
        ),
        Message(
            "{file}: no _class_name can be read ({reason})",
            "`model_index.json` is damaged, or written by another program.",
            _generate("tiny/model_index.json", {"tiny/model_index.json": ""}),
            _generate("tiny/model_index.json", {"tiny/model_index.json": "{}"}),
            _generate("tiny/model_index.json", {"tiny/model_index.json": "[]"}),
        ),
        Message(
            "{file}: '{name}' is not a supported pipeline; supported: {names}",
            "The model is of another family.",
            _generate("'FluxPipeline'", {"tiny/model_index.json": json_with(_class_name="FluxPipeline")}),
        ),
        Message(
            "{file}: {key}: input should be {what}",
            "A value in the model's `fewstep.json` is out of range.",
            _generate("steps: input should be greater", {"tiny/fewstep.json": json_with(steps=0)}),
            _generate("sampler: input should be 'euler' or 'sde'", {"tiny/fewstep.json": json_with(sampler="ddim")}),
            _generate("steps: input should be a valid", {"tiny/fewstep.json": json_with(steps="six")}),
        ),
        Message(
            "{file}: {key}: expected a number, not true or false{...}",
            "`true` stands where a number belongs: correct the model's `fewstep.json`.",
            _generate("steps", {"tiny/fewstep.json": json_with(steps=True)}),
        ),
        Message(
            "{file}: unknown key {key}; did you mean {other}?",
            "Correct the key in the model's `fewstep.json`.",
            _generate("did you mean steps?", {"tiny/fewstep.json": json_with(step=4)}),
        ),
        Message(
            "{file}: input should be a valid dictionary or instance of GenerationConfig",
            "The file holds something else than the model's sampling defaults.",
            _generate("tiny/fewstep.json", {"tiny/fewstep.json": "[]"}),
        ),
        Message(
            "{file}: cannot be read ({reason})",
            "The file is damaged.",
            _generate("tiny/fewstep.json", {"tiny/fewstep.json": '{"steps": '}),
        ),
        Message(
            "guidance_scale {number}: this model has guidance distilled into it; omit it, or set 0",
            "The student was trained to need no guidance; with it, images would be oversaturated.",
            Case(
                "generate tiny 'a fox' --guidance-scale 3",
                "guidance_scale 3",
                {"tiny/fewstep.json": json_with(guidance_distilled=True, guidance_scale=0)},
            ),
        ),
        Message(
            "{side} {number} is not a multiple of {factor}",
            "The autoencoder and the transformer's patches divide the sides.",
            Case("generate tiny 'a fox' --height 65", "height 65 is not a multiple of 16"),
            Case("generate tiny 'a fox' --width 100", "width 100"),
        ),
    ),
)
