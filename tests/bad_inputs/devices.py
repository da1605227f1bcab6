"""Devices, dtypes, attention backends and GPUs that are not there."""

from bad_inputs.files import CACHE, DISTILL, PROMPTS
from bad_inputs.lora_train import LORA
from bad_inputs.table import Case, Message, Section

_RECIPE = {"mine.yaml": DISTILL, "prompts.txt": PROMPTS}

SECTION = Section(
    "Devices and data types",
    "`--device` names a device of PyTorch, `--dtype` the data type of the weights.",
    (
        Message(
            "device {name}: not a device; use auto, cpu, cuda, cuda:1, ...",
            "Take one of PyTorch's names of devices.",
            Case("generate tiny 'a fox' --device gpu", "device gpu"),
            Case("evaluate tiny --prompts prompts.txt --device 0x", "device 0x", {"prompts.txt": PROMPTS}),
            Case("distill mine.yaml --device gpu", "device gpu", _RECIPE),
            Case("distill mine.yaml --device gpu --ray 2", "device gpu", _RECIPE),
            Case(
                "tune mine.yaml --space space.yaml --minutes 5 --device gpu",
                "device gpu",
                _RECIPE | {"space.yaml": "optim.student.lr: [0.01, 0.02]\n"},
            ),
            Case("cache-trajectories cache.yaml --device gpu", "device gpu", _RECIPE | {"cache.yaml": CACHE}),
            Case("encode-prompts prompts.txt --out shards --model tiny --device gpu", "device gpu", _RECIPE),
            Case("prefs collect tiny a=tiny --prompts prompts.txt --out votes --device gpu", "device gpu", _RECIPE),
            Case("lora train mine.yaml --device gpu", "device gpu", {"mine.yaml": LORA}),
            Case("lora adapter tiny --out a.safetensors --prompts prompts.txt --device gpu", "device gpu"),
            Case("prefs train votes --out head --device gpu", "device gpu"),
            Case("lora choose run --device gpu", "device gpu"),
        ),
        Message(
            "device {name}: not available here ({reason}); use cpu",
            "This machine has no such device, or PyTorch was installed without support for it.",
            Case("generate tiny 'a fox' --device cuda:99", "device cuda:99"),
            Case("generate tiny 'a fox' --device meta", "device meta"),
            Case("evaluate tiny --prompts prompts.txt --device cuda:99", "cuda:99", {"prompts.txt": PROMPTS}),
        ),
        Message(
            "attention {name}: no such backend; usual: {names}; all: {address}",
            "`--attention-backend` takes the names of diffusers' backends.",
            Case("generate tiny 'a fox' --attention-backend wrong", "wrong: no such backend; usual: native, flash"),
            Case("generate nowhere 'a fox' --attention-backend FLASH", "FLASH"),
        ),
        Message(
            "fp16: activations of this model family overflow in it; take bf16",
            "Images would be black. bf16 takes the same memory.",
            Case("generate tiny 'a fox' --dtype fp16", "take bf16"),
            Case("evaluate tiny --prompts prompts.txt --dtype fp16", "take bf16", {"prompts.txt": PROMPTS}),
            Case("convert tiny --out model --dtype fp16", "take bf16"),
        ),
        Message(
            "--gpu {name}: give a size such as 24GB, or one of {names}",
            "Give the memory of the GPU, or one of the names.",
            Case("plan mine.yaml --gpu rtx", "--gpu rtx", _RECIPE),
            Case("plan mine.yaml --gpu 24XB", "--gpu 24XB", _RECIPE),
            Case("plan mine.yaml --gpu nan", "--gpu nan", _RECIPE),
            Case("plan mine.yaml --gpu -5", "--gpu -5", _RECIPE),
            Case("plan mine.yaml --gpu 0GB", "--gpu 0GB", _RECIPE),
            Case("plan mine.yaml --gpu inf", "--gpu inf", _RECIPE),
        ),
    ),
)
