"""What `--plan` says of memory: counted on the meta device, held against arithmetic by hand."""
import contextlib
import json
import re
import shutil
import subprocess
import sys
from unittest.mock import patch

import torch
import torch.nn.functional as F

import model
import train
from extras import memory
from tests.common import CONFIG, HERE, PARAMS, cli, folder, tiny_lm

D, G, HIDDEN, V, R = 48, 16, 168, 97, 4         # CONFIG's widths; G of keys and values; LoRA's rank
LAYER = 2 * D * D + 2 * D * G + 3 * D * HIDDEN + 2 * D
ENDS = 2 * V * D + D
LORA = R * (D + D) + R * (D + G)                # of a layer's wq and wv


@contextlib.contextmanager
def sized(**changes):
    """(its architecture, the configuration) of a run of five layers: E has 0 and 2, A 3 and 4."""
    with folder() as path:
        (path / "params.json").write_text(json.dumps(PARAMS))
        flags = {"ckpt": path, "data-dir": path, "device": "cpu", "dropout": "0.3333", "adapter": 2,
                 "rank": R, "max-len": 33, "batch-size": 4, "shots": 0, "max-new-tokens": 7,
                 "eval-batch": 3, "threads": 1, **changes}
        argv = [str(x) for name, value in flags.items() for x in (f"--{name}", value)]
        yield CONFIG, train.parse(argv)


def counted(**changes) -> dict[str, int]:
    with sized(**changes) as (config, cfg):
        return memory.needed(config, cfg, train.method_of(cfg.method))


def test_storages_are_followed_until_the_last_view_of_them_is_gone():
    # kills: a view counted anew; an in-place result counted; a freed storage kept; the peak of the
    # last operator alone
    before = torch.zeros(7, device="meta")
    with memory.counting(cuda=False) as (live, _):
        before += 1
        assert before[2:].sum() == 1 and live.now == 0, "what the host reads is 1"
        x = torch.zeros(10, 100, device="meta")             # 4,000 bytes
        y = x[2:].t()
        assert (live.now, live.peak) == (4000, 4000)
        x += 1
        z = (y * 2).sum() + y.double().sum()                # 3,200 and a sum; 6,400 and one
        assert live.now == 4000 + 8 and live.peak == 4000 + 4 + 6400 + 8, (live.now, live.peak)
        del x, z
        assert live.now == 4000, "y is a view of it"
        del y
        assert live.now == 0


def test_a_step_keeps_what_backward_needs():
    # kills: marks after the backward pass; scores of attention written; on CUDA the CPU's norm
    B, H, T, d = 2, 3, 50, 8
    for cuda in (False, True):
        with memory.counting(cuda) as (live, stand_in):
            q = torch.zeros(B, H, T, d, device="meta", requires_grad=True)
            held = live.now

            def work(q=q):
                F.scaled_dot_product_attention(q, q, q, is_causal=True).sum().backward()
            parts = memory.growth(live, stand_in, work)
            assert parts["weights"] == held == 4 * B * H * T * d
            assert parts["activations"] == 4 * B * H * T * (d + 1) + 4      # result, lse; the sum
        with memory.counting(cuda) as (live, stand_in):
            x = torch.zeros(T, d, device="meta", dtype=torch.bfloat16, requires_grad=True)
            parts = memory.growth(live, stand_in, lambda x=x: F.rms_norm(x, (d,)).sum().backward())
            kept = 4 * T + 2 if cuda else 4 * T * d + 4 * T + 2     # 1 / rms, sum; x in fp32
            assert parts["activations"] == kept, (cuda, parts)


def test_on_cuda_an_optimizer_updates_all_tensors_together():
    # kills: the CPU's update, one tensor at a time, counted for CUDA; the hook left behind
    for cuda in (False, True, False):
        with memory.counting(cuda) as (live, _):
            tuned = [torch.zeros(100, device="meta", requires_grad=True) for _ in range(10)]
            for p in tuned:
                p.grad = torch.zeros_like(p)
            optimizer = torch.optim.AdamW(tuned)
            optimizer.step()
            live.peak = live.now
            optimizer.step()
            assert (live.peak - live.now >= 10 * 4 * 100) == cuda, (cuda, live.peak - live.now)


