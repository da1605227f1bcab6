"""Images to make again, and servers that cannot start."""

import json
from pathlib import Path

from bad_inputs.files import PROMPTS, folder
from bad_inputs.lora import tensors
from bad_inputs.table import Case, Message, Section


def _keys(content: str, expected: str) -> Case:
    return Case("serve tiny --api-keys keys.txt", expected, {"keys.txt": content})


def _other_vae(path: Path) -> None:
    config = json.loads((path.parents[1] / "tiny" / "vae" / "config.json").read_text(encoding="utf-8"))
    path.write_text(json.dumps(config | {"scaling_factor": 0.5}), encoding="utf-8")


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
            Case("serve tiny --replicas 1 --host 0.0.0.0", "--host 0.0.0.0"),
        ),
        Message(
            "--host {address} --port {port}: cannot be used ({reason})",
            "Another program listens there, or the address is not one of this machine.",
            Case("serve tiny --host 127.0.0.1.5 --port 0 --api-keys keys.txt", "127.0.0.1.5", {"keys.txt": "k" * 16}),
        ),
        Message(
            "--replicas: {count} replicas need as many {kind}; there are {count}",
            "Each replica has a GPU of its own where there are GPUs, and at least one CPU.",
            Case("serve tiny --replicas 4000", "4000 replicas"),
            Case("serve tiny --max-replicas 4000", "4000 replicas"),
        ),
        Message(
            "max_replicas: {count} is less than replicas, {count}",
            "`--replicas` is the smallest number, `--max-replicas` the largest.",
            Case("serve tiny --replicas 3 --max-replicas 2", "max_replicas: 2"),
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
        Message(
            "{folder}: no LoRA files; put .safetensors files there, or folders of peft or diffusers",
            "Files of other kinds are passed over.",
            Case("serve tiny --lora-dir loras", "loras: no LoRA files", {"loras": folder}),
        ),
        Message(
            "{file}: {file} has the same name, {name}; rename one of them",
            "Requests name a file without its ending.",
            Case(
                "serve tiny --lora-dir loras",
                "has the same name, a",
                {"loras/a.safetensors": tensors({}), "loras/a/one.safetensors": tensors({})},
            ),
        ),
        Message(
            "--lora-dir: LoRA files cannot be changed in weights in fp8; give --dtype bf16",
            "They are merged before weights are quantized.",
            Case("serve tiny --lora-dir loras --dtype fp8", "--lora-dir", {"loras/a.safetensors": tensors({})}),
        ),
        Message(
            "{folder}: has no language head to revise prompts with; give --enhancer FOLDER of a causal language model, "
            "or URL#MODEL",
            "The text encoder's weights are for features alone.",
            Case("generate tiny 'a fox' --enhance", "tiny/text_encoder"),
            Case("serve tiny --enhancer own", "tiny/text_encoder"),
        ),
        Message(
            "{folder}: no such folder; give that of a causal language model",
            "Check the path.",
            Case("serve tiny --enhancer nowhere", "nowhere: no such folder"),
            Case("generate tiny 'a fox' --enhance --enhancer nowhere", "nowhere: no such folder"),
        ),
        Message(
            "{folder}: no causal language model can be loaded ({reason})",
            "The folder has no model in transformers' layout, or one without safetensors.",
            Case("serve tiny --enhancer empty", "empty: no causal language model", {"empty": folder}),
        ),
        Message(
            "--enhancer {endpoint}: give URL#MODEL, as in http://localhost:8000/v1#MODEL",
            "The model is the name that the server of the endpoint knows.",
            Case("serve tiny --enhancer http://localhost/v1", "give URL#MODEL"),
        ),
        Message(
            "{folder}: no such folder; give that of a VAE in diffusers' layout",
            "Check the path.",
            Case("generate tiny 'a fox' --vae nowhere", "nowhere: no such folder"),
            Case("serve tiny --vae nowhere", "nowhere: no such folder"),
        ),
        Message(
            "{folder}: {key} is {value}, that of the model's own VAE {value}; use one that agrees",
            "Latents of another VAE would be decoded to noise.",
            Case("generate tiny 'a fox' --vae vae", "scaling_factor is 0.5", {"vae/config.json": _other_vae}),
        ),
        Message(
            "{option}: an edit begins from an image; give --image FILE",
            "`--strength` and `--mask` belong to an edit.",
            Case("generate tiny 'a fox' --strength 0.5", "--strength"),
            Case("generate tiny 'a fox' --mask mask.png", "--mask"),
        ),
        Message(
            "{file}: cannot be read as PNG, JPEG, WEBP ({reason})",
            "It is no image, or damaged.",
            Case("generate tiny 'a fox' --image prompts.txt", "prompts.txt", {"prompts.txt": PROMPTS}),
        ),
    ),
)
