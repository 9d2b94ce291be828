"""attacks"""
import contextlib
import csv
import gzip
import io
import itertools
import json
import math
import os
import re
import resource
import signal
import time
import tracemalloc
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import torch

import baselines
import data
import fedbiot
import model
import train
from model import LM, ModelConfig, UserError
from tests.common import (
    PARAMS, assert_same_run, cli, config, copied, Evil, folder, gsm8k_folder, hf_folder,
    hf_state, meta_folder, off, pair, refused, run_rounds, same, scored, small_run, start,
    tiny_lm, toy_shard,
)


def killed_within_its_fourth_state():
    save, count = torch.save, itertools.count(1)

    def half(state, file):
        if next(count) == 4:
            save(state, whole := io.BytesIO())
            file.write(whole.getvalue()[:len(whole.getvalue()) // 2])
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        save(state, file)
    torch.save = half


def test_killed_at_any_moment_nothing_is_lost(kills=6):
    # kills: state written in place; the log ahead of the state; a .part file taken for the state
    rng = np.random.default_rng(0)
    with folder() as path, patch.object(train, "evaluate", scored):
        flags = small_run(path) + ["--rounds", 12, "--eval-every", 4]
        start(path / "log", *flags, "--plan").join()                           # the fork server imports torch
        began = time.perf_counter()
        start(path / "log", *flags, "--out", path / "whole").join()
        whole = time.perf_counter() - began
        start(path / "log", *flags, "--out", path / "run", change=killed_within_its_fourth_state).join()
        rows = len(torch.load(path / "run" / "state.pt", weights_only=True)["rows"])
        assert rows == 3 and len(list(csv.DictReader(open(path / "run" / "log.csv")))) == rows
        for _ in range(kills):
            job = start(path / "log", *flags, "--out", path / "run", "--resume")
            job.join(rng.uniform(0.2, 0.7) * whole)
            job.kill()
            job.join()
        job = start(path / "log", *flags, "--out", path / "run", "--resume")
        job.join()
        assert job.exitcode == 0, (path / "log").read_text()
        assert_same_run(path / "run", path / "whole")


def disk_is_full():
    resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))     # room for a log, not for a state


def test_a_full_disk_keeps_the_old_state():
    # kills: written in place; a traceback; a torn file left behind; status 0
    with folder() as path, patch.object(train, "evaluate", scored):
        flags = small_run(path) + ["--eval-every", 1]
        with patch.object(train.Run, "evaluate_if_due", side_effect=KeyboardInterrupt):
            status, _, err = cli(*flags, "--out", path / "run")
        assert status == 130 and err.count("\n") == 1
        before = (path / "run" / "state.pt").read_bytes()
        job = start(path / "log", *flags, "--out", path / "run", "--resume", change=disk_is_full)
        job.join()
        text = (path / "log").read_text()
        assert job.exitcode == 2 and len(re.findall("^error: .*state.pt: cannot be written.*$", text, re.M)) == 1, text
        assert "Traceback" not in text and (path / "run" / "state.pt").read_bytes() == before
        assert not list((path / "run").glob("*.part"))
        with patch.object(torch, "save", side_effect=RuntimeError("PytorchStreamWriter failed writing file")):
            status, _, err = cli(*flags, "--out", path / "run", "--resume")
        assert status == 2 and err.count("\n") == 1 and "state.pt: cannot be written" in err, err
        assert cli(*flags, "--out", path / "run", "--resume")[0] == cli(*flags, "--out", path / "whole")[0] == 0
        assert_same_run(path / "run", path / "whole")


class OneOfThemIsHostile:
    """In place of a Client: the honest one, but for what `change` makes of client 1's upload."""

    def __init__(self, client, change):
        self.client, self.change = client, change

    def update(self, t, payload, shard, m):
        upload, metrics = self.client.update(t, payload, shard, m)
        return (copied(upload), dict(metrics)) if m != 1 else self.change(copied(upload), dict(metrics))


def first_of(upload):
    return next(iter(upload))


def edited(change):
    """What a client sends when `change(upload)` has been at its tensors."""
    def both(upload, metrics):
        change(upload)
        return upload, metrics
    return both