def test_the_plans_memory_is_arithmetic_on_the_architecture():
    # kills: LoRA or a side's layers left out; moments of E at the client; a cache of the emulator's
    # depth; uploads of one client; views of shared weights counted twice
    n = counted()
    assert n["client_weights"] == 4 * (4 * (LAYER + 2 * LORA) + ENDS)       # its LoRA, and as sent
    assert n["server_weights"] == 4 * (5 * LAYER + 4 * LORA + ENDS)
    for side in ("client", "server"):                               # two moments, a step's loss
        assert 0 <= n[f"{side}_optimizer"] - 2 * 4 * 2 * LORA <= 8, n
    assert n["uploads"] == 3 * 4 * 2 * LORA
    assert n["evaluation_cache_a_token"] == 5 * 2 * G * 4
    cache = 3 * (33 + 7) * n["evaluation_cache_a_token"]
    assert cache < n["evaluation"] < cache + 4 * 3 * 33 * (8 * D + 3 * HIDDEN), n["evaluation"]
    for side in ("server", "client"):
        parts = ("weights", "activations", "optimizer", "temporaries")
        assert n[side] == sum(n[f"{side}_{part}"] for part in parts)
    assert n["server"] <= n["one_process"] < n["server"] + n["client"]


def test_activations_of_a_client_are_its_adapters_and_grow_with_the_tokens():
    # kills: activations of the emulator kept; the batch's size left out; a length of its own
    few, long, wide = counted(), counted(**{"max-len": 65}), counted(**{"batch-size": 8})
    deep = counted(dropout=0)                                       # one more layer of E
    assert few["client_activations"] == deep["client_activations"]
    assert few["server_activations"] < deep["server_activations"]
    for more in (long, wide):                                       # 4 x 32 tokens, then 8 x 32
        token = (more["client_activations"] - few["client_activations"]) / 128
        # Of the two layers: queries, keys, values, attention's result, 3 hidden widths and inputs.
        least, most = (4 * 2 * (k * D + 2 * G + 3 * HIDDEN) for k in (5, 12))
        assert least < token < most, (token, least, most)


def test_eq_5_on_weights_needs_them_in_fp32_and_their_moments():
    # kills: Eq. 5 left out of the plan; its optimizer's state forgotten; no autocast on "meta"
    own = 2 * LAYER                                                 # E's matrices and norms
    plain, tuned = counted(), counted(**{"align-init-on": "weights"})
    assert tuned["server_weights"] - plain["server_weights"] == 4 * own
    assert 0 <= tuned["server_optimizer"] - 2 * 4 * own <= 8
    bf16 = counted(**{"align-init-on": "weights", "device": "cuda", "dtype": "bf16"})
    assert 0 <= bf16["server_optimizer"] - 2 * 4 * own <= 8
    assert tuned["server_temporaries"] > 4 * own, "gradients"
    assert bf16["server_activations"] < 0.7 * tuned["server_activations"], "products in bf16"


def test_every_method_has_a_memory_row_and_fedkseed_two_fp32_copies():
    # kills: a method that reads numbers of "meta"; a third copy in a client's step
    for method in train.METHODS:
        changes = {"clients": 1} if method == "offsite" else {}
        n = counted(method=method, adapter=1, dropout="0.5", **changes)
        assert all(n[side] > n[f"{side}_weights"] > 0 for side in ("server", "client")), (method, n)
    bf16 = counted(method="fedkseed", dtype="bf16")
    w0 = 2 * (5 * LAYER + ENDS)
    assert bf16["client_weights"] == w0 + 2 * w0, "w0 and the round's start"
    assert 2 * w0 < bf16["client_temporaries"] < 4 * w0, "and what walks"


