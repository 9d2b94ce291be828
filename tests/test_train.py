"""Training's command line: the plan, presets, mistakes, the run folder, resuming."""
import contextlib
import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import torch

import eval as evaluation
import fedbiot
import lora
import train
from extras import memory
from tests.common import (
    HERE, RUN_FILES, WEIGHTS, assert_same_run, cli, fast_scores, folder, meta_folder,
    no_longer_than, one_line, read_json, read_log, read_saved, refused, scored, small_run, start,
    stopped_before_evaluation, tiny_lm,
)

LLAMA_2_7B = {"dim": 4096, "n_layers": 32, "n_heads": 32, "multiple_of": 256, "norm_eps": 1e-5,
              "vocab_size": -1}


# ---- the plan -----------------------------------------------------------------------------------

def without_memory():
    """While this lasts a plan does not count memory, which takes seconds: tests/test_memory.py."""
    return patch.object(memory, "add_to", return_value={})


def planned(*argv) -> dict:
    with without_memory():
        status, out, err = cli(*argv, "--plan", "--json")
    assert (status, err) == (0, ""), err
    return json.loads(out)


def test_plan_prints_table_5_from_params_json_alone():
    # kills: L_bp = all; only one direction counted; LoRA left out of P
    with folder() as path:
        (path / "params.json").write_text(json.dumps(LLAMA_2_7B))
        for beta, s, emulator, millions, gmac, mb in (
                (".2", 2, 24, .262, 5.47, 14.68), ("0.2", 4, 22, .524, 5.87, 15.73),
                (".5", 2, 15, .262, 3.65, 9.96), ("0.5", 4, 14, .524, 4.25, 11.53)):
            argv = ("--ckpt", path, "--task", "gsm8k", "--dropout", beta, "--adapter", s)
            plan = planned(*argv)
            kept, dropped, adapter = (plan[f"{k}_layers"] for k in ("kept", "dropped", "adapter"))
            assert len(kept) == emulator and adapter == list(range(32 - s, 32))
            assert sorted(kept + dropped + adapter) == list(range(32))
            assert plan["trainable_params"] == s * 131072
            assert round(plan["trainable_params"] / 1e6, 3) == millions
            assert round(plan["comm_mb_per_round"], 2) == mb
            assert round(plan["gmac_per_token"], 2) == gmac
            with without_memory():
                status, table, err = cli(*argv, "--plan")
            assert (status, err) == (0, "") and f"{mb:.2f} MB" in table
            assert f"{s * 131072:,}" in table


def test_plan_counts_grouped_keys_and_values():
    # kills: a square wk and wv for every model
    with folder() as path:
        (path / "params.json").write_text(json.dumps({**LLAMA_2_7B, "n_kv_heads": 8}))
        plan = planned("--ckpt", path, "--adapter", 2)
    lora = 8 * (3 * 4096 + 1024)                            # A of wq and wv, B of wq, B of wv
    layer = 2 * 4096**2 + 2 * 1024 * 4096 + 3 * 4096 * 11008 + lora
    assert plan["trainable_params"] == 2 * lora
    assert math.isclose(plan["gmac_per_token"], (26 + 2 - 1) * layer / 1e9)


def test_plan_of_the_other_methods_is_table_5_and_its_rules():
    # kills: s for 2 s; backward through the adapter only; a FedTT adapter in P left out; a backward
    # for FedKSeed
    layer = 4 * 4096**2 + 3 * 4096 * 11008                  # one of LLaMA-2-7B's, without LoRA
    whole = 32 * (layer + 2 * 4096) + 4096 + 2 * 32000 * 4096
    lora, tt = 131_072, 32 * 4 * 1100
    with folder() as path:
        (path / "params.json").write_text(json.dumps(LLAMA_2_7B))
        (path / "small").mkdir()
        small = LLAMA_2_7B | {"n_layers": 4, "vocab_size": 32000}
        (path / "small" / "params.json").write_text(json.dumps(small))

        def plan(*argv):
            return planned("--ckpt", path, *argv)
        for method in ("fedot", "offsite"):
            for beta, kept, gmac in (("0.2", 22, 10.33), ("0.5", 14, 7.09)):
                p = plan("--method", method, "--dropout", beta)
                assert p["trainable_params"] == 4 * lora and round(p["gmac_per_token"], 2) == gmac
                assert math.isclose(p["comm_mb_per_round"], 4 * lora * 8 / 1e6)
                assert p["adapter_layers"] == [0, 1, 30, 31] and len(p["kept_layers"]) == kept
        for method, trained, sent, mac in (
                ("fedavg", 32 * lora, 8 * 32 * lora, 63 * (layer + lora)),
                ("fedkseed", whole, 17_988, 64 * layer), ("fedkseed-pro", whole, 9_796, 64 * layer),
                ("fedtt", tt, 8 * tt, 63 * (layer + 4400)),
                ("fedtt+", tt, 8 * tt / 6 + 8, 63 * (layer + 4400)),
                ("fedpt", 4 * lora, 8 * 4 * lora, 7 * (layer + lora))):
            proxy = ("--proxy-ckpt", path / "small") if method == "fedpt" else ()
            p = plan("--method", method, *proxy)
            assert p["trainable_params"] == trained, method
            assert math.isclose(p["comm_mb_per_round"], sent / 1e6), (method, p)
            assert math.isclose(p["gmac_per_token"], mac / 1e9), (method, p)
        assert tt == 140_800 and round(32 * lora / tt, 1) == 29.8, "as FedTT's paper has them"
        assert plan("--method", "fedtt", "--tt-bias")["trainable_params"] == 407_040

