"""train"""
import csv
import json
import math
import os
import re
import subprocess
import sys
from fractions import Fraction
from types import SimpleNamespace
from unittest.mock import patch

import torch

import eval as evaluation
import fedbiot
import lora
import model
import train
from tests.common import (
    HERE, cli, config, folder, gsm8k_folder, meta_folder, needs, off, outcome, refused, same,
    scored, small_run, tiny_lm, tokenizer,
)


LLAMA_2_7B = {"dim": 4096, "n_layers": 32, "n_heads": 32, "multiple_of": 256, "norm_eps": 1e-5, "vocab_size": -1}


def test_plan_prints_table_5_from_params_json_alone():
    # kills: L_bp = all; only one direction counted; LoRA left out of P
    with folder() as path:
        (path / "params.json").write_text(json.dumps(LLAMA_2_7B))
        for beta, s, emulator, millions, gmac, mb in ((".2", 2, 24, .262, 5.47, 14.68), ("0.2", 4, 22, .524, 5.87, 15.73),
                                                      ("1/2", 2, 15, .262, 3.65, 9.96), ("0.5", 4, 14, .524, 4.25, 11.53)):
            argv = ("--ckpt", path, "--task", "gsm8k", "--dropout", beta, "--adapter", s, "--plan")
            status, out, err = cli(*argv, "--json")
            plan = json.loads(out)
            assert (status, err) == (0, "") and len(plan["kept_layers"]) == emulator
            assert plan["adapter_layers"] == list(range(32 - s, 32))
            assert sorted(plan["kept_layers"] + plan["dropped_layers"] + plan["adapter_layers"]) == list(range(32))
            assert round(plan["trainable_params"] / 1e6, 3) == millions and plan["trainable_params"] == s * 131072
            assert round(plan["comm_mb_per_round"], 2) == mb and round(plan["gmac_per_token"], 2) == gmac
            status, table, err = cli(*argv)
            assert (status, err) == (0, "") and f"{mb:.2f} MB" in table and f"{s * 131072:,}" in table
        narrow = {**LLAMA_2_7B, "n_kv_heads": 8}                # by hand: wk, wv (1024, 4096); B of wv (1024, 8)
        (path / "params.json").write_text(json.dumps(narrow))
        plan = json.loads(cli("--ckpt", path, "--adapter", 2, "--plan", "--json")[1])
        lora_layer = 8 * (3 * 4096 + 1024)
        assert plan["trainable_params"] == 2 * lora_layer
        layer = 2 * 4096**2 + 2 * 1024 * 4096 + 3 * 4096 * 11008 + lora_layer
        assert math.isclose(plan["gmac_per_token"], (26 + 2 - 1) * layer / 1e9)


def test_plan_of_the_other_methods_is_table_5_and_its_rules():
    # kills: s for 2 s; backward through the adapter only; a FedTT adapter in P left out; a backward for FedKSeed
    layer = 4 * 4096**2 + 3 * 4096 * 11008                              # one of LLaMA-2-7B's, without LoRA
    lora = 131_072
    with folder() as path:
        (path / "params.json").write_text(json.dumps(LLAMA_2_7B))
        (path / "small").mkdir()
        (path / "small" / "params.json").write_text(json.dumps(LLAMA_2_7B | {"n_layers": 4, "vocab_size": 32000}))

        def plan(*argv):
            status, out, err = cli("--ckpt", path, "--plan", "--json", *argv)
            assert status == 0, err
            p = json.loads(out)
            return p["trainable_params"], p["comm_mb_per_round"], p["gmac_per_token"] * 1e9, p
        for method in ("fedot", "offsite"):
            for beta, kept, gmac in (("0.2", 22, 10.33), ("0.5", 14, 7.09)):
                trained, mb, mac, p = plan("--method", method, "--dropout", beta)
                assert trained == 4 * lora and math.isclose(mb, 4 * lora * 8 / 1e6) and round(mac / 1e9, 2) == gmac
                assert p["adapter_layers"] == [0, 1, 30, 31] and len(p["kept_layers"]) == kept
        whole = 32 * (layer + 2 * 4096) + 4096 + 2 * 32000 * 4096
        tt = 32 * 4 * 1100
        for method, expected in {"fedavg": (32 * lora, 8 * 32 * lora, 63 * (layer + lora)),
                                 "fedkseed": (whole, 17_988, 64 * layer), "fedkseed-pro": (whole, 9_796, 64 * layer),
                                 "fedtt": (tt, 8 * tt, 63 * (layer + 4400)), "fedtt+": (tt, 8 * tt / 6, 63 * (layer + 4400)),
                                 "fedpt": (4 * lora, 8 * 4 * lora, 7 * (layer + lora))}.items():
            found = plan("--method", method, "--proxy-ckpt", path / "small")
            assert found[0] == expected[0] and math.isclose(found[1] * 1e6, expected[1]), (method, found)
            assert math.isclose(found[2], expected[2]), (method, found)
        assert tt == 140_800 and round(32 * lora / tt, 1) == 29.8 and plan("--method", "fedtt", "--tt-bias")[0] == 407_040


