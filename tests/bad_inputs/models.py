"""Models that are missing, incomplete or damaged, and single files."""

from bad_inputs.table import Case, Message, Section

SECTION = Section("Models", "", (
        Message(
            "{model}: no model found (model_index.json is missing); give a folder, a hub id, or one of: {names}",
            "Check the path.",
            Case("generate nowhere 'a fox'", "nowhere: no model"),
        ),))
SINGLE_FILES = Section("Single files", "", (
        Message(
            "{file}: contains the transformer alone; give --components-from, a model of its family",
            "A single file has no text encoder and no autoencoder: name a model that has them.",
            Case("convert a.safetensors --out model", "a.safetensors", {"a.safetensors": b""}),
        ),))