HOSTILE = {"missing": edited(lambda u: u.pop(first_of(u))), "'extra'": edited(lambda u: u.update(extra=torch.ones(1))),
           "[1]": edited(lambda u: u.update({first_of(u): torch.ones(1)})),
           "float64": edited(lambda u: u.update({n: p.double() for n, p in u.items()})),
           "finite": edited(lambda u: u[first_of(u)].view(-1)[0].fill_(math.nan)),
           "not all": edited(lambda u: u[first_of(u)].view(-1)[-1].fill_(-math.inf)),
           "its numbers": lambda u, metrics: (u, {"loss": math.nan}), "numbers are": lambda u, metrics: (u, {}),
           "--max-update-norm 10": edited(lambda u: u.update({n: p + 3 for n, p in u.items()})),
           "more than": edited(lambda u: u[first_of(u)].fill_(3e38))}         # its square overflows fp32


def test_hostile_uploads_are_rejected_and_the_rest_averaged():
    # kills: each check in turn; the rejected client's weight kept; norm in fp32; round counted from 0
    shards = [toy_shard(0, 6), toy_shard(6, 12), toy_shard(12, 40)]
    short = {"rounds": 1, "align_init": 0, "local_steps": 1}
    twin, other = pair(**short)
    down = copied(twin.broadcast(0))
    ups = {m: other.update(0, down, shards[m], m)[0] for m in (0, 2)}
    mean = {n: (6 * ups[0][n].double() + 28 * ups[2][n].double()) / 34 for n in ups[0]}
    for reason, change in HOSTILE.items():
        server, client = pair(**short)
        err = io.StringIO()
        with contextlib.redirect_stderr(err):
            run_rounds(server, OneOfThemIsHostile(client, change), shards)
        line = err.getvalue()
        assert line.startswith("round 1, client 1: rejected, ") and reason in line and line.count("\n") == 1, (reason, line)
        assert off([server.tuned[n].detach() for n in mean], mean.values()) < 1e-6, reason
    server, client = pair(**short, max_update_norm=0.0)
    run_rounds(server, OneOfThemIsHostile(client, HOSTILE["--max-update-norm 10"]), shards)
    assert off([server.tuned[n].detach() for n in mean], mean.values()) > 0.1, "0 switches the bound off"
    server, _ = pair(**short)
    refused(lambda: run_rounds(server, AllAreEmpty(), shards), "round 1", "no client")


class AllAreEmpty:
    def update(self, t, payload, shard, m):
        return {}, {"loss": 1.0}


def test_hostile_indices_and_scalars_are_harmless_to_fedkseed():
    # kills: an index past the candidates ends the server; NaN scalars summed
    method = baselines.module_of("fedkseed")
    cfg = SimpleNamespace(**vars(config()), method="fedkseed", kseed_candidates=8, kseed_eps=1e-3)
    server = method.Server(tiny_lm(), None, cfg)
    up = {"j": torch.tensor([-9, 2**31 - 1, 3]).int(), "g": torch.ones(3)}
    bad = {"j": up["j"], "g": torch.tensor([1, math.nan, 1])}
    with contextlib.redirect_stderr(io.StringIO()) as err:
        results = fedbiot.accepted(0, {m: (u, {"loss": 1.0}) for m, u in ((0, up), (1, bad))}, server.expected(0), cfg)
    assert list(results) == [0] and "client 1: rejected" in err.getvalue()
    server.aggregate(0, [up], [1.0])
    assert server.learnt["a"].sum() == 3 and server.learnt["a"].isfinite().all()


