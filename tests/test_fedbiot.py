"""Algorithm 1, the losses, and FedBiOT's server, client and rounds."""
import contextlib
import io
import math
from fractions import Fraction
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fedbiot
import lora
import train
from tests.common import (
    asserts, config, copied, off, pair, random, random_tokens, refused, run_rounds,
    same, slow_forward, slow_logits, tiny_lm, toy_server, toy_shard, true_ce,
)


# ---- Algorithm 1 --------------------------------------------------------------------------------

def test_layer_extract_gives_the_layers_of_table_5():
    # kills: beta for 1 - beta; n - s for n - s - 1; ceil for floor
    odd = list(range(1, 26, 2))
    for s, beta, dropped in ((2, "0.2", [4, 9, 14, 19, 24, 28]), (4, "0.2", [4, 8, 13, 17, 22, 26]),
                             (2, "0.5", odd + [27, 28]), (4, "0.5", odd + [26])):
        kept, adapter = fedbiot.layer_extract(32, s, float(beta))
        assert adapter == list(range(32 - s, 32))
        assert sorted(set(range(32 - s)) - set(kept)) == dropped, (s, beta, kept)


def test_layer_extract_is_exact_where_floats_lose_a_layer():
    # kills: int(j * ((n-s-1) / (n'-1))); int((1 - beta) * (n - s)); Fraction(beta) of a float
    for total in range(1, 60):
        for kept in range(1, total + 1):
            step = Fraction(total - 1, max(kept - 1, 1))
            by_fractions = [math.floor(j * step) for j in range(kept)]
            assert fedbiot.spread(total, kept) == by_fractions
            beta = 1 - Fraction(kept, total)
            assert fedbiot.layer_extract(total + 3, 3, beta)[0] == by_fractions
    assert fedbiot.spread(16, 14)[-1] == 15
    for n, s, beta, kept in ((32, 2, 0.8, 6), (32, 2, 0.9, 3), (12, 2, 0.7, 3)):
        assert len(fedbiot.layer_extract(n, s, beta)[0]) == kept
    assert fedbiot.layer_extract(5, 2, 0) == ([0, 1, 2], [3, 4])
    assert fedbiot.layer_extract(5, 1, 0.7) == ([0], [4])


def test_layer_extract_refuses_what_leaves_no_emulator_or_no_adapter():
    # kills: s >= 0; s <= n; beta >= 0 unasked where floor hides it; kept == 0 let through
    for n, s, beta, word in ((5, 0, "0.2", "1..4"), (5, 5, "0.2", "1..4"), (5, -1, "0", "1..4"),
                             (5, 2, "1", "0..0.6666"), (5, 2, "-0.1", "0..0.6666"),
                             (5, 2, "-9", "0..0.6666"), (5, 2, "9", "0..0.6666"),
                             (5, 2, "0.7", "one of the 3"), (5, 4, "0.01", "0..0.0,")):
        refused(lambda: fedbiot.layer_extract(n, s, float(beta)), word)
    assert fedbiot.layer_extract(5, 2, 0.6666) == ([0], [3, 4]), "what the line suggests"


# ---- losses -------------------------------------------------------------------------------------

def true_kl(h, h_t, W, w):
    s, t = (h @ W.T).log_softmax(-1), (h_t @ W.T).log_softmax(-1)
    return (w.double() * (t.exp() * (t - s)).sum(-1)).sum()


def value_and_gradient(loss, h, *others):
    h = h.detach().clone().requires_grad_()
    value = loss(h, *others)
    return value.detach(), torch.autograd.grad(value, h)[0]


def loss_case(dtype, apart=1.0, N=96, D=64, V=211, size=1.0):
    """Student, teacher (a step `apart`), head, targets, weights with zeros among them."""
    h = random(N, D, seed=1, std=size)
    h_t = h + apart * random(N, D, seed=2)
    W = random(V, D, seed=3, std=0.25)
    w = torch.rand(N, generator=torch.Generator().manual_seed(4)) / N
    w[::5] = 0
    return h.to(dtype), h_t.to(dtype), W.to(dtype), random_tokens(N, seed=5, vocab=V), w


def test_fused_cross_entropy_matches_float64_value_and_gradient():
    # kills: one-hot not subtracted; weight left out of dh; max p dropped from lse
    for dtype, size, value_error, error in ((torch.float32, 1.0, 1e-6, 2e-6),
                                            (torch.float32, 12.0, 1e-6, 2e-6),
                                            (torch.bfloat16, 1.0, 1e-3, 5e-3)):
        h, _, W, y, w = loss_case(dtype, size=size)
        found, g = value_and_gradient(fedbiot.linear_cross_entropy, h, W, y, w)
        expected, true = value_and_gradient(true_ce, h.double(), W.double(), y, w)
        assert (found.dtype, found.shape, g.dtype) == (torch.float32, (), dtype)
        assert off(found, expected) < value_error, (dtype, size)
        assert off(g, true) < error, (dtype, size, off(g, true))


