"""Uploads that wait on disk until they are averaged: what a server holds does not grow with the
clients of a round. (They cannot be summed as they come: `fedbiot.accepted` compares each with the
median of all.)"""
import itertools
import os
import tempfile
from collections.abc import Mapping

import torch
from torch import Tensor

from fedbiot import Payload, misfit
from model import expecting


def a_folder_with_room():
    return expecting("a folder with room for a round's uploads", "TMPDIR (default /tmp)")


def as_bytes(t: Tensor) -> Tensor:
    """A tensor's bytes, uint8 (n,), a view where it is contiguous. (A single number counts as
    contiguous whatever its stride is, which `view` then refuses.)"""
    return t.contiguous().as_strided((t.numel(),), (1,)).view(torch.uint8)


class Spool:
    """A file without a name, in the folder TMPDIR (default /tmp), for uploads of the names, shapes
    and dtypes of `expected`. It is gone with the last of them, or with the process."""

    def __init__(self, expected: Payload):
        self.expected, ends = expected, itertools.accumulate(t.nbytes for t in expected.values())
        self.places = dict(zip(expected, [0, *ends]))           # where in an upload's bytes
        with a_folder_with_room():
            self.file = tempfile.TemporaryFile(buffering=0, dir=os.environ.get("TMPDIR") or None)

    def keep(self, upload: Payload) -> Mapping[str, Tensor]:
        """The same upload, on disk; of one that does not fit, which nobody will average, its names,
        shapes and dtypes. A GPU is read once."""
        if misfit(upload, self.expected):
            return {name: t.to("meta") for name, t in upload.items()}
        content = torch.cat([as_bytes(upload[name].detach()) for name in self.places])
        left = memoryview(content.cpu().numpy())
        with a_folder_with_room():
            start = self.file.seek(0, os.SEEK_END)
            while left:
                left = left[self.file.write(left):]
        return OnDisk(self, start)


class OnDisk(Mapping):
    """An upload in a spool, from the byte `start` on. A tensor is read, on the CPU, each time that
    it is asked for."""

    def __init__(self, spool: Spool, start: int):
        self.spool, self.start = spool, start

    def __getitem__(self, name: str) -> Tensor:
        like = self.spool.expected[name]
        tensor = torch.empty(like.shape, dtype=like.dtype)
        left = memoryview(as_bytes(tensor).numpy())
        with a_folder_with_room():
            self.spool.file.seek(self.start + self.spool.places[name])
            while left:
                if not (n := self.spool.file.readinto(left)):
                    raise ValueError("a file that was cut")
                left = left[n:]
        return tensor

    def __iter__(self):
        return iter(self.spool.places)

    def __len__(self):
        return len(self.spool.places)