def test_a_flag_without_a_use_is_noted_once_and_a_contradiction_refused():
    # kills: the note missing; a note for a flag with a use; Offsite-Tuning with three clients
    with folder() as path:
        (path / "params.json").write_text(json.dumps(LLAMA_2_7B))
        status, _, err = cli("--ckpt", path, "--plan", "--method", "fedavg", "--dropout", ".5", "--tt-rank", 3, "--rank", 4)
        assert status == 0 and err.count("\n") == 1 and "--dropout" in err and "--tt-rank" in err and "--rank" not in err.replace("--tt-rank", "")
        assert cli("--ckpt", path, "--plan", "--method", "fedkseed", "--kseed-candidates", 9)[2] == ""
        status, _, err = cli("--ckpt", path, "--plan", "--method", "offsite", "--clients", 3)
        assert status == 2 and err.count("\n") == 1 and "fedot" in err


def test_presets_are_the_papers_and_the_authors():
    # kills: prox left on; a given flag overruled by the preset
    paper, theirs = (train.resolve({"preset": p, "ckpt": "x"}) for p in ("paper", "official-code"))
    assert (paper.rounds, paper.local_steps, paper.batch_size, paper.align_init, paper.align_steps) == (500, 30, 10, 500, 10)
    assert (paper.rank, paper.alpha, paper.clients, paper.dropout, paper.adapter) == (8, 16, 3, Fraction(1, 5), 2)
    assert paper.prox > 0 and (paper.align_tokens, paper.align_norm) == ("answer", "rms")
    assert not paper.align_renew and not paper.uniform_weights and paper.shots == 8
    assert theirs.prox == 0 and (theirs.align_tokens, theirs.align_norm) == ("all", "rms")
    assert theirs.align_renew and theirs.uniform_weights
    assert train.resolve({"preset": "official-code", "prox": 0.3}).prox == 0.3
    assert [train.resolve({"task": t, "ckpt": "x"}).clients for t in ("gsm8k", "rosetta", "dolly")] == [3, 9, 8]


