"""``fewstep lora import``: files that are no LoRA training of ai-toolkit for Z-Image."""

from bad_inputs.table import Case, Message, Section

_JOB = """\
config:
  name: ann
  process:
    - type: diffusion_trainer
      network: {type: lora, linear: 4}
      datasets: [{folder_path: photos}]
      train: {steps: 10}
      model: {name_or_path: model, arch: zimage}
"""


def _case(expected: str, text: str, out: str = "mine.yaml") -> Case:
    return Case(f"lora import config.yaml --out {out}", expected, {"config.yaml": text})


SECTION = Section(
    "Configurations of ai-toolkit",
    "[LoRA](../lora.md#recipes-of-ai-toolkit) describes `fewstep lora import`.",
    (
        Message(
            "{file}: no LoRA training of ai-toolkit: {...}",
            "The configuration has no network to train, or no images.",
            _case("config.process", "job: extension\n"),
            _case("config.process", _JOB.replace("network", "nets")),
            _case("datasets", _JOB.replace("[{folder_path: photos}]", "[]")),
        ),
        Message(
            "{file}: config.process type {type}: only trainings are imported: {types}",
            "Other jobs extract or generate.",
            _case("type generate", _JOB.replace("diffusion_trainer", "generate")),
        ),
        Message(
            "{file}: model.arch {name}: no such model family here; Z-Image's are zimage and zimage:...",
            "LoRA files of other families do not fit.",
            _case("model.arch flux", _JOB.replace("arch: zimage", "arch: flux")),
        ),
        Message(
            "{file}: model.name_or_path is missing: name the model's folder or hub id",
            "The recipe needs it.",
            _case("model.name_or_path", _JOB.replace("name_or_path: model, ", "")),
        ),
        Message(
            "{file}: a value of the wrong type ({reason})",
            "A number is written as text, or a mapping as a list.",
            _case("config.yaml: a value", _JOB.replace("steps: 10", "steps: ten")),
            _case("config.yaml: a value", _JOB.replace("{steps: 10}", "[10]")),
        ),
        Message(
            "{file}: {key}: input should be {...}",
            "Imported values are checked as those of any recipe.",
            _case("train.steps", _JOB.replace("steps: 10", "steps: -10")),
        ),
    ),
)