def test_a_plan_follows_what_carries_lora():
    # kills: parameters, bytes or multiplications of the plan by a formula of wq and wv
    full = tiny_lm(vocab_size=1024).layers["0"]
    for targets in (("wq",), ("wq", "wk", "wv", "wo")):
        with folder() as path, fast_scores(), patch.object(lora, "TARGETS", targets):
            flags, run = small_run(path), path / "run"
            assert cli(*flags, "--out", run)[0] == 0
            plan, learnt, rows = planned(*flags), read_saved(run / "lora.pt"), read_log(run)
        sizes = [getattr(full.attention, name).weight.shape for name in targets]
        layer = sum(8 * (d_out + d_in) for d_out, d_in in sizes)
        frozen = sum(p.numel() for n, p in full.named_parameters() if "norm" not in n)
        assert plan["trainable_params"] == 2 * layer
        assert plan["trainable_params"] == sum(t.numel() for n, t in learnt.items() if n[7] in "34")
        assert math.isclose(plan["gmac_per_token"], (3 + 2 - 1) * (frozen + layer) / 1e9)
        for row in rows:
            sent = float(row["bytes_down"]) + float(row["bytes_up"])
            assert math.isclose(sent / 1e6, plan["comm_mb_per_round"]), targets


# ---- flags --------------------------------------------------------------------------------------

def test_a_flag_without_a_use_is_noted_once_and_a_contradiction_refused():
    # kills: the note missing; a note for a flag with a use; Offsite-Tuning with three clients
    with folder() as path:
        (path / "params.json").write_text(json.dumps(LLAMA_2_7B))

        def plan(*argv):
            with without_memory():
                return cli("--ckpt", path, "--plan", *argv)
        answer = plan("--method", "fedavg", "--dropout", ".5", "--tt-rank", 3, "--rank", 4)
        note = one_line(answer, "--dropout", "--tt-rank", status=0)
        assert "--rank" not in note.replace("--tt-rank", "")
        assert plan("--method", "fedkseed", "--kseed-candidates", 9)[2] == ""
        one_line(plan("--method", "offsite", "--clients", 3), "fedot")


def test_presets_are_the_papers_and_the_authors():
    # kills: prox left on; a given flag overruled by the preset
    paper, theirs = (train.resolve({"preset": p, "ckpt": "x"}) for p in ("paper", "official-code"))
    expected = {"rounds": 500, "local_steps": 30, "batch_size": 10, "align_init": 500,
                "align_steps": 10, "rank": 8, "alpha": 16, "clients": 3, "adapter": 2,
                "dropout": 0.2, "align_tokens": "answer", "align_norm": "rms",
                "align_renew": False, "uniform_weights": False, "shots": 8}
    assert expected.items() <= vars(paper).items() and paper.prox > 0
    expected = {"prox": 0, "align_tokens": "all", "align_norm": "rms", "align_renew": True,
                "uniform_weights": True}
    assert expected.items() <= vars(theirs).items()
    assert train.resolve({"preset": "official-code", "prox": 0.3}).prox == 0.3
    clients = {task: train.resolve({"task": task, "ckpt": "x"}).clients
               for task in ("gsm8k", "rosetta", "dolly")}
    assert clients == {"gsm8k": 3, "rosetta": 9, "dolly": 8}
    with patch.dict(os.environ, WORLD_SIZE="6"):
        assert train.resolve({"own_data": True}).clients == 5, "every rank but the server's"


