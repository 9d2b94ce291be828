"""The other methods: Offsite-Tuning and FedOT, FedAvg, FedKSeed, FedTT, FedPT."""
import contextlib
import io
import math
import os
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import torch

import fedbiot
import model
import train
from baselines import fedavg, fedkseed, fedtt, offsite
from model import LM
from tests.common import (
    BUNDLED_TOKENIZER, HERE, Skip, cli, copied, folder, meta_folder, off, one_line, random,
    random_tokens, refused, run_rounds, same, tiny_lm, toy_shard, true_ce,
)


def method_config(method: str, **changes) -> train.RunConfig:
    """A short run's, with the method's own flags where the method has some."""
    small = {"dropout": 0.5, "adapter": 1, "rounds": 2, "local_steps": 3,
             "batch_size": 4, "align_init": 3, "align_steps": 2, "lr": 1e-2, "server_lr": 1e-2,
             "rank": 4, "clients": 2, "max_len": 64, "shots": 0, "max_update_norm": 0.0}
    return train.config_of(method)(method=method, **{**small, **changes})


def method_run(method: str, full: LM | None = None, rounds=2, first_round=0, state=None,
               shards=None, **changes):
    """(server, client, records) of a method's rounds in this process, from the start or a state."""
    cfg = method_config(method, rounds=rounds, **changes)
    module = train.method_of(method)
    server = module.Server(full or tiny_lm(), toy_shard(30, 40), cfg)
    if state:
        server.load_state_dict(state)
    client = module.Client(server.bootstrap(), cfg)
    shards = shards or [toy_shard(0, 16), toy_shard(16, 30)]
    return server, client, run_rounds(server, client, shards, first_round=first_round)


def sizes(tensors) -> int:
    """Bytes in fp32."""
    return sum(4 * t.numel() for t in tensors.values())


def cached_equals_uncached(lm):
    """Generation with a cache, and hidden states at some rows, equal the plain forward pass."""
    short = [[1, 5, 9], [1, 7, 20, 11, 30]]
    for prompts in (short, [[3] * 130 + prompt for prompt in short]):
        for ids, prompt in zip(model.generate(lm, prompts, 6, 0), prompts):
            for i, token in enumerate(ids):
                assert lm(torch.tensor([prompt + ids[:i]]))[0, -1].argmax() == token
    tokens, rows = random_tokens(2, 4), torch.tensor([1, 3, 7])
    assert off(lm.hidden(tokens, rows=rows), lm.hidden(tokens).flatten(0, 1)[rows]) < 1e-6


# ---- Offsite-Tuning, FedOT, FedAvg --------------------------------------------------------------

def test_fedot_keeps_both_ends_and_its_adapter_only_travels():
    # kills: first layers left out; the emulator not shifted; emulator's LoRA sent every round; not
    # aligned; a dropped layer sent
    cfg = method_config("fedot", adapter=2, dropout=0.2)
    emulator, adapter = offsite.split(32, cfg)
    assert adapter == [0, 1, 30, 31]
    assert (len(emulator), emulator[0], emulator[-1]) == (22, 2, 29)
    half = method_config("fedot", adapter=2, dropout=0.5)
    assert len(offsite.split(32, half)[0]) == 14
    refused(lambda: offsite.split(4, method_config("fedot", adapter=2)), "--adapter 2", "1..1")
    server, client, records = method_run("fedot")
    assert list(client.lm.layers) == ["0", "1", "4"]
    assert {n.split(".")[1] for n in server.broadcast(2)} == {"0", "4"}
    assert records[0]["bytes_down"] == records[1]["bytes_up"] == sizes(server.tuned)
    emulated = copied(server.emulated)
    assert all(p.abs().max() > 0 for n, p in emulated.items() if n.endswith("lora_B"))
    assert same(emulated, {n: client.lm.get_parameter(n).detach() for n in emulated})
    again = offsite.Server(tiny_lm(), toy_shard(30, 40), server.cfg)
    again.load_state_dict({"learnt": server.state_dict()["learnt"]})
    given = again.bootstrap()                               # resumed: nothing is aligned anew
    assert same(emulated, {n: given[n] for n in emulated})