def test_fused_kl_matches_float64_value_and_gradient():
    # kills: gradient's sign; student's p in the sum; logits made apart (bf16: noise at 1e-5);
    # fp32: p_s - p_t by subtraction (1e-5 at a KL of 1e-4, 1e-4 at 1e-5); c not corrected by sums
    for apart, low, high in ((2e-3, 3e-6, 3e-5), (3e-2, 1e-4, 1e-1), (0.5, 1e-2, 5), (30, 40, 1e4)):
        far = apart > 1
        for dtype, error, last_digit in (
                (torch.float32, 1e-5 if far else 2e-6, 1e-10),
                (torch.bfloat16, 5e-2 if far else 2e-2, 2e-7)):             # that of lse
            h, h_t, W, _, w = loss_case(dtype, apart, size=20.0 if far else 1.0)
            found, g = value_and_gradient(fedbiot.linear_kl, h, h_t, W, w)
            expected, true = value_and_gradient(true_kl, h.double(), h_t.double(), W.double(), w)
            assert low < expected / w.sum() < high, (dtype, apart, expected / w.sum())
            bound = error * expected + last_digit * w.sum()
            assert found.dtype == torch.float32
            assert abs(found - expected) <= bound, (dtype, apart, found, expected)
            assert off(g, true) < error, (dtype, apart, off(g, true))


def both_losses(h, h_t, W, y, w):
    return fedbiot.linear_cross_entropy(h, W, y, w) + fedbiot.linear_kl(h, h_t, W, w)


def test_losses_ignore_rows_of_weight_zero_whatever_they_hold():
    # kills: single where (inf * 0 = nan)
    for dtype in (torch.float32, torch.bfloat16):
        h, h_t, W, y, w = loss_case(dtype)
        clean, g = value_and_gradient(both_losses, h, h_t, W, y, w)
        for bad in (math.inf, -math.inf, math.nan, 1e38):
            for both in (False, True):
                dirty, teacher = h.clone(), h_t.clone()
                dirty[::5] = bad
                teacher[::10] = bad if both else teacher[::10]
                value, found = value_and_gradient(both_losses, dirty, teacher, W, y, w)
                assert torch.equal(value, clean) and torch.equal(found, g), (dtype, bad)
        assert (g[::5] == 0).all()
        for keep in (w[:0], w * 0):                         # no row at all; all rows ignored
            n = len(keep)
            case = h[:n] * math.inf, h_t[:n], W, y[:n], keep
            value, found = value_and_gradient(both_losses, *case)
            assert value == 0 and found.shape == (n, 64) and (found == 0).all()


def test_losses_do_not_depend_on_the_chunks():
    # kills: last short chunk skipped; loss of the last chunk only
    case = loss_case(torch.float32)
    whole, g = value_and_gradient(both_losses, *case)
    for size in (1, 7, 95, 96, 97):
        def chunks(h, W):
            return [slice(a, a + size) for a in range(0, len(h), size)]
        with patch.object(fedbiot, "chunks", chunks):
            value, found = value_and_gradient(both_losses, *case)
        assert off(value, whole) < 1e-6 and off(found, g) < 1e-6, size
    for N, V in ((0, 7), (1, 32000), (262, 32000), (263, 32000), (1000, 32000), (5, 10**9)):
        slices = fedbiot.chunks(torch.empty(N, 1), torch.empty(V, 1, device="meta"))
        assert [i for s in slices for i in range(s.start, s.stop)] == list(range(N))
        rows = [s.stop - s.start for s in slices]
        assert all(n * V * 4 <= 2**25 or n <= 32 for n in rows), "32 MB of logits, or few rows"


def test_losses_differentiate_like_any_other_loss():
    # kills: gradient scaled in place in backward; not scaled at all
    h, h_t, W, y, w = loss_case(torch.float32)
    h, h_t = h.requires_grad_(), h_t.requires_grad_()
    loss = 3 * both_losses(h, h_t, W, y, w)
    first, = torch.autograd.grad(loss, h, retain_graph=True)
    again, = torch.autograd.grad(loss, h)
    _, plain = value_and_gradient(both_losses, h, h_t, W, y, w)
    assert torch.equal(first, again) and off(first, 3 * plain) < 1e-6
    both_losses(h, h_t, W, y, w).backward()
    assert h_t.grad is None and off(h.grad, plain) < 1e-6
    with torch.no_grad():
        assert off(both_losses(h, h_t, W, y, w), loss.detach() / 3) < 1e-6
    assert not both_losses(h.detach(), h_t.detach(), W, y, w).requires_grad


class Products(TorchDispatchMode):
    """Counts matrix products."""
    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten.mm.default
        return function(*args, **kwargs or {})


def test_losses_make_no_gradient_that_nobody_asked_for():
    # kills: a gradient made whether or not h needs one; made again in backward
    h, h_t, W, y, w = loss_case(torch.float32)
    for need, expected in ((False, 1 + 2), (True, 2 + 3)):
        with Products() as products:
            loss = both_losses(h.requires_grad_(need), h_t, W, y, w)
            if need:
                loss.backward()
        assert products.count == expected, (need, products.count)


def test_losses_compile_into_one_graph():
    # kills: .item() in a loss
    case = loss_case(torch.float32)
    compiled = torch.compile(both_losses, fullgraph=True, backend="aot_eager")
    value, g = value_and_gradient(compiled, *case)
    expected, true = value_and_gradient(both_losses, *case)
    assert off(value, expected) < 1e-6 and off(g, true) < 1e-6


def proximal_case(delta, pairs=3):
    """Quadruples (B, A, B0, A0): moved by `delta` from what was broadcast; B0 is not zero."""
    out = []
    for i in range(pairs):
        B0, A0 = random(40, 4, seed=i, std=0.1), random(4, 48, seed=9 + i, std=0.1)
        B, A = B0 + delta * random(40, 4, seed=20 + i), A0 + delta * random(4, 48, seed=30 + i)
        out.append((B.requires_grad_(), A.requires_grad_(), B0, A0))
    return out


