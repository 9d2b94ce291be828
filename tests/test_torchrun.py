"""torchrun"""
import csv
import gc
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from unittest.mock import patch

import torch

import fedbiot
import lora
import train
from tests.common import (
    HERE, assert_same_run, cli, folder, free_port, ranks, same, scored, small_run, tiny_lm,
)


def first_rank_is_slow():
    original = fedbiot.Client.update

    def update(self, t, *args):
        time.sleep(0.3 if os.environ["RANK"] == "1" else 0)
        return original(self, t, *args)
    fedbiot.Client.update = update


def test_more_processes_give_the_same_bits():
    # kills: summed as they arrive; the same client twice; a client's number by its rank; header counted as payload
    with folder() as path, patch.object(train, "evaluate", scored):
        flags = small_run(path) + ["--rounds", 2]
        for clients, worlds in ((["--clients", 4], (2, 3, 4)), (["--clients", 2], (4,)),
                                (["--clients", 6, "--clients-per-round", 1], (3,))):
            name = "-".join(map(str, clients))
            assert cli(*flags, *clients, "--out", path / name)[0] == 0
            for world in worlds:
                run = path / f"{name}-{world}"
                statuses, texts = ranks(path, world, *flags, *clients, "--out", run, change=first_rank_is_slow)
                assert statuses == [0] * world, texts
                assert "round 2" in texts[0] and not any(texts[1:]), "only rank 0 prints"
                assert_same_run(run, path / name)


def test_every_method_runs_over_processes():
    # kills: no expected() for a method; FedTT+ on a rank that missed a round; tensors of an unknown dtype
    with folder() as path, patch.object(train, "evaluate", scored):
        flags = small_run(path) + ["--rounds", 2, "--clients", 2]
        for method, *more in (["offsite", "--clients", 1], ["fedavg"], ["fedkseed-pro"], ["fedtt+"],
                              ["fedpt", "--proxy-ckpt", path / "ckpt", "--proxy-steps", 2]):
            argv = *flags, "--method", method, *more
            if method == "offsite":
                argv = *argv, "--adapter", 1
            status, _, err = cli(*argv, "--out", path / method)
            assert status == 0, err
            statuses, texts = ranks(path, 3, *argv, "--out", path / f"{method}-3")
            assert statuses == [0] * 3, texts
            assert_same_run(path / method, path / f"{method}-3")


def says_what_it_holds():
    if os.environ["RANK"] != "0":
        original = fedbiot.Client.update

        def update(self, *args):
            done = original(self, *args)
            tensors = [t for t in gc.get_objects() if isinstance(t, torch.Tensor) and t.device.type != "meta"]
            storages = {s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in tensors)}
            os.write(1, f"holds {sum(storages.values())}\n".encode())
            return done
        fedbiot.Client.update = update


def test_a_client_rank_holds_the_compressed_model_and_no_more():
    # kills: load() on every rank; what was received kept beside the model; dropped layers in the bootstrap
    with folder() as path:
        flags = small_run(path) + ["--rounds", 1]
        shutil.copytree(path / "ckpt", path / "bare", ignore=shutil.ignore_patterns("*.pth"))
        statuses, texts = ranks(path, 2, *flags, "--out", path / "run", change=says_what_it_holds,
                                own=lambda rank: ["--ckpt", path / "bare"] if rank else [])
        assert statuses == [0, 0], texts
        held = max(map(int, re.findall(r"holds (\d+)", texts[1])))
        summary = json.loads((path / "run" / "summary.json").read_text())
        whole = 4 * sum(t.numel() for t in tiny_lm(vocab_size=1024).state_dict().values())
        lora = summary["bytes_down_per_client_round"]
        assert summary["bootstrap_bytes"] <= held < summary["bootstrap_bytes"] + 7 * lora < whole, (held, summary, whole)