def test_fedot_aligns_before_it_tunes_and_never_pulls_back():
    # kills: an alignment between rounds; prox left on
    a, b = (method_run("fedot", prox=prox)[0] for prox in (0.0, 1e3))
    assert same(copied(a.tuned), copied(b.tuned))
    start = offsite.Server(tiny_lm(), toy_shard(30, 40), a.cfg)
    given = start.bootstrap()
    assert same(copied(a.emulated), {n: given[n] for n in a.emulated})
    assert all(not torch.equal(p, start.tuned[n]) for n, p in a.tuned.items())


def test_fedavg_tunes_every_layer_and_averages_by_size():
    # kills: layers left out; an unweighted average; prox left on; the base model trained
    full, shards = tiny_lm(), [toy_shard(0, 24), toy_shard(24, 32)]
    before = copied(full.state_dict())
    server, client, _ = method_run("fedavg", full, 1, shards=shards, prox=1e3)
    plain, _, _ = method_run("fedavg", full, 1, shards=shards)
    fresh = fedavg.Server(full, None, server.cfg)
    assert len(server.tuned) == 5 * 2 * 2
    ups = [client.update(0, fresh.broadcast(0), s, m)[0] for m, s in enumerate(shards)]
    for n, p in server.tuned.items():
        assert off(p, (24 * ups[0][n] + 8 * ups[1][n]) / 32) < 1e-6
        assert n.endswith("A") or not torch.equal(p, fresh.tuned[n])
    assert same(before, full.state_dict()) and same(copied(plain.tuned), copied(server.tuned))


# ---- FedKSeed -----------------------------------------------------------------------------------

def walked_by(client, losses=None) -> list:
    """Will hold the model that the client's next update walks; `losses` in place of its own."""
    seen, loss = [], client.loss

    def watched(lm, batch):
        seen[:] = [lm]
        return loss(lm, batch) if losses is None else torch.tensor(next(losses)).double()
    client.loss = watched
    return seen


def test_fedkseed_replay_equals_the_walked_weights():
    # kills: sign of g; perturbation left in; eta left out; lambda not normalised; other noise in
    # the replay; tied weights walked as two
    for method, clients in (("fedkseed", 1), ("fedkseed", 2), ("fedkseed-pro", 2)):
        full = tiny_lm(tied=method == "fedkseed-pro")
        shards = [toy_shard(0, 10), toy_shard(10, 30)][:clients]
        cfg = method_config(method, local_steps=12, lr=1e-4, kseed_candidates=8)
        server = fedkseed.Server(full, None, cfg)
        walked, ups = [], []
        for m, shard in enumerate(shards):
            client = fedkseed.Client(server.bootstrap(), cfg)
            seen = walked_by(client)
            ups.append(client.update(0, server.broadcast(0), shard, m)[0])
            walked.append([p.double() for p in seen[0].parameters()])
            assert len(walked[0]) == len(list(full.parameters())), "a tied weight is walked once"
        server.aggregate(0, ups, [float(len(s)) for s in shards])
        w0, total = [p.double() for p in full.parameters()], sum(map(len, shards))
        update = [sum(len(s) / total * (w[i] - p) for w, s in zip(walked, shards))
                  for i, p in enumerate(w0)]
        replayed = [p.double() - q for p, q in zip(server.models()["full"].parameters(), w0)]
        assert off(replayed, update) < 1e-4, (method, clients, off(replayed, update))


def test_fedkseed_step_is_the_two_point_estimate():
    # kills: eps for 2 eps; two batches; noise of another seed
    eps, full, shard = 1e-3, tiny_lm(), toy_shard()
    cfg = method_config("fedkseed", local_steps=1, kseed_eps=eps)
    server = fedkseed.Server(full, None, cfg)
    up, _ = fedkseed.Client(server.bootstrap(), cfg).update(0, server.broadcast(0), shard, 0)
    batch = next(shard.batches(1, cfg.batch_size, (cfg.seed, 0, 0)))
    seeds = fedkseed.candidates(server.learnt["seed"].item(), 4096)
    g = torch.Generator().manual_seed(seeds[up["j"].item()])
    z = {n: torch.randn(p.shape, generator=g).double() for n, p in full.named_parameters()}

    def loss(step):
        lm = tiny_lm().double()
        lm.load_state_dict({n: p.double() + step * z[n] for n, p in full.named_parameters()})
        hidden = lm.hidden(batch.tokens).flatten(0, 1)[batch.rows]
        return true_ce(hidden, lm.output.weight, batch.targets, batch.weights).item()
    slope = (loss(eps) - loss(-eps)) / (2 * eps)
    assert abs(up["g"].item() / slope - 1) < 1e-2