def test_proximal_matches_the_dense_matrices_value_and_gradient():
    # kills: scale not squared; three-term expansion in fp32 (useless at 1e-6); sign of A - A0
    for delta in (1.0, 1e-2, 1e-6):
        pairs = proximal_case(delta)
        wide = [tuple(t.detach().double().requires_grad_(i < 2) for i, t in enumerate(p))
                for p in pairs]
        value = fedbiot.proximal(pairs, 2.5)
        true = sum((2.5 * (B @ A - B0 @ A0)).pow(2).sum() for B, A, B0, A0 in wide)
        value.backward()
        true.backward()
        assert value.dtype == torch.float32
        assert off(value.detach(), true.detach()) < 1e-5, delta
        for (B, A, *_), (wide_B, wide_A, *_) in zip(pairs, wide):
            assert off([B.grad, A.grad], [wide_B.grad, wide_A.grad]) < 1e-5, delta


def test_proximal_is_zero_at_the_start_and_has_a_gradient_once_moved():
    # kills: detached tensors (the authors' code: no gradient at all)
    still, moved = proximal_case(0.0), proximal_case(1e-3)
    value = fedbiot.proximal(still, 2.0)
    value.backward()
    assert value == 0 and all((t.grad == 0).all() for B, A, *_ in still for t in (B, A))
    fedbiot.proximal(moved, 2.0).backward()
    assert all(t.grad.abs().max() > 0 for B, A, *_ in moved for t in (B, A))


# ---- server and client --------------------------------------------------------------------------

def test_emulator_without_dropout_equals_full():
    # kills: a layer of the emulator lost
    server, tokens = toy_server(False, dropout=0.0), random_tokens(2, 13)
    assert list(server.student.layers) == list("01234")
    for lm in server.models().values():
        assert torch.equal(lm(tokens), tiny_lm()(tokens))
    losses = server.alignment_losses(next(server.public.batches(1, 4, (0,))))
    assert losses["l2"][1] == 0 and abs(losses["kl"][1]) < 1e-6


def test_adapemu_and_adapfu_are_composed_as_the_paper_says():
    # kills: AdapFu with the emulator's LoRA; AdapEmu and AdapFu swapped
    server, tokens = toy_server(), random_tokens(1, 11)
    w = {n: t.double() for n, t in tiny_lm().state_dict().items()}
    learnt = {n: t.double() for n, t in server.state_dict()["learnt"].items()}
    assert {n.split(".")[1] for n in learnt} == set("0234"), "LoRA on the emulator and the adapter"
    on_top = {n: t for n, t in learnt.items() if n[7] in "34"}
    without_1 = {n: t for n, t in (w | learnt).items() if "layers.1." not in n}
    expected = {"base": w, "adapemu": without_1, "adapfu": w | on_top}
    assert list(server.models()) == list(expected)
    for name, lm in server.models().items():
        slow = slow_logits(lm, tokens[0].tolist(), expected[name])
        assert off(lm(tokens)[0], slow) < 3e-6, name


def test_client_never_holds_a_dropped_layer():
    # kills: bootstrap of the full model; a view of a larger storage
    server, client = pair()
    bootstrap, full = server.bootstrap(), tiny_lm().state_dict()
    frozen = {n: t for n, t in bootstrap.items() if n != "config"}
    assert {int(n.split(".")[1]) for n in frozen if n.startswith("layers.")} == {0, 2, 3, 4}
    assert len(frozen) == 3 + 4 * 9 and not any("lora" in n for n in frozen)
    assert same(frozen, {n: t for n, t in full.items() if n in frozen})
    dropped = [t for n, t in full.items() if n.startswith("layers.1.")]
    sent = server.broadcast(0)
    for held in (*bootstrap.values(), *client.lm.state_dict().values(), *sent.values()):
        whole = held.untyped_storage().nbytes()
        assert whole == held.nbytes, "a view would carry its whole storage along"
        assert not any(held.shape == t.shape and torch.equal(held, t) for t in dropped)


def test_only_lora_crosses_the_wire():
    # kills: weights sent each round; emulator's LoRA uploaded
    server, client = pair()
    down = server.broadcast(0)
    up, metrics = client.update(0, down, toy_shard(), 0)
    kinds = [f"attention.{w}.lora_{m}" for w in ("wq", "wv") for m in "AB"]
    assert set(down) == {f"layers.{i}.{kind}" for i in (0, 2, 3, 4) for kind in kinds}
    assert set(up) == {f"layers.{i}.{kind}" for i in (3, 4) for kind in kinds}
    wq, wv = 4 * 48 + 48 * 4, 4 * 48 + 16 * 4               # A and B at rank 4; two kv heads
    layer = 4 * (wq + wv)                                   # bytes in fp32
    assert fedbiot.payload_bytes(down) == 4 * layer and fedbiot.payload_bytes(up) == 2 * layer
    assert set(metrics) == {"loss"} and isinstance(metrics["loss"], float)


def test_frozen_tensors_are_shared_not_copied():
    # kills: clone in bootstrap
    server, client = pair(dtype=torch.bfloat16)
    address = {n: p.data_ptr() for n, p in server.full.named_parameters()}
    for lm in (server.student, server.teacher, client.lm):
        frozen = {n: p.data_ptr() for n, p in lm.named_parameters() if ".lora_" not in n}
        assert frozen == {n: address[n] for n in frozen}
    learnt, teacher = lora.lora_tensors(server.student), lora.lora_tensors(server.teacher)
    assert {n[7] for n in teacher} == set("34") and all(p is learnt[n] for n, p in teacher.items())
    own = client.received.items()
    assert all(p.data_ptr() != learnt[n].data_ptr() for n, p in own), "a client has its own LoRA"


