"""Samples of WebDataset shards: members of a tar file with one key, such as ``00012.jpg`` and ``00012.txt``, are one
sample. Members of other kinds are passed over, and nothing is unpickled."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fewstep.errors import UserError
from fewstep.machine import reading

_PICKLES = (".pyd", ".pickle", ".pkl", ".pth", ".pt")


@dataclass(frozen=True)
class TarSample:
    """One sample.

    Attributes:
        key: the name that its members share, without extensions.
        where: its file and key, for messages.
        members: contents by extension, in lower case and without the dot.
    """

    key: str
    where: str
    members: Mapping[str, bytes]


def check_webdataset(what: str) -> None:
    """Raises: UserError if the package is missing that reads shards, for ``what``."""
    try:
        import webdataset.tariterators  # noqa: F401
    except ImportError:
        raise UserError(f"{what}: WebDataset shards need webdataset; pip install 'fewstep[stream]'") from None


def read_samples(path: Path, extensions: Collection[str]) -> Iterator[TarSample]:
    """The samples of a shard that have members of these kinds, one after the other, each with those members.

    Raises:
        UserError: the file is damaged or holds pickles, or a package is missing.
    """
    check_webdataset(str(path))
    from webdataset.tariterators import group_by_keys

    with reading(path, "not a tar file, or a damaged one"):
        try:
            for sample in group_by_keys(_members(path, extensions)):
                key = sample["__key__"]
                members = {name: sample[name] for name in extensions if name in sample}
                yield TarSample(key, f"{path}, sample {key}", members)
        except ValueError:
            raise UserError(f"{path}: two members of one sample have the same name; write the shard again") from None


def _members(path: Path, extensions: Collection[str]) -> Iterator[dict[str, Any]]:
    """The members of these kinds, read one after the other."""
    from webdataset.tariterators import base_plus_ext, tar_file_iterator

    def is_read(name: str) -> bool:
        return _is_pickle(name) or str(base_plus_ext(name)[1]).lower() in extensions

    with path.open("rb") as stream:
        for member in tar_file_iterator(stream, select_files=is_read):
            if _is_pickle(member["fname"]):
                raise UserError(f"{path}: {member['fname']} is a pickle, which can run any program; leave it out")
            yield {**member, "__url__": str(path)}


def _is_pickle(name: str) -> bool:
    return name.lower().endswith(_PICKLES)
