"""Kills, full disks, hostile uploads, damaged and hostile files, and what must stay small."""
import contextlib
import gzip
import io
import itertools
import json
import math
import os
import random
import re
import signal
import time
import tracemalloc
from pathlib import Path
from resource import RLIMIT_FSIZE, setrlimit
from unittest.mock import patch

import numpy as np
import torch

import data
import fedbiot
import model
import train
from model import LM, ModelConfig, UserError
from tests.common import (
    PARAMS, RUN_FILES, WEIGHTS, Evil, assert_same_run, cli, copied, errors_in,
    fast_scores, folder, gsm8k_folder, hf_folder, hf_state, meta_folder, off, one_line, pair, raw,
    read_json, read_log, read_saved, refused, run_rounds, same, small_run, start,
    stopped_before_evaluation, tiny_lm, toy_shard,
)


# ---- kills and full disks -----------------------------------------------------------------------

def until(job, reached, seconds=math.inf):
    """Waits until `reached()`, for so many seconds at most, or until the job ends by itself."""
    end = time.perf_counter() + seconds
    while not reached() and time.perf_counter() < end and job.is_alive():
        time.sleep(0.003)


def rounds_of(run: Path) -> int:
    return len(read_log(run)) if (run / "log.csv").exists() else 0


def test_killed_at_any_moment_nothing_is_lost():
    # kills: the rows of the state forgotten by a resumed run; emulator.pt written again
    rng, kills = random.Random(0), 0
    with folder() as path:
        flags = small_run(path, *WEIGHTS) + ["--rounds", 24, "--eval-every", 4]

        def begin(out: Path):
            return start(path / "log", *flags, "--out", out, "--resume")
        start(path / "log", *flags, "--plan").join()        # the fork server imports torch
        began, job = time.perf_counter(), begin(path / "whole")
        until(job, lambda: rounds_of(path / "whole"))
        first = time.perf_counter() - began
        job.join()
        later = (time.perf_counter() - began - first) / 23
        for before_a_round in (True, False) * 3:
            done, job = rounds_of(path / "killed"), begin(path / "killed")
            if before_a_round:
                until(job, lambda: False, rng.uniform(0, first))
            else:
                until(job, lambda: rounds_of(path / "killed") > done)
                until(job, lambda: False, rng.uniform(0, later))
            job.kill()
            job.join()
            kills += job.exitcode == -signal.SIGKILL
        job = begin(path / "killed")
        job.join()
        assert job.exitcode == 0 and kills >= 3, (kills, (path / "log").read_text())
        assert_same_run(path / "killed", path / "whole")