def leaves(tensors) -> dict:
    return {n: t.detach().double().requires_grad_() for n, t in tensors.items()}


def pull_by_hand(tuned: dict, sent: dict) -> torch.Tensor:
    """The sum over matrices of ||s B A - s B0 A0||^2 with s = 16 / 4, from dense products."""
    total = 0
    for a in (n for n in tuned if n.endswith("lora_A")):
        b = a[:-1] + "B"
        total += (4 * (tuned[b] @ tuned[a] - (sent[b] @ sent[a]).double())).pow(2).sum()
    return total


def test_client_steps_match_float64_by_hand():
    # kills: prox for prox / 2; pull towards zero; betas (0.9, 0.999)
    server, client = pair()
    for t in (0, 1):
        sent = copied(server.broadcast(t))
        up, metrics = client.update(t, sent, toy_shard(0, 20), 1)
        w = {n: p.double() for n, p in (client.lm.state_dict() | sent).items()}
        tuned, losses = leaves({n: sent[n] for n in up}), []
        optimizer = torch.optim.AdamW(tuned.values(), 3e-3, betas=(0.9, 0.95), weight_decay=0.01)
        for batch in toy_shard(0, 20).batches(3, 4, (0, t, 1)):
            z = [slow_logits(client.lm, row.tolist(), w | tuned) for row in batch.tokens]
            z = torch.cat(z)[batch.rows]
            losses.append(true_ce(z, torch.eye(97).double(), batch.targets, batch.weights))
            optimizer.zero_grad()
            (losses[-1] + 0.5 / 2 * pull_by_hand(tuned, sent)).backward()
            optimizer.step()
        assert off(up.values(), [tuned[n].detach() for n in up]) < 1e-4
        moved = [tuned[n].detach() - sent[n] for n in up]
        assert off([up[n] - sent[n] for n in up], moved) < 1e-2
        assert abs(metrics["loss"] - torch.stack(losses).mean()) < 1e-4


def alignment_by_hand(server, batch, student: dict, full: dict):
    """Alignment's loss in float64: L2 at the adapter's input, over the teacher's mean square where
    align_norm is rms, plus kl_weight times the KL of the outputs, over the rows of align_tokens."""
    cfg, outputs = server.cfg, []
    for weights in (student, full):
        rows = [slow_forward(server.full, row.tolist(), weights, cut=3) for row in batch.tokens]
        outputs.append(map(torch.cat, zip(*rows)))
    (z, x), (z_t, x_t) = outputs                            # logits, and what enters layer 3
    rows, p = batch.rows, batch.weights.double()
    if cfg.align_tokens == "all":
        rows = torch.arange(batch.tokens.numel())
        p = torch.full((len(rows),), 1 / len(rows)).double()
    l2 = (p * (x - x_t)[rows].pow(2).sum(-1)).sum()
    if cfg.align_norm == "rms":
        l2 = l2 / (p * x_t[rows].pow(2).sum(-1)).sum()
    t_log, s_log = z_t[rows].log_softmax(-1), z[rows].log_softmax(-1)
    return l2 + cfg.kl_weight * (p * (t_log.exp() * (t_log - s_log)).sum(-1)).sum()


def test_alignment_steps_match_float64_by_hand():
    # kills: no rms; kl_weight or align_tokens ignored; optimizer never renewed; E steps at t = 0;
    # betas (0.9, 0.999)
    for changes in ({}, {"align_norm": "none", "align_renew": True},
                    {"align_tokens": "all", "kl_weight": 3.0}):
        server = toy_server(**changes)
        student, full = ({n: t.double() for n, t in lm.state_dict().items()}
                         for lm in (server.student, server.teacher))
        before, tuned = copied(server.emulated), leaves(server.emulated)

        def new():
            return torch.optim.AdamW(tuned.values(), lr=3e-3, betas=(0.9, 0.95))
        optimizer = new()
        for t, steps in ((0, 3), (1, 2)):
            optimizer = new() if server.cfg.align_renew else optimizer
            for batch in toy_shard().batches(steps, 4, (0, t, fedbiot.SERVER)):
                optimizer.zero_grad()
                alignment_by_hand(server, batch, student | tuned, full).backward()
                optimizer.step()
            down = server.broadcast(t)
        expected = {n: p.detach() for n, p in tuned.items()}
        assert off([down[n] for n in tuned], expected.values()) < 1e-4, changes
        moved = [expected[n] - before[n] for n in tuned]
        assert off([down[n] - before[n] for n in tuned], moved) < 1e-2, changes


def test_the_alignments_record_is_the_mean_of_its_last_ten_steps():
    # kills: the mean of all steps; the last step alone
    server, seen = toy_server(), []

    def watched(batch, real=server.alignment_losses):
        seen.append(real(batch))
        return seen[-1]
    server.alignment_losses = watched
    server.align(0, 14)
    for name in ("l2", "kl"):
        last = [terms[name][1].item() for terms in seen]
        mean = sum(last[4:]) / 10
        assert abs(server.measured[f"align_{name}"] - mean) < 1e-6 * mean, name
        assert abs(sum(last) / 14 - mean) > 1e-3 * mean < abs(last[-1] - mean), "they differ"