def test_a_mistake_in_a_flag_ends_in_one_line_and_status_2():
    # kills: status 1; abbreviations; a share of 1e400 as a traceback, of 1e300000000 for minutes; a
    # rank that no memory holds; an alpha of 0; the meta device
    shares = ("1", "1.5", "-0.1", "nan", "x", "1/0", "0.9", "1e400", "-1e400", "1e300000000")
    cases = [(["--task", "cooking"], "cooking", "gsm8k"), (["--drop", "0.2"], "--drop"),
             (["--method", "magic"], "magic", "fedbiot"), (["--adapter", "2.5"], "--adapter"),
             *[(["--dropout", share], "--dropout") for share in shares],
             *[(["--adapter", s], f"--adapter {s}", "5 layers", "1..4") for s in (0, 5, 40)],
             (["--adapter", -1], "--adapter -1"),
             (["--max-len", 1], "--max-len 1"), (["--rounds", 0], "--rounds 0"),
             (["--lr", "nan"], "--lr"), (["--prox", "-1"], "--prox"), (["--rank", 0], "--rank"),
             (["--batch-size", 0], "--batch-size"), (["--seed", "-1"], "--seed"),
             (["--clients-per-round", 4], "--clients-per-round 4"), (["--clients", 0], "--clients"),
             (["--rank", 10**9], "--rank"), (["--alpha", 0], "--alpha"),
             (["--device", "meta"], "--device meta"),
             (["--validate", 1, "--task", "dolly"], "--validate", "gsm8k"),
             (["--device", "abacus"], "--device abacus"), (["--shots", 9], "--shots 9")]
    with folder() as path:
        flags = small_run(path)
        for argv, *words in cases:
            answer = cli(*flags, "--out", path / "run", *argv)
            assert one_line(answer, *words).startswith("error: "), argv
            assert not (path / "run").exists(), argv


def test_a_mistake_in_a_file_ends_in_one_line_before_the_first_round():
    # kills: --out not looked at; a checkpoint's, a tokenizer's or a data file's error let through
    with folder() as path:
        flags = small_run(path)
        for name in ("cut", "no-tokenizer"):
            meta_folder(path / name, tiny_lm(vocab_size=1024), tokenizer=name == "cut")
        with open(path / "cut" / "consolidated.00.pth", "rb+") as file:
            file.truncate(5000)
        row = '{"question": "q", "answer": "1"}\n'
        for name, text in (("malformed", row + '{"question"\n'), ("few", row * 2)):
            shutil.copytree(path / "data", path / name)
            (path / name / "gsm8k" / "train.jsonl").write_text(text)
        (path / "taken").mkdir()
        (path / "file").write_text("mine")
        for argv, *words in ((["--ckpt", path / "none"], "none"),
                             (["--ckpt", path / "no-tokenizer"], "tokenizer.model"),
                             (["--ckpt", path / "cut"], "consolidated.00.pth"),
                             (["--data-dir", path / "malformed"], "train.jsonl", "line 2"),
                             (["--data-dir", path / "few"], "--clients 3", "1..2"),
                             (["--max-len", 9], "--max-len 9"),
                             (["--out", path / "taken"], "taken", "--resume"),
                             (["--out", path / "file"], "file", "--resume"),
                             (["--out", path / "file" / "below"], "below")):
            answer = cli(*flags, "--out", path / "run", *argv)
            assert one_line(answer, *words).startswith("error: "), argv
            assert not (path / "run" / "state.pt").exists(), f"{argv}: refused only after a round"
        assert (path / "file").read_text() == "mine" and not list((path / "taken").iterdir())

TEXTS = {train.main: ("ckpt", "data-dir", "out", "init-lora", "device", "save-predictions"),
         evaluation.main: ("ckpt", "data-dir", "run", "export", "predictions", "device")}


def test_an_empty_or_an_endless_value_is_one_line():
    # kills: an empty name taken for the folder one stands in; a number that overflows later; a name
    # that is too long as a traceback
    with folder() as path:
        flags = small_run(path) + ["--out", path / "run"]
        (path / "file").write_text("mine")
        for main, names in TEXTS.items():
            usual = flags if main is train.main else ["--task", "gsm8k", "--limit", 1]
            for name in names:
                one_line(cli(*usual, f"--{name}", "", main=main), f"--{name}", "empty")
            for name in names:
                if name != "save-predictions":              # GSM8K keeps no programs
                    for wrong in ("n" * 300, path / "file" / "below"):
                        one_line(cli(*usual, f"--{name}", wrong, main=main))
            for number in ("99999999999999999999", "-99999999999999999999", "1" * 5000, "٣x"):
                one_line(cli(*usual, "--threads", number, main=main), "--threads")
        one_line(cli(*flags, "--lr", "9" * 400), "--lr")
        assert not (path / "run").exists()


def test_a_checkpoint_of_brackets_or_pipes_is_one_line():
    # kills: RecursionError as a traceback; a wait for the writer of a pipe
    with folder() as path:
        flags = small_run(path) + ["--out", path / "run"]
        for name in ("params.json", "tokenizer.model", "consolidated.00.pth", "train.jsonl",
                     "test.jsonl", "alpaca_data.json"):
            file, = path.rglob(name)
            content = file.read_bytes()
            file.write_bytes(b"[" * 200_000)
            one_line(cli(*flags), name)
            file.unlink()
            os.mkfifo(file)
            with no_longer_than(10):
                one_line(cli(*flags), name)
            file.unlink()
            file.write_bytes(content)
            assert not (path / "run").exists(), name