def test_a_client_rank_needs_no_weights():
    # kills: load() on every rank
    with folder() as path, patch.object(train, "evaluate", scored):
        flags = small_run(path) + ["--rounds", 1, "--dtype", "bf16"]
        shutil.copytree(path / "ckpt", path / "bare", ignore=shutil.ignore_patterns("*.pth"))
        assert cli(*flags, "--out", path / "one")[0] == 0
        statuses, texts = ranks(path, 2, *flags, "--out", path / "two",
                                own=lambda rank: ["--ckpt", path / "bare"] if rank else [])
        assert statuses == [0, 0], texts
        assert_same_run(path / "one", path / "two")


def test_an_error_on_any_rank_ends_all_in_one_line():
    # kills: rank 0 waits for ever; every rank prints; the others end with status 0
    with folder() as path:
        flags = small_run(path) + ["--rounds", 1, "--out", path / "run"]
        for own, *words in ((lambda rank: ["--rank", 0], "--rank 0"),
                            (lambda rank: ["--data-dir", path / "ckpt" / "params.json"] if rank == 2 else [], "train.jsonl"),
                            (lambda rank: ["--lr", 0.5] if rank == 1 else [], "rank 1", "--lr 0.5", "0.001"),
                            (lambda rank: ["--lr", 1e30], "client", "--lr")):
            statuses, texts = ranks(path, 3, *flags, own=own)
            errors = re.findall("^error: .*$", "\n".join(texts), re.M)
            assert statuses == [2, 2, 2] and len(errors) == 1, (statuses, texts)
            assert all(word in errors[0] for word in words) and "Traceback" not in "".join(texts), texts


def second_client_is_very_slow():
    original = fedbiot.Client.update

    def update(self, t, payload, shard, m):
        time.sleep({(0, 1): 4, (1, 0): 2}.get((t, m), 0))      # the second round sees the late answer
        return original(self, t, payload, shard, m)
    fedbiot.Client.update = update


def test_a_slow_client_is_left_out_of_the_round():
    # kills: waits for it; its weight still in the average; the client never comes back
    def without_one(self, t, payload, client, shards, chosen, expected, round=fedbiot.Wire.round):
        return round(self, t, payload, client, shards, [m for m in chosen if (t, m) != (0, 1)], expected)
    with folder() as path, patch.object(train, "evaluate", scored):
        flags = small_run(path) + ["--rounds", 2, "--client-timeout", 3]
        with patch.object(fedbiot.Wire, "round", without_one):
            assert cli(*flags, "--out", path / "one")[0] == 0
        statuses, texts = ranks(path, 4, *flags, "--out", path / "four", change=second_client_is_very_slow)
        assert statuses[0] == 0, texts
        assert float(next(csv.DictReader(open(path / "four" / "log.csv")))["seconds"]) < 3.9, "not waited for"
        assert re.findall("^.*left out.*$", texts[0], re.M) == [
            "round 1, client 1: left out, no upload within --client-timeout 3 s"], texts[0]
        assert_same_run(path / "one", path / "four")


def second_client_claims_a_giant():
    original = train.header_of
    if os.environ["RANK"] == "2":
        train.header_of = lambda upload: [[name, dtype, [10**9, *shape]] for name, dtype, shape in original(upload)]


def test_what_a_header_claims_is_not_allocated():
    # kills: memory for whatever a client says that it sends; the next order never heard
    with folder() as path, patch.object(train, "evaluate", scored):
        flags = small_run(path) + ["--rounds", 2]
        statuses, texts = ranks(path, 4, *flags, "--out", path / "run", change=second_client_claims_a_giant)
        assert statuses == [0] * 4, texts
        lines = re.findall("^round . client 1: rejected.*$", texts[0].replace(",", ""), re.M)
        assert len(lines) == 2 and all("1000000000" in line for line in lines), texts[0]