def losses_of(server, batch) -> dict:
    """The alignment's losses without their weights."""
    return {name: value.item() for name, (_, value) in server.alignment_losses(batch).items()}


def test_alignment_lowers_its_losses_and_never_moves_the_teacher():
    # kills: gradient with the wrong sign; adapter's LoRA trained too
    server, tokens = toy_server(align_init=60), random_tokens(3, 12)
    batch = next(server.public.batches(1, 30, (7,)))
    before, teacher = losses_of(server, batch), server.teacher(tokens)
    tuned = copied(server.tuned)
    server.broadcast(0)
    after = losses_of(server, batch)
    assert all(after[name] < 0.8 * before[name] for name in ("l2", "kl")), (before, after)
    assert torch.equal(server.teacher(tokens), teacher) and same(copied(server.tuned), tuned)
    measured = server.aggregate(0, [tuned], [1.0])
    assert set(measured) == {"align_l2", "align_kl"} and all(v > 0 for v in measured.values())
    assert server.aggregate(0, [tuned], [1.0]) == {}, "each is told once"
    assert torch.equal(server.teacher(tokens), teacher)
    server.aggregate(0, [{n: t + 1 for n, t in tuned.items()}], [1.0])
    moved = not torch.equal(server.teacher(tokens), teacher)
    assert moved, "the adapter's LoRA, and nothing else, changes the teacher"
    assert torch.equal(server.full(tokens), tiny_lm()(tokens)), "the base model has none"


def five_server(public=None, **changes) -> fedbiot.Server:
    """A server that trains E's own weights before round 1, as Eq. 5; nothing is trained yet."""
    dtype = changes.pop("dtype", torch.float32)
    cfg = config(**{"align_init_on": "weights", "align_init": 60, **changes})
    return fedbiot.Server(tiny_lm().to(dtype), public or toy_shard(0, 30), cfg)


def held_out():
    return next(toy_shard(30, 40).batches(1, 10, (7,)))


def layers_of(payload: dict, *numbers: int) -> dict:
    return {n: p for n, p in payload.items() if n.split(".")[1] in map(str, numbers)}


def test_eq_5_ships_no_layer_of_the_originals_below_the_adapter():
    # kills: a matrix or a norm left out of Eq. 5; the shared tensors trained; LoRA of E trained;
    # weights left trainable, with gradients, or as views; broadcast aligns once more
    server, full = five_server(), tiny_lm().state_dict()
    before, start = losses_of(server, held_out()), copied(server.emulated)
    sent = {n: p for n, p in server.bootstrap().items() if n != "config"}
    assert len(sent) == 3 + 4 * 9 and not any("lora" in n for n in sent)
    own = layers_of(sent, 0, 2)
    assert len(own) == 2 * 9 and own.keys() == server.emulator.keys()
    for name, p in own.items():
        assert not any(p.shape == t.shape and torch.equal(p, t) for t in full.values()), name
        assert p.untyped_storage().nbytes() == p.nbytes and not p.requires_grad, name
    assert same({n: p for n, p in sent.items() if n not in own},
                {n: full[n] for n in sent if n not in own}), "adapter, embeddings, norm and head do"
    assert same(full, server.full.state_dict()), "the full model is untouched"
    assert same(start, copied(server.emulated)), "LoRA of E is where it began"
    assert all((p == 0).all() for n, p in start.items() if n.endswith("lora_B"))
    assert all(p.requires_grad and p.grad is None for p in server.emulated.values())
    frozen = [p for lm in (server.student, server.teacher) for n, p in lm.named_parameters()
              if ".lora_" not in n]
    assert all(not p.requires_grad and p.grad is None for p in frozen)
    after = losses_of(server, held_out())
    assert all(after[name] < 0.8 * before[name] for name in ("l2", "kl")), (before, after)
    down = server.broadcast(0)
    assert same(start, {n: down[n] for n in start}), "Eq. 5 stands in for the first alignment"
    again = {n: p for n, p in server.bootstrap().items() if n != "config"}
    assert same(sent, again), "trained once"


def test_eq_5_steps_match_float64_by_hand():
    # kills: no warm-up; no decay; betas (0.9, 0.999); --server-lr for --align-init-lr; the norms
    # left out; LoRA's optimizer moved
    server = five_server(align_init=22, batch_size=2, align_init_lr=2e-3)
    student, full = ({n: t.double() for n, t in lm.state_dict().items()}
                     for lm in (server.student, server.teacher))
    before, tuned = copied(server.emulator), leaves(server.emulator)
    rates = [2e-3 * min((k + 1) / 20, (22 - k) / 2) for k in range(22)]
    assert rates[0] == 1e-4 and rates[19] == 2e-3 and rates[21] == 1e-3
    optimizer = torch.optim.AdamW(tuned.values(), betas=(0.9, 0.95))
    for rate, batch in zip(rates, server.public.batches(22, 2, (0, 0, fedbiot.SERVER))):
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        alignment_by_hand(server, batch, student | tuned, full).backward()
        optimizer.step()
    sent = server.bootstrap()
    moved = [p.detach() - before[n] for n, p in tuned.items()]
    assert off([sent[n] - before[n] for n in tuned], moved) < 1e-2
    assert not server.optimizer.state, "AdamW of Eq. 7 has not begun"