# ---- the run folder -----------------------------------------------------------------------------

def test_a_run_folder_holds_what_is_promised():
    # kills: base scored again; accuracy in every row
    with folder() as path, fast_scores() as evaluations:
        flags = small_run(path, *WEIGHTS)
        status, out, err = cli(*flags, "--out", path / "run", "--eval-every", 2)
        assert status == 0, err
        assert evaluations.call_count == 5, "the base model once, the other two twice"
        run = path / "run"
        assert {p.name for p in run.iterdir()} == RUN_FILES | {"emulator.pt"}
        rows, summary, config = (read_log(run), read_json(run / "summary.json"),
                                 read_json(run / "config.json"))
    assert list(rows[0]) == ["round", "client_loss", "align_l2", "align_kl", "bytes_down",
                             "bytes_up", "seconds", "base", "adapemu", "adapfu"]
    assert [r["round"] for r in rows] == ["1", "2", "3"] and config["dropout"] == 0.34
    assert [bool(r["adapfu"]) for r in rows] == [False, True, True]
    assert rows[1]["base"] == rows[2]["base"] and rows[1]["adapfu"] != rows[2]["adapfu"]
    head = {"task": "gsm8k", "method": "fedbiot", "seed": 0, "rounds": 3}
    assert head.items() <= summary.items() and summary["peak_memory_bytes"] > 10**7
    assert list(summary["metrics"]) == ["base", "adapemu", "adapfu"]
    assert all(set(m) == {"correct", "total", "accuracy"} for m in summary["metrics"].values())
    assert re.findall(r"^round \d", out, re.M) == ["round 1", "round 2", "round 3"]
    assert "adapfu" in out.split("accuracy")[1]


def test_a_runs_plan_is_what_it_trains_and_sends():
    # kills: half the bytes in the plan
    with folder() as path, fast_scores():
        flags, run = small_run(path), path / "run"
        assert cli(*flags, "--out", run)[0] == 0
        plan, rows = planned(*flags), read_log(run)
        summary, learnt = read_json(run / "summary.json"), read_saved(run / "lora.pt")
    assert plan["kept_layers"] == [0] and plan["dropped_layers"] == [1, 2]
    down, up = (summary[f"bytes_{way}_per_client_round"] for way in ("down", "up"))
    assert all((float(r["bytes_down"]), float(r["bytes_up"])) == (down, up) for r in rows)
    assert math.isclose((down + up) / 1e6, plan["comm_mb_per_round"])
    assert {n.split(".")[1] for n in learnt} == set("034")
    assert 4 * sum(t.numel() for t in learnt.values()) == down
    adapter = sum(t.numel() for n, t in learnt.items() if n[7] in "34")
    assert plan["trainable_params"] == summary["trainable_params"] == adapter == up / 4
    full = tiny_lm(vocab_size=1024).state_dict()
    held = 4 * sum(t.numel() for n, t in full.items() if not re.match(r"layers\.[12]\.", n))
    assert held < summary["bootstrap_bytes"] < held + 500


def test_eval_builds_the_same_models_from_a_run_folder():
    # kills: AdapEmu and AdapFu swapped by eval.py; a missing lora.pt as a traceback
    with folder() as path, fast_scores():
        run = path / "run"
        assert cli(*small_run(path, *WEIGHTS), "--out", run, "--rounds", 1)[0] == 0
        models, _, cfg = evaluation.models_of_run(run, "cpu", torch.float32)
        found = {name: scored(lm, None, cfg, "") for name, lm in models.items()}
        assert found == read_json(run / "summary.json")["metrics"]
        for name in ("lora.pt", "emulator.pt", "config.json"):
            (run / name).rename(path / name)
            refused(lambda: evaluation.models_of_run(run, "cpu", torch.float32), name, "run")
            (path / name).rename(run / name)
        (run / "summary.json").unlink()
        refused(lambda: evaluation.models_of_run(run, "cpu", torch.float32), "finished", "--resume")


def test_a_default_name_that_is_taken_gets_a_number():
    # kills: -2 for the third
    here, short = os.getcwd(), ("--rounds", 1, "--align-init", 0, "--local-steps", 1)
    with folder() as path, fast_scores():
        flags = small_run(path)
        os.chdir(path)
        try:
            assert [cli(*flags, *short)[0] for _ in range(3)] == [0, 0, 0]
        finally:
            os.chdir(here)
        name = "gsm8k-fedbiot-b0.34-s2-seed0"
        assert {p.name for p in (path / "runs").iterdir()} == {name, name + "-2", name + "-3"}