def test_bad_input_ends_in_one_line_and_status_2():
    # kills: status 1; abbreviations; --out not looked at; shapes unchecked
    with folder() as path:
        flags = small_run(path)
        broken = {}
        for name in ("tokenizer", "missing", "surplus", "shape", "cut"):
            def edit(state, part):
                first = "layers.0.attention.wq.weight"
                state.update({"surplus": {"more": torch.ones(1)}, "shape": {first: torch.ones(48, 47)}}.get(name, {}))
                name == "missing" and state.pop(first)
            broken[name] = meta_folder(path / name, tiny_lm(vocab_size=1024), tokenizer=name != "tokenizer", edit=edit)
        with open(path / "cut" / "consolidated.00.pth", "rb+") as file:
            file.truncate(5000)
        sets = {}
        for name, lines in (("malformed", '{"question": "q", "answer": "1"}\n{"question"\n'), ("empty", ""),
                            ("few", '{"question": "q", "answer": "1"}\n' * 2)):
            sets[name] = gsm8k_folder(path / f"data-{name}")
            (sets[name] / "gsm8k" / "train.jsonl").write_text(lines)
        (path / "taken").mkdir()
        (path / "file").write_text("mine")
        cases = [(["--task", "cooking"], "cooking", "gsm8k"), (["--method", "magic"], "magic", "fedbiot"), (["--drop", "0.2"], "--drop"),
                 *[(["--dropout", b], "--dropout") for b in ("1", "1.5", "-0.1", "nan", "x", "1/0", "0.9", "1e400", "-1e400")],
                 *[(["--adapter", s], f"--adapter {s}", "5 layers", "1..4") for s in (0, -1, 5, 40)],
                 (["--adapter", "2.5"], "--adapter"), (["--ckpt", path / "none"], "none"),
                 *[(["--ckpt", broken[n]], *words) for n, *words in (("tokenizer", "tokenizer.model"), ("missing", "wq", "missing"),
                   ("surplus", "more"), ("shape", "47", "48"), ("cut", "consolidated.00.pth"))],
                 *[(["--data-dir", sets[n]], *words) for n, *words in (("malformed", "train.jsonl", "line 2"), ("empty", "no rows"),
                   ("few", "--clients 3", "1..2"))],
                 (["--out", path / "taken"], "taken", "--resume"), (["--out", path / "file"], "file", "--resume"),
                 (["--out", path / "file" / "below"], "below"), (["--max-len", 9], "--max-len 9"),
                 (["--max-len", 1], "--max-len 1"), (["--rounds", 0], "--rounds 0"), (["--lr", "nan"], "--lr"),
                 (["--prox", "-1"], "--prox"), (["--batch-size", 0], "--batch-size"), (["--seed", "-1"], "--seed"),
                 (["--clients-per-round", 4], "--clients-per-round 4"), (["--clients", 0], "--clients"),
                 (["--device", "abacus"], "--device abacus"), (["--shots", 9], "--shots 9"), (["--rank", 0], "--rank")]
        for i, (argv, *words) in enumerate(cases):
            out = [] if "--out" in map(str, argv) else ["--out", str(path / f"run{i}")]
            status, _, err = cli(*flags, *out, *argv)
            assert status == 2 and err.startswith("error: ") and err.count("\n") == 1, (argv, status, err)
            assert all(word in err for word in words), (argv, err)
            assert not (path / f"run{i}" / "state.pt").exists(), f"{argv}: refused only after a round"
        assert (path / "file").read_text() == "mine" and not list((path / "taken").iterdir())