def test_eq_5_of_no_steps_is_the_other_mode_of_no_steps():
    # kills: copies that are rounded; the order of the random draws changed; a step at 0
    shards, found = [toy_shard(0, 20), toy_shard(20, 40)], []
    for mode in ("weights", "lora"):
        for dtype in (torch.float32, torch.bfloat16):
            server = five_server(align_init=0, align_init_on=mode, dtype=dtype)
            bootstrap = server.bootstrap()
            records = run_rounds(server, fedbiot.Client(bootstrap, server.cfg), shards)
            for record in records:
                del record["seconds"]
            found.append((bootstrap, server.state_dict()["learnt"], records))
    for one, other in (found[0::2], found[1::2]):
        assert same(one[0], other[0]) and same(one[1], other[1]) and one[2] == other[2]


def test_eq_5_trains_in_fp32_and_freezes_in_the_checkpoints_dtype():
    # kills: weights of E trained in bf16; frozen in fp32; the stored
    # dtype ignored, so that a run's emulator is not what emulator.pt gives back
    server = five_server(dtype=torch.bfloat16)
    whole = tiny_lm().bfloat16().state_dict()
    assert all(p.dtype == torch.float32 for p in server.emulator.values())
    before = losses_of(server, held_out())
    sent = server.bootstrap()
    assert all(p.dtype == torch.bfloat16 for n, p in sent.items() if n != "config")
    assert same(whole, server.full.state_dict())
    moved = {n: (sent[n] != whole[n]).float().mean().item() for n in server.emulator}
    assert min(moved.values()) > 0.2, moved
    after = losses_of(server, held_out())
    assert all(after[name] < 0.8 * before[name] for name in ("l2", "kl")), (before, after)
    records = run_rounds(server, fedbiot.Client(sent, server.cfg), [toy_shard()])
    assert all(math.isfinite(v) for record in records for v in record.values())

    server = five_server(align_init=5)
    server.full.stored = torch.bfloat16
    server.bootstrap()
    for p in server.emulator.values():
        assert p.dtype == torch.float32 and torch.equal(p, p.bfloat16().float())


def test_a_server_of_eq_5_goes_on_from_its_state_bit_for_bit():
    # kills: the emulator's weights trained anew, or left as the original's, by a resumed server
    shards, public = [toy_shard(0, 20), toy_shard(20, 40)], toy_shard(0, 30)
    whole, half, other = (five_server(public, align_init=5, rounds=3) for _ in range(3))
    run_rounds(whole, fedbiot.Client(whole.bootstrap(), whole.cfg), shards)
    client = fedbiot.Client(half.bootstrap(), half.cfg)
    next(fedbiot.federate(half, client, shards, half.cfg, fedbiot.Wire()))
    other.load_state_dict(half.state_dict() | {"emulator": copied(half.emulator)})
    with patch.object(fedbiot.Server, "align_weights", side_effect=AssertionError):
        bootstrap = other.bootstrap()
    assert same(bootstrap, half.bootstrap())
    run_rounds(other, fedbiot.Client(bootstrap, other.cfg), shards, first_round=1)
    assert same(whole.state_dict()["learnt"], other.state_dict()["learnt"])
    tokens = random_tokens(2, 9)
    for name, lm in whole.models().items():
        assert torch.equal(lm(tokens), other.models()[name](tokens)), name


class WithCosine(fedbiot.Server):
    """A term of one's own: 1 - cos of what enters the adapter."""
    weight = 0.5

    def alignment_losses(self, batch):
        with torch.no_grad():
            target, _ = self.teacher.hidden(batch.tokens, rows=batch.rows, tap=self.cut)
        entered, _ = self.student.hidden(batch.tokens, rows=batch.rows, tap=self.cut)
        apart = 1 - torch.cosine_similarity(entered, target, dim=-1)
        value = (batch.weights * apart).sum()
        return super().alignment_losses(batch) | {"cosine": (self.weight, value)}


def test_a_new_alignment_term_is_minimised_and_reaches_the_record_and_the_rounds_line():
    # kills: names of two terms written down in the server or in round_line; the third left out of
    # the sum; its weight ignored
    def run(kind, mode="lora"):
        server = kind(tiny_lm(), toy_shard(0, 30), config(align_init_on=mode))
        client = fedbiot.Client(server.bootstrap(), server.cfg)
        return run_rounds(server, client, [toy_shard()]), server.state_dict()["learnt"]
    for mode in ("lora", "weights"):
        records, learnt = run(WithCosine, mode)
        for record in records:
            assert list(record)[:5] == ["round", "client_loss", "align_l2", "align_kl",
                                        "align_cosine"]
            assert 0 < record["align_cosine"] < 2
            line = train.round_line(record, 2, ())
            l2, kl, cosine = (f"{record[f'align_{n}']:.3f}" for n in ("l2", "kl", "cosine"))
            assert f"| align l2 {l2} | align kl {kl} | align cosine {cosine} |" in line, line
        plain = run(fedbiot.Server, mode)[1]
        assert not same(learnt, plain)
        with patch.object(WithCosine, "weight", 0.0):
            ignored = run(WithCosine, mode)[1]
        assert off(ignored.values(), plain.values()) < 1e-6


def test_aggregation_weighs_by_size():
    # kills: uniform mean; weights not normalised
    server = toy_server()
    ups = [{n: torch.full_like(p, v) for n, p in server.tuned.items()} for v in (1.0, 2.0, 6.0)]
    emulated = copied(server.emulated)
    server.aggregate(0, ups, [10.0, 20.0, 50.0])            # (10 + 40 + 300) / 80 = 4.375
    assert all((p == 4.375).all() for p in server.tuned.values())
    assert same(copied(server.emulated), emulated)