def at_the_same_moment():
    """Both processes stand where a folder is chosen before either goes on; then each in `IN`."""
    original = train.choose_folder

    def choose_folder(cfg, restarted):
        os.chdir(os.environ["IN"])
        Path(f"here-{os.getpid()}").touch()
        while len(list(Path().glob("here-*"))) < 2:
            time.sleep(0.001)
        return original(cfg, restarted)
    train.choose_folder = choose_folder


def test_two_runs_of_the_same_moment_take_two_folders():
    # kills: a free name looked for first and made later
    name = "gsm8k-fedbiot-b0.34-s2-seed0"
    with folder() as path:
        flags = small_run(path) + ["--rounds", 1]
        jobs = [start(path / f"log{i}", *flags, change=at_the_same_moment, IN=str(path))
                for i in range(2)]
        for job in jobs:
            job.join(120)
        texts = [(path / f"log{i}").read_text() for i in range(2)]
        assert [job.exitcode for job in jobs] == [0, 0], texts
        made = {p.name for p in (path / "runs").iterdir()}
        assert made == {name, name + "-2"}, made
        assert_same_run(path / "runs" / name, path / "runs" / f"{name}-2")


def test_a_folder_with_a_run_at_work_is_refused_in_one_line():
    # kills: two runs in one folder; a lock that outlives its process
    with folder() as path, fast_scores():
        flags, run = small_run(path), path / "run"
        with stopped_before_evaluation():
            assert cli(*flags, "--out", run)[0] == 130
        before = {p.name: p.read_bytes() for p in run.iterdir()}
        with train.locked(run):
            one_line(cli(*flags, "--out", run, "--resume"), str(run), "at work")
        assert before == {p.name: p.read_bytes() for p in run.iterdir()}
        assert cli(*flags, "--out", run, "--resume")[0] == 0


def test_the_main_command_runs_on_the_bundled_model_from_anywhere():
    # kills: a path relative to the working directory
    with folder() as path:
        def command(*argv):
            argv = [sys.executable, HERE / "train.py", "--task", "gsm8k", "--out", "run", *argv]
            return subprocess.run(argv, cwd=path, capture_output=True, text=True)
        done = command("--dropout", "0.2", "--adapter", "2", "--rounds", "1", "--local-steps", "2",
                       "--align-init", "2", "--eval-limit", "4", "--threads", "1")
        assert done.returncode == 0, done.stderr
        summary, (row,) = read_json(path / "run" / "summary.json"), read_log(path / "run")
        assert summary["metrics"]["adapfu"]["total"] == 4
        assert summary["peak_memory_bytes"] < 1.5e9
        assert float(row["client_loss"]) < 0.5 * math.log(1024), "a pre-trained model"
        again = command()
        one_line((again.returncode, again.stdout, again.stderr), "--resume")

# ---- the six files alone ------------------------------------------------------------------------

SIX = ("model.py", "lora.py", "fedbiot.py", "data.py", "eval.py", "train.py")
SHORT = ("--task", "gsm8k", "--dropout", "0.2", "--adapter", "2", "--rounds", "1", "--local-steps",
         "2", "--align-init", "2", "--eval-limit", "2", "--max-new-tokens", "20", "--threads", "1")

# Every door in one process: (which program, its flags) -> the status and the line of each.
DOORS = """
import contextlib, io, json, os, sys
import eval, train
for program, argv, env in json.load(open("doors.json")):
    err, status = io.StringIO(), None
    os.environ.update(env)
    with contextlib.redirect_stderr(err):
        try:
            eval.main_guard(lambda: {"train": train, "eval": eval}[program].main(argv))
        except SystemExit as end:
            status = end.code
    for name in env:
        del os.environ[name]
    print(json.dumps([status, err.getvalue()]), file=sys.stderr)
"""


def alone(path: Path) -> Path:
    """The six files and the bundled model, in a folder of their own."""
    shutil.copytree(HERE / "tiny", path / "tiny")
    for name in SIX:
        shutil.copy(HERE / name, path)
    return path


def command_in(path: Path, *argv) -> subprocess.CompletedProcess:
    """Python with these arguments, in a folder, where nothing else of the project is found."""
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    return subprocess.run([sys.executable, *map(str, argv)], cwd=path, env=env, text=True,
                          capture_output=True, timeout=300)