def test_a_run_folder_holds_what_is_promised():
    # kills: half the bytes in the plan; base scored again; accuracy in every row
    with folder() as path, patch.object(train, "evaluate", side_effect=scored) as evaluations:
        flags = small_run(path)
        status, out, err = cli(*flags, "--out", path / "run", "--eval-every", 2)
        assert status == 0, err
        assert evaluations.call_count == 5, "the base model once, the other two twice"
        run = path / "run"
        assert {p.name for p in run.iterdir()} == {"config.json", "log.csv", "state.pt", "lora.pt", "summary.json"}
        rows = list(csv.DictReader(open(run / "log.csv")))
        assert list(rows[0]) == ["round", "client_loss", "align_l2", "align_kl", "bytes_down", "bytes_up", "seconds",
                                 "base", "adapemu", "adapfu"]
        assert [r["round"] for r in rows] == ["1", "2", "3"] and [bool(r["adapfu"]) for r in rows] == [False, True, True]
        assert rows[1]["base"] == rows[2]["base"] and rows[1]["adapfu"] != rows[2]["adapfu"]
        summary, config = (json.loads((run / f"{n}.json").read_text()) for n in ("summary", "config"))
        assert {"task": "gsm8k", "method": "fedbiot", "seed": 0, "rounds": 3}.items() <= summary.items()
        assert list(summary["metrics"]) == ["base", "adapemu", "adapfu"] and config["dropout"] == "17/50"
        assert all(set(m) == {"correct", "total", "accuracy"} for m in summary["metrics"].values())
        plan = json.loads(cli(*flags, "--plan", "--json")[1])
        assert plan["kept_layers"] == [0] and plan["dropped_layers"] == [1, 2]
        down, up = summary["bytes_down_per_client_round"], summary["bytes_up_per_client_round"]
        assert all((float(r["bytes_down"]), float(r["bytes_up"])) == (down, up) for r in rows)
        assert math.isclose((down + up) / 1e6, plan["comm_mb_per_round"])
        learnt = torch.load(run / "lora.pt", weights_only=True)
        assert {n.split(".")[1] for n in learnt} == set("034") and 4 * sum(t.numel() for t in learnt.values()) == down
        assert summary["trainable_params"] == sum(t.numel() for n, t in learnt.items() if n[7] in "34") == up / 4
        held = sum(t.numel() for n, t in tiny_lm(vocab_size=1024).state_dict().items() if not re.match(r"layers\.[12]\.", n))
        assert 4 * held < summary["bootstrap_bytes"] < 4 * held + 500 and summary["peak_memory_bytes"] > 10**7
        assert re.findall(r"^round \d", out, re.M) == ["round 1", "round 2", "round 3"] and "adapfu" in out.split("accuracy")[1]
        models, _, cfg = evaluation.models_of_run(run, "cpu", torch.float32)
        accuracy = {n: scored(lm, None, "gsm8k", SimpleNamespace(limit=2), "")["accuracy"] for n, lm in models.items()}
        assert accuracy == {n: m["accuracy"] for n, m in summary["metrics"].items()}, "eval.py --run sees the same models"
        (run / "lora.pt").unlink()
        refused(lambda: evaluation.models_of_run(run, "cpu", torch.float32), "lora.pt", "--resume")


def test_a_stopped_run_resumes_bit_for_bit():
    # kills: rounds from 0 again; optimizer not restored; a stopped evaluation never made up for; a finished run begun anew
    with folder() as path, patch.object(train, "evaluate", scored):
        flags = small_run(path)
        assert cli(*flags, "--out", path / "whole", "--eval-every", 1)[0] == 0

        def stops_at(owner, name, call):
            original, count = getattr(owner, name), iter(range(99))

            def wrapped(*args, **keywords):
                if next(count) == call:
                    raise KeyboardInterrupt
                return original(*args, **keywords)
            return patch.object(owner, name, wrapped)
        for i, (owner, name, call) in enumerate(((train.Run, "finish_round", 0), (train.Run, "finish_round", 1),
                                                 (train, "write_log", 0), (train, "write_log", 2), (train, "evaluate", 1),
                                                 (train, "evaluate", 3), (fedbiot.Client, "update", 5), (train.Run, "finish", 0))):
            run = path / f"stopped{i}"
            with stops_at(owner, name, call):
                status, _, err = cli(*flags, "--out", run, "--eval-every", 1)
            assert status == 130 and err.count("\n") == 1 and "stopped" in err, err
            assert not (run / "summary.json").exists()
            status, _, err = cli(*flags, "--out", run, "--eval-every", 1, "--resume")
            assert status == 0 and outcome(run) == outcome(path / "whole"), (name, call, err)
            assert same(*(torch.load(p / "lora.pt", weights_only=True) for p in (run, path / "whole")))
        before = {p.name: p.read_bytes() for p in run.iterdir()}
        status, _, err = cli(*flags, "--out", run, "--eval-every", 1, "--resume")
        assert status == 0 and "finished" in err and before == {p.name: p.read_bytes() for p in run.iterdir()}
        assert cli(*flags, "--out", path / "new", "--eval-every", 1, "--resume")[0] == 0        # missing: from round 0
        assert outcome(path / "new") == outcome(path / "whole")
        (run / "summary.json").unlink()
        status, _, err = cli(*flags, "--out", run, "--eval-every", 1, "--resume", "--lr", "0.5")
        assert status == 2 and "--lr" in err and err.count("\n") == 1
        (run / "state.pt").write_bytes((run / "state.pt").read_bytes()[:900])
        status, _, err = cli(*flags, "--out", run, "--eval-every", 1, "--resume")
        assert status == 2 and "state.pt" in err and err.count("\n") == 1