def test_a_forks_choice_of_layers_is_ascending_once_each_and_below_the_adapter():
    # kills: a layer of the adapter in the emulator, a layer twice, layers that the plan lists in
    # another order than the model has
    for wrong in ([0, 3], [0, 0], [2, 0]):
        with patch.object(fedbiot, "spread", lambda total, kept, wrong=wrong: wrong):
            asserts(toy_server)
    with patch.object(fedbiot, "spread", lambda total, kept: [1]):
        assert toy_server().kept == [1]


# ---- rounds -------------------------------------------------------------------------------------

def test_rounds_average_what_the_clients_learnt_from_their_own_shard():
    # kills: same shard for all; client number not passed; always or never uniform; loss unweighted
    shards = [toy_shard(0, 6), toy_shard(6, 12), toy_shard(12, 40)]
    for changes, p in (({}, (6 / 40, 6 / 40, 28 / 40)), ({"uniform_weights": True}, (1 / 3,) * 3)):
        server, client = pair(rounds=1, **changes)
        twin, other = pair(rounds=1, **changes)
        down = copied(twin.broadcast(0))
        ups, metrics = zip(*[other.update(0, down, shard, m) for m, shard in enumerate(shards)])
        record, = run_rounds(server, client, shards)
        expected = [sum(q * up[n].double() for q, up in zip(p, ups)) for n in server.tuned]
        assert off([q.detach() for q in server.tuned.values()], expected) < 1e-6
        loss = sum(q * m["loss"] for q, m in zip(p, metrics))
        assert abs(record["client_loss"] - loss) < 1e-5 and record["round"] == 1
        assert record["bytes_down"] == 2 * record["bytes_up"] == fedbiot.payload_bytes(down)


def test_some_clients_take_part_where_asked():
    # kills: clients_per_round ignored; the same ones in every round
    cfg = config(clients_per_round=3)
    chosen = [fedbiot.choose_clients(cfg, 8, t) for t in range(30)]
    assert all(len(set(c)) == 3 and c == sorted(c) for c in chosen)
    assert set(sum(chosen, [])) == set(range(8)) and len(set(map(tuple, chosen))) > 5
    assert chosen == [fedbiot.choose_clients(cfg, 8, t) for t in range(30)]
    assert fedbiot.choose_clients(config(), 8, 0) == list(range(8))


def test_alignment_is_done_before_the_first_round_and_between_rounds():
    # kills: align_init in every round; batches of round 0 again
    seen = []

    class Public:
        def batches(self, steps, size, key):
            seen.append((steps, size, key))
            return toy_shard().batches(steps, size, key)
    server = fedbiot.Server(tiny_lm(), Public(), config(rounds=3))
    run_rounds(server, fedbiot.Client(server.bootstrap(), server.cfg), [toy_shard()])
    assert seen == [(steps, 4, (0, t, fedbiot.SERVER)) for t, steps in enumerate((3, 2, 2))]


def test_frozen_weights_do_not_move_in_a_round():
    # kills: an optimizer over all parameters of a client whose weights are not frozen
    for dtype in (torch.float32, torch.bfloat16):
        server, client = pair(dtype=dtype)
        before = copied(server.full.state_dict())
        records = run_rounds(server, client, [toy_shard(0, 20), toy_shard(20, 40)])
        assert [r["round"] for r in records] == [1, 2]
        assert all(math.isfinite(r["client_loss"]) for r in records)
        assert same(before, server.full.state_dict())
        frozen = {n: t for n, t in client.lm.state_dict().items() if "lora" not in n}
        assert same(frozen, {n: before[n] for n in frozen})


def test_zero_switches_alignment_off_exactly():
    # kills: align_steps 0 an error; some kl in the loss at 0
    server = toy_server(False, align_init=0, align_steps=0)
    start = copied(server.student.state_dict())
    assert server.broadcast(0) and server.broadcast(1) and same(start, server.student.state_dict())
    assert server.aggregate(0, [copied(server.tuned)], [1.0]) == {}

    def only_l2(server, batch, losses=fedbiot.Server.alignment_losses):
        return {"l2": losses(server, batch)["l2"]}
    server, alone, unaligned = toy_server(kl_weight=0.0), toy_server(kl_weight=0.7), toy_server()
    with patch.object(fedbiot.Server, "alignment_losses", only_l2):
        alone.broadcast(0)
    server.broadcast(0)
    assert same(copied(server.emulated), copied(alone.emulated))
    assert not same(copied(server.emulated), copied(unaligned.emulated))


def test_zero_switches_the_proximal_term_off_exactly():
    # kills: prox computed at 0
    down = copied(toy_server().broadcast(0))

    def update(prox):
        return pair(prox=prox)[1].update(0, down, toy_shard(), 0)[0]

    def distance(up):
        return sum((up[n] - down[n]).norm() for n in up)
    with patch.object(fedbiot, "proximal", lambda *_: 0 / 0):
        plain = update(0.0)
    assert same(plain, update(0.0)) and not same(plain, update(0.5))
    far, near = distance(plain), distance(update(1e4))
    assert near < 0.9 * far, "a strong pull keeps the adapter near what was broadcast"