def test_fedkseed_sends_17988_bytes_a_round_and_pro_9796_whatever_the_model():
    # kills: int64 indices; p for plain FedKSeed; no master seed
    for method, expected in (("fedkseed", 17_988), ("fedkseed-pro", 9_796)):
        default = train.resolve({"method": method}).kseed_candidates
        cfg = method_config(method, local_steps=200, kseed_candidates=default)
        for changes in ({}, {"n_layers": 2, "dim": 24}):
            server = fedkseed.Server(tiny_lm(**changes), None, cfg)
            both_ways = server.broadcast(0), server.expected(0)
            assert sum(map(fedbiot.payload_bytes, both_ways)) == expected
        cfg = method_config(method, local_steps=2, batch_size=1)
        server = fedkseed.Server(tiny_lm(), None, cfg)
        client = fedkseed.Client(server.bootstrap(), cfg)
        up, _ = client.update(0, server.broadcast(0), toy_shard(), 0)
        assert not fedbiot.misfit(up, server.expected(0)) and fedbiot.payload_bytes(up) == 2 * 8


KSEED_ELSEWHERE = """
import re, sys, torch
from types import SimpleNamespace
from baselines.fedkseed import Client, Server, candidates, step_along
from data import Example, Shard
from model import LM, ModelConfig
torch.set_num_threads(1)
w, before = [torch.zeros(5, 3), torch.zeros(40)], torch.get_rng_state()
for seed in candidates(7, 3):
    step_along(w, seed, 1.0)
assert torch.equal(before, torch.get_rng_state()), "the global generator moved"
print([x.hex() for p in w for x in p.flatten().tolist()])
cfg = SimpleNamespace(method="fedkseed", kseed_candidates=4096, kseed_eps=1e-3, seed=0,
                      local_steps=1, batch_size=1, lr=1e-4)
lm = LM.empty(ModelConfig(256, 24, 4, 4, 512, 768)).requires_grad_(False)
server = Server(lm, None, cfg)
client = Client(server.bootstrap(), cfg)
data = Shard([Example([1] + [5] * 50, 4)], [0])
batch = next(data.batches(1, 1, (0,)))
def status(key):
    return int(re.search(key + r":\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
def peak(call):
    open("/proc/self/clear_refs", "w").write("5")           # forgets the peak so far
    start = status("VmRSS")
    call()
    return status("VmHWM") - start
def infer():
    torch.no_grad()(client.loss)(client.start, batch)
def step():
    client.update(0, server.broadcast(0), data, 0)
infer()
weights, inference = sum(4 * p.numel() for p in client.start.parameters()), peak(infer)
copies = 2 * weights                                        # the round's start, and what walks
print((weights + peak(step)) / (copies + inference))        # the first step: freed memory stays
"""


def test_fedkseed_noise_is_the_same_elsewhere_and_a_step_needs_an_inferences_memory():
    # kills: the global generator; one generator for all draws; seeds from hash(); z kept; a third
    # copy of the weights in a step
    if not Path("/proc/self/clear_refs").exists():
        raise Skip("Linux only: /proc/self/clear_refs")
    weights, seeds = [torch.zeros(5, 3), torch.zeros(40)], fedkseed.candidates(7, 3)
    for seed in seeds:
        fedkseed.step_along(weights, seed, 1.0)
    env = os.environ | {"PYTHONHASHSEED": "11"}
    there = subprocess.run([sys.executable, "-c", KSEED_ELSEWHERE], capture_output=True, text=True,
                           check=True, cwd=HERE, env=env).stdout.splitlines()
    assert there[0] == str([x.hex() for p in weights for x in p.flatten().tolist()])
    assert float(there[1]) < 1.1, f"a step needs {there[1]} of an inference's memory"
    one = [torch.zeros(5, 3)]
    fedkseed.step_along(one, seeds[0], 1.0)
    noise = torch.randn(5, 3, generator=torch.Generator().manual_seed(seeds[0]))
    assert torch.equal(one[0], noise)
    many = fedkseed.candidates(7, 4096)
    assert len(set(many)) == 4096 and 0 <= min(many) and max(many) < 2**31


