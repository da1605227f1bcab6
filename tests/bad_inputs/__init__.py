"""Bad inputs of every command, the messages that they give, and what to do: data, in the order of the page of errors.

``python -m bad_inputs`` prints that page, ``tests/test_bad_inputs.py`` tries every input.
"""

from bad_inputs import (
    command_lines,
    devices,
    evaluation,
    exports,
    families,
    lora,
    lora_choose,
    lora_commands,
    lora_import,
    lora_prepare,
    lora_train,
    models,
    outputs,
    preferences,
    prompt_streams,
    prompts,
    real_streams,
    recipe_contradictions,
    recipe_files,
    recipe_values,
    rewards,
    runs,
    serving,
    single_files,
    steps,
    tuning,
    videos,
)
from bad_inputs.table import Case, Message, Section

SECTIONS: tuple[Section, ...] = (
    command_lines.SECTION,
    models.SECTION,
    single_files.SECTION,
    exports.SECTION,
    families.SECTION,
    videos.SECTION,
    lora.SECTION,
    lora_commands.SECTION,
    lora_prepare.SECTION,
    lora_train.SECTION,
    lora_choose.SECTION,
    lora_import.SECTION,
    prompts.SECTION,
    prompt_streams.SECTION,
    real_streams.SECTION,
    devices.SECTION,
    outputs.SECTION,
    serving.SECTION,
    recipe_files.SECTION,
    recipe_values.SECTION,
    recipe_contradictions.SECTION,
    rewards.SECTION,
    runs.SECTION,
    evaluation.SECTION,
    steps.SECTION,
    tuning.SECTION,
    preferences.SECTION,
)
CASES: list[tuple[Message, Case]] = [
    (message, case) for section in SECTIONS for message in section.messages for case in message.cases
]
