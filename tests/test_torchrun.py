"""A run over several processes: the same bits, bounded memory, errors, slow and killed ranks."""
import contextlib
import gc
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch

import data
import fedbiot
import train
from extras import torchrun
from tests.common import (
    HERE, RUN_FILES, WEIGHTS, assert_same_run, cli, errors_in, fast_scores, folder, free_port,
    one_line, ranks, read_json, read_log, read_saved, refused, same,
    small_run, tiny_lm,
)


# ---- the same bits ------------------------------------------------------------------------------

def first_rank_is_slow():
    """Rank 1 is. One upload of `small_run`, 10,240 bytes, fits into memory; a line is printed for
    each of the others, which wait on disk."""
    torchrun.HELD, keep = 15_000, torchrun.Spool.keep

    def keep_and_say(self, upload):
        print("on disk", flush=True)
        return keep(self, upload)
    torchrun.Spool.keep, original = keep_and_say, fedbiot.Client.update

    def update(self, t, *args):
        time.sleep(0.3 if os.environ["RANK"] == "1" else 0)
        return original(self, t, *args)
    fedbiot.Client.update = update


def test_more_processes_give_the_same_bits():
    # kills: summed as they arrive; the same client twice; a client's number by its rank; header
    # counted as payload; an upload on disk read as another's, or all in memory
    with folder() as path, fast_scores():
        flags = small_run(path, *WEIGHTS) + ["--rounds", 2]
        for world, clients, per_round in ((3, 5, 0), (4, 2, 0), (3, 6, 1)):
            argv = *flags, "--clients", clients, "--clients-per-round", per_round
            one, many = path / f"one-{clients}", path / f"many-{clients}"
            assert cli(*argv, "--out", one)[0] == 0
            statuses, texts = ranks(path, world, *argv, "--out", many, change=first_rank_is_slow)
            assert statuses == [0] * world, texts
            assert "round 2" in texts[0] and not any(texts[1:]), "only rank 0 prints"
            assert texts[0].count("on disk") == 2 * ((per_round or clients) - 1), texts[0]
            assert_same_run(many, one)


class AllOffer(torchrun.Processes):
    """A server of so many ranks that are done in no time, each with an upload of 1 MB, of which it
    takes a twentieth of a second to receive one. Counts how many come at once."""

    def __init__(self, ranks: int, timeout: float):
        self.rank, self.world, self.timeout, self.busy = 0, ranks + 1, timeout, {}
        self.place = self.device = torch.device("cpu")
        self.upload, self.coming, self.most = {"a": torch.zeros(2**18)}, 0, 0
        self.until = time.monotonic() + 20

    def post(self, rank, message, payload):
        pass

    def send(self, rank, payload):
        pass

    def has_posted(self, rank):
        assert time.monotonic() < self.until, "nobody is asked for an upload"
        return True

    def look(self, rank):
        return {"loss": 1.0, "examples": 1}, torchrun.header_of(self.upload)

    def receive(self, rank, like):
        self.coming += 1
        self.most = max(self.most, self.coming)
        time.sleep(0.05)
        self.coming -= 1
        return {name: torch.full_like(t, rank, device="cpu") for name, t in like.items()}


def test_uploads_come_as_memory_allows_and_who_waits_is_in_time():
    # kills: all that are offered asked for at once; none where one alone is over the limit; the
    # clock of --client-timeout runs on while a client waits for its turn, or for the server's disk
    keep = torchrun.Spool.keep

    def keep_slowly(self, upload):
        time.sleep(0.5)
        return keep(self, upload)
    for n, held, most, disk in ((9, 3.5 * 2**20, 3, keep), (9, 0, 1, keep), (9, 2**26, 9, keep),
                                (3, 0, 1, keep_slowly)):
        wire = AllOffer(n, timeout=0.4)
        with patch.object(torchrun, "HELD", held), patch.object(torchrun.Spool, "keep", disk), (
                contextlib.redirect_stderr(io.StringIO())) as err:
            results, _, up = wire.round(0, {}, None, [None] * n, list(range(n)), wire.upload)
        assert wire.most == most and err.getvalue() == "", (wire.most, err.getvalue())
        assert sorted(results) == list(range(n)) and len(up) == n
        numbers = sorted(upload["a"].unique().item() for upload, _ in results.values())
        assert numbers == list(range(1, n + 1))