def test_code_in_a_state_is_never_run_and_another_runs_state_is_refused():
    # kills: weights_only=False; the first difference not named; a damaged byte resumed from
    with folder() as path, patch.object(train, "evaluate", scored):
        flags, run = small_run(path), path / "run"
        with patch.object(train.Run, "evaluate_if_due", side_effect=KeyboardInterrupt):
            assert cli(*flags, "--out", run)[0] == 130
        state = torch.load(run / "state.pt", weights_only=True)
        whole = (run / "state.pt").read_bytes()
        at = whole.find(state["server"]["learnt"][first_of(state["server"]["learnt"])].numpy().tobytes())
        Evil.path = str(path / "owned")
        for content, *words in ((state | {"rows": Evil()}, "state.pt"), (state | {"config": {}}, "--dropout"),
                                ({}, "state.pt"), ([1], "state.pt"), (state | {"rows": [1]}, "state.pt"),
                                (state | {"server": {}}, "state.pt"), (state | {"server": {"learnt": {}}}, "state.pt"),
                                (whole[:at] + b"\xff" + whole[at + 1:], "state.pt"),
                                (state | {"config": state["config"] | {"seed": 5, "task": "dolly"}}, "--seed 5", "0")):
            if isinstance(content, bytes):
                (run / "state.pt").write_bytes(content)
            else:
                torch.save(content, run / "state.pt")
            status, _, err = cli(*flags, "--out", run, "--resume")
            assert status == 2 and err.count("\n") == 1 and all(w in err for w in words), (words, err)
            assert not (path / "owned").exists()


TOKENS = [b"null", b"-1", b"0", b"1e999", b"NaN", b"true", b"[]", b"{}", b'""', b"9" * 20, b"9" * 5000, b"../x", b"\0"]


def mutated(blob: bytes, rng) -> bytes:
    """One to three bytes, slices or values of a file changed."""
    out = bytearray(blob)
    for _ in range(rng.integers(1, 4)):
        at, n, token = int(rng.integers(len(out) + 1)), int(rng.integers(1, 9)), TOKENS[rng.integers(len(TOKENS))]
        numbers = [m.span() for m in re.finditer(rb"\d+|\"[^\"]{1,40}\"", out)] or [(at, at)]
        a, b = numbers[rng.integers(len(numbers))]
        a, b, new = [(at, at + n, rng.bytes(n)), (at, at + n, b""), (at, at, rng.bytes(n)), (at, len(out), b""),
                     (at, at + n, token), (a, b, token), (a, b, str(rng.integers(300)).encode())][rng.integers(7)]
        out[a:b] = new
    return bytes(out)


def raw(t) -> bytes:
    return t.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def check_safetensors(path: Path, lm: LM):
    blob = (path / "model.safetensors").read_bytes()
    length = int.from_bytes(blob[:8], "little")
    header, data_ = json.loads(blob[8:8 + length]), blob[8 + length:]
    for name, t in hf_state(lm).items():
        entry = header[name]
        a, b = map(int, entry["data_offsets"])
        kind = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[entry["dtype"]]
        assert raw(torch.frombuffer(bytearray(data_[a:b]), dtype=kind).float()) == raw(t), name


def check_config(path: Path, c: ModelConfig):
    if (path / "config.json").exists():
        j = json.loads((path / "config.json").read_text())
        assert (c.dim, c.n_layers, c.n_heads, c.vocab_size, c.hidden_dim, c.norm_eps) == (
            j["hidden_size"], j["num_hidden_layers"], j["num_attention_heads"], j["vocab_size"], j["intermediate_size"],
            j["rms_norm_eps"])
    else:
        j = json.loads((path / "params.json").read_text())
        assert (c.dim, c.n_layers, c.n_heads, c.norm_eps) == (j["dim"], j["n_layers"], j["n_heads"], j["norm_eps"])


def check_rows(path: Path, rows: list):
    blob = path.read_bytes()
    text = (gzip.decompress(blob) if path.name.endswith(".gz") else blob).decode()
    whole = path.name.endswith(".json")
    found = json.loads(text) if whole else [json.loads(line) for line in text.split("\n") if line.strip()]
    assert repr(rows) == repr(found.get("data") if isinstance(found, dict) else found)


def too_slow(*_):
    raise TimeoutError("5 seconds of work")


def small_model(path: Path) -> LM:
    c = ModelConfig.read(path)
    if c.vocab_size == -1:
        raise UserError("the vocabulary is the tokenizer's, and here is none")
    return model.load_weights(path, c)


def fuzzed(seed: int, count: int, path: Path, load, check):
    """`count` mutations of a file: `load` gives what `check` finds right, or one clear line, within 5 seconds."""
    rng, blob, right = np.random.default_rng(seed), path.read_bytes(), 0
    signal.signal(signal.SIGPROF, too_slow)
    check(load())
    for i in range(count):
        path.write_bytes(mutated(blob, rng))
        signal.setitimer(signal.ITIMER_PROF, 5)         # seconds of the processor: a busy machine is no hang
        try:
            with contextlib.redirect_stderr(io.StringIO()):
                check(load())
            right += 1
        except UserError as error:
            assert 10 < len(str(error)) < 700 and "Traceback" not in str(error), error
        except BaseException as error:
            raise AssertionError(f"{path.name}, mutation {i} of seed {seed}: {error!r:.300}") from error
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
    path.write_bytes(blob)
    return right


