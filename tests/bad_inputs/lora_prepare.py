"""``fewstep lora prepare``: folders of images and their captions."""

from pathlib import Path

from PIL import Image

from bad_inputs.files import folder
from bad_inputs.table import Case, Content, Message, Section


def _image(path: Path) -> None:
    Image.new("RGB", (64, 64), "red").save(path)


PHOTOS = {"photos/a.png": _image}


def _case(expected: str, more: dict[str, Content], options: str = "") -> Case:
    return Case(f"lora prepare photos --out set {options}".rstrip(), expected, {**PHOTOS, **more})


SECTION = Section(
    "Training sets",
    "[LoRA](../lora.md#training-sets) describes `fewstep lora prepare`. Images that cannot be opened are no error: "
    "they are named and left out.",
    (
        Message(
            "{folder}: no such folder of images",
            "Check the path.",
            Case("lora prepare nowhere --out set", "nowhere"),
        ),
        Message(
            "{folder}: no images in it (.jpg, .png, .webp, ...)",
            "Give the folder that holds the images, or one above it.",
            Case("lora prepare empty --out set", "empty", {"empty": folder}),
        ),
        Message(
            "{folder}: none of its {count} images can be opened ({file}: {reason})",
            "The reason is that of the first.",
            Case("lora prepare photos --out set", "a.png: no image", {"photos/a.png": b"none"}),
        ),
        Message(
            "{folder}: already exists; choose another --out",
            "Nothing is overwritten.",
            _case("set", {"set/notes.txt": "mine"}),
        ),
        Message(
            "{folder}: is in {folder}, and would be taken for images there; use a folder outside of it",
            "The next run would read the crops as originals.",
            Case("lora prepare photos --out photos/set", "photos/set", PHOTOS),
        ),
        Message(
            "{folder}: cannot write here ({reason})",
            "A folder is needed above it.",
            Case("lora prepare photos --out notes.txt/set", "notes.txt", {**PHOTOS, "notes.txt": "mine"}),
        ),
        Message(
            "{file}: not a UTF-8 text file; save it as UTF-8",
            "Captions are read as UTF-8.",
            _case("a.txt", {"photos/a.txt": b"\xff\xfea\x00"}),
            _case("metadata.csv", {"photos/metadata.csv": b"file_name,text\na.png,caf\xe9\n"}),
        ),
        Message(
            "{file}: line {number}: expected file_name and one of text, caption, prompt; it has {keys}",
            "The columns of Hugging Face's imagefolder are needed.",
            _case("image, words", {"photos/metadata.csv": "image,words\na.png,a cat\n"}),
            _case("file_name", {"photos/metadata.jsonl": '{"file_name": "a.png"}\n'}),
        ),
        Message(
            "{file}: line {number}: not JSON ({reason})",
            "Each line is a JSON object.",
            _case("line 1", {"photos/metadata.jsonl": "a.png a cat\n"}),
        ),
        Message(
            "{file}: line {number}: expected an object with file_name and text",
            "Each line is a JSON object.",
            _case("line 1", {"photos/metadata.jsonl": "[1]\n"}),
        ),
        Message(
            "--template {text}: only {name} may be in braces",
            "Write {name} where the name goes.",
            _case("{nome}", {}, "--name ann --template 'a photo of {nome}'"),
        ),
        Message(
            "--template {text}: has no {name}; without it every caption would lack it",
            "Write {name} where the name goes.",
            _case("a photo", {}, "--name ann --template 'a photo'"),
        ),
        Message(
            "{folder}: no such folder; did you mean the bundled model {name}?",
            "Check the spelling.",
            _case("mico", {}, "--trigger sks --model mico"),
        ),
        Message(
            "Invalid value for '{option}': Input should be {bound}",
            "Take a number in the range. The exit code of these is 2.",
            _case("--size", {}, "--size 8"),
        ),
        Message(
            "Invalid value for '{option}': {value} is not one of {choices}.",
            "Take one of the list. The exit code of these is 2.",
            _case("tall", {}, "--fit tall"),
        ),
    ),
)