def test_two_hosts_over_loopback():
    # kills: ranks counted a host
    cores = patch.object(os, "sched_getaffinity", lambda pid: set(range(12)))
    with patch.dict(os.environ, WORLD_SIZE="6", LOCAL_WORLD_SIZE="3"), cores:
        assert train.resolve({}).threads == 4, "a share of this host's cores"
    with folder() as path:
        flags = small_run(path) + ["--rounds", "1", "--eval-limit", "1", "--out"]
        argv = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node",
                "1", "--master-addr", "127.0.0.1", "--master-port", free_port(), "--node-rank"]
        hosts = [subprocess.Popen([*argv, rank, HERE / "train.py", *flags, path / "two"], text=True,
                                  stdout=subprocess.PIPE, stderr=subprocess.PIPE)
                 for rank in "01"]
        try:
            texts = [host.communicate(timeout=120) for host in hosts]
        finally:
            for host in hosts:
                host.kill()
        assert [host.returncode for host in hosts] == [0, 0], texts
        assert "round 1 |" in texts[0][0] and not texts[1][0]
        assert cli(*flags, path / "one")[0] == 0
        assert_same_run(path / "one", path / "two")


def own_rows(path: Path, numbers) -> Path:
    """A client's folder: GSM8K's training file, and nothing else."""
    (path / "gsm8k").mkdir(parents=True)
    rows = [{"question": f"What is {i} and {i}?", "answer": f"It is {2 * i}.\n#### {2 * i}"}
            for i in numbers]
    (path / "gsm8k" / "train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def as_shards(folders):
    """While this lasts, a run in this process has these clients, a folder each."""
    def make_shards(task, data_dir, tokenizer, clients, max_len, *_):
        return [data.Shard(data.training_examples(task, path, tokenizer, max_len))
                for path in folders]
    return patch.object(train, "make_shards", make_shards)


def no_network():
    def urlopen(*args, **keywords):
        raise OSError("the network is not there")
    urllib.request.urlopen = urlopen


def lines_of_a_client(text: str, m: int, examples: int) -> list[float]:
    """The losses that a client rank printed: of a run of two rounds all its lines, in columns."""
    joined, *rounds = text.splitlines()
    assert joined == f"client {m} | joined  | {examples} examples, waits for the server", text
    found = [re.fullmatch(rf"client {m} \| round {t} \| loss (\d+\.\d{{3}}) \| \d+ s", line)
             for t, line in enumerate(rounds, 1)]
    assert all(found), text
    return [float(line[1]) for line in found]


def test_every_client_may_have_data_of_its_own():
    # kills: a rank's shard by another number; equal weights for unequal shards; the server asks for
    # training data; data that changed is resumed with; which rank failed is not said; a client
    # rank is silent, numbers clients or rounds by another start, prints another's loss; the ranks
    # that are ended by another's error say nothing
    with folder() as path, fast_scores():
        flags = small_run(path, *WEIGHTS) + ["--rounds", 2]
        (path / "data" / "gsm8k" / "train.jsonl").unlink()
        own = [own_rows(path / f"own{m}", range(20 * m, 20 * m + size))
               for m, size in enumerate((5, 17, 9))]
        with as_shards(own):
            assert cli(*flags, "--out", path / "one")[0] == 0

        def four(out, *more, folders=own):
            def folder_of(rank):
                return ["--data-dir", folders[rank - 1]] if rank else []
            return ranks(path, 4, *flags, "--own-data", "--out", path / out, *more, own=folder_of,
                         change=no_network)
        statuses, texts = four("four")
        assert statuses == [0] * 4, texts
        assert_same_run(path / "one", path / "four")
        losses = [lines_of_a_client(texts[m + 1], m, size) for m, size in enumerate((5, 17, 9))]
        for row, *each in zip(read_log(path / "four"), *losses, strict=True):
            mean = (5 * each[0] + 17 * each[1] + 9 * each[2]) / 31
            assert abs(float(row["client_loss"]) - mean) < 0.001, (row, each)

        (path / "four" / "summary.json").unlink()
        (path / "none").mkdir()
        dolly = own_rows(path / "dolly", [1]) / "gsm8k" / "train.jsonl"
        dolly.write_text('{"instruction": "Why?", "context": "", "response": "So."}\n')
        for folders, *more, words in (
                ([own[0], path / "none", own[2]], "--rounds", 2, ["rank 2", "train.jsonl"]),
                ([own[0], own[1], path / "dolly"], "--rounds", 2, ["rank 3", "'question'"]),
                ([own[1], own[0], own[2]], "--resume", ["rank", "other training data"])):
            statuses, texts = four("four" if "--resume" in more else "bad", *more, folders=folders)
            error, = errors_in(texts)
            assert statuses == [2] * 4 and all(word in error for word in words), texts
            assert sum("its terminal says why" in text for text in texts) == 3, texts
            assert not (path / "bad").exists()
        one_line(cli(*flags, "--own-data", "--out", path / "alone"), "--own-data", "torchrun")
    with patch.dict(os.environ, WORLD_SIZE="4", LOCAL_WORLD_SIZE="4"):
        refused(lambda: train.resolve({"own_data": True, "validate": 5}), "--validate 5", "own-dat")
        refused(lambda: train.resolve({"own_data": True, "method": "offsite"}), "one client", 3)


def test_every_method_runs_over_processes():
    # kills: no expected() for a method; FedTT+ on a rank that missed a round; tensors of an unknown
    # dtype; --own-data for some methods only
    with folder() as path, fast_scores():
        flags = small_run(path) + ["--rounds", 2]
        own = [own_rows(path / f"own{m}", range(20 * m, 20 * m + size))
               for m, size in enumerate((5, 17))]
        for method, *more in (["offsite", "--clients", 1, "--adapter", 1],
                              ["fedavg"], ["fedkseed-pro", "--client-timeout", 60],
                              ["fedtt+"], ["fedtt+", "--clients-per-round", 1],
                              ["fedpt", "--proxy-ckpt", path / "ckpt", "--proxy-steps", 2]):
            argv = *flags, "--method", method, *more
            one, three = path / f"one {method} {more[:1]}", path / f"three {method} {more[:1]}"
            alone = method == "offsite"                     # one client: no data of its own
            with contextlib.nullcontext() if alone else as_shards(own):
                status, _, err = cli(*argv, *([] if alone else ["--clients", 2]), "--out", one)
            assert status == 0, err
            folder_of = (lambda r: []) if alone else lambda r: [
                "--own-data", *(["--data-dir", own[r - 1]] if r else [])]
            statuses, texts = ranks(path, 3, *argv, "--out", three, own=folder_of)
            assert statuses == [0] * 3, texts
            assert_same_run(one, three)


# ---- what a client's rank holds -----------------------------------------------------------------

def bare_clients(path):
    """The flags of the ranks 1, 2, …: a checkpoint without its weights."""
    shutil.copytree(path / "ckpt", path / "bare", ignore=shutil.ignore_patterns("*.pth"))
    return lambda rank: ["--ckpt", path / "bare"] if rank else []


def says_what_it_holds():
    original = fedbiot.Client.update

    def update(self, *args):
        done = original(self, *args)
        tensors = [x for x in gc.get_objects() if isinstance(x, torch.Tensor)]
        storages = [t.untyped_storage() for t in tensors if t.device.type != "meta"]
        held = sum({s.data_ptr(): s.nbytes() for s in storages}.values())
        os.write(1, f"holds {held}\n".encode())
        return done
    fedbiot.Client.update = update


def test_a_client_rank_holds_the_compressed_model_and_no_more():
    # kills: what was received kept beside the model; dropped layers in the bootstrap
    with folder() as path:
        flags = small_run(path) + ["--rounds", 1]
        statuses, texts = ranks(path, 2, *flags, "--out", path / "run", own=bare_clients(path),
                                change=says_what_it_holds)
        assert statuses == [0, 0], texts
        summary = read_json(path / "run" / "summary.json")
    held = max(map(int, re.findall(r"holds (\d+)", texts[1])))
    least, lora = summary["bootstrap_bytes"], summary["bytes_down_per_client_round"]
    whole = 4 * sum(t.numel() for t in tiny_lm(vocab_size=1024).state_dict().values())
    assert least <= held < least + 7 * lora < whole, (held, summary, whole)


def test_a_client_rank_needs_no_weights():
    # kills: load() on every rank
    with folder() as path, fast_scores():
        flags = small_run(path) + ["--rounds", 1, "--dtype", "bf16"]
        assert cli(*flags, "--out", path / "one")[0] == 0
        statuses, texts = ranks(path, 2, *flags, "--out", path / "two", own=bare_clients(path))
        assert statuses == [0, 0], texts
        assert_same_run(path / "one", path / "two")


# ---- errors, slow and hostile ranks -------------------------------------------------------------

def test_an_error_on_any_rank_ends_all_in_one_line():
    # kills: rank 0 waits for ever; every rank prints; the others end with status 0
    with folder() as path:
        flags = small_run(path) + ["--rounds", 1, "--out", path / "run"]
        no_folder = path / "ckpt" / "params.json"
        for wrong, argv, *words in (((0, 1, 2), ["--rank", 0], "--rank 0"),
                                    ((2,), ["--data-dir", no_folder], "train.jsonl"),
                                    ((1,), ["--lr", 0.5], "rank 1", "--lr 0.5", "0.001"),
                                    ((0, 1, 2), ["--lr", 1e9], "client", "smaller --lr")):
            statuses, texts = ranks(path, 3, *flags, own=lambda r: argv if r in wrong else [])
            assert statuses == [2, 2, 2], texts
            error, = errors_in(texts)
            assert all(word in error for word in words), error


def second_client_is_very_slow():
    original, seconds = fedbiot.Client.update, {(0, 1): 4, (1, 0): 2}

    def update(self, t, payload, shard, m):
        time.sleep(seconds.get((t, m), 0))                  # round 2 sees round 1's late answer
        return original(self, t, payload, shard, m)
    fedbiot.Client.update = update


def test_a_slow_client_is_left_out_of_the_round():
    # kills: waits for it; its weight still in the average; the client never comes back
    original = fedbiot.Wire.round

    def without_one(self, t, payload, client, shards, chosen, expected):
        chosen = [m for m in chosen if (t, m) != (0, 1)]
        return original(self, t, payload, client, shards, chosen, expected)
    with folder() as path, fast_scores():
        flags = small_run(path) + ["--rounds", 2, "--client-timeout", 3]
        with patch.object(fedbiot.Wire, "round", without_one):
            assert cli(*flags, "--out", path / "one")[0] == 0
        statuses, texts = ranks(path, 4, *flags, "--out", path / "four",
                                change=second_client_is_very_slow)
        assert statuses[0] == 0, texts
        assert float(read_log(path / "four")[0]["seconds"]) < 3.9, "not waited for"
        line = "round 1, client 1: left out, no upload within --client-timeout 3 s"
        assert re.findall("^.*left out.*$", texts[0], re.M) == [line], texts[0]
        assert_same_run(path / "one", path / "four")


def every_client_takes_a_moment():
    original = fedbiot.Client.update

    def update(self, *args):
        time.sleep(0.7)
        return original(self, *args)
    fedbiot.Client.update = update


def first_client_stays_away():
    original = fedbiot.Client.update

    def update(self, t, payload, shard, m):
        time.sleep(4 if m == 0 else 0)
        return original(self, t, payload, shard, m)
    fedbiot.Client.update = update


def test_who_was_never_given_work_is_not_left_out():
    # kills: the clock of --client-timeout begins with the round
    with folder() as path, fast_scores():
        flags = small_run(path) + ["--rounds", 1, "--client-timeout", 1.5, "--clients", 5]
        assert cli(*flags, "--out", path / "one")[0] == 0
        statuses, texts = ranks(path, 3, *flags, "--out", path / "three",
                                change=every_client_takes_a_moment)
        assert statuses == [0] * 3 and "left out" not in texts[0], texts
        assert_same_run(path / "one", path / "three")
        statuses, texts = ranks(path, 3, *flags, "--out", path / "late",
                                change=first_client_stays_away)
        assert statuses[0] == 0, texts
        assert re.findall("client (.): left out", texts[0]) == ["0"], texts


BALLAST = 2**24         # bytes in a payload, more than a socket's buffer holds


def hosts_fall_asleep(path: Path):
    """Client 1's host before it receives round 1, client 2's in the middle of its upload of round
    2. Client 0 waits in the next round until the one that slept is at work again."""
    broadcast, update = fedbiot.Server.broadcast, fedbiot.Client.update
    rank, receive, send = os.environ["RANK"], torchrun.Processes.receive, torchrun.Processes.send
    calls = iter(range(100))

    def receive_asleep(self, *args):
        if next(calls) == 1:                                # 0 is the bootstrap
            os.kill(os.getpid(), signal.SIGSTOP)
        return receive(self, *args)

    def send_asleep(self, to, payload):
        for name in payload:
            if next(calls) == 1 + len(payload):             # the second upload's second tensor
                os.kill(os.getpid(), signal.SIGSTOP)
            send(self, to, {name: payload[name]})

    def update_when_all_are_here(self, t, payload, shard, m):
        (path / f"client {m} round {t + 1}").touch()
        while m == 0 and t and not (path / f"client {t} round {t + 1}").exists():
            time.sleep(0.02)
        payload.pop("ballast")
        return update(self, t, payload, shard, m)
    ballast = {"ballast": torch.zeros(BALLAST, dtype=torch.uint8)}
    fedbiot.Server.broadcast = lambda self, t: broadcast(self, t) | ballast
    fedbiot.Client.update = update_when_all_are_here
    if rank == "2":
        torchrun.Processes.receive = receive_asleep
    if rank == "3":
        torchrun.Processes.send = send_asleep


def test_a_host_that_falls_asleep_does_not_hold_up_the_others():
    # kills: the server waits in a transfer, down or up; the client never comes back
    original, seen = fedbiot.Wire.round, []

    def without_who_sleeps(self, t, payload, client, shards, chosen, expected):
        chosen = [m for m in chosen if (t, m) not in ((0, 1), (1, 2))]
        return original(self, t, payload, client, shards, chosen, expected)

    def wake(jobs):
        until = time.monotonic() + 60
        while len(seen) < 2 and time.monotonic() < until and jobs[0].is_alive():
            time.sleep(0.02)
            text = "".join(log.read_text() for log in path.glob("log0"))
            for line in re.findall("^.*left out", text, re.M)[len(seen):]:
                os.kill(jobs[2 + len(seen)].pid, signal.SIGCONT)
                seen.append(line)
        for job in jobs if len(seen) < 2 else ():
            job.kill()
    with folder() as path, fast_scores():
        flags = small_run(path) + ["--rounds", 3, "--client-timeout", 3]
        own = [own_rows(path / f"own{m}", range(9 * m, 9 * m + 9)) for m in range(3)]
        with patch.object(fedbiot.Wire, "round", without_who_sleeps), as_shards(own):
            assert cli(*flags, "--out", path / "one")[0] == 0
        statuses, texts = ranks(path, 4, *flags, "--own-data", "--out", path / "four", then=wake,
                                own=lambda r: ["--data-dir", own[r - 1]] if r else [],
                                change=partial(hosts_fall_asleep, path))
        assert statuses == [0] * 4, texts
        assert seen == ["round 1, client 1: left out", "round 2, client 2: left out"], texts[0]
        one, four = (read_saved(path / run / "lora.pt") for run in ("one", "four"))
        assert same(one, four)


def second_client_sleeps_as_it_sends(path: Path):
    """Until the run has ended without it."""
    send = torchrun.Processes.send

    def send_late(self, to, payload):
        (path / "asleep").touch()
        os.kill(os.getpid(), signal.SIGSTOP)
        send(self, to, payload)
    if os.environ["RANK"] == "2":
        torchrun.Processes.send = send_late


def test_who_wakes_after_the_end_has_the_runs_status():
    # kills: status 2, since its transfer was cut, of a run that succeeded without it
    def wake(jobs):
        until = time.monotonic() + 60
        while not (path / "run" / "summary.json").exists() and time.monotonic() < until:
            time.sleep(0.02)
        os.kill(jobs[2].pid, signal.SIGCONT)
    with folder() as path:
        flags = small_run(path) + ["--rounds", 1, "--client-timeout", 2]
        statuses, texts = ranks(path, 3, *flags, "--out", path / "run", then=wake,
                                change=partial(second_client_sleeps_as_it_sends, path))
        assert (path / "asleep").exists() and "left out" in texts[0], texts
        assert statuses == [0, 0, 0], (statuses, texts)


def second_client_claims_a_giant():
    original = torchrun.header_of

    def header_of(upload):
        return [[name, dtype, [10**9, *shape]] for name, dtype, shape in original(upload)]
    if os.environ["RANK"] == "2":
        torchrun.header_of = header_of


def test_what_a_header_claims_is_not_allocated():
    # kills: memory for whatever a client says that it sends; the next order never heard
    with folder() as path:
        flags = small_run(path) + ["--rounds", 2]
        statuses, texts = ranks(path, 4, *flags, "--out", path / "run",
                                change=second_client_claims_a_giant)
        assert statuses == [0] * 4, texts
        lines = re.findall("^round . client 1: rejected.*$", texts[0].replace(",", ""), re.M)
        assert len(lines) == 2 and all("1000000000" in line for line in lines), texts[0]


def nested(depth: int) -> list:
    return [nested(depth - 1)] if depth else []


def header_with(*names) -> str:
    """Claimed numbers that are fine, and these tensors."""
    header = [[name, "torch.float32", [1]] for name in names]
    return json.dumps([{"loss": 1, "examples": 9}, header])


NOTHING = "is None, expected (torch.float32"                # not even a header
BAD_MESSAGES = [        # of rank 2, round by round: (what it posts or claims, what is said of it)
    ("no JSON", NOTHING), ("\udcff\0", NOTHING), ("5", NOTHING), ("[1, 2, 3]", NOTHING),
    ("[" * 5000, NOTHING), ("[" * 500 + "]" * 500, NOTHING), ("[{}, {}]", NOTHING),
    (header_with(*map(str, range(100_000))), NOTHING), ("[" + "9" * 5000 + ", []]", NOTHING),
    (header_with("a\nround 99, client 0: \x1b[2J"), r"'a\nround 99"),
    ({"loss": "L"}, "its loss is"), ({"loss": 10**400}, "its loss is"),
    ({"loss": True}, "its loss is"), ({"loss": nested(600)}, "its loss is"),
    ({"examples": 10**400}, "it claims"), ({"examples": 0}, "it claims 0"),
    ({"examples": 1.5}, "it claims"), ({"examples": nested(600)}, "it claims")]


def second_client_talks_nonsense():
    original, rounds = torchrun.Processes.post, iter(BAD_MESSAGES)

    def post(self, rank, message, payload):
        upload = isinstance(message, dict)                  # else the greeting
        bad = next(rounds)[0] if upload else "[7, []]"
        if isinstance(bad, dict):
            return original(self, rank, message | bad, payload)
        self.store.set(f"{self.rank} to {rank}", bad.encode("utf-8", "surrogateescape"))
    if os.environ["RANK"] == "2":
        torchrun.Processes.post = post


def test_a_message_that_is_none_costs_its_client_the_round():
    # kills: json.loads unguarded; a greeting unpacked; a header's length, a loss or a number of
    # examples believed; what a client wrote printed as it is, or in full
    with folder() as path:
        flags = small_run(path) + ["--rounds", len(BAD_MESSAGES), "--local-steps", 1]
        statuses, texts = ranks(path, 4, *flags, "--out", path / "run",
                                change=second_client_talks_nonsense)
        assert statuses == [0] * 4, texts
        said = re.findall("^round (.*), client 1: rejected, (.*)$", texts[0], re.M)
        assert [int(t) for t, _ in said] == list(range(1, len(BAD_MESSAGES) + 1)), texts[0]
        for (_, reason), (_, word) in zip(said, BAD_MESSAGES):
            assert word in reason and len(reason) < 300, (reason, word)
        assert "\x1b" not in texts[0] and texts[0].count("rejected") == len(BAD_MESSAGES)


# ---- stopped and killed -------------------------------------------------------------------------

def lingers_in_the_second_round():
    original = fedbiot.Client.update

    def update(self, t, *args):
        if t:
            os.write(1, b"lingers\n")
            time.sleep(60)
        return original(self, t, *args)
    fedbiot.Client.update = update


def test_ctrl_c_is_one_line_state_kept_and_status_130():
    # kills: a traceback; every rank prints; status 1; a rank that waits for ever; the round under
    # way saved half
    def interrupt(jobs):
        while not any("lingers" in log.read_text() for log in path.glob("log*")):
            assert all(job.is_alive() for job in jobs), (path / "log0").read_text()
            time.sleep(0.02)
        for job in jobs:
            os.kill(job.pid, signal.SIGINT)
    for world in (1, 3):
        with folder() as path, fast_scores():
            flags, run = small_run(path) + ["--rounds", 300, "--eval-every", 1], path / "run"
            statuses, texts = ranks(path, world, *flags, "--out", run, then=interrupt,
                                    change=lingers_in_the_second_round)
            lines = re.findall(".*(?:[Ee]rror|Traceback|stopped).*", "\n".join(texts))
            assert lines == ["stopped by Ctrl-C; a run goes on with --resume"], texts
            assert statuses == [130] * world
            saved, rows = read_saved(run / "state.pt"), read_log(run)
            assert saved["rows"] and len(saved["rows"]) - len(rows) in (0, 1)
            assert {p.name for p in run.iterdir()} <= RUN_FILES
            rounds = len(saved["rows"])
            assert cli(*flags, "--rounds", rounds, "--out", path / "whole")[0] == 0
            assert same(read_saved(path / "whole" / "lora.pt"), saved["server"]["learnt"])


KILLS_ITSELF = """
import os, signal, sys
sys.path[:0] = [{here!r}]
import fedbiot, train
from eval import main_guard
from tests.common import fast_scores
update = fedbiot.Client.update
def dies(self, t, *args):
    if (t, os.environ["TORCHELASTIC_RESTART_COUNT"]) == (1, "0"):
        os.kill(os.getpid(), signal.SIGKILL)
    return update(self, t, *args)
fedbiot.Client.update = dies
with fast_scores():
    main_guard(train.main)
"""


def test_torchrun_restarts_a_killed_client_from_the_last_round():
    # kills: a restart refuses the folder that exists; starts at round 0; loses a row; a
    # client counts its rounds anew
    with folder() as path, fast_scores():
        free_port()
        flags = small_run(path, *WEIGHTS) + ["--rounds", "2", "--own-data", "--out"]
        with as_shards([path / "data"]):
            one = *(x for x in flags if x != "--own-data"), path / "one", "--clients", 1
            assert cli(*one)[0] == 0
        (path / "dies.py").write_text(KILLS_ITSELF.format(here=str(HERE)))
        argv = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
                "2", "--max-restarts", "2", path / "dies.py", *flags, path / "two"]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr[-2000:]
        for line in ("round 1 |", "round 2 |", "client 0 | round 1 |", "client 0 | round 2 |"):
            assert len(re.findall(f"^{re.escape(line)}", done.stdout, re.M)) == 1, done.stdout
        assert_same_run(path / "one", path / "two")


def test_a_rank_names_its_own_data_alone():
    # kills: any name that a client's rank greets with, another client's or a file's, in the state
    wire, known = object.__new__(torchrun.Processes), {}
    wire.world, wire.travel, wire.post, wire.send = 4, *3 * [lambda *_: None]
    greetings = {1: ["training data of client 0", "a"], 2: ["emulator.pt", "x"],
                 3: ["training data of client 0", "b"]}
    wire.wait = lambda rank: (greetings[rank], None)
    with patch.dict(os.environ, LOCAL_WORLD_SIZE="4"):
        wire.start_clients(train.parse([]), torch.device("cpu"), {}, known)
    assert known == {"training data of client 0": "a"}