def test_the_six_files_alone_are_the_program():
    # kills: an import of a room at the top of a file, or on the default way; other bits without the
    # rooms
    assert cli(*SHORT, "--out", os.devnull, "--plan")[0] == 0
    with folder() as path:
        status, _, err = cli(*SHORT, "--out", path / "whole")
        assert status == 0, err
        here, outputs = alone(path), []
        for argv in (("train.py", *SHORT, "--plan", "--json"), ("train.py", *SHORT, "--out", "run"),
                     ("eval.py", "--run", "run", "--limit", 2, "--threads", 1, "--json"),
                     ("train.py", *SHORT, "--out", "run", "--resume")):
            done = command_in(here, *argv)
            assert (done.returncode, done.stderr) == (0, ""), (argv, done)
            outputs.append(done.stdout)
            if argv[0] == "eval.py":                        # what --resume has to make again
                summary = read_json(here / "run" / "summary.json")
                (here / "run" / "summary.json").unlink()
                (here / "run" / "lora.pt").rename(here / "first.pt")
        assert json.loads(outputs[0]) == planned(*SHORT)
        assert json.loads(outputs[2]) == summary["metrics"]["adapfu"]
        assert "round 1 |" in outputs[1] and "round 1 |" not in outputs[3]
        for found in (here / "first.pt", here / "run" / "lora.pt"):
            assert found.read_bytes() == (path / "whole" / "lora.pt").read_bytes(), found
        assert_same_run(here / "run", path / "whole")


def test_a_door_to_a_room_that_is_not_there_is_one_line():
    # kills: ModuleNotFoundError as a traceback; status 1; all methods' flags asked for at a slip
    ranks = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    doors = [("train", ["--method", m], {}, train.METHODS[m].split(".")[0])
             for m in train.METHODS if m != "fedbiot"]
    doors += [("train", ["--task", "dolly"], {}, "tasks"),
              ("train", ["--task", "rosetta"], {}, "tasks"),
              ("train", ["--shots", "8"], {}, "tasks"), ("train", [], ranks, "extras"),
              ("train", ["--init-lora", "x"], {}, "extras"),
              ("train", ["--data-dir", "."], {}, "extras"),
              ("train", ["--ckpt", "hf"], {}, "extras"),
              ("eval", ["--export", "out"], {}, "extras"),
              ("eval", ["--task", "dolly"], {}, "tasks"),
              ("eval", ["--task", "gsm8k", "--predictions", "p.jsonl"], {}, "tasks"),
              ("train", ["--no-such-flag"], {}, "--no-such-flag; see --help\n")]  # needs no room
    with folder() as path:
        alone(path)
        (path / "hf").mkdir()
        (path / "hf" / "config.json").write_text("{}")
        (path / "doors.py").write_text(DOORS)
        (path / "doors.json").write_text(json.dumps([door[:3] for door in doors]))
        done = command_in(path, "doors.py")
        answers = [json.loads(line) for line in done.stderr.splitlines()]
        assert len(answers) == len(doors), done
        for (status, line), (program, argv, _, named) in zip(answers, doors):
            assert status == 2 and line.count("\n") == 1, (program, argv, line)
            named = named if "\n" in named else f"'{named}'"
            assert line.startswith("error: ") and named in line, (program, argv, line)
        assert not list(path.glob("runs/*")) and not (path / "out").exists()


FAKE_TORCH = """
import os, signal, time
os.kill(os.getpid(), signal.SIGINT)
time.sleep(60)
"""


def test_ctrl_c_during_the_imports_is_one_line():
    # kills: the handler set after the imports; every rank prints
    with folder() as path:
        alone(path)
        (path / "torch.py").write_text(FAKE_TORCH)
        for program, rank, said in (("train.py", "0", 1), ("train.py", "2", 0),
                                    ("eval.py", "0", 1)):
            with patch.dict(os.environ, RANK=rank):
                done = command_in(path, program, *SHORT[:2])
            assert (done.returncode, done.stdout) == (130, ""), done
            assert done.stderr == "stopped by Ctrl-C\n" * said, done


# ---- resuming -----------------------------------------------------------------------------------

def stops_at(owner, name: str, call: int):
    """While this lasts, `owner.name` is a Ctrl-C at its call number `call`."""
    original, count = getattr(owner, name), iter(range(99))

    def wrapped(*args, **keywords):
        if next(count) == call:
            raise KeyboardInterrupt
        return original(*args, **keywords)
    return patch.object(owner, name, wrapped)


def test_a_stopped_run_resumes_bit_for_bit():
    # kills: rounds from 0 again; optimizer not restored; a stopped evaluation never made up for;
    # E's own weights aligned again
    stops = ((train.Run, "finish_round", 0), (train.Run, "finish_round", 1),
             (train, "write_file", 0), (train, "write_file", 1),    # emulator.pt, the first state
             (train, "write_file", 2), (train, "write_file", 6),    # a log behind its state
             (evaluation, "score", 1), (evaluation, "score", 3), (fedbiot.Client, "update", 5),
             (train.Run, "finish", 0), (train, "write_json", 1))    # all but the summary
    with folder() as path, fast_scores():
        flags = small_run(path, *WEIGHTS) + ["--eval-every", "1"]
        assert cli(*flags, "--out", path / "whole")[0] == 0
        for i, stop in enumerate(stops):
            run = path / f"stopped{i}"
            with stops_at(*stop):
                one_line(cli(*flags, "--out", run), "stopped", status=130)
            assert not (run / "summary.json").exists()
            status, _, err = cli(*flags, "--out", run, "--resume")
            assert status == 0, (stop, err)
            assert_same_run(run, path / "whole")