def test_fedkseed_latecomer_needs_only_w0_and_the_accumulator():
    # kills: a client that goes on from where it stands; the round's start walked along
    server, client, _ = method_run("fedkseed", rounds=10, local_steps=1, kseed_candidates=8,
                                   lr=1e-4)
    late = fedkseed.Client(server.bootstrap(), server.cfg)
    for m in (0, 1):
        sent = server.broadcast(10)
        assert same(*(c.update(10, sent, toy_shard(), m)[0] for c in (client, late)))


def test_fedkseed_leaves_the_servers_weights_and_a_nan_step_moves_nothing():
    # kills: walking the shared tensors; a NaN applied, or sent
    full, cfg = tiny_lm(), method_config("fedkseed", local_steps=4, lr=1e-4)
    before, server = copied(full.state_dict()), fedkseed.Server(full, None, cfg)
    client = fedkseed.Client(server.bootstrap(), cfg)
    seen = walked_by(client, iter([1.0, math.nan, 2.0, 1.5] + [math.inf] * 4))
    with contextlib.redirect_stderr(io.StringIO()) as err:
        up, metrics = client.update(0, server.broadcast(0), toy_shard(), 0)
    assert (up["g"] != 0).tolist() == [False, True, False, False]
    assert metrics["loss"] == 1.75 and "3 of 4" in err.getvalue()
    server.aggregate(0, [up], [1.0])
    assert off(list(seen[0].parameters()), list(server.models()["full"].parameters())) < 1e-6
    assert same(before, full.state_dict())


def test_honest_fedkseed_uploads_of_few_steps_are_not_outliers():
    # kills: --max-update-norm taken literally for one to three numbers, whose norms differ a lot;
    # no bound left for a hostile one
    for steps in (1, 2, 3):
        with contextlib.redirect_stderr(io.StringIO()) as err:
            for seed in range(3):
                shards = [toy_shard(i, i + 8) for i in range(0, 24, 8)]
                method_run("fedkseed", tiny_lm(n_layers=2), 12, shards=shards, seed=seed, lr=1e-4,
                           local_steps=steps, kseed_candidates=8, max_update_norm=10.0)
        assert "rejected" not in err.getvalue(), err.getvalue()
        cfg = method_config("fedkseed", local_steps=steps, max_update_norm=10.0)
        expected = fedkseed.Server(tiny_lm(n_layers=2), None, cfg).expected(0)
        results = {m: (expected | {"g": torch.full((steps,), size)}, {"loss": 1.0, "examples": 8})
                   for m, size in enumerate((0.5, -1.0, 2.0, 1e5))}
        with contextlib.redirect_stderr(io.StringIO()) as err:
            assert list(fedbiot.accepted(0, results, expected, cfg)) == [0, 1, 2]
        assert "client 3: rejected" in err.getvalue()


def test_fedkseed_pro_draws_larger_gradients_more_often():
    # kills: no clip; min-max left out; a history without its first zero
    server = fedkseed.Server(tiny_lm(), None, method_config("fedkseed-pro", kseed_candidates=4))
    assert torch.allclose(server.broadcast(0)["p"], torch.full((4,), .25))
    up = {"j": torch.tensor([0, 0, 1]).int(), "g": torch.tensor([3., -6., 5000.])}
    server.aggregate(0, [up], [2.0])
    p = server.broadcast(1)["p"]
    # Per seed the mean of |g|, each clipped at 1000, and of the first zero; then over their range.
    assert off(p, torch.softmax(torch.tensor([9 / 3, 1000 / 2, 0, 0]) / 500, 0)) < 1e-6
    assert p.max() / p.min() < math.e + 1e-5
    assert server.learnt["a"].tolist() == [-3, 5000, 0, 0]


# ---- FedTT --------------------------------------------------------------------------------------

def tt_matrix(cores, d_in, d_out):
    """By the definition, core after core, in float64."""
    W = torch.ones(1, 1, dtype=torch.float64)
    for core in cores:
        W = torch.einsum("ap,pkq->akq", W, core.double()).flatten(0, 1)
    return W.reshape(d_in, d_out)