def test_the_evaluations_batch_is_the_one_that_generate_takes():
    # kills: another bound than generate's
    lm, seen = tiny_lm(), []
    real, most = model.generate_batch, memory.CACHE_BYTES

    def watched(lm, prompts, *rest):
        seen.append(len(prompts))
        return real(lm, prompts, *rest)
    with sized(**{"eval-batch": 0}) as (_, cfg):
        server = train.method_of("fedbiot").Server(lm, None, cfg)
        for bound in (most, 10 * 40 * memory.cache_of_a_token(lm)):     # 10 prompts of 33 and 7
            model.generate_batch, model.CACHE_BYTES, memory.CACHE_BYTES = watched, bound, bound
            try:
                seen.clear()
                memory.evaluate(server, cfg)
                by_plan = seen[0]
                seen.clear()
                model.generate(lm, [[1] * 33] * 64, 7, -1)
            finally:
                model.generate_batch, model.CACHE_BYTES, memory.CACHE_BYTES = real, most, most
            assert by_plan == seen[0] == (64 if bound == most else 10)


def test_the_uploads_of_a_round_count_as_if_each_were_made():
    # kills: those beyond two forgotten, or let go before they are averaged; those on disk counted
    fit = 9

    def naive(self, t, payload, client, shards, chosen, expected):
        self.payload = payload
        report = {"loss": 1.0, "examples": 1}
        return {m: (memory.copies(expected), report) for m in chosen[:fit]}, [0], [0]
    with sized(method="fedavg", clients=9, **{"max-len": 4, "batch-size": 1}) as (config, cfg):
        for fit, most in ((9, memory.HELD), (6, 4 * 4 * 5 * LORA - 1)):      # 3 kept, 3 come
            with patch.object(memory, "HELD", most):
                found = memory.needed(config, cfg, train.method_of("fedavg"))
                with patch.object(memory.Uploads, "round", naive):
                    true = memory.needed(config, cfg, train.method_of("fedavg"))
            assert found["uploads"] == fit * 4 * 5 * LORA
            for name, n in true.items():                    # an upload's norm has 8 bytes
                assert 0 <= n - found[name] <= 8 * 7, (name, n, found[name])


def in_bytes(text: str) -> float:
    """`12.3 MiB`, as the plan writes it."""
    number, _, unit = text.partition(" ")
    return float(number) * {"": 1, "KiB": 2**10, "MiB": 2**20}[unit]


def test_the_plan_prints_memory_and_without_the_room_says_what_it_needs():
    # kills: memory counted at a run's start; no row where extras/ is absent; a status of its own; a
    # row over 100 columns; two columns exchanged; a row's total of another phase
    argv = ("--threads", 1, "--device", "cpu", "--max-len", 16, "--eval-batch", 64)
    status, table, err = cli(*argv, "--plan")
    assert (status, err) == (0, "") and "  one process " in table
    assert max(map(len, table.splitlines())) <= 100, table
    status, text, err = cli(*argv, "--plan", "--json")
    counts = json.loads(text)["memory_bytes"]
    assert all(type(n) is int for n in counts.values())
    for side in ("server", "client"):
        row, = re.findall(rf"^    {side} (.*)$", table, re.M)
        whole, *parts = map(in_bytes, re.findall(r"\S+ [KM]iB|0(?!\S)", row))
        named = ("weights", "activations", "optimizer", "temporaries")
        for n, shown in zip([counts[f"{side}_{name}"] for name in named], parts, strict=True):
            assert abs(n - shown) <= 0.05 * 2**20, (row, counts)
        assert abs(whole - sum(parts)) <= 5 * 0.05 * 2**20, row
    assert cli(*argv, "--plan", "--device", "nonsense")[0] == 2
    with folder() as path:
        for name in ("model", "lora", "fedbiot", "data", "eval", "train"):
            shutil.copy(HERE / f"{name}.py", path)
        (path / "tiny").symlink_to(HERE / "tiny")
        done = subprocess.run([sys.executable, "train.py", *map(str, argv), "--plan"], cwd=path,
                              capture_output=True, text=True)
        assert done.returncode == 0 and done.stderr == ""
        assert "needs extras/memory.py" in done.stdout and "GMAC a token" in done.stdout