def lingers_in_the_second_round():
    original = fedbiot.Client.update

    def update(self, t, *args):
        if t:
            os.write(1, b"lingers\n")
            time.sleep(60)
        return original(self, t, *args)
    fedbiot.Client.update = update


def test_ctrl_c_is_one_line_state_kept_and_status_130():
    # kills: a traceback; every rank prints; status 1; a rank that waits for ever; the round under way saved half
    def interrupt(jobs):
        while not any("lingers" in log.read_text() for log in path.glob("log*")):
            assert all(job.is_alive() for job in jobs), (path / "log0").read_text()
            time.sleep(0.02)
        for job in jobs:
            os.kill(job.pid, signal.SIGINT)
    for world in (1, 3):
        with folder() as path, patch.object(train, "evaluate", scored):
            flags = small_run(path) + ["--rounds", 300, "--eval-every", 1]
            statuses, texts = ranks(path, world, *flags, "--out", path / "run", then=interrupt,
                                    change=lingers_in_the_second_round)
            lines = [line for line in "".join(texts).split("\n") if re.search("error|Error|Traceback|stopped", line)]
            assert statuses == [130] * world and lines == ["stopped by Ctrl-C; what was saved stays"], (statuses, texts)
            saved = torch.load(path / "run" / "state.pt", weights_only=True)
            assert saved["rows"] and len(saved["rows"]) - len(list(csv.DictReader(open(path / "run" / "log.csv")))) in (0, 1)
            assert not list((path / "run").glob("*.part"))
            assert cli(*flags, "--rounds", len(saved["rows"]), "--out", path / "whole")[0] == 0
            assert same(torch.load(path / "whole" / "lora.pt", weights_only=True), saved["server"]["learnt"])


KILLS_ITSELF = """
import os, signal, sys
sys.path[:0] = [{here!r}]
import fedbiot, train
from tests import common
from eval import main_guard
update = fedbiot.Client.update
def dies(self, t, *args):
    if (t, os.environ["TORCHELASTIC_RESTART_COUNT"]) == (1, "0"):
        os.kill(os.getpid(), signal.SIGKILL)
    return update(self, t, *args)
fedbiot.Client.update, train.evaluate = dies, common.scored
main_guard(train.main)
"""


def test_torchrun_restarts_a_killed_client_from_the_last_round():
    # kills: a restart refuses the folder that exists; starts at round 0; loses a row
    with folder() as path, patch.object(train, "evaluate", scored):
        free_port()
        flags = [str(x) for x in small_run(path) + ["--rounds", 2]]
        assert cli(*flags, "--out", path / "one")[0] == 0
        (path / "dies.py").write_text(KILLS_ITSELF.format(here=str(HERE)))
        done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
                               "--max-restarts", "2", path / "dies.py", *flags, "--out", path / "two"],
                              capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr[-2000:]
        assert done.stdout.count("round 1 |") == done.stdout.count("round 2 |") == 1, done.stdout
        assert_same_run(path / "one", path / "two")


def test_two_hosts_over_loopback():
    # kills: ranks counted a host
    with patch.dict(os.environ, WORLD_SIZE="6", LOCAL_WORLD_SIZE="3"):
        assert train.local_processes() == 3
    with folder() as path:
        port = free_port()
        flags = [str(x) for x in small_run(path) + ["--rounds", 1, "--eval-limit", 1, "--out", path / "two"]]
        hosts = [subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--node-rank", str(i),
                                   "--nproc-per-node", "1", "--master-addr", "127.0.0.1", "--master-port", port,
                                   HERE / "train.py", *flags], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
                 for i in range(2)]
        try:
            texts = [host.communicate(timeout=120) for host in hosts]
        finally:
            for host in hosts:
                host.kill()
        assert [host.returncode for host in hosts] == [0, 0], texts
        assert "round 1 |" in texts[0][0] and not texts[1][0]
        assert cli(*flags[:-1], path / "one")[0] == 0
        assert_same_run(path / "one", path / "two")