def test_resume_of_a_finished_run_and_of_none():
    # kills: a finished run begun anew; a run that is not there refused; other flags than a finished
    # run's passed over
    with folder() as path, fast_scores():
        flags, run = small_run(path), path / "run"
        assert cli(*flags, "--out", run, "--resume")[0] == 0, "not there: from round 0"
        before = {p.name: p.read_bytes() for p in run.iterdir()}
        one_line(cli(*flags, "--out", run, "--resume"), "finished", status=0)
        one_line(cli(*flags, "--out", run, "--resume", "--seed", 7), "--seed", "--out")
        assert before == {p.name: p.read_bytes() for p in run.iterdir()}


def test_resume_refuses_other_flags_and_a_cut_state():
    # kills: the flags of the state not compared; a short state as a traceback; rows of other
    # rounds, or without their numbers, gone on from; a link taken for no state
    with folder() as path, fast_scores():
        flags, run = small_run(path), path / "run"
        with stops_at(train.Run, "finish", 0):
            assert cli(*flags, "--out", run)[0] == 130
        state = (run / "state.pt").read_bytes()
        one_line(cli(*flags, "--out", run, "--resume", "--lr", "0.5"), "--lr")
        assert (run / "state.pt").read_bytes() == state
        (run / "state.pt").write_bytes(state[:900])
        one_line(cli(*flags, "--out", run, "--resume"), "state.pt")
        (run / "state.pt").write_bytes(state)
        rows = torch.load(run / "state.pt")["rows"]
        for odd in ({"rows": rows[:1] * 2}, {"rows": [rows[0] | {"round": "1"}]},
                    {"rows": [{"round": 1}]}, {"metrics": {"base": 3}}):
            torch.save(torch.load(run / "state.pt") | odd, run / "state.pt")
            one_line(cli(*flags, "--out", run, "--resume"), "state.pt")
            (run / "state.pt").write_bytes(state)
        (run / "state.pt").unlink()
        (run / "state.pt").symlink_to("state.pt")               # not there, and yet not absent
        one_line(cli(*flags, "--out", run, "--resume"), "state.pt")


def rewritten(path: Path, old: str, new: str):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def test_resume_refuses_other_data_and_another_checkpoint():
    # kills: the state tied to flags alone; only the files' names or sizes compared
    data = Path("data") / "gsm8k"
    with folder() as path, fast_scores():
        flags, run = small_run(path, *WEIGHTS), path / "run"
        with stopped_before_evaluation():
            assert cli(*flags, "--out", run)[0] == 130
        state = (run / "state.pt").read_bytes()
        for file, change in (
                (path / data / "train.jsonl", lambda f: rewritten(f, "7 and 7", "8 and 7")),
                (path / data / "test.jsonl", lambda f: rewritten(f, "#### 2", "#### 4")),
                (path / "data" / "alpaca" / "alpaca_data.json",
                 lambda f: rewritten(f, "Repeat 3", "Repeat 9")),
                (path / "ckpt" / "params.json", lambda f: rewritten(f, "500.0", "501.0")),
                (run / "emulator.pt", lambda f: f.write_bytes(f.read_bytes()[:-1] + b"!")),
                (path / "ckpt" / "consolidated.00.pth",
                 lambda f: meta_folder(f.parent, tiny_lm(1, vocab_size=1024), tokenizer=True))):
            content = file.read_bytes()
            change(file)
            assert file.read_bytes() != content
            one_line(cli(*flags, "--out", run, "--resume"), "state.pt", "made with", "--out")
            assert (run / "state.pt").read_bytes() == state
            file.write_bytes(content)
        config = path / "ckpt" / "notes.json"               # one file fewer than at the start
        config.write_text("{}")
        with stopped_before_evaluation():
            assert cli(*flags, "--out", path / "more")[0] == 130
        config.unlink()
        one_line(cli(*flags, "--out", path / "more", "--resume"), "notes.json", "now it is None")
        assert cli(*flags, "--out", run, "--resume")[0] == 0
        assert cli(*flags, "--out", path / "whole")[0] == 0
        assert_same_run(run, path / "whole")