def killed_within_its_fourth_state():
    save, count = torch.save, itertools.count()             # 0 is emulator.pt

    def half(state, file):
        if next(count) == 4:
            save(state, whole := io.BytesIO())
            file.write(whole.getvalue()[:len(whole.getvalue()) // 2])
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        save(state, file)
    torch.save = half


def test_a_state_torn_by_a_kill_is_not_the_state():
    # kills: state written in place; the log ahead of the state; a torn file taken for the state
    with folder() as path, fast_scores():
        flags, run = small_run(path, *WEIGHTS) + ["--rounds", 5], path / "run"
        start(path / "log", *flags, "--out", run, change=killed_within_its_fourth_state).join()
        assert len(read_saved(run / "state.pt")["rows"]) == len(read_log(run)) == 3
        assert cli(*flags, "--out", run, "--resume")[0] == 0
        assert cli(*flags, "--out", path / "whole")[0] == 0
        assert_same_run(run, path / "whole")


def disk_is_full():
    setrlimit(RLIMIT_FSIZE, (9000, 9000))                   # room for a log, not for a state


def test_a_full_disk_keeps_the_old_state():
    # kills: written in place; a traceback; a torn file left behind; status 0
    with folder() as path, fast_scores():
        flags, run = small_run(path) + ["--eval-every", 1], path / "run"
        with stopped_before_evaluation():
            one_line(cli(*flags, "--out", run), status=130)
        before = (run / "state.pt").read_bytes()
        job = start(path / "log", *flags, "--out", run, "--resume", change=disk_is_full)
        job.join()
        error, = errors_in([(path / "log").read_text()])
        assert job.exitcode == 2 and "state.pt: cannot be written" in error, error
        assert (run / "state.pt").read_bytes() == before
        assert {p.name for p in run.iterdir()} <= RUN_FILES
        broken = RuntimeError("PytorchStreamWriter failed writing file")
        with patch.object(torch, "save", side_effect=broken):
            one_line(cli(*flags, "--out", run, "--resume"), "state.pt: cannot be written")
        assert cli(*flags, "--out", run, "--resume")[0] == 0
        assert cli(*flags, "--out", path / "whole")[0] == 0
        assert_same_run(run, path / "whole")


# ---- hostile uploads ----------------------------------------------------------------------------

class OneOfThemIsHostile:
    """In place of a Client: the honest one, but for what `change` makes of client 1's upload."""

    def __init__(self, client, change):
        self.client, self.change = client, change

    def update(self, t, payload, shard, m):
        upload, metrics = self.client.update(t, payload, shard, m)
        upload, metrics = copied(upload), dict(metrics)
        return self.change(upload, metrics) if m == 1 else (upload, metrics)


class AllAreEmpty:
    def update(self, t, payload, shard, m):
        return {}, {"loss": 1.0}


def first_of(upload):
    return next(iter(upload))


def edited(change):
    """What a client sends when `change(upload)` has been at its tensors."""
    def both(upload, metrics):
        change(upload)
        return upload, metrics
    return both


def each(change):
    return edited(lambda u: u.update({n: change(p) for n, p in u.items()}))


def claims(**numbers):
    """What a client sends that reports these numbers."""
    return lambda upload, metrics: (upload, metrics | numbers)


HOSTILE = {                                                 # a word of the reason: what it does
    "is None, expected": edited(lambda u: u.pop(first_of(u))),
    "'extra' is": edited(lambda u: u.update(extra=torch.ones(1))),
    "[1])": edited(lambda u: u.update({first_of(u): torch.ones(1)})),
    "float64": each(lambda p: p.double()),
    "finite": edited(lambda u: u[first_of(u)].view(-1)[0].fill_(math.nan)),
    "not all": edited(lambda u: u[first_of(u)].view(-1)[-1].fill_(-math.inf)),
    "its loss is nan": claims(loss=math.nan), "its loss is -inf": claims(loss=-math.inf),
    "its loss is None": lambda u, metrics: (u, {}), "its loss is 1000000": claims(loss=10**400),
    "its loss is '1'": claims(loss="1"), "its loss is True": claims(loss=True),
    "--max-update-norm 10": each(lambda p: p + 3),
    "median": edited(lambda u: u[first_of(u)].fill_(3e38)),     # its square overflows fp32
}


def test_hostile_uploads_are_rejected_and_the_rest_averaged():
    # kills: each check in turn; the rejected client's weight kept; norm in fp32; round counted
    # from 0
    shards = [toy_shard(0, 6), toy_shard(6, 12), toy_shard(12, 40)]
    short = {"rounds": 1, "align_init": 0, "local_steps": 1}
    twin, other = pair(**short)
    down = copied(twin.broadcast(0))
    a, b = (other.update(0, down, shards[m], m)[0] for m in (0, 2))
    mean = {n: (6 * a[n].double() + 28 * b[n].double()) / 34 for n in a}

    def after_round(change, **changes):
        """How far the average is from that of the honest, and what was said."""
        server, client = pair(**short, **changes)
        with contextlib.redirect_stderr(io.StringIO()) as err:
            run_rounds(server, OneOfThemIsHostile(client, change), shards)
        return off([server.tuned[n].detach() for n in mean], mean.values()), err.getvalue()
    for reason, change in HOSTILE.items():
        distance, line = after_round(change)
        assert line.startswith("round 1, client 1: rejected, ") and reason in line, (reason, line)
        assert line.count("\n") == 1 and distance < 1e-6, (reason, line)
    distance, _ = after_round(HOSTILE["--max-update-norm 10"], max_update_norm=0.0)
    assert distance > 0.1, "0 switches the bound off"
    server, _ = pair(**short)
    refused(lambda: run_rounds(server, AllAreEmpty(), shards), "round 1", "no client")


def test_hostile_indices_and_scalars_are_harmless_to_fedkseed():
    # kills: an index past the candidates ends the server; NaN scalars summed
    cfg = train.resolve({"method": "fedkseed", "kseed_candidates": 8, "local_steps": 3})
    server = train.method_of("fedkseed").Server(tiny_lm(), None, cfg)
    wild = {"j": torch.tensor([-9, 2**31 - 1, 3]).int(), "g": torch.ones(3)}
    nan = {"j": wild["j"], "g": torch.tensor([1, math.nan, 1])}
    fine = {"loss": 1.0, "examples": 1}
    uploads = {0: (wild, fine), 1: (nan, fine)}
    with contextlib.redirect_stderr(io.StringIO()) as err:
        results = fedbiot.accepted(0, uploads, server.expected(0), cfg)
    assert list(results) == [0] and "client 1: rejected" in err.getvalue()
    server.aggregate(0, [wild], [1.0])
    assert server.learnt["a"].sum() == 3 and server.learnt["a"].isfinite().all()


# ---- hostile files ------------------------------------------------------------------------------

def test_code_in_a_state_is_never_run_and_another_runs_state_is_refused():
    # kills: weights_only=False; the first difference not named; a damaged byte resumed from
    with folder() as path, fast_scores():
        flags, run = small_run(path), path / "run"
        with stopped_before_evaluation():
            assert cli(*flags, "--out", run)[0] == 130
        state, whole = read_saved(run / "state.pt"), (run / "state.pt").read_bytes()
        learnt = state["server"]["learnt"]
        at = whole.find(raw(learnt[first_of(learnt)]))
        other_run = state["depends_on"] | {"--seed": 5, "--task": "dolly"}
        Evil.path = str(path / "owned")
        for content, *words in ((state | {"rows": Evil()}, "state.pt"), ({}, "state.pt"),
                                (state | {"depends_on": {}}, "--dropout None"),
                                ([1], "state.pt"), (state | {"depends_on": 7}, "state.pt"),
                                (state | {"rows": [1]}, "state.pt"),
                                ({"depends_on": state["depends_on"]}, "state.pt"),
                                *((state | {name: None}, "state.pt") for name in state),
                                (state | {"server": {}}, "state.pt"),
                                (state | {"server": {"learnt": {}}}, run, "learnt"),
                                (state | {"depends_on": other_run}, "--seed 5", "now it is 0")):
            torch.save(content, run / "state.pt")
            one_line(cli(*flags, "--out", run, "--resume"), *words)
            assert not (path / "owned").exists()
        (run / "state.pt").write_bytes(whole[:at] + b"\xff" + whole[at + 1:])
        one_line(cli(*flags, "--out", run, "--resume"), "state.pt")


TOKENS = [b"null", b"-1", b"0", b"1e999", b"NaN", b"true", b"[]", b"{}", b'""', b"9" * 20,
          b"9" * 5000, b"../x", b"\0"]


def mutated(blob: bytes, rng) -> bytes:
    """One to three bytes, slices or values of a file changed."""
    out = bytearray(blob)
    for _ in range(rng.integers(1, 4)):
        at, n = int(rng.integers(len(out) + 1)), int(rng.integers(1, 9))
        token = TOKENS[rng.integers(len(TOKENS))]
        values = [m.span() for m in re.finditer(rb"\d+|\"[^\"]{1,40}\"", out)] or [(at, at)]
        value = slice(*values[rng.integers(len(values))])
        here, other, more = slice(at, at + n), rng.bytes(n), rng.bytes(n)
        number = str(rng.integers(300)).encode()
        where, new = [(here, other), (here, b""), (slice(at, at), more), (slice(at, None), b""),
                      (here, token), (value, token), (value, number)][rng.integers(7)]
        out[where] = new
    return bytes(out)


def too_slow(*_):
    raise TimeoutError("5 seconds of work")


def fuzzed(seed: int, count: int, path: Path, load, check):
    """`count` mutations of a file: within 5 seconds `load` gives what `check` finds right, or one
    clear line. How many were right."""
    rng, blob, right = np.random.default_rng(seed), path.read_bytes(), 0
    signal.signal(signal.SIGPROF, too_slow)
    check(load())
    for i in range(count):
        path.write_bytes(mutated(blob, rng))
        signal.setitimer(signal.ITIMER_PROF, 5)             # of the processor: busy is no hang
        try:
            with contextlib.redirect_stderr(io.StringIO()):
                check(load())
            right += 1
        except UserError as error:
            assert 10 < len(str(error)) < 700 and "Traceback" not in str(error), error
        except BaseException as error:
            where = f"{path.name}, mutation {i} of seed {seed}"
            raise AssertionError(f"{where}: {error!r:.300}") from error
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
    path.write_bytes(blob)
    return right


SMALL = dict(dim=16, n_layers=2, n_heads=2, n_kv_heads=1, vocab_size=12, hidden_dim=20)


def small_model(path: Path) -> LM:
    c = ModelConfig.read(path)
    if c.vocab_size == -1:
        raise UserError("the vocabulary is the tokenizer's, and here is none")
    return model.load_weights(path, c)


def assert_tensors_of_the_header(path: Path, lm: LM):
    """The model is what another reader of safetensors finds in the file."""
    blob = path.read_bytes()
    length = int.from_bytes(blob[:8], "little")
    header, held = json.loads(blob[8:8 + length]), blob[8 + length:]
    kinds = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    for name, t in hf_state(lm).items():
        a, b = map(int, header[name]["data_offsets"])
        found = torch.frombuffer(bytearray(held[a:b]), dtype=kinds[header[name]["dtype"]])
        assert raw(found.float()) == raw(t), name


def assert_few_bytes_differ(found: LM, expected: LM):
    """Meta's files carry no checksums: what was mutated are numbers of the weights."""
    a, b = (b"".join(map(raw, lm.state_dict().values())) for lm in (found, expected))
    differ = sum(x != y for x, y in zip(a, b, strict=True))
    assert differ <= 24, "three slices of eight bytes at most"


def assert_config_of_the_file(path: Path, c: ModelConfig):
    j = read_json(path)
    if path.name == "params.json":
        names = {"dim": "dim", "n_layers": "n_layers", "n_heads": "n_heads", "norm_eps": "norm_eps"}
    else:
        names = {"dim": "hidden_size", "n_layers": "num_hidden_layers", "n_heads":
                 "num_attention_heads", "vocab_size": "vocab_size", "hidden_dim":
                 "intermediate_size", "norm_eps": "rms_norm_eps"}
    assert all(getattr(c, ours) == j[theirs] for ours, theirs in names.items()), (c, j)


def assert_rows_of_the_file(path: Path, rows: list):
    blob = path.read_bytes()
    text = (gzip.decompress(blob) if path.suffix == ".gz" else blob).decode()
    if path.suffix == ".json":
        found = json.loads(text)
        found = found.get("data") if isinstance(found, dict) else found
    else:
        found = [json.loads(line) for line in text.split("\n") if line.strip()]
    assert repr(rows) == repr(found)


def test_mutated_checkpoints_load_right_or_are_refused_in_one_line():
    # kills: json.loads unguarded; shapes unchecked; a mapped record shifted
    lm = tiny_lm(**SMALL)
    sizes = {k: v for k, v in SMALL.items() if k in PARAMS}
    with folder() as path:
        meta = meta_folder(path / "meta", lm, **sizes, multiple_of=20, ffn_dim_multiplier=0.4)
        one, many = hf_folder(path / "one", lm), hf_folder(path / "many", lm, shards=3)
        tensors, index = one / "model.safetensors", many / "model.safetensors.index.json"
        params, about = meta / "params.json", one / "config.json"
        right = [
            fuzzed(0, 150, tensors, lambda: small_model(one),
                   lambda found: assert_tensors_of_the_header(tensors, found)),
            fuzzed(1, 150, meta / "consolidated.00.pth", lambda: small_model(meta),
                   lambda found: assert_few_bytes_differ(found, lm)),
            fuzzed(2, 100, index, lambda: small_model(many),
                   lambda found: assert_few_bytes_differ(found, lm)),
            fuzzed(3, 150, params, lambda: small_model(meta).config,
                   lambda c: assert_config_of_the_file(params, c)),
            fuzzed(4, 150, about, lambda: small_model(one).config,
                   lambda c: assert_config_of_the_file(about, c))]
        assert sum(right) > 20, f"mutations that load all the same: {right}"


def test_mutated_rows_load_right_or_are_refused_in_one_line():
    # kills: json.loads unguarded; a cut archive as a traceback
    rows = [{"question": f"{i} + \u00e9?", "answer": str(i)} for i in range(9)]
    lines = "\n".join(map(json.dumps, rows))
    with folder() as path:
        for name, content in (("d.jsonl", lines.encode()), ("d.json", json.dumps(rows).encode()),
                              ("d.jsonl.gz", gzip.compress(lines.encode()))):
            file = path / name
            file.write_bytes(content)
            fuzzed(5, 67, file, lambda: data.read_rows(file),
                   lambda found: assert_rows_of_the_file(file, found))


def test_mutated_states_load_right_or_are_refused_in_one_line():
    # kills: CRC of a state not checked
    with folder() as path, stopped_before_evaluation():
        flags, run = small_run(path), path / "run"
        cli(*flags, "--out", run)
        known = read_saved(run / "state.pt")["depends_on"]
        original = train.load_state(run, known)

        def same_state(state):
            server, expected = state["server"], original["server"]
            assert same(server["learnt"], expected["learnt"]) and state["rows"] == original["rows"]
            assert repr(server["optimizer"]) == repr(expected["optimizer"])
        fuzzed(6, 100, run / "state.pt", lambda: train.load_state(run, known), same_state)


def test_a_gzip_bomb_is_bounded():
    # kills: no limit on what is unpacked
    with folder() as path:
        with gzip.open(path / "bomb.jsonl.gz", "wb", 9) as file:
            for _ in range(80):
                file.write(b" " * 2**20)
        with patch.object(data, "LARGEST", 2**24):
            tracemalloc.start()
            refused(lambda: data.read_rows(path / "bomb.jsonl.gz"), "bomb", "16,777,216")
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
    assert peak < 5 * 2**24, f"{peak:,} bytes for a limit of 16 MB"


# ---- memory -------------------------------------------------------------------------------------

def test_a_thousand_clients_take_the_memory_of_ten():
    # kills: results of clients that were not chosen; a copy of the examples, or of the model, a
    # client
    with folder() as path:
        flags = small_run(path) + ["--rounds", 2, "--clients-per-round", 10, "--batch-size", 4]
        gsm8k_folder(path / "data", train_rows=1200)
        peaks = []
        for clients in (10, 1000):
            run = path / str(clients)
            job = start(path / "log", *flags, "--clients", clients, "--out", run)
            job.join()
            assert job.exitcode == 0, (path / "log").read_text()
            peaks.append(read_json(run / "summary.json")["peak_memory_bytes"])
        assert peaks[1] < peaks[0] + 30e6, peaks