def test_tensor_train_of_4096_by_64_has_1100_parameters_and_is_its_contraction():
    # kills: rank at the ends; unbalanced factors; in and out swapped; a transposed core
    shapes = fedtt.core_shapes(4096, 64, 5)
    assert sum(map(math.prod, shapes)) == 1100
    assert [k for _, k, _ in shapes] == [16, 16, 16, 4, 4, 4]
    assert [k for _, k, _ in fedtt.core_shapes(64, 4096, 5)] == [4, 4, 4, 16, 16, 16]
    balanced = [[10, 10, 10], [4, 4, 8], [1, 1, 7], [4, 4, 6]]
    assert [fedtt.factors(d) for d in (1000, 128, 7, 96)] == balanced
    layer = fedtt.TTLinear(24, 12, 3, False, fedbiot.generator(1)).double()
    x = random(5, 24).double()
    split = x.view(5, *fedtt.factors(24))
    y = torch.einsum("nxyz,pxq,qyr,rzs,sit,tju,ukv->nijk", split, *layer.cores).reshape(5, 12)
    assert off(layer(x), y) < 1e-12
    assert off(layer.matrix(), tt_matrix(layer.cores, 24, 12)) < 1e-12


def test_fedtt_is_the_identity_at_the_start_bit_for_bit_and_learns_all_cores():
    # kills: `up` not zero; an adapter around the stream; adapters in bf16; adapters skipped where
    # rows are asked for
    for dtype in (torch.float32, torch.bfloat16):
        full = tiny_lm().to(dtype)
        tuned = fedtt.Server(full, None, method_config("fedtt")).models()["full"]
        assert torch.equal(full(random_tokens(2, 9)), tuned(random_tokens(2, 9)))
        cores = [p for n, p in tuned.named_parameters() if ".cores." in n]
        assert cores and all(p.dtype == torch.float32 for p in cores)
    server, _, records = method_run("fedtt", tiny_lm(n_layers=2), 3)
    fresh = fedtt.Server(tiny_lm(n_layers=2), None, server.cfg)
    assert all(not torch.equal(p, fresh.learnt[n]) for n, p in server.learnt.items())
    down, up = (sum(map(math.prod, fedtt.core_shapes(*d, 5))) for d in ((48, 64), (64, 48)))
    adapters = 2 * 2                                        # two a layer
    assert records[0]["bytes_up"] == records[0]["bytes_down"] == 4 * adapters * (down + up)
    cached_equals_uncached(server.models()["full"])


def test_fedtt_plus_average_of_cores_is_the_average_of_matrices():
    # kills: two active cores at once
    weights, layer = [.2, .3, .5], fedtt.TTLinear(24, 12, 3, False, fedbiot.generator(1)).double()
    cores = {f"x.cores.{i}": p for i, p in enumerate(layer.cores)}
    for t in range(6):
        moved = fedtt.active(cores, t, method_config("fedtt+"))
        assert list(moved) == [f"x.cores.{5 - t}"]
        ups = [{n: p + random(*p.shape, seed=10 * t + m).double() for n, p in moved.items()}
               for m in range(3)]
        mean = {n: sum(w * up[n] for w, up in zip(weights, ups)) for n in moved}
        matrices = [tt_matrix((cores | up).values(), 24, 12) for up in ups]
        average = sum(w * W for w, W in zip(weights, matrices))
        assert (tt_matrix((cores | mean).values(), 24, 12) - average).abs().max() < 1e-12


