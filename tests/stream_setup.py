"""Sources of prompts that tests stream: the same prompts as WebDataset shards, text files and a dataset folder."""

import io
import json
import tarfile

from pyarrow import parquet, table

KINDS = ("tar", "txt", "hub")


def shard_prompts(shard, count=30):
    return [f"animal {shard} number {row}" for row in range(count)]


def all_prompts(shards=4):
    return [text for shard in range(shards) for text in shard_prompts(shard)]


def write_tar(path, members):
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            data = content if isinstance(content, bytes) else content.encode()
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def write_source(folder, kind, shards=4):
    """The value of ``prompts.source``; one file per shard."""
    folder.mkdir(exist_ok=True)
    for shard in range(shards):
        prompts, name = shard_prompts(shard), f"shard-{shard:03}"
        if kind == "tar":
            samples = enumerate(prompts)
            members = [(f"{row:05}.{end}", text) for row, prompt in samples for end, text in _sample(prompt).items()]
            write_tar(folder / f"{name}.tar", members)
        elif kind == "txt":
            (folder / f"{name}.txt").write_text("\n".join(prompts))
        else:
            parquet.write_table(table({"prompt": prompts, "size": [0] * len(prompts)}), folder / f"{name}.parquet")
    if kind == "tar":
        return f"{folder}/shard-{{000..{shards - 1:03}}}.tar"
    return f"hf:{folder}" if kind == "hub" else str(folder)


def _sample(prompt):
    return {"jpg": b"\xff\xd8 no image", "json": json.dumps({"prompt": prompt, "size": 0}), "txt": "another caption"}
