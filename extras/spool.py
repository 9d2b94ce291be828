"""Uploads that wait on disk until they are averaged: what a server holds does not grow with the
clients of a round. (They cannot be summed as they come: `fedbiot.accepted` compares each with the
median of all.)"""
import os
import tempfile
from collections.abc import Mapping

import torch
from torch import Tensor

from fedbiot import Payload, misfit
from model import UserError


class Spool:
    """A file without a name, in the folder for temporary files (TMPDIR), for uploads of the names,
    shapes and dtypes of `expected`. It is gone with the last of them, or with the process."""

    def __init__(self, expected: Payload):
        self.expected, self.file = expected, tempfile.TemporaryFile()
        self.places, self.size = {}, 0                  # in an upload's bytes: (from, to) by name
        for name, t in expected.items():
            self.places[name] = self.size, self.size + t.nbytes
            self.size += t.nbytes

    def keep(self, upload: Payload) -> Mapping[str, Tensor]:
        """The same upload, on disk; of one that does not fit, which nobody will average, its names,
        shapes and dtypes. A GPU is read once."""
        if misfit(upload, self.expected):
            return {name: t.to("meta") for name, t in upload.items()}
        parts = [upload[name].contiguous().view(-1).view(torch.uint8) for name in self.places]
        start, content = self.file.seek(0, os.SEEK_END), torch.cat(parts).cpu().numpy()
        try:
            self.file.write(content)
            self.file.flush()
        except OSError as error:
            raise UserError(f"{tempfile.gettempdir()}: expected room for a round's uploads, "
                            f"{self.size / 1e6:.2f} MB each, found: {error.strerror}; set TMPDIR "
                            f"to a larger folder") from None
        return OnDisk(self, start)


class OnDisk(Mapping):
    """An upload in a spool, from the byte `start` on. A tensor is read, on the CPU, each time that
    it is asked for."""

    def __init__(self, spool: Spool, start: int):
        self.spool, self.start = spool, start

    def __getitem__(self, name: str) -> Tensor:
        first, end = self.spool.places[name]
        like, content = self.spool.expected[name], bytearray(end - first)
        self.spool.file.seek(self.start + first)
        assert self.spool.file.readinto(content) == len(content), f"{name}: the file was cut"
        return torch.frombuffer(content, dtype=like.dtype).view(like.shape)

    def __iter__(self):
        return iter(self.spool.places)

    def __len__(self):
        return len(self.spool.places)