def test_eval_refuses_a_run_whose_files_are_not_its_own():
    # kills: lora.pt of another run under this one's alpha; a configuration changed by hand; another
    # checkpoint under the same path
    with folder() as path, fast_scores():
        flags, run = small_run(path, *WEIGHTS) + ["--rounds", 1], path / "run"
        assert cli(*flags, "--out", run)[0] == 0
        assert cli(*flags, "--seed", 1, "--out", path / "other")[0] == 0
        original = {p.name: p.read_bytes() for p in run.iterdir()}

        def evaluated():
            return cli("--run", run, "--limit", 1, main=evaluation.main)
        for name in ("lora.pt", "emulator.pt"):
            (run / name).write_bytes((path / "other" / name).read_bytes())
            one_line(evaluated(), str(run), name)
            (run / name).write_bytes(original[name])
        for old, new in (('"alpha": 16.0', '"alpha": 32.0'), ('"rank": 8', '"rank": 4'),
                         ('"method": "fedbiot"', '"method": "fedavg"')):
            rewritten(run / "config.json", old, new)
            one_line(evaluated(), str(run), "config.json")
            (run / "config.json").write_bytes(original["config.json"])
        for content in (b"{}", b"[]", b"[" * 200_000, b"\xff"):
            for name in ("config.json", "summary.json"):
                (run / name).write_bytes(content)
                one_line(evaluated(), str(run))
                (run / name).write_bytes(original[name])
        assert evaluated()[0] == 0
        meta_folder(path / "ckpt", tiny_lm(1, vocab_size=1024), tokenizer=True)
        one_line(evaluated(), str(run), "another --ckpt consolidated.00.pth")


def test_a_run_belongs_to_the_checkpoint_that_it_began_with_from_every_folder():
    # kills: the checkpoint's fingerprints taken at the end; a relative --ckpt or --data-dir kept as
    # it was given; a checkpoint that is gone said to be another; --ckpt beside --run passed over
    with folder() as path, fast_scores(), contextlib.chdir(path):
        flags, run = [*small_run(Path(".")), "--rounds", 1], path / "run"
        assert cli(*flags, "--out", "run")[0] == 0
        evaluated = "--run", run, "--limit", 1
        with contextlib.chdir("/"):
            assert cli(*evaluated, main=evaluation.main)[0] == 0
        with patch.object(train.Run, "finish", lambda *given, finish=train.Run.finish: (
                meta_folder(path / "ckpt", tiny_lm(1, vocab_size=1024), tokenizer=True),
                finish(*given))[1]):
            assert cli(*flags, "--out", "other")[0] == 0
        one_line(cli("--run", "other", main=evaluation.main), "another --ckpt consolidated.00.pth")
        (path / "ckpt").rename(path / "elsewhere")
        one_line(cli(*evaluated, main=evaluation.main), "no --ckpt consolidated.00.pth", "--ckpt)")
        moved = *evaluated, "--ckpt", path / "elsewhere"
        one_line(cli(*moved, main=evaluation.main), "another --ckpt consolidated.00.pth")
        meta_folder(path / "elsewhere", tiny_lm(vocab_size=1024), tokenizer=True)
        assert cli(*moved, main=evaluation.main)[0] == 0


def test_the_summary_has_the_peak_of_the_runs_own_gpu():
    # kills: the peak of the current device for --device cuda:1
    peaks = {torch.device("cuda:1"): 7 * 2**30}
    with folder() as path, patch.object(torch.cuda, "max_memory_allocated", peaks.__getitem__):
        (path / "config.json").write_text("{}")
        row = {"bytes_down": 1, "bytes_up": 1}
        run = SimpleNamespace(
            folder=path, cfg=train.parse([]), rows=[row],
            server=SimpleNamespace(state_dict=lambda: {"learnt": {}}),
            state={"metrics": {}, "seconds": 1.0, "depends_on": {}})
        summary = train.Run.finish(run, 1, 1, torch.device("cuda:1"))
        assert summary["peak_memory_bytes"] == 7 * 2**30


def test_what_a_killed_process_left_half_written_is_removed():
    # kills: a folder .part-… beside state.pt for good; that of a run at work removed
    with folder() as path, fast_scores():
        flags, run = small_run(path), path / "run"
        with stopped_before_evaluation():
            assert cli(*flags, "--out", run)[0] == 130
        (run / ".part-x").mkdir()
        (run / ".part-x" / "state.pt").write_bytes(b"half")
        with train.locked(run):
            (run / ".part-y").mkdir()
            one_line(cli(*flags, "--out", run, "--resume"), "at work")
            assert {p.name for p in run.glob(".part-*")} == {".part-y"}
        assert cli(*flags, "--out", run, "--resume")[0] == 0
        assert {p.name for p in run.iterdir()} == RUN_FILES


def test_an_environment_of_empty_variables_and_a_closed_stderr_are_no_error():
    # kills: int("") as a traceback; progress bars that need a stderr
    empty = dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), "")
    with folder() as path, patch.dict(os.environ, empty), patch.object(sys, "stderr", None):
        flags = [*small_run(path), "--rounds", "1", "--out", str(path / "run")]
        with fast_scores(), contextlib.redirect_stdout(io.TextIOWrapper(io.BytesIO())):
            try:
                evaluation.main_guard(lambda: train.main(flags))
            except SystemExit as end:
                assert end.code == 0
        assert (path / "run" / "summary.json").exists()