def test_fedtt_plus_sends_one_core_a_matrix_and_moves_no_other():
    # kills: all cores sent; state carried from client to client; a latecomer
    # with stale cores
    server, client, records = method_run("fedtt+", tiny_lm(n_layers=2), 1)
    fresh = fedtt.Server(tiny_lm(n_layers=2), None, server.cfg)
    last = {n for n in server.learnt if n.endswith("cores.5")}
    moved = {n for n, p in server.learnt.items() if not torch.equal(p, fresh.learnt[n])}
    assert moved == last
    assert records[0]["bytes_up"] == sizes({n: server.learnt[n] for n in last})
    tokens = random_tokens(2, 9)
    assert off(server.lm(tokens), server.full(tokens)) > 1e-3, "the zero core is the active one"
    sent = server.broadcast(1)
    assert sent.keys() == last | {"all"} and sent["all"].nbytes == 8
    ups = [client.update(1, sent, toy_shard(), m)[0] for m in (0, 1, 0)]
    late, _ = fedtt.Client(server.bootstrap(), server.cfg).update(1, sent, toy_shard(), 0)
    assert all(n.endswith("cores.4") for n in late) and same(ups[0], ups[2]) and same(ups[0], late)
    server, _, records = method_run("fedtt+", tiny_lm(n_layers=2), 2, clients_per_round=1)
    assert records[1]["bytes_down"] == sizes(server.learnt), "absent clients: all cores go down"


class RebuiltEveryRound(fedbiot.Wire):
    """A wire that keeps no clients: it builds them anew from the bootstrap that it once got."""

    def __init__(self, bootstrap):
        self.bootstrap = bootstrap

    def round(self, t, payload, client, *others):
        fresh = type(client)(copied(self.bootstrap), client.cfg)
        return super().round(t, payload, fresh, *others)


def test_fedtt_sizes_that_no_memory_holds_are_one_line():
    # kills: a rank of a million, an error of the allocator's
    for flag in ("--tt-rank", "--tt-bottleneck"):
        answer = cli("--method", "fedtt", flag, 10**6, "--plan")
        one_line(answer, f"{flag} 1000000", "expected a number")


def test_fedtt_plus_clients_refuse_a_gap():
    # kills: no fingerprint, so that a client goes on from stale cores; only the newest core in it;
    # a refusal where nothing is missing
    def run(method, wire, **changes):
        cfg = method_config(method, rounds=3, **changes)
        module = train.method_of(method)
        server = module.Server(tiny_lm(n_layers=2), None, cfg)
        bootstrap = copied(server.bootstrap())
        client, shards = module.Client(bootstrap, cfg), [toy_shard(0, 16), toy_shard(16, 30)]
        records = fedbiot.federate(server, client, shards, cfg, wire(bootstrap))
        return server, list(records)
    refused(lambda: run("fedtt+", RebuiltEveryRound), "round 3, client 0", "new bootstrap")
    for method, changes in (("fedtt", {}), ("fedtt+", {"clients_per_round": 1}),
                            ("fedavg", {}), ("fedkseed", {"kseed_candidates": 8, "lr": 1e-4})):
        kept, rebuilt = (run(method, wire, **changes)[0] for wire in (
            lambda bootstrap: fedbiot.Wire(), RebuiltEveryRound))
        assert same(kept.state_dict()["learnt"], rebuilt.state_dict()["learnt"]), method
    server, client, _ = method_run("fedtt+", tiny_lm(n_layers=2), 2)
    sent = copied(server.broadcast(2))
    next(iter(client.held.values())).view(-1)[0] += 1
    refused(lambda: client.update(2, sent, toy_shard(), 1), "round 3, client 1")


# ---- FedPT --------------------------------------------------------------------------------------

class BlackBox(torch.nn.Module):
    """A large model of which nothing can be asked but logits: `hidden` gives them, and the head,
    which has no weights to look at, hands them on."""
    def __init__(self, lm):
        super().__init__()
        self.config, self.output = lm.config, torch.nn.Identity()
        self.hidden = lambda tokens, rows: lm.output(lm.hidden(tokens, rows=rows))
        self.output.weight = torch.empty(0, dtype=lm.output.weight.dtype)


def proxy_run(path: Path, *args, large=None, **changes):
    small = tiny_lm(5, n_layers=2, dim=24, n_heads=4, vocab_size=1024)
    meta_folder(path / "small", small, tokenizer=True, ffn_dim_multiplier=2.6)
    large = large or tiny_lm(vocab_size=1024)
    ckpts = {"ckpt": str(HERE / "tiny" / "llama"), "proxy_ckpt": str(path / "small")}
    return method_run("fedpt", large, *args, **ckpts, **changes)