def test_a_thousand_mutated_files_load_right_or_are_refused_in_one_line():
    # kills: json.loads unguarded; CRC of a state not checked; shapes unchecked; a mapped record shifted
    small = dict(dim=16, n_layers=2, n_heads=2, n_kv_heads=1, vocab_size=12, hidden_dim=20)
    lm, rows = tiny_lm(**small), [{"question": f"{i} + \u00e9?", "answer": str(i)} for i in range(9)]
    params = {**PARAMS, **{k: v for k, v in small.items() if k in PARAMS}, "multiple_of": 20, "ffn_dim_multiplier": 0.4}
    with folder() as path, patch.object(train, "evaluate", scored):
        meta = meta_folder(path / "meta", lm, **params)
        one, many = hf_folder(path / "one", lm), hf_folder(path / "many", lm, shards=3)

        def same_model(found):
            assert same(found.state_dict(), lm.state_dict())

        def only_mutated_bytes(found):
            bytes_of = [b"".join(map(raw, x.state_dict().values())) for x in (found, lm)]
            assert sum(a != b for a, b in zip(*bytes_of, strict=True)) <= 24, "three slices of eight bytes at most"
        for name, text in (("d.jsonl", "\n".join(map(json.dumps, rows))), ("d.json", json.dumps(rows))):
            (path / name).write_text(text)
        (path / "d.jsonl.gz").write_bytes(gzip.compress((path / "d.jsonl").read_bytes()))
        flags = small_run(path)
        with patch.object(train.Run, "evaluate_if_due", side_effect=KeyboardInterrupt):
            cli(*flags, "--out", path / "run")
        args = vars(train.make_parser().parse_args(flags))
        cfg = train.resolve({k: v for k, v in args.items() if k not in ("resume", "plan", "json")})
        original = train.load_state(path / "run", cfg)

        def same_state(state):
            assert same(state["server"]["learnt"], original["server"]["learnt"]) and state["rows"] == original["rows"]
            assert repr(state["server"]["optimizer"]) == repr(original["server"]["optimizer"])
        right = [fuzzed(0, 150, one / "model.safetensors", lambda: small_model(one), lambda m: check_safetensors(one, m)),
                 fuzzed(1, 150, meta / "consolidated.00.pth", lambda: small_model(meta), only_mutated_bytes),
                 fuzzed(2, 100, many / "model.safetensors.index.json", lambda: small_model(many), same_model),
                 fuzzed(3, 150, meta / "params.json", lambda: small_model(meta).config, lambda c: check_config(meta, c)),
                 fuzzed(4, 150, one / "config.json", lambda: small_model(one).config, lambda c: check_config(one, c)),
                 *(fuzzed(5, 67, path / n, lambda n=n: data.read_rows(path / n), lambda r, n=n: check_rows(path / n, r))
                   for n in ("d.jsonl", "d.json", "d.jsonl.gz")),
                 fuzzed(6, 100, path / "run" / "state.pt", lambda: train.load_state(path / "run", cfg), same_state)]
        assert sum(right) > 30, f"mutations that load all the same: {right}"


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


def test_a_thousand_clients_take_the_memory_of_ten():
    # kills: results of clients that were not chosen; a copy of the examples, or of the model, a client
    with folder() as path:
        flags = small_run(path) + ["--rounds", 2]
        gsm8k_folder(path / "data", train_rows=1200)
        peaks = []
        for clients in (10, 1000):
            job = start(path / "log", *flags, "--clients", clients, "--clients-per-round", 10, "--out", path / str(clients),
                        "--batch-size", 4)
            job.join()
            assert job.exitcode == 0, (path / "log").read_text()
            peaks.append(json.loads((path / str(clients) / "summary.json").read_text())["peak_memory_bytes"])
        assert peaks[1] < peaks[0] + 30e6, peaks
