"""Uploads on disk: the same bits, and a server whose memory the clients of a round do not fill."""
import contextlib
import io
import os
import weakref
from unittest.mock import patch

import torch

import fedbiot
from extras import spool
from tests.common import copied, pair, refused, run_rounds, same, tiny_lm, toy_shard
from tests.test_attacks import HOSTILE, OneOfThemIsHostile
from tests.test_baselines import method_run


def held(size: int):
    """While this lasts, so many bytes of a round's uploads stay in memory."""
    return patch.object(fedbiot, "HELD", size)


def test_a_run_learns_the_same_from_uploads_on_disk():
    # kills: the last upload in the place of all; offsets of another tensor; another dtype; none on
    # disk; none in memory
    shards = [toy_shard(0, 16), toy_shard(16, 30), toy_shard(5, 25)]
    for method in ("fedbiot", "fedkseed", "fedtt+"):            # three forms of an upload
        memory, _, records = method_run(method, tiny_lm(), shards=shards)
        sizes = [int(record["bytes_up"]) for record in records]         # FedTT+'s differ
        for size in (0, max(sizes)):
            times = sum(max(len(shards) - size // n, 0) for n in sizes)
            kept = patch.object(spool.Spool, "keep", autospec=True, side_effect=spool.Spool.keep)
            with held(size), kept as calls:
                disk, _, found = method_run(method, tiny_lm(), shards=shards)
            assert calls.call_count == times, (method, size, calls.call_count)
            assert same(disk.state_dict()["learnt"], memory.state_dict()["learnt"]), method
            for one, other in zip(records, found, strict=True):
                assert one | {"seconds": 0} == other | {"seconds": 0}, method


class Watched(fedbiot.Client):
    """Counts the bytes of tensors that are alive of those that it has sent up."""
    alive = most = 0

    @classmethod
    def follow(cls, tensor):
        def gone():
            cls.alive -= tensor_bytes
        tensor_bytes = tensor.nbytes
        cls.alive += tensor_bytes
        cls.most = max(cls.most, cls.alive)
        weakref.finalize(tensor, gone)
        return tensor

    def update(self, t, payload, examples, m):
        return {n: self.follow(p.detach() + m) for n, p in self.tuned.items()}, {"loss": 1.0}


def test_a_server_holds_as_many_uploads_of_sixty_clients_as_of_six():
    # kills: all uploads in memory; an upload on disk that is held besides; all read together;
    # those of the last round kept
    server, _ = pair(rounds=2, max_update_norm=0.0)
    client, upload = Watched(server.bootstrap(), server.cfg), fedbiot.payload_bytes(server.tuned)
    read = spool.OnDisk.__getitem__
    watched = patch.object(spool.OnDisk, "__getitem__", lambda *args: Watched.follow(read(*args)))
    for clients in (6, 60):
        Watched.most = 0
        with held(3 * upload), watched:
            run_rounds(server, client, [toy_shard()] * clients)
        assert Watched.alive == 0, "the round is over"
        assert 3 * upload < Watched.most < 4.5 * upload, (Watched.most, upload)


def test_hostile_uploads_are_rejected_on_disk_with_the_same_words():
    # kills: an upload that does not fit read by the expected one's offsets; NaN that counts
    shards = [toy_shard(0, 6), toy_shard(6, 12), toy_shard(12, 40)]
    for change in HOSTILE.values():
        said, learnt = [], []
        for size in (2**26, 0):
            server, client = pair(rounds=1, align_init=0, local_steps=1)
            with contextlib.redirect_stderr(io.StringIO()) as err, held(size):
                run_rounds(server, OneOfThemIsHostile(client, change), shards)
            said.append(err.getvalue())
            learnt.append(copied(server.tuned))
        assert said[0] == said[1] and "client 1: rejected" in said[0], said
        assert same(*learnt), said


def test_a_disk_without_room_for_uploads_is_one_line():
    # kills: a traceback; an error that comes later, when the upload is read; another folder in the
    # place of one that is not there; an upload of which the file has lost the end
    server, client = pair()
    with held(0), patch.dict(os.environ, TMPDIR="/none/of/these"):
        refused(lambda: run_rounds(server, client, [toy_shard()]), "TMPDIR", "No such file")
    uploads = spool.Spool(server.expected(0))
    kept = [uploads.keep(server.expected(0)) for _ in range(2)]
    uploads.file.truncate(fedbiot.payload_bytes(server.tuned) + 5)
    assert same(dict(kept[0]), server.expected(0))
    refused(lambda: dict(kept[1]), "TMPDIR", "cut")
    with open("/dev/full", "w+b", 0) as uploads.file:
        refused(lambda: uploads.keep(server.expected(0)), "TMPDIR", "No space left")


def test_a_tensor_of_any_stride_and_dtype_is_its_bytes():
    # kills: a single number of stride 2, FedKSeed's upload after one step
    grid = torch.arange(6.0).view(2, 3)
    for t in (grid[:1, 1], grid.T, grid[1, 2], grid[:0], grid > 2, grid.int()[:, 1]):
        assert spool.as_bytes(t).numpy().tobytes() == t.numpy().tobytes(), t
    memory, _, _ = method_run("fedkseed", tiny_lm(), local_steps=1)
    with held(0):
        disk, _, _ = method_run("fedkseed", tiny_lm(), local_steps=1)
    assert same(disk.state_dict()["learnt"], memory.state_dict()["learnt"])


class Halves(io.BytesIO):
    """A file that writes and reads at most 99 bytes at a time."""

    def write(self, content):
        return super().write(content[:99])

    def readinto(self, into):
        return super().readinto(into[:99])


def test_a_file_may_take_and_give_less_than_is_asked_for():
    # kills: what is over forgotten; an upload written over the one before it
    server, _ = pair()
    uploads = spool.Spool(server.expected(0))
    uploads.file = Halves()
    others = [{name: t + i for name, t in server.expected(0).items()} for i in range(3)]
    kept = [uploads.keep(other) for other in others]
    uploads.file.seek(7)
    kept.append(uploads.keep(others[0]))
    assert all(same(dict(a), b) for a, b in zip(kept, [*others, others[0]]))
