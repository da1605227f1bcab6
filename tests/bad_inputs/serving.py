"""Images to make again, and servers that cannot start."""

from bad_inputs.files import PROMPTS
from bad_inputs.table import Case, Message, Section


def _keys(content: str, expected: str) -> Case:
    return Case("serve tiny --api-keys keys.txt", expected, {"keys.txt": content})


SECTION = Section(
    "Images made again, and servers",
    "A server reports these before it loads the model. Errors of requests are in [Serving](../serving.md).",
    (
        Message(
            "{file}: cannot be read ({reason})",
            "The file is not there, or it is no image.",
            Case("generate --from nowhere.png", "nowhere.png"),
            Case("generate tiny --from prompts.txt", "prompts.txt", {"prompts.txt": PROMPTS}),
            Case("serve tiny --api-keys nowhere.txt", "nowhere.txt"),
        ),
        Message(
            "--host {address}: other machines reach this address; give --api-keys FILE as well",
            "Write one key on each line of a file, at least 16 characters long.",
            Case("serve tiny --host 0.0.0.0", "--host 0.0.0.0"),
            Case("serve tiny --host ::", "--host ::"),
        ),
        Message(
            "--host {address} --port {port}: cannot be used ({reason})",
            "Another program listens there, or the address is not one of this machine.",
            Case("serve tiny --host 127.0.0.1.5 --port 0 --api-keys keys.txt", "127.0.0.1.5", {"keys.txt": "k" * 16}),
        ),
        Message("{file}: no keys; write one on each line", "The file has no keys.", _keys("# none\n", "keys.txt")),
        Message(
            "{file}: the key in line {number} is shorter than 16 characters",
            "Make a longer one, such as with `openssl rand -hex 32`.",
            _keys("secret\n", "line 1"),
        ),
        Message(
            "{file}: the key in line {number} is there twice",
            "Delete one of the lines.",
            _keys(f"{'k' * 16}\nann {'k' * 16}\n", "line 2"),
        ),
        Message(
            "{file}: line {number} has {count} words; write a name and a key, or a key",
            "Names and keys have no spaces.",
            _keys("ann smith 0123456789abcdef\n", "has 3 words"),
        ),
    ),
)