def test_a_default_name_that_is_taken_gets_a_number():
    # kills: -2 for the third
    here = os.getcwd()
    with folder() as path, patch.object(train, "evaluate", scored):
        flags = small_run(path)
        try:
            os.chdir(path)
            for _ in range(3):
                assert cli(*flags, "--rounds", 1, "--align-init", 0, "--local-steps", 1)[0] == 0
        finally:
            os.chdir(here)
        name = "gsm8k-fedbiot-b0.34-s2-seed0"
        assert sorted(p.name for p in (path / "runs").iterdir()) == [name, name + "-2", name + "-3"]


def test_prompts_are_completed_on_stdout_and_nothing_else():
    # kills: the prompt printed too; a template around it
    with folder() as path:
        lm, t = tiny_lm(vocab_size=1024), tokenizer()
        meta_folder(path / "c", lm, tokenizer=True)
        argv = ("--ckpt", path / "c", "--prompt", "Once upon", "--max-new-tokens", 9, "--threads", 1, "--dtype", "fp32")
        status, out, err = cli(*argv, main=evaluation.main)
        prompt = [t.bos] + t.encode("Once upon")
        ids = model.generate(lm, [prompt], 9, t.eos)[0]
        assert (status, err) == (0, "") and out == t.decode(prompt + ids)[len("Once upon"):] + "\n"
        status, out, err = cli("--task", "gsm8k", "--ckpt", path / "c", "--json", "--limit", 1, "--max-new-tokens", 2,
                               "--shots", 1, main=evaluation.main)
        assert status == 0 and json.loads(out)["total"] == 1
        for bad in (("--prompt", "x", "--ckpt", path / "none"), ("--limit", "-1"), ("--task", "gsm8k", "--predictions", path / "no")):
            status, out, err = cli(*bad, main=evaluation.main)
            assert (status, out, err.count("\n")) == (2, "", 1), (bad, err)


def test_the_main_command_runs_on_the_bundled_model_from_anywhere():
    # kills: a path relative to the working directory
    with folder() as path:
        def command(*argv):
            return subprocess.run([sys.executable, HERE / "train.py", *map(str, argv)], cwd=path, capture_output=True, text=True)
        done = command("--task", "gsm8k", "--dropout", "0.2", "--adapter", 2, "--rounds", 1, "--local-steps", 2, "--align-init", 2,
                       "--eval-limit", 4, "--out", "run")
        assert done.returncode == 0, done.stderr
        summary = json.loads((path / "run" / "summary.json").read_text())
        row, = csv.DictReader(open(path / "run" / "log.csv"))
        assert summary["metrics"]["adapfu"]["total"] == 4 and summary["peak_memory_bytes"] < 1.5e9
        assert float(row["client_loss"]) < 0.5 * math.log(1024), "a pre-trained model"
        again = command("--task", "gsm8k", "--out", "run")
        assert again.returncode == 2 and again.stderr.count("\n") == 1 and "--resume" in again.stderr


def test_tensorboard_is_written_where_it_is_installed():
    # kills: refused only after the weights are read; all rows at one step
    with folder() as path, patch.object(train, "evaluate", scored):
        flags = [*small_run(path), "--tensorboard", "--out", path / "run"]
        with patch.object(train.importlib.util, "find_spec", lambda name: None):
            status, _, err = cli(*flags, "--ckpt", path / "none")
        assert status == 2 and err.count("\n") == 1 and "log.csv" in err and not (path / "run").exists()
        accumulator = needs("tensorboard.backend.event_processing.event_accumulator")[0].EventAccumulator
        assert cli(*flags)[0] == 0
        board = accumulator(str(path / "run" / "tensorboard"))
        board.Reload()
        assert [(e.step, off(torch.tensor(e.value), torch.tensor(float(r["client_loss"]))) < 1e-6) for e, r in zip(
            board.Scalars("client_loss"), csv.DictReader(open(path / "run" / "log.csv")), strict=True)] == [(1, True), (2, True), (3, True)]
        assert len(board.Scalars("adapfu")) == 1