def test_fedpt_untuned_proxy_is_the_large_model_exactly():
    # kills: z_S0 left out; alpha ignored
    tokens = random_tokens(2, 9)
    with folder() as path:
        for dtype in (torch.float32, torch.bfloat16):
            large = tiny_lm(vocab_size=1024).to(dtype)
            untuned = proxy_run(path, 0, large=large)[0].models()
            assert torch.equal(untuned["proxy"](tokens), large(tokens))
            server = proxy_run(path, 1, large=large, proxy_alpha=0.0)[0]
            assert torch.equal(server.models()["proxy"](tokens), large(tokens))
            assert not torch.equal(server.models()["small"](tokens), server.full(tokens))


def test_fedpt_tuned_proxy_is_a_sum_of_logits():
    # kills: alpha's sign; one cache for three models
    tokens = random_tokens(2, 9)
    with folder() as path:
        server = proxy_run(path, proxy_alpha=.7)[0]
        state = {"learnt": server.state_dict()["learnt"]}
        again = proxy_run(path, 0, state=state, proxy_alpha=.7)[0]
    z = {name: lm(tokens).double() for name, lm in server.models().items()}
    assert list(z) == ["base", "small", "distilled", "proxy"]
    assert off(z["proxy"], z["base"] + .7 * (z["small"] - server.full(tokens))) < 1e-5
    cached_equals_uncached(server.models()["proxy"])
    assert all(torch.equal(lm(tokens).double(), z[name]) for name, lm in again.models().items())


def test_fedpt_asks_the_large_model_for_logits_only():
    # kills: its hidden states, layers or gradients used in a round; its weights in a payload
    large = tiny_lm(vocab_size=1024)
    with folder() as path:
        server, client, records = proxy_run(path, large=BlackBox(large))
    assert all(p.grad is None and not p.requires_grad for p in large.parameters())
    sent = {n: t for n, t in server.bootstrap().items() if n != "config"}
    assert same(sent, dict(server.full.named_parameters()))
    assert all(p.shape[-1] in (4, 24) for p in server.broadcast(1).values())
    assert list(client.lm.layers) == ["0", "1"]
    assert records[0]["bytes_down"] == records[0]["bytes_up"] == sizes(server.tuned)


def test_fedpt_distillation_lowers_the_kl_to_its_frozen_teacher():
    # kills: a teacher that moves along; KL the wrong way round; z_L left out
    with folder() as path:
        server = proxy_run(path, 1, proxy_steps=0)[0]
    batch, teacher = next(server.public.batches(1, 10, (7,))), copied(server.averaged)

    def kl():
        z, s = (server.models()[name](batch.tokens).flatten(0, 1)[batch.rows].double()
                .log_softmax(-1) for name in ("proxy", "distilled"))
        return (batch.weights * (z.exp() * (z - s)).sum(-1)).sum().item()
    before = kl()
    assert abs(server.distillation_loss(batch)[0].item() / before - 1) < 1e-4
    server.cfg = method_config("fedpt", proxy_steps=20)
    measured = server.distil(0)
    assert kl() < .9 * before and same(teacher, copied(server.averaged))
    assert measured["distill_kl"] > 0 and measured["drift"] > 0


def test_fedpt_refuses_another_vocabulary():
    # kills: no check of the sizes; none of the pieces
    with folder() as path:
        for name in ("large", "small"):
            meta_folder(path / name, tiny_lm(vocab_size=1024), tokenizer=True)
        meta_folder(path / "smaller", tiny_lm(vocab_size=60), tokenizer=True)
        pieces = BUNDLED_TOKENIZER.read_bytes().replace(b"Response", b"Rezponse")
        (path / "small/tokenizer.model").write_bytes(pieces)
        for small, expected in (("small", "other pieces"), ("smaller", "60")):
            flags = "--ckpt", path / "large", "--proxy-ckpt", path / small, "--out", path / "run"
            one_line(cli("--method", "fedpt", *flags), expected)
            assert not (path / "run").exists()


# ---- one more row -------------------------------------------------------------------------------