def test_clients_are_stateless_and_uploads_their_own():
    # kills: optimizer kept between rounds; upload aliases the client's tensors; payload not loaded
    server, client = pair()
    first, second = copied(server.broadcast(0)), copied(server.broadcast(1))
    up, _ = client.update(0, first, toy_shard(), 2)
    kept = copied(up)
    again, _ = client.update(1, second, toy_shard(), 2)
    assert same(up, kept) and not same(up, again)
    fresh, _ = fedbiot.Client(server.bootstrap(), server.cfg).update(1, second, toy_shard(), 2)
    assert same(fresh, again), "what a client did before leaves no trace"
    less = {n: t for n, t in first.items() if n[7] != "0"}
    more = first | {"layers.1.attention.wq.lora_A": torch.ones(4, 48)}
    for wrong in (less, more):
        asserts(lambda: client.update(0, wrong, toy_shard(), 0))


def test_a_server_goes_on_from_its_state_bit_for_bit():
    # kills: optimizer's moments not saved; emulator's LoRA not saved
    shards = [toy_shard(0, 20), toy_shard(20, 40)]
    whole, client = pair(rounds=3)
    run_rounds(whole, client, shards)
    half, client = pair(rounds=3)
    next(fedbiot.federate(half, client, shards, half.cfg, fedbiot.Wire()))
    blob = io.BytesIO()
    torch.save(half.state_dict(), blob)
    blob.seek(0)
    other, client = pair(rounds=3, trained=False)
    other.load_state_dict(torch.load(blob, weights_only=True))
    records = run_rounds(other, client, shards, first_round=1)
    assert [r["round"] for r in records] == [2, 3]
    assert same(whole.state_dict()["learnt"], other.state_dict()["learnt"])


class DivergesWhere:
    """In place of a client: the honest one, but where `when(t, m)` its adapter begins as NaN."""

    def __init__(self, client, when):
        self.client, self.when = client, when

    def update(self, t, payload, shard, m):
        factor = math.nan if self.when(t, m) else 1
        bad = {n: p * (factor if n.startswith("layers.3.") else 1) for n, p in payload.items()}
        return self.client.update(t, bad, shard, m)


def test_a_clients_nan_costs_that_client_its_round_only():
    # kills: NaN averaged on in silence; NaN ends the run; a rejected client's weight still counted
    # in p_m; left out of the next round too
    server, client = pair()
    twin, other = pair()
    shards = [toy_shard(0, 6), toy_shard(6, 20), toy_shard(20, 40)]
    rounds = fedbiot.federate(server, DivergesWhere(client, lambda t, m: (t, m) == (0, 1)), shards,
                              server.cfg, fedbiot.Wire())
    for t, weights in enumerate(({0: 6, 2: 20}, {0: 6, 1: 14, 2: 20})):
        with contextlib.redirect_stderr(io.StringIO()) as err:
            record = next(rounds)
        down = twin.broadcast(t)
        found = {m: other.update(t, down, shards[m], m) for m in weights}
        total = sum(weights.values())
        loss = sum(w / total * found[m][1]["loss"] for m, w in weights.items())
        assert abs(record["client_loss"] - loss) < 1e-5
        twin.aggregate(t, [up for up, _ in found.values()], [float(w) for w in weights.values()])
        assert off(server.expected(t).values(), twin.expected(t).values()) < 1e-5
        assert err.getvalue().count("rejected") == err.getvalue().count("round 1, client 1") == (
            1 if t == 0 else 0), err.getvalue()


def test_a_round_in_which_no_loss_is_finite_is_explained():
    # kills: an average of nobody; NaN alignment goes on
    server, client = pair()
    diverged = DivergesWhere(client, lambda t, m: True)
    refused(lambda: run_rounds(server, diverged, [toy_shard()] * 2), "round 1", "nan", "--lr")
    for p in server.tuned.values():
        p.fill_(math.nan)
    refused(lambda: server.broadcast(1), "nan", "--server-lr")


CLAIMED_EXAMPLES = (0, -1, 1.5, 2.0, "3", 10**9 + 1, 10**12, 10**400, True, False, None, [3],
                    math.nan, math.inf)
CLAIMED_LOSSES = (1e308, -1e308, 1.1e6, 10**400, -10**400, math.nan, math.inf, -math.inf, None,
                  "1", True, [1.0], torch.tensor(1.0))


def test_what_a_client_claims_is_checked_before_it_counts():
    # kills: any bound of `implausible`; True taken for 1; a number beyond floats as a traceback;
    # a missing claim let through
    server, client = pair()
    up, fine = client.update(0, server.broadcast(0), toy_shard(), 0)
    fine, expected = fine | {"examples": 40}, server.expected(0)
    claims = [("examples", value, "examples") for value in CLAIMED_EXAMPLES]
    claims += [("loss", value, "loss") for value in CLAIMED_LOSSES]
    bad = [(fine | {name: value}, word) for name, value, word in claims]
    bad += [({n: v for n, v in fine.items() if n != name}, name) for name in fine]
    for metrics, word in bad:
        with contextlib.redirect_stderr(io.StringIO()) as err:
            both = {0: (up, fine), 1: (up, metrics)}
            assert list(fedbiot.accepted(0, both, expected, server.cfg)) == [0], metrics
        line = err.getvalue()
        assert "round 1, client 1: rejected, it" in line and word in line, line
        assert line.count("\n") == 1 and len(line) < 200
        refused(lambda: fedbiot.accepted(0, {1: (up, metrics)}, expected, server.cfg), word)
    for examples, loss in ((1, 0), (10**9, 1e6), (3, -2.5), (7, 12)):
        metrics = {"examples": examples, "loss": loss}
        assert fedbiot.accepted(0, {0: (up, metrics)}, expected, server.cfg)