FEDPROX = """
\"\"\"FedProx on LoRA: FedAvg whose clients are pulled to what was broadcast.\"\"\"
from baselines import fedavg

class Server(fedavg.Server):
    no_use = fedavg.Server.no_use - {"prox"}

class Client(fedavg.Client):
    def __init__(self, bootstrap, cfg, device="cpu"):
        super().__init__(bootstrap, cfg, device)
        self.cfg = cfg
"""
ECHO = """
\"\"\"A task of thirty sentences.\"\"\"
from data import Row, accuracy

def read_training(data_dir):
    return [Row(f"Say {i}.", "", str(i), "odd" if i % 2 else "even") for i in range(30)]

def prepare(cfg):
    return []

def score(lm, tokenizer, cfg, progress):
    return accuracy([1, 2, None, 4], [1, 2, 3, 4])

def score_predictions(cfg):
    return accuracy([1], [2])

def report(result):
    print(f"echo: {result['correct']}")
"""


def with_rows(path: Path) -> Path:
    """A copy of the project with one more method and one more task: a file and a row of each."""
    for name in ("model", "lora", "fedbiot", "data", "eval", "train"):
        text = (HERE / f"{name}.py").read_text()
        text = text.replace("METHODS = {", 'METHODS = {"a-tenth": "fedprox", ')
        text = text.replace("TASKS = {", 'TASKS = {"echo": Task("echo", 2, 64), ')
        (path / f"{name}.py").write_text(text)
    for name in ("baselines", "tasks", "extras", "tiny"):
        (path / name).symlink_to(HERE / name)
    (path / "fedprox.py").write_text(FEDPROX)
    (path / "echo.py").write_text(ECHO)
    return path


def test_a_method_and_a_task_are_added_as_a_row_and_a_file_of_each():
    # kills: a second list of methods or tasks anywhere; prox lost on its way to the client;
    # a default --model that the run does not have
    def program(name, *argv):
        command = [sys.executable, f"{name}.py", *map(str, argv)]
        return subprocess.run(command, capture_output=True, text=True, cwd=path, check=True).stdout
    with folder() as path:
        with_rows(path)
        flags = ("--method", "a-tenth", "--task", "echo", "--rounds", 1, "--local-steps", 4)
        for prox in (0, 1000):
            said = program("train", *flags, "--prox", prox, "--out", f"run{prox}")
            assert "a-tenth, echo, clients: 2" in said and "3 of 4" in said, said
        free, held = (torch.load(path / run / "lora.pt") for run in ("run0", "run1000"))
        pulled = [sum(p.norm() for n, p in learnt.items() if n.endswith("lora_B"))
                  for learnt in (free, held)]
        assert 0 < pulled[1] < 0.9 * pulled[0], pulled
        for more in ((), ("--model", "full")):                  # the last model is the default
            assert program("eval", "--run", "run0", *more) == "echo: 3\n"
        assert program("eval", "--task", "echo", "--predictions", "x") == "echo: 0\n"


# ---- all of them --------------------------------------------------------------------------------

def test_a_clients_optimizer_has_what_is_tuned_and_nothing_else():
    # kills: an optimizer over all of a client's parameters, or over all that it received
    for method in ("fedbiot", "fedot", "fedavg", "fedtt", "fedtt+"):
        cfg, module, given = method_config(method), train.method_of(method), []
        server = module.Server(tiny_lm(), toy_shard(), cfg)
        client = module.Client(server.bootstrap(), cfg)

        def watched(parameters, *more, real=torch.optim.AdamW, **options):
            given.append([*parameters])
            return real(given[-1], *more, **options)
        payload = server.broadcast(0)
        with patch.object(torch.optim, "AdamW", watched):
            client.update(0, payload, toy_shard(), 0)
        assert [[*map(id, tuned)] for tuned in given] == [[*map(id, client.tuned.values())]], method



def test_every_method_resumes_bit_for_bit():
    # kills: a part of the state not saved; randomness carried from round to round
    flags, own = {"lr": 1e-4, "local_steps": 2}, {"kseed_candidates": 8}
    with folder() as path:
        for method in ("fedot", "fedavg", "fedkseed", "fedkseed-pro", "fedtt", "fedtt+", "fedpt"):
            def run(**more):
                if method == "fedpt":
                    return proxy_run(path, proxy_steps=2, **flags, **more)[0].state_dict()
                changes = flags | (own if "kseed" in method else {}) | more
                return method_run(method, **changes)[0].state_dict()
            whole, half = run(rounds=2), run(rounds=1)
            resumed = run(rounds=2, first_round=1, state=half)
            assert same(whole["learnt"], resumed["learnt"]), method
