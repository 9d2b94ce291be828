"""What is promised, one test a promise, in the order of reading: the first failure is the cause.

    python test_all.py [substring]

Each name is a claim; each `# kills:` names a mutation of the code that the test was seen to die of. Oracles are
independent: a slow form, an invariant, arithmetic by hand. No network, no GPU, nothing outside the repository.
"""
import contextlib
import csv
import gc
import gzip
import importlib.util
import inspect
import io
import itertools
import json
import math
import os
import re
import shutil
import socket
import struct
import subprocess
import multiprocessing
import resource
import signal
import tracemalloc
import sys
import tempfile
import textwrap
import time
import traceback
import unittest
import zipfile
from collections import Counter
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F

import baselines
import data
import eval as evaluation
import fedbiot
import lora
import model
import train
from baselines import fedavg, fedkseed, fedtt, offsite
from model import LM, ModelConfig, UserError
from tasks import code as humaneval
from tasks import qa, sandbox

HERE = Path(__file__).resolve().parent
BUNDLED_TOKENIZER = HERE / "tiny" / "llama" / "tokenizer.model"


class Skip(unittest.SkipTest):
    """Raised by a test that needs something which is absent here; counted, and the reason printed."""


# ---- fixtures -----------------------------------------------------------------------------------

# Meta's params.json of the models below: 8*48/3 = 128, times 1.3 = 166.4, down to 166, up to 168.
PARAMS = {"dim": 48, "n_layers": 5, "n_heads": 6, "n_kv_heads": 2, "vocab_size": 97, "multiple_of": 4,
          "ffn_dim_multiplier": 1.3, "norm_eps": 1e-3, "rope_theta": 500.0}
CONFIG = ModelConfig(48, 5, 6, 2, 97, 168, 1e-3, 500.0)


def tiny_lm(seed=0, **changes) -> LM:
    """A random model in which every weight matters: no unit gains, no zeros."""
    g = torch.Generator().manual_seed(seed)
    lm = LM.empty(ModelConfig(**{**vars(CONFIG), **changes})).requires_grad_(False)
    for name, p in lm.named_parameters():
        p.normal_(1 if "norm" in name else 0, 0.3 if "norm" in name else 1.3 / math.sqrt(p.shape[-1]), generator=g)
    return lm


def random(*shape, seed=0, std=1.0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * std


def random_tokens(*shape, seed=0, vocab=97):
    return torch.randint(3, vocab, shape, generator=torch.Generator().manual_seed(seed))


def slow_forward(lm: LM, tokens: list[int], weights=None, cut=None) -> tuple:
    """((T, V), what enters layer `cut`) in float64 from LLaMA's definition, head by head, rotations as complex numbers.

    Uses nothing of the model but its tensors, or `weights`; LoRA is added to its weight as a dense matrix."""
    c, w = lm.config, dict(weights or {name: t.double() for name, t in lm.state_dict().items()})
    entered = None
    for name in [n for n in w if n.endswith("lora_A")]:
        stem = name.removesuffix("lora_A")
        w[stem + "weight"] = w[stem + "weight"] + 16 / len(w[name]) * w[stem + "lora_B"] @ w[name]
    d, T = c.dim // c.n_heads, len(tokens)

    def normed(x, gain):
        return x / (x.pow(2).mean(-1, keepdim=True) + c.norm_eps).sqrt() * gain
    angle = torch.tensor([[t / c.rope_theta ** (2 * i / d) for i in range(d // 2)] for t in range(T)]).double()
    turn = torch.complex(angle.cos(), angle.sin())                              # (T, d/2)
    x = w["tok_embeddings.weight"][tokens]
    for i in sorted({int(n.split(".")[1]) for n in w if n.startswith("layers.")}):
        p = {n.removeprefix(f"layers.{i}."): t for n, t in w.items() if n.startswith(f"layers.{i}.")}
        entered = x if i == cut else entered
        h, heads = normed(x, p["attention_norm.weight"]), []
        q, k, v = (h @ p[f"attention.{n}.weight"].T for n in ("wq", "wk", "wv"))
        for a in range(c.n_heads):
            b = a * c.n_kv_heads // c.n_heads                                   # the group that head a reads
            qa, kb = (torch.complex(z[:, 0::2], z[:, 1::2]) * turn
                      for z in (q[:, a * d:a * d + d], k[:, b * d:b * d + d]))
            scores = (qa @ kb.conj().T).real / math.sqrt(d)
            scores = scores.masked_fill(torch.ones(T, T).triu(1).bool(), -math.inf)
            heads.append(scores.softmax(-1) @ v[:, b * d:b * d + d])
        x = x + torch.cat(heads, -1) @ p["attention.wo.weight"].T
        h = normed(x, p["ffn_norm.weight"])
        gate = h @ p["feed_forward.w1.weight"].T
        x = x + (gate * gate.sigmoid() * (h @ p["feed_forward.w3.weight"].T)) @ p["feed_forward.w2.weight"].T
    return normed(x, w["norm.weight"]) @ w["output.weight"].T, entered


def slow_logits(lm: LM, tokens: list[int], weights=None) -> torch.Tensor:
    return slow_forward(lm, tokens, weights)[0]


def off(found, expected) -> float:
    """Relative distance of two tensors (or lists of them), in float64."""
    found, expected = (torch.cat([t.double().flatten() for t in ([x] if torch.is_tensor(x) else x)])
                       for x in (found, expected))
    return ((found - expected).norm() / expected.norm()).item()


def same(a: dict, b: dict) -> bool:
    """Two dicts of tensors: the same names, and equal to the bit."""
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


@contextlib.contextmanager
def folder():
    with tempfile.TemporaryDirectory() as path:
        yield Path(path)


def refused(call, *words):
    """`call()` ends in a UserError whose text holds every word."""
    with contextlib.redirect_stderr(io.StringIO()):
        try:
            found = call()
        except UserError as error:
            missing = [word for word in words if str(word) not in str(error)]
            assert not missing, f"expected {missing} in: {error}"
            assert "Traceback" not in str(error) and len(str(error)) < 600, error
            return
    raise AssertionError(f"expected a UserError about {words}, but the call returned {found!r:.200}")


def asserts(call):
    try:
        call()
    except AssertionError:
        return
    raise AssertionError("expected an assertion to fail")


# ---- model --------------------------------------------------------------------------------------

def test_decoder_matches_a_slow_float64_decoder():
    # kills: swap w1/w3; angles doubled; theta ignored; eps ignored; heads tiled over groups; not causal; gain dropped
    for heads in (2, 6, 1):
        lm, tokens = tiny_lm(n_kv_heads=heads), random_tokens(2, 19)
        expected = torch.stack([slow_logits(lm, row) for row in tokens.tolist()])
        assert off(lm(tokens), expected) < 3e-6, (heads, off(lm(tokens), expected))


def test_embeddings_are_not_tied_unless_the_configuration_says_so():
    # kills: tie always; never tie
    for tied in (False, True):
        lm = LM.empty(ModelConfig(**{**vars(CONFIG), "tied": tied}))
        assert (lm.output.weight is lm.tok_embeddings.weight) == tied
    lm = LM.empty(CONFIG).requires_grad_(False)
    before = lm.output.weight.clone()
    lm.tok_embeddings.weight.add_(1)
    assert torch.equal(before, lm.output.weight)


def test_norm_is_computed_in_fp32():
    # kills: squares in the input's dtype (fp16 overflows above 255)
    norm = model.RMSNorm(48, 1e-5).half()
    x = random(3, 48).half() * 3000
    assert x.square().isinf().any() and off(norm(x), x.double() / x.double().pow(2).mean(-1, True).sqrt()) < 1e-3


def test_feed_forward_width_is_that_of_the_published_llamas():
    # kills: 4 D for 8 D / 3; round down to multiple_of
    for dim, heads, kv, multiple, factor, width in ((4096, 32, None, 256, None, 11008), (5120, 40, None, 256, None, 13824),
                                                    (8192, 64, 8, 4096, 1.3, 28672), (6656, 52, None, 256, None, 17920),
                                                    (48, 6, 2, 4, 1.3, 168)):
        p = {"dim": dim, "n_layers": 2, "n_heads": heads, "multiple_of": multiple, "norm_eps": 1e-5, "vocab_size": -1}
        p |= {"n_kv_heads": kv} if kv else {}
        c = ModelConfig.from_params(p | ({"ffn_dim_multiplier": factor} if factor else {}))
        assert (c.hidden_dim, c.n_kv_heads, c.rope_theta) == (width, kv or heads, 10000.0), c


def test_generation_is_the_argmax_of_every_step_without_a_cache():
    # kills: mask < for <=; slots not advanced; caches keep the finished rows; output in sorted order; head on the last slot
    lm = tiny_lm(3)
    prompts = [random_tokens(n, seed=n).tolist() for n in (9, 1, 4, 17, 2, 9, 5)]

    def by_hand(prompt):
        ids = list(prompt)
        for _ in range(14):
            ids.append(lm(torch.tensor([ids]))[0, -1].argmax().item())
        return ids[len(prompt):]
    free = [by_hand(p) for p in prompts]
    frequent = Counter(t for text in free for t in set(text)).most_common(3)      # some rows meet it early, some never
    for eos in [t for t, _ in frequent] + [free[0][0]]:
        expected = [text[:text.index(eos)] if eos in text else text for text in free]
        for size in (1, 3, 64):
            assert model.generate(lm, prompts, 14, eos, size) == expected, (eos, size)
    assert len({len(t) for t in expected}) > 1, "the case must have rows that end early"
    assert model.generate(lm, prompts, 1, 0) == [text[:1] for text in free] and model.generate(lm, [], 5, 0) == []


def test_sampling_stays_within_top_k_and_top_p_and_follows_the_softmax():
    # kills: top_k + 1; nucleus without the piece that crosses top_p; temperature multiplied; ids not mapped back
    z = random(1, 12, std=1.5).repeat(20000, 1)
    order, p = z[0].argsort(descending=True), z[0].double().softmax(-1)

    def draw(t, k, top_p, seed=1):
        return model.choose(z, t, k, top_p, torch.Generator().manual_seed(seed))
    for t, k, top_p in ((0.0, 0, 1.0), (1.0, 1, 1.0), (1.0, 0, 1e-9), (1.0, 0, 0.0), (1e-4, 0, 1.0)):
        assert (draw(t, k, top_p) == z[0].argmax()).all(), (t, k, top_p)
    assert set(draw(1.0, 3, 1.0).tolist()) == set(order[:3].tolist())
    nucleus = next(n for n in range(1, 13) if p[order[:n]].sum() >= 0.7)
    assert set(draw(1.0, 0, 0.7).tolist()) == set(order[:nucleus].tolist())
    inner = p[order[:5]] / p[order[:5]].sum()                                     # top p of what top k left
    both = next(n for n in range(1, 6) if inner[:n].sum() >= 0.6)
    assert set(draw(1.0, 5, 0.6).tolist()) == set(order[:both].tolist())
    warm = (z[0].double() / 0.7).softmax(-1)
    share = torch.bincount(draw(0.7, 0, 1.0), minlength=12) / 20000
    assert (share - warm).abs().max() < 5 * 0.5 / math.sqrt(20000)
    assert torch.equal(draw(1.0, 0, 1.0), draw(1.0, 0, 1.0)) and not torch.equal(draw(1.0, 0, 1.0), draw(1.0, 0, 1.0, 2))


# ---- checkpoints --------------------------------------------------------------------------------

def meta_folder(path: Path, lm: LM, parts=1, tokenizer=False, edit=lambda state, part: None, **params) -> Path:
    """Meta's format: column-parallel matrices split over rows; row-parallel ones and the embedding over columns."""
    path.mkdir(exist_ok=True)
    rows = ("wq", "wk", "wv", "w1", "w3", "output")
    for part in range(parts):
        state = {}
        for name, t in lm.state_dict().items():
            if "norm" not in name:
                t = t.chunk(parts, 0 if name.split(".")[-2] in rows else 1)[part].clone()
            state[name] = t
        edit(state, part)
        torch.save(state, path / f"consolidated.{part:02d}.pth")
    given = {k: v for k, v in vars(lm.config).items() if k in PARAMS}
    (path / "params.json").write_text(json.dumps({**PARAMS, **given, **params}))
    if tokenizer:
        (path / "tokenizer.model").write_bytes(BUNDLED_TOKENIZER.read_bytes())
    return path


NAMES = {"wq": "self_attn.q_proj", "wk": "self_attn.k_proj", "wv": "self_attn.v_proj", "wo": "self_attn.o_proj",
         "w1": "mlp.gate_proj", "w3": "mlp.up_proj", "w2": "mlp.down_proj",
         "attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}


def hf_state(lm: LM) -> dict:
    """Hugging Face's names; q and k with a head's even rows first, then its odd ones."""
    d, state = lm.config.head_dim, {}
    for name, t in lm.state_dict().items():
        if name.startswith("layers."):
            _, i, *_, kind, _ = name.split(".")
            if kind in ("wq", "wk"):
                t = t[[h * d + 2 * j + odd for h in range(len(t) // d) for odd in (0, 1) for j in range(d // 2)]]
            state[f"model.layers.{i}.{NAMES[kind]}.weight"] = t.clone()
        else:
            state[{"tok_embeddings.weight": "model.embed_tokens.weight", "norm.weight": "model.norm.weight",
                   "output.weight": "lm_head.weight"}[name]] = t.clone()
    return state


def write_safetensors(path: Path, state: dict, edit=lambda header: None, pad=0, tail=b""):
    header, blob = {"__metadata__": {"format": "pt"}}, b""
    for name, t in state.items():
        raw = t.contiguous().view(torch.uint8).numpy().tobytes()
        kind = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64"}[t.dtype]
        header[name] = {"dtype": kind, "shape": list(t.shape), "data_offsets": [len(blob), len(blob) + len(raw)]}
        blob += raw
    edit(header)
    text = json.dumps(header).encode() + b" " * pad
    path.write_bytes(struct.pack("<Q", len(text)) + text + blob + tail)


def hf_config(c: ModelConfig, version=4, **changes) -> str:
    fields = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "hidden_size": c.dim,
              "num_hidden_layers": c.n_layers, "num_attention_heads": c.n_heads, "num_key_value_heads": c.n_kv_heads,
              "vocab_size": c.vocab_size, "intermediate_size": c.hidden_dim, "rms_norm_eps": c.norm_eps,
              "attention_bias": False, "mlp_bias": False, "tie_word_embeddings": c.tied, "head_dim": c.head_dim}
    fields |= ({"rope_theta": c.rope_theta, "rope_scaling": None, "torch_dtype": "float16"} if version == 4 else
               {"rope_parameters": {"rope_theta": c.rope_theta, "rope_type": "default"}, "dtype": "float16"})
    return json.dumps({**fields, **changes})


def hf_folder(path: Path, lm: LM, kind="safetensors", shards=1, index=True, version=4, edit=lambda state: None) -> Path:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(hf_config(lm.config, version))
    state = hf_state(lm)
    if lm.config.tied:
        del state["lm_head.weight"]
    edit(state)
    stem, end = ("model", "safetensors") if kind == "safetensors" else ("pytorch_model", "bin")
    names, where = list(state), {}
    for i in range(shards):
        file = f"{stem}-{i + 1:05d}-of-{shards:05d}.{end}" if shards > 1 else f"{stem}.{end}"
        part = {n: state[n] for n in names[i::shards]}
        where |= dict.fromkeys(part, file)
        (write_safetensors if kind == "safetensors" else lambda p, s: torch.save(s, p))(path / file, part)
    if shards > 1 and index:
        (path / f"{stem}.{end}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return path


def read(path, layers=None, dtype=torch.float32) -> LM:
    return model.load_weights(path, ModelConfig.read(path), layers, dtype)


def test_meta_shards_load_bit_for_bit():
    # kills: embedding split over rows; wo split over rows; rope.freqs is surplus; every shard at offset 0
    lm = tiny_lm(vocab_size=96)
    for parts, stored, wanted in ((1, torch.float32, torch.float32), (2, torch.bfloat16, torch.bfloat16),
                                  (4, torch.float32, torch.float32), (2, torch.float16, torch.float32),
                                  (1, torch.bfloat16, torch.float16)):
        with folder() as path:
            def stored_as(state, part):
                state.update({n: t.to(stored) for n, t in state.items()}, **{"rope.freqs": torch.ones(4)})
            found = read(meta_folder(path, lm, parts, edit=stored_as), dtype=wanted)
        assert found.config == lm.config and not any(p.requires_grad for p in found.parameters())
        expected = {n: t.to(stored).to(wanted) for n, t in lm.state_dict().items()}
        assert same(found.state_dict(), expected), (parts, stored, wanted)


def test_hugging_face_folders_load_bit_for_bit():
    # kills: no permutation of q/k; wk permuted with n_heads; index ignored; rope_parameters ignored; lm_head needed when tied
    for kind, shards, index, version, tied in (("safetensors", 1, True, 4, False), ("safetensors", 3, True, 5, False),
                                               ("safetensors", 2, False, 5, True), ("bin", 1, True, 4, True),
                                               ("bin", 3, True, 4, False), ("bin", 2, False, 5, False)):
        lm = tiny_lm(tied=tied)
        with folder() as path:
            found = read(hf_folder(path, lm, kind, shards, index, version))
            (path / f"unrelated.{kind}").write_bytes(b"x")      # an index names its files; others are none of ours
            assert shards == 1 or not index or same(read(path).state_dict(), lm.state_dict())
        assert found.config == lm.config and same(found.state_dict(), lm.state_dict()), (kind, shards, index, version)
        assert (found.output.weight is found.tok_embeddings.weight) == tied


def test_safetensors_are_read_at_any_alignment_and_in_every_float():
    # kills: no clone of misaligned bytes; BF16 read as F16
    for pad in range(4):
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            with folder() as path:
                state = {"a": random(3, 5).to(dtype), "b": random(7).half(), "empty": torch.zeros(0, 4), "c": random(2, 2)}
                write_safetensors(path / "x", state, pad=pad)
                assert same(model.read_safetensors(path / "x"), state), (pad, dtype)


def test_only_the_layers_asked_for_are_read():
    # kills: layer_ids ignored
    lm = tiny_lm(vocab_size=96)
    for make in (lambda p: meta_folder(p, lm, 2), lambda p: hf_folder(p, lm, shards=2)):
        with folder() as path:
            part = read(make(path), [0, 3])
        expected = {n: t for n, t in lm.state_dict().items() if not re.match(r"layers\.[124]\.", n)}
        assert same(part.state_dict(), expected) and list(part.layers) == ["0", "3"]


def test_old_params_take_the_vocabulary_from_the_tokenizer():
    # kills: vocab_size -1 passed on; tokenizer not checked against vocab_size
    lm = tiny_lm(vocab_size=1024)
    with folder() as path:
        meta_folder(path, lm, tokenizer=True, vocab_size=-1)
        found, tokenizer = model.load(path)
        assert found.config.vocab_size == tokenizer.vocab_size == 1024 and same(found.state_dict(), lm.state_dict())
        (path / "params.json").write_text(json.dumps(PARAMS))
        refused(lambda: model.load(path), "1024", "97", "tokenizer")


class Evil:
    def __reduce__(self):
        return os.mkdir, (Evil.path,)


def test_damaged_checkpoints_are_refused_by_name():
    # kills: missing or surplus let through; weights_only=False; a header's end, gaps or tail unchecked; ../ in an index; a set twice
    lm = tiny_lm()
    first = "layers.0.attention.wq.weight"

    def edited(change):
        return lambda path: meta_folder(path, lm, edit=lambda state, part: change(state))

    def cut(name, keep):
        def make(path):
            meta_folder(path, lm) if name.endswith("pth") else hf_folder(path, lm)
            blob = (path / name).read_bytes()
            (path / name).write_bytes(blob[:int(len(blob) * keep)])
        return make

    def rewritten(name, content):
        def make(path):
            meta_folder(path, lm)
            torch.save(content, path / name) if not isinstance(content, bytes) else (path / name).write_bytes(content)
        return make

    def lying(change, **extra):
        def make(path):
            hf_folder(path, lm)
            write_safetensors(path / "model.safetensors", hf_state(lm), change, **extra)
        return make

    def indexed(content):
        def make(path):
            hf_folder(path, lm, shards=2)
            (path / "model.safetensors.index.json").write_text(content)
        return make
    def gap(header):
        for entry in header.values():
            start, end = entry.get("data_offsets", (0, 0))
            if start:
                entry["data_offsets"] = [start + 4, end + 4]
    q = "model.layers.0.self_attn.q_proj.weight"
    size = 48 * 48 * 4
    cases = [
        (edited(lambda s: s.pop(first)), first, "missing"),
        (edited(lambda s: s.update({"layers.5.ffn_norm.weight": torch.ones(48)})), "layers.5.ffn_norm", "surplus"),
        (edited(lambda s: s.update({"layers.0.attention.wq.bias": torch.ones(48)})), "wq.bias", "surplus"),
        (edited(lambda s: s.update({first: s[first][:-1].clone()})), first, "47", "48"),
        (edited(lambda s: s.update({first: s[first].T.reshape(96, 24)})), first),
        (edited(lambda s: s.update({first: s[first].long()})), first, "int64"),
        (edited(lambda s: s.clear()), "missing"),
        (lambda path: meta_folder(path, tiny_lm(vocab_size=97), 2), "output.weight"),
        (lambda path: meta_folder(path, lm, edit=lambda s, p: s.update({"output.weight": s["output.weight"][:96]})), "output"),
        (cut("consolidated.00.pth", .5), "consolidated.00.pth"), (cut("consolidated.00.pth", 0), "consolidated.00.pth"),
        (cut("consolidated.00.pth", .99), "consolidated.00.pth"),
        (cut("model.safetensors", .5), "model.safetensors", "truncated"), (cut("model.safetensors", .001), "model.safetensors"),
        (cut("model.safetensors", 0), "model.safetensors"),
        (rewritten("consolidated.00.pth", {"w": Evil()}), "consolidated.00.pth"),
        (rewritten("consolidated.00.pth", [torch.ones(2)]), "dict", "list"),
        (rewritten("consolidated.02.pth", {}), "consolidated.02.pth", "consolidated.01.pth"),
        (lying(lambda h: h[q].update(data_offsets=[0, 10**12])), "q_proj"),
        (lying(lambda h: h[q].update(data_offsets=[-size, 0])), "q_proj"),
        (lying(lambda h: h[q].update(shape=[48, 47])), "q_proj"), (lying(lambda h: h[q].update(shape=[-48, -48])), "q_proj"),
        (lying(lambda h: h[q].update(dtype="F64")), "F64"), (lying(lambda h: h[q].pop("shape")), "header"),
        (lying(lambda h: h[q].update(data_offsets=h["lm_head.weight"]["data_offsets"])), "truncated or damaged"),
        (lying(lambda h: h[q].update(shape=[math.inf, 48])), "header"),
        (lying(lambda h: None, tail=b"more"), "4 bytes"), (lying(gap, tail=b"more"), "truncated or damaged"),
        (lambda path: (hf_folder(path, lm), (path / "model.safetensors").write_bytes(struct.pack("<Q", 2**63) + b"{}")), "header"),
        (lambda path: (hf_folder(path, lm), (path / "model.safetensors").write_bytes(struct.pack("<Q", 2) + b"[]")), "header"),
        (lambda path: (hf_folder(path, lm), (path / "more.safetensors").write_bytes((path / "model.safetensors").read_bytes())),
         "two files"),
        (indexed('{"weight_map": {"a": "../model.safetensors"}}'), "'../model.safetensors'"),
        (indexed('{"weight_map": {"a": "/etc/passwd"}}'), "/etc/passwd", "not a file of this folder"), (indexed('{"weight_map": {"a": "gone"}}'), "gone"),
        (indexed('{"weight_map": {"a": 3}}'), "3"), (indexed("[]"), "weight_map"), (indexed("{"), "weight_map"),
        (lambda path: (meta_folder(path, lm), (path / "consolidated.00.pth").rename(path / "model.gguf")), "found no", "pth"),
    ]
    for make, *words in cases:
        with folder() as path:
            Evil.path = str(path / "pwned")
            make(path)
            refused(lambda: read(path), *words)
            assert not Path(Evil.path).exists(), "code in a checkpoint was run"


def test_shards_that_do_not_divide_a_tensor_are_refused():
    # kills: n // parts without the remainder (the last row would be left uninitialised)
    with folder() as path:
        meta_folder(path, tiny_lm(), 2, edit=lambda s, part: s.update({"output.weight": s["output.weight"][:48].clone()}))
        refused(lambda: read(path), "output.weight", "97")


def test_what_is_not_a_plain_llama_is_refused_by_name():
    # kills: rope_scaling ignored; attention_bias ignored; unknown keys of params.json ignored; no limit on sizes
    scaled = {"rope_type": "llama3", "factor": 8.0, "rope_theta": 500.0}
    for changes, word in (({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope"), ({"rope_scaling": scaled}, "rope"),
                          ({"rope_parameters": scaled}, "rope"), ({"attention_bias": True}, "attention_bias"),
                          ({"mlp_bias": True}, "mlp_bias"), ({"head_dim": 16}, "head_dim"), ({"model_type": "qwen2"}, "model"),
                          ({"hidden_act": "gelu"}, "hidden_act"), ({"quantization_config": {"bits": 4}}, "quantization"),
                          ({"hidden_size": 50}, "50"), ({"num_key_value_heads": 4}, "n_kv_heads"),
                          ({"num_hidden_layers": 0}, "n_layers"), ({"num_hidden_layers": 10**9}, "n_layers"),
                          ({"hidden_size": "x"}, "config.json")):
        with folder() as path:
            (path / "config.json").write_text(hf_config(CONFIG, **changes))
            refused(lambda: ModelConfig.read(path), word, "config.json")
    for text, word in ((json.dumps(PARAMS | {"use_scaled_rope": True}), "use_scaled_rope"), ("{", "params.json"),
                       (json.dumps(PARAMS | {"moe": 1}), "moe"), ("[]", "params.json"), (b"\xff\xfe", "params.json"),
                       (json.dumps({k: v for k, v in PARAMS.items() if k != "dim"}), "dim"),
                       (json.dumps(PARAMS | {"multiple_of": 0}), "params.json"),
                       (json.dumps(PARAMS | {"dim": float("inf")}), "params.json")):
        with folder() as path:
            (path / "params.json").write_bytes(text if isinstance(text, bytes) else text.encode())
            refused(lambda: ModelConfig.read(path), word)
    with folder() as path:
        refused(lambda: ModelConfig.read(path), "params.json", "config.json")
        meta_folder(path, tiny_lm())
        refused(lambda: model.load(path), "tokenizer.model", "no such file")
        (path / "tokenizer.model").write_text("aGVsbG8= 0\n")
        refused(lambda: model.load(path), "tokenizer.model", "tiktoken")


# ---- Algorithm 1 --------------------------------------------------------------------------------

def test_layer_extract_gives_the_layers_of_table_5():
    # kills: beta for 1 - beta; n - s for n - s - 1; ceil for floor
    odd = list(range(1, 26, 2))
    for s, beta, dropped in ((2, "0.2", [4, 9, 14, 19, 24, 28]), (4, "0.2", [4, 8, 13, 17, 22, 26]),
                             (2, "0.5", odd + [27, 28]), (4, "0.5", odd + [26])):
        kept, adapter = fedbiot.layer_extract(32, s, Fraction(beta))
        assert adapter == list(range(32 - s, 32)) and sorted(set(range(32 - s)) - set(kept)) == dropped, (s, beta, kept)


def test_layer_extract_is_exact_where_floats_lose_a_layer():
    # kills: int(j * ((n-s-1) / (n'-1))); int((1 - float(beta)) * (n - s))
    for total in range(1, 60):
        for kept in range(1, total + 1):
            by_fractions = [math.floor(j * Fraction(total - 1, kept - 1)) for j in range(kept)] if kept > 1 else [0]
            assert fedbiot.spread(total, kept) == by_fractions
            assert fedbiot.layer_extract(total + 3, 3, 1 - Fraction(kept, total))[0] == by_fractions
    assert fedbiot.spread(16, 14)[-1] == 15 and len(fedbiot.layer_extract(32, 2, Fraction("0.8"))[0]) == 6
    assert fedbiot.layer_extract(5, 2, Fraction(0)) == ([0, 1, 2], [3, 4])
    assert fedbiot.layer_extract(5, 1, Fraction("0.7")) == ([0], [4])


def test_layer_extract_refuses_what_leaves_no_emulator_or_no_adapter():
    # kills: s >= 0; s <= n; beta <= 1; kept == 0 let through
    for n, s, beta, word in ((5, 0, "0.2", "1..4"), (5, 5, "0.2", "1..4"), (5, -1, "0", "1..4"), (5, 2, "1", "[0, 1)"),
                             (5, 2, "-0.1", "[0, 1)"), (5, 2, "0.7", "no layer"), (5, 4, "0.01", "no layer")):
        refused(lambda: fedbiot.layer_extract(n, s, Fraction(beta)), word)


# ---- LoRA ---------------------------------------------------------------------------------------

def noisy_lora(lm: LM, seed=0, std=0.1) -> LM:
    """LoRA as after training: every A and B holds something."""
    g = torch.Generator().manual_seed(seed)
    for p in lora.lora_tensors(lm).values():
        with torch.no_grad():
            p.add_(torch.randn(p.shape, generator=g) * std)
    return lm


def with_lora(lm: LM, seed=0, rank=4, alpha=16.0) -> LM:
    return lora.add_lora(lm, rank, alpha, torch.Generator().manual_seed(seed)).requires_grad_(False)


def test_lora_is_identity_at_init():
    # kills: B of ones; another bound for A
    for dtype in (torch.float32, torch.bfloat16):
        lm, tokens = tiny_lm().to(dtype), random_tokens(2, 9)
        twin = with_lora(lm)
        assert torch.equal(twin(tokens), lm(tokens))
        A = torch.cat([p.flatten() for n, p in lora.lora_tensors(twin).items() if n.endswith("A")])
        bound = 1 / math.sqrt(48)                   # Kaiming-uniform(sqrt 5): +- sqrt(6 / (1 + 5) / d_in)
        assert 0.99 * bound < A.abs().max() <= bound and abs(A.std() - bound / math.sqrt(3)) < 0.05 * bound
    asserts(lambda: np.testing.assert_array_equal(*[list(lora.lora_tensors(with_lora(lm, s)).values())[0] for s in (0, 1)]))


def test_lora_adds_its_scaled_product_to_wq_and_wv():
    # kills: scale forgotten; alpha * rank; wk instead of wv
    lm = noisy_lora(with_lora(tiny_lm()))
    kinds = Counter(n.split(".", 2)[2] for n in lora.lora_tensors(lm))
    assert kinds == {f"attention.{w}.lora_{m}": 5 for w in ("wq", "wv") for m in "AB"}
    tokens = random_tokens(1, 12)
    assert off(lm(tokens)[0], slow_logits(lm, tokens[0].tolist())) < 3e-6
    assert off(lm(tokens), tiny_lm()(tokens)) > 0.05, "the case must feel its LoRA"


def test_lora_shares_every_frozen_tensor():
    # kills: clone of W
    lm = tiny_lm()
    twin = with_lora(lm)
    frozen = {n: p for n, p in twin.named_parameters() if ".lora_" not in n}
    assert {n: p.data_ptr() for n, p in frozen.items()} == {n: p.data_ptr() for n, p in lm.named_parameters()}
    assert not any(".lora_" in n for n, _ in lm.named_parameters()), "the model itself must stay as it is"


def test_lora_over_bf16_trains_in_fp32_and_only_itself():
    # kills: lora in the base's dtype; W left trainable
    lm = lora.add_lora(tiny_lm().to(torch.bfloat16), 4, 16.0, torch.Generator())
    assert {n for n, p in lm.named_parameters() if p.requires_grad} == set(lora.lora_tensors(lm))
    noisy_lora(lm)(random_tokens(1, 6)).float().square().mean().backward()
    for name, p in lora.lora_tensors(lm).items():
        assert p.dtype == torch.float32 and p.grad.abs().max() > 0, name


def test_lora_is_loaded_strictly():
    # kills: keys not compared; broadcasting copy_
    own = lora.lora_tensors(with_lora(tiny_lm()))
    other = {n: random(*p.shape) for n, p in own.items()}
    lora.copy_into(own, other)
    assert same({n: p.data for n, p in own.items()}, other)
    name = next(iter(own))
    for wrong in ({n: t for n, t in other.items() if n != name}, other | {"layers.9.attention.wq.lora_A": other[name]},
                  other | {name: other[name][:, :1]}, other | {name: torch.zeros(1, 1)}):
        asserts(lambda: lora.copy_into(own, wrong))


# ---- losses -------------------------------------------------------------------------------------

def true_ce(h, W, y, w):
    return (w.double() * F.cross_entropy(h @ W.T, y, reduction="none")).sum()


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
    W, w = random(V, D, seed=3, std=0.25), torch.rand(N, generator=torch.Generator().manual_seed(4)) / N
    w[::5] = 0
    return h.to(dtype), h_t.to(dtype), W.to(dtype), random_tokens(N, seed=5, vocab=V), w


def test_fused_cross_entropy_matches_float64_value_and_gradient():
    # kills: one-hot not subtracted; weight left out of dh; max p dropped from lse
    for dtype, value_error, error in ((torch.float32, 1e-6, 2e-6), (torch.bfloat16, 1e-3, 5e-3)):
        for size in (1.0, 12.0) if dtype == torch.float32 else (1.0,):
            h, _, W, y, w = loss_case(dtype, size=size)
            found, g = value_and_gradient(fedbiot.linear_cross_entropy, h, W, y, w)
            expected, true = value_and_gradient(true_ce, h.double(), W.double(), y, w)
            assert found.dtype == torch.float32 and g.dtype == dtype and found.shape == ()
            assert off(found, expected) < value_error and off(g, true) < error, (dtype, size, off(g, true))


def test_fused_kl_matches_float64_value_and_gradient():
    # kills: gradient's sign; student's p in the sum; logits made apart (bf16: noise at 1e-5); fp32: p_s - p_t by
    # subtraction (1e-5 at a KL of 1e-4, 1e-4 at 1e-5); c not corrected by the rows' sums
    for dtype in (torch.float32, torch.bfloat16):
        for apart, low, high in ((2e-3, 3e-6, 3e-5), (3e-2, 1e-4, 1e-1), (0.5, 1e-2, 5), (30.0, 40, 1e4)):
            error = (5e-2 if apart > 1 else 2e-2) if dtype == torch.bfloat16 else 1e-5 if apart > 1 else 2e-6
            h, h_t, W, _, w = loss_case(dtype, apart, size=20.0 if apart > 1 else 1.0)
            found, g = value_and_gradient(fedbiot.linear_kl, h, h_t, W, w)
            expected, true = value_and_gradient(true_kl, h.double(), h_t.double(), W.double(), w)
            assert low < expected / w.sum() < high, (dtype, apart, expected / w.sum())
            bound = error * expected + (2e-7 if dtype == torch.bfloat16 else 1e-10) * w.sum()   # lse's last digit
            assert found.dtype == torch.float32 and abs(found - expected) <= bound, (dtype, apart, found, expected)
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
            value, found = value_and_gradient(both_losses, h[:n] * math.inf, h_t[:n], W, y[:n], keep)
            assert value == 0 and found.shape == (n, 64) and (found == 0).all()


def test_losses_do_not_depend_on_the_chunks():
    # kills: last short chunk skipped; loss of the last chunk only
    h, h_t, W, y, w = loss_case(torch.float32)
    whole, g = value_and_gradient(both_losses, h, h_t, W, y, w)
    for size in (1, 7, 95, 96, 97):
        with patch.object(fedbiot, "chunks", lambda h, W: [slice(a, a + size) for a in range(0, len(h), size)]):
            value, found = value_and_gradient(both_losses, h, h_t, W, y, w)
        assert off(value, whole) < 1e-6 and off(found, g) < 1e-6, size
    for N, V in ((0, 7), (1, 32000), (262, 32000), (263, 32000), (1000, 32000), (5, 10**9)):
        slices = fedbiot.chunks(torch.empty(N, 1), torch.empty(V, 1, device="meta"))
        assert [i for s in slices for i in range(s.start, s.stop)] == list(range(N))
        assert all((s.stop - s.start) * V * 4 <= 2**25 or s.stop - s.start <= 32 for s in slices)


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


def test_losses_compile_into_one_graph():
    # kills: .item() in a loss
    case = loss_case(torch.float32)
    compiled = torch.compile(both_losses, fullgraph=True, backend="aot_eager")
    (value, g), (expected, true) = (value_and_gradient(f, *case) for f in (compiled, both_losses))
    assert off(value, expected) < 1e-6 and off(g, true) < 1e-6


def proximal_case(delta, pairs=3):
    """(B, A, B0, A0): what training moved by `delta` from what was broadcast; B0 is not zero."""
    out = []
    for i in range(pairs):
        B0, A0 = random(40, 4, seed=i, std=0.1), random(4, 48, seed=9 + i, std=0.1)
        out.append((B0 + delta * random(40, 4, seed=20 + i), A0 + delta * random(4, 48, seed=30 + i), B0, A0))
    return out


def test_proximal_matches_the_dense_matrices_value_and_gradient():
    # kills: scale not squared; three-term expansion in fp32 (useless at 1e-6); sign of A - A0
    for delta, error in ((1.0, 1e-5), (1e-2, 1e-5), (1e-6, 1e-5)):
        pairs = [tuple(t.requires_grad_(i < 2) for i, t in enumerate(p)) for p in proximal_case(delta)]
        wide = [tuple(t.detach().double().requires_grad_(i < 2) for i, t in enumerate(p)) for p in pairs]
        value = fedbiot.proximal(pairs, 2.5)
        true = sum((2.5 * (B @ A - B0 @ A0)).pow(2).sum() for B, A, B0, A0 in wide)
        value.backward()
        true.backward()
        assert value.dtype == torch.float32 and off(value.detach(), true.detach()) < error, delta
        for narrow, exact in zip(pairs, wide):
            assert off([t.grad for t in narrow[:2]], [t.grad for t in exact[:2]]) < error, delta


def test_proximal_is_zero_at_the_start_and_has_a_gradient_once_moved():
    # kills: detached tensors (the authors' code: no gradient at all)
    pairs = [tuple(t.requires_grad_(i < 2) for i, t in enumerate(p)) for p in proximal_case(0.0)]
    value = fedbiot.proximal(pairs, 2.0)
    value.backward()
    assert value == 0 and all((t.grad == 0).all() for p in pairs for t in p[:2])
    moved = [tuple(t.detach().requires_grad_(i < 2) for i, t in enumerate(p)) for p in proximal_case(1e-3)]
    fedbiot.proximal(moved, 2.0).backward()
    assert all(t.grad.abs().max() > 0 for p in moved for t in p[:2])


# ---- data ---------------------------------------------------------------------------------------

def tokenizer():
    return model.Tokenizer(BUNDLED_TOKENIZER)


def toy_examples(n=40, seed=0, longest=30, vocab=97):
    """Examples of many lengths; the first token after BOS tells which one it is (n <= 90)."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(6, longest, n)
    return [data.Example([1, 3 + i % 94] + rng.integers(3, vocab, k - 3).tolist() + [2], int(rng.integers(2, k - 1)))
            for i, k in enumerate(lengths)]


ROWS = [data.Row("Add 1 and 2.", "", "1+2=3\nThe answer is 3"), data.Row("Translate.", "un deux", "one two"),
        data.Row("Odd: é ﷺ \t𝔘", "", "  ünï\n\n "), data.Row("Say nothing.", "", ""), data.Row("</s> <s>", "", "</s>x<s>")]


def test_prompts_are_alpacas():
    # kills: one more space
    assert data.prompt_of("Do it.") == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\nDo it.\n\n### Response:")
    assert data.prompt_of("Do it.", "With this.") == (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.\n\n### Instruction:\nDo it.\n\n### Input:\nWith this.\n\n"
        "### Response:")


def test_examples_are_bos_prompt_answer_eos():
    # kills: BOS twice; no EOS; answer off by one
    t = tokenizer()
    for row, example in zip(ROWS, data.Examples(ROWS, t, 999, "rows")):
        prompt = t.encode(data.prompt_of(row.instruction, row.input))
        assert example.ids[:example.answer] == [t.bos] + prompt, "what evaluation will feed the model"
        assert (example.ids.count(t.bos), example.ids.count(t.eos), example.ids[-1]) == (1, 1, t.eos)
        assert t.decode(example.ids[example.answer:-1]) == row.output
        assert t.decode(prompt) == data.prompt_of(row.instruction, row.input)


def test_masks_are_right_at_the_token_level():
    # kills: rows one late; N not padded; padding rows weighted
    examples = list(data.Examples(ROWS, tokenizer(), 999, "rows"))
    batch = data.collate(examples)
    width, real = batch.tokens.shape[1], batch.weights > 0
    wanted = [(b, t) for b, e in enumerate(examples) for t in range(e.answer, len(e.ids))]
    found = [(r // width, r % width + 1) for r in batch.rows[real].tolist()]
    assert found == wanted, "each answer token, EOS included, is predicted once, from the position before it"
    assert batch.targets[real].tolist() == [examples[b].ids[t] for b, t in wanted]
    for row, e in zip(batch.tokens, examples):
        assert row[:len(e.ids) - 1].tolist() == e.ids[:-1]
    assert width == max(len(e.ids) for e in examples) - 1
    assert len(batch.rows) % 128 == 0 and len(batch.rows) == len(batch.targets) == len(batch.weights)
    assert torch.allclose(batch.weights[real], torch.tensor(1 / len(wanted))) and (batch.weights[~real] == 0).all()
    assert batch.weights.dtype == torch.float32 and batch.rows.max() < batch.tokens.numel()


def test_truncation_keeps_a_target_and_drops_with_a_count_what_would_have_none():
    # kills: fits with <=; a shortcut that lets too much through; count not printed
    t = tokenizer()
    row = data.Row("Add 1 and 2, é.", "", "The answer is 3, and then a little more of it")
    start = len(data.Examples([row], t, 999, "x")[0].ids[:data.Examples([row], t, 999, "x")[0].answer])
    for extra in (1, 2, 5):
        cut = data.Examples([row], t, start + extra, "x")[0]
        assert len(cut.ids) == start + extra and cut.answer == start and len(data.collate([cut]).weights) == 128
    short, noise = data.Row("A", "", "b"), io.StringIO()
    with contextlib.redirect_stderr(noise):
        kept = data.Examples([row, short, row], t, start, "the set")
    assert len(kept) == 1 and kept.rows[0] == short and "the set: 2 of 3" in noise.getvalue()
    refused(lambda: data.Examples([row], t, start, "the set"), "the set", f"--max-len {start}")
    refused(lambda: data.Examples([], t, 999, "the set"), "the set", "no rows")
    for text, input in (("é" * 300, ""), ("ﷺ" * 9, "é" * 90), ("abc " * 9, "\u0301x"), ("", "")):
        examples, odd = data.Examples([short], t, 999, "x"), data.Row(text, input, "x")
        n, fitting = len(t.encode(data.prompt_of(text, input))) + 1, []
        for examples.max_len in range(10, 600):             # the shortcut by bytes agrees with tokenising
            fitting += [examples.max_len] if examples.fits(odd) else []
        assert fitting == list(range(max(n + 1, 10), 600)), (text, n)


def test_partition_is_iid_without_labels_and_by_label_with_them():
    # kills: array_split of unshuffled rows; smallest label lost; largest not split
    parts = data.partition([""] * 7473, 3, 0)
    assert [len(p) for p in parts] == [2491] * 3 and sorted(sum(parts, [])) == list(range(7473))
    assert abs(np.mean(parts[0]) - 3736) < 200, "i.i.d., not consecutive"
    assert [len(p) for p in data.partition([""] * 11, 4, 0)] == [3, 3, 3, 2]
    assert parts == data.partition([""] * 7473, 3, 0) != data.partition([""] * 7473, 3, 1)
    labels = [c for c, n in (("a", 10), ("b", 7), ("c", 2), ("d", 1)) for _ in range(n)]
    for clients, expected in ((4, ["a" * 10, "b" * 7, "cc", "d"]), (3, ["a" * 10, "b" * 7, "ccd"]),
                              (5, ["aaaaa", "aaaaa", "b" * 7, "cc", "d"]), (1, ["a" * 10 + "b" * 7 + "ccd"])):
        with contextlib.redirect_stderr(io.StringIO()) as noise:
            parts = data.partition(labels, clients, 0)
        assert sorted("".join(sorted(labels[i] for i in p)) for p in parts) == sorted(expected), clients
        assert sorted(sum(parts, [])) == list(range(20)) and ("4 labels" in noise.getvalue()) == (clients < 4)
    for clients in (0, 21):
        refused(lambda: data.partition(labels, clients, 0), f"--clients {clients}", "1..20")


def drawn(shard, *args):
    return [tuple(row[1].item() - 3 for row in b.tokens) for b in shard.batches(*args)]


def test_batches_depend_only_on_their_key():
    # kills: global generator; key without the round; key without the client
    examples = toy_examples()
    shard, twin = (data.Shard(examples, list(range(5, 25))) for _ in range(2))
    before = drawn(shard, 7, 4, (0, 3, 1))
    torch.manual_seed(5), np.random.seed(5), drawn(shard, 3, 4, (0, 3, 2))
    assert before == drawn(shard, 7, 4, (0, 3, 1)) == drawn(twin, 7, 4, (0, 3, 1))
    others = [drawn(shard, 7, 4, key) for key in ((0, 3, 2), (0, 4, 1), (1, 3, 1), (3, 0, 1))]
    assert all(other != before for other in others)


def test_batches_pass_over_all_examples_in_windows_of_like_length():
    # kills: drawn with replacement; not sorted; batches in order of length; a window of several passes; steps 0 an error
    examples = toy_examples(90, longest=120)
    shard = data.Shard(examples, list(range(10, 90)))
    batches = drawn(shard, 40, 4, (0, 0, 0))
    assert [len(b) for b in batches] == [4] * 40 and Counter(sum(batches, ())) == dict.fromkeys(range(10, 90), 2)
    assert Counter(sum(batches[:20], ())) == dict.fromkeys(range(10, 90), 1)

    def padding(batches):
        return sum(max(len(examples[i].ids) for i in b) * len(b) - sum(len(examples[i].ids) for i in b) for b in batches)
    plain = np.random.default_rng(0).permutation(range(10, 90)).reshape(20, 4).tolist()
    assert padding(batches[:20]) < 0.4 * padding(plain)
    widths = [max(len(examples[i].ids) for i in b) for b in batches[:10]]
    assert widths != sorted(widths) and widths != sorted(widths, reverse=True), "short ones first would be a curriculum"
    small = data.Shard(examples, [3, 4, 5])
    assert [sorted(b) for b in drawn(small, 4, 10, (0, 0, 0))] == [[3, 4, 5]] * 4
    assert drawn(small, 0, 10, (0, 0, 0)) == []


def gsm8k_folder(path: Path, train_rows=30, test_rows=4) -> Path:
    """Data in the official formats, a few rows of each."""
    for name, rows in (("train", train_rows), ("test", test_rows)):
        (path / "gsm8k").mkdir(parents=True, exist_ok=True)
        lines = [json.dumps({"question": f"What is {i} and {i}?", "answer": f"{i}+{i}=<<{i}+{i}={2 * i}>>{2 * i}\n#### {2 * i}"})
                 for i in range(rows)]
        (path / "gsm8k" / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    (path / "alpaca").mkdir(exist_ok=True)
    public = [{"instruction": f"Repeat {i}.", "input": "twice" * (i % 2), "output": f"{i} {i}"} for i in range(25)]
    (path / "alpaca" / "alpaca_data.json").write_text(json.dumps(public))
    return path


def test_official_files_become_rows():
    # kills: #### kept
    with folder() as path:
        gsm8k_folder(path)
        assert data.read_gsm8k(path)[3] == ("What is 3 and 3?", "", "3+3=<<3+3=6>>6\nThe answer is 6", "")
        assert len(data.read_gsm8k(path)) == 30 and len(data.read_gsm8k(path, "test")) == 4
        assert data.read_alpaca(path)[1] == ("Repeat 1.", "twice", "1 1", "")
        shards = data.make_shards("gsm8k", path, tokenizer(), 3, 512, 0)
        assert [len(s) for s in shards] == [10] * 3 and len(data.make_public(path, tokenizer(), 512)) == 25


def test_malformed_data_names_the_file_and_the_line():
    # kills: blank lines not counted; fields unchecked
    with folder() as path:
        gsm8k_folder(path)
        good = '{"question": "q", "answer": "#### 1"}\n'
        for text, *words in ((good + "\n" + '{"question": \n' + good, "train.jsonl, line 3"), (good + "3\n", "line 2", "int"),
                             (good * 4 + '{"question": "q"}', "row 5", "'answer'"),
                             (good + '{"question": "q", "answer": 1}', "row 2", "'answer'"),
                             ("", "no rows"), ("\n\n", "no rows"), ("[" * 10**6, "line 1"), (b"\xff\xfe{", "UTF-8")):
            (path / "gsm8k" / "train.jsonl").write_bytes(text if isinstance(text, bytes) else text.encode())
            refused(lambda: data.make_shards("gsm8k", path, tokenizer(), 1, 512, 0),
                    *words, *(["train.jsonl"] if words != ["no rows"] else []))
        for text, *words in (("{}", "array"), ("[1]", "row 1"), ("[", "malformed"), ("[{}]", "'instruction'"),
                             ("[]", "no rows")):
            (path / "alpaca" / "alpaca_data.json").write_text(text)
            refused(lambda: data.make_public(path, tokenizer(), 512), *words)
        (path / "x.jsonl.gz").write_bytes(b"\x1f\x8b\x08junk")
        refused(lambda: data.read_rows(path / "x.jsonl.gz"), "x.jsonl.gz")


def test_missing_files_are_fetched_once_checked_and_renamed():
    # kills: checksum not compared; rows not counted; written in place; the user's own file replaced
    name, content = "gsm8k/train.jsonl", b'{"question": "q", "answer": "#### 1"}\n'
    sha = __import__("hashlib").sha256(content).hexdigest()
    with folder() as path:
        (path / "origin").write_bytes(content)
        url = (path / "origin").as_uri()
        for check in (sha, 1, None):
            with patch.dict(data.SOURCES, {name: (url, check)}), folder() as target, contextlib.redirect_stderr(io.StringIO()):
                assert data.find_file(target, name).read_bytes() == content
                assert [p.name for p in (target / "gsm8k").iterdir()] == ["train.jsonl"]
        for check, word in (("0" * 64, "sha256"), (7, "rows: 7")):
            with patch.dict(data.SOURCES, {name: (url, check)}), folder() as target:
                refused(lambda: data.find_file(target, name), word, url)
                assert list((target / "gsm8k").iterdir()) == []
                (target / name).write_text("mine")                  # what the user placed is used as it is
                assert data.find_file(target, name).read_text() == "mine"
        dead = "http://127.0.0.1:9/train.jsonl"                     # the discard port: refused at once, no network
        with patch.dict(data.SOURCES, {name: (dead, sha)}), folder() as target:
            refused(lambda: data.find_file(target, name), dead, target / name)
        refused(lambda: data.find_file(path, "helm_qa/none.jsonl"), path / "helm_qa/none.jsonl")


# ---- evaluation ---------------------------------------------------------------------------------

def test_answers_are_extracted_by_the_papers_rules():
    # kills: last number after a marker; marker without a number falls back; commas split; every hyphen a sign
    for text, number in (("The answer is 18", "18"), ("So 3 and 4. The answer is 18. Then 5", "18"), ("#### 18.0", "18"),
                         ("#### 7\nThe answer is 8", "7"), ("The answer is 8 #### 7", "8"), ("The answer is unclear", None),
                         ("5 apples. The answer is", None), ("3 and then 4", "4"), ("no number", None), ("", None),
                         ("The answer is $1,234.50.", "1234.5"), ("The answer is 1,234,567", "1234567"), ("it is 42%", "42"),
                         ("The answer is -5", "-5"), ("The answer is -$5", "-5"), ("The answer is $-5", "-5"),
                         ("660-36=624", "624"), ("5-3", "3"), ("The answer is: \n 7 km", "7"), ("The answer is 1, 2", "1"),
                         ("The answer is 0.10", "0.1"), ("The answer is .5", "0.5"), ("The answer is -.5", "-0.5"),
                         ("#### 12345678901234567890.10", "12345678901234567890.1"), ("x2 costs 3.", "3"), ("####18", "18")):
        found = evaluation.extract_number(text)
        assert found == (None if number is None else Decimal(number)), (text, found)


def test_numbers_are_compared_as_numbers_and_a_missing_one_is_wrong():
    # kills: string comparison; None == None counts
    D = Decimal
    assert evaluation.accuracy([D("18.0"), None, None, D(3)], [D(18), D(1), None, D(4)]) == {
        "correct": 1, "total": 4, "accuracy": 0.25}


def test_a_file_of_predictions_is_scored_by_its_indices():
    # kills: indices ignored; duplicates let through
    with folder() as path:
        gsm8k_folder(path)
        file = path / "p.jsonl"

        def score(*rows):
            file.write_text("\n".join(json.dumps(r) for r in rows))
            return evaluation.score_gsm8k_predictions(file, path)
        assert score({"index": 3, "text": "The answer is 6.0"}, {"index": 1, "text": "it is 3"}, {"index": 2, "text": "4"}) == {
            "correct": 2, "total": 3, "accuracy": 2 / 3}
        for bad in ({"index": 4, "text": ""}, {"index": -1, "text": ""}, {"text": "1"}, {"index": True, "text": "1"}):
            refused(lambda: score({"index": 0, "text": "0"}, bad), "row 2", "0..3")
        refused(lambda: score({"index": 0, "text": "0"}, {"index": 0, "text": "0"}), "row 2", "once")
        refused(lambda: score({"index": 0}), "'text'")


def test_worked_examples_are_eight_and_end_as_the_extraction_wants():
    # kills: #### left in
    for shots in (0, 1, 8):
        text = evaluation.gsm8k_shots(shots)
        assert text.count("Q: ") == text.count("\nA: ") == len(re.findall(r"The answer is \d+\.\n\n", text)) == shots
        assert "####" not in text
    refused(lambda: evaluation.gsm8k_shots(9), "--shots 9", "0..8")


def test_scoring_a_model_prompts_like_training_and_counts_by_hand():
    # kills: prompt without BOS
    t, lm = tokenizer(), tiny_lm(vocab_size=1024)
    with folder() as path:
        gsm8k_folder(path, test_rows=6)
        opts = evaluation.parse_args(["--data-dir", str(path), "--limit", "5", "--batch-size", "2",
                                      "--max-new-tokens", "7", "--shots", "0"])
        seen = []

        def fake(lm, ids, new, eos, size, **_):
            seen.extend(ids)
            assert (new, eos, size) == (7, t.eos, 2)
            return [t.encode(f"The answer is {2 * i if i != 3 else 5}") for i in range(len(ids))]
        with patch.object(evaluation, "generate", fake):
            assert evaluation.evaluate(lm, t, "gsm8k", opts) == {"correct": 4, "total": 5, "accuracy": 0.8}
        assert seen == [[t.bos] + t.encode(data.prompt_of(f"What is {i} and {i}?")) for i in range(5)]
        assert evaluation.evaluate(lm, t, "gsm8k", opts)["total"] == 5


# ---- question answering -------------------------------------------------------------------------

def helm_folder(path: Path, only="") -> Path:
    """All eight scenarios in their official formats, a few rows each, written out by hand."""
    def lines(rows):
        return "".join(json.dumps(row) + "\n" for row in rows).encode()
    mmlu = ["1+1?,1,2,3,4,B", '"Which, of these?","a, b",c,d,e,A', "2+2?,1,2,3,4,D"]
    story = {"context.tokens": "Ann did n't go ( yet ) .", "question.tokens": "Who did n't go ?",
             "ground_truths": ["Ann .", "ann 's"]}
    turns = [{"question": f"Q{i}?", "orig_answer": {"text": t}, "answers": [{"text": t}, {"text": "x"}]}
             for i, t in enumerate(["one", "CANNOTANSWER", "three"])]
    quac = {"data": [{"title": "T", "section_title": "S", "background": "",
                      "paragraphs": [{"context": "It is so. CANNOTANSWER", "qas": turns}]}]}
    zipped = io.BytesIO()
    with zipfile.ZipFile(zipped, "w") as archive:
        archive.writestr("test.json", json.dumps([story] * 3))
    table = "ID\tQuestion Stem\tChoices\tComplete Question\tAnswer Key\n" + "".join(
        f'1-{i}\t"Cows" eat what\t(A) grass (B) red meat (C) tin (D) air\t-\t{letter}\n' for i, letter in enumerate("AB"))
    opened = {"question": "who", "answers": ["Ann"], "ctxs": [{"title": "t", "text": "Ann did."}]}
    golf = {"activity_label": "Golf", "ctx_a": "He swings.", "ctx_b": "then he",
            "endings": ["runs.", "eats it all.", "sits", "stands up"]}
    files = {"mmlu/test/hard_logic_test.csv": "\n".join(mmlu).encode(), "mmlu/test/zoo_test.csv": b"3+3?,6,7,8,9,A\n",
             "mmlu/dev/hard_logic_dev.csv": "".join(f"{i}?,1,2,3,4,C\n" for i in range(7)).encode(),
             "boolq/val.jsonl": lines({"question": f"is it {i}", "passage": f"P{i}", "label": label}
                                      for i, label in enumerate([True, "false", "true", False] * 3)),
             "narrativeqa/test.json.zip": zipped.getvalue(),
             "nq_open/NQ-open.dev.jsonl": lines([{"question": "who", "answer": ["Ann", "Bob"]}] * 2),
             "nq_open/nq-open-oracle.jsonl.gz": gzip.compress(lines([opened] * 2)),
             "quac/quac_sample.json": json.dumps(quac).encode(), "quac/train_v0.2.json": b"not read",
             "hellaswag/hellaswag_val.jsonl": lines(golf | {"label": n} for n in (2, 0, "1")),
             "openbookqa/test.tsv": table.encode()}
    for name, content in files.items():
        if name.startswith(only):
            (path / "helm_qa" / name).parent.mkdir(parents=True, exist_ok=True)
            (path / "helm_qa" / name).write_bytes(content)
    return path


def qa_opts(path, **changes):
    return SimpleNamespace(**{"data_dir": path, "limit": 0, "shots": 0, "batch_size": 64, "max_new_tokens": 2,
                              "validate": 0} | changes)


def quiet(call, *args):
    with contextlib.redirect_stderr(io.StringIO()):
        return call(*args)


def test_answers_are_normalised_as_helm_does():
    # kills: articles removed before punctuation; articles inside words; spaces left double; case kept
    for text, expected in (("  The  Cat's,\tA\nhat! ", "cats hat"), ("the-end", "theend"), ("A.", ""),
                           ("Theatre an", "theatre"), ("$5.00", "500"), ("naïve", "naïve")):
        assert qa.normalised(text) == expected, (text, qa.normalised(text))


def test_metrics_equal_arithmetic_by_hand():
    # kills: exact match that normalises; F1 over multisets, or recall alone; the first reference instead of the best
    for metric, gold, text, expected in (
            ("exact match", " B", "B ", 1), ("exact match", "B", "b", 0), ("exact match", "B", "B.", 0),
            ("quasi-exact match", "Yes", " yes.", 1), ("quasi-exact match", "Yes", "yes it is", 0),
            ("F1", "red red fish", "the red bird sings", Fraction(2, 5)),    # {red fish}, {red bird sings}: P 1/3, R 1/2
            ("F1", "a b c d", "b", Fraction(1, 2)),                          # {b c d}, {b}: P 1, R 1/3
            ("F1", "x", "y", 0), ("F1", "the", "", 0)):
        assert math.isclose(qa.agreement(metric, gold, text), expected), (metric, gold, text)
    question = qa.Question("?", "", ["no", "a dog", "big dog"])
    found = qa.scored("quac", [question] * 3, ["\n Dog\nbecause", "", "a big, big fish"])
    assert found == {"metric": "F1", "score": (1 + 0 + 0.5) / 3, "total": 3}, found


def test_official_files_become_helms_questions():
    # kills: labels swapped; the header scored; the training file read; an answer in its own passage
    with folder() as path:
        found = qa.read_scenarios(helm_folder(path))
        assert {name: len(q) for name, q in found.items()} == {
            "mmlu": 4, "boolq": 12, "narrativeqa": 3, "naturalquestions_closed": 2, "naturalquestions_open": 2,
            "quac": 3, "hellaswag": 3, "openbookqa": 2}
        Q = qa.Question
        assert found["mmlu"][1] == Q("Which, of these?\nA. a, b\nB. c\nC. d\nD. e", "", ["A"], (), "hard logic")
        assert [q.answers for q in found["boolq"][:4]] == [["Yes"], ["No"], ["Yes"], ["No"]]
        assert found["boolq"][1][:2] == ("is it 1?", "P1")
        assert found["narrativeqa"][0] == Q("Who didn't go?", "Ann didn't go (yet).", ["Ann.", "ann's"])
        assert found["naturalquestions_closed"][0] == Q("who?", "", ["Ann", "Bob"])
        assert found["naturalquestions_open"][0] == Q("who?", "Ann did.", ["Ann"])
        assert found["quac"][1] == Q("Q1?", "Title: T\nSection: S\nIt is so.\nQuestion: Q0?\nAnswer: one",
                                     ["Not enough information", "x"])
        assert found["quac"][2].passage.endswith("\nQuestion: Q1?\nAnswer: Not enough information")
        assert found["hellaswag"][2][:3] == ("Golf: He swings. Then he", "", ["eats it all.", "B"])
        assert found["openbookqa"][1] == Q('"Cows" eat what', "", ["red meat", "B"],
                                           ("grass", "red meat", "tin", "air"))


def test_log_likelihoods_match_one_sequence_at_a_time():
    # kills: padding counted; rows off by one; results left in order of length; half of the sum
    lm, g = tiny_lm(), torch.Generator().manual_seed(1)
    examples = [data.Example(torch.randint(3, 97, (a + b,), generator=g).tolist(), a)
                for a, b in ((5, 3), (1, 9), (12, 1), (7, 7), (2, 2), (30, 4), (4, 1))]
    expected = []
    for ids, start in examples:
        logp = slow_logits(lm, ids[:-1]).log_softmax(-1)
        expected.append(sum(logp[t - 1, ids[t]].item() for t in range(start, len(ids))))
    for batch_size in (1, 3, 64):
        assert off(qa.log_likelihoods(lm, examples, batch_size, "x"), torch.tensor(expected)) < 1e-4


def test_options_are_chosen_per_token_or_calibrated():
    # kills: no division by the length; no calibration; one scenario's way used for the other; the least likely chosen
    lm, t = tiny_lm(vocab_size=1024), tokenizer()
    words = "red blue cold winter morning seven dogs run over the small green hill again".split()
    options = [tuple(" ".join(words[i:i + n]) for n in (1, 2, 5, 3)) for i in range(9)]
    questions = [qa.Question(f"What is {a} {b}?", "", ["x"], o) for a, b, o in zip(words, words[5:], options)]

    def logp(prompt, option):
        ids = [t.bos] + t.encode(prompt)
        answer = t.encode(option)
        rows = lm(torch.tensor([ids + answer]))[0].log_softmax(-1)[len(ids) - 1:-1]
        return rows.gather(1, torch.tensor(answer)[:, None]).sum().item(), len(answer)
    ways = {"hellaswag": lambda q, o: logp(q, o)[0] / logp(q, o)[1], "neither": lambda q, o: logp(q, o)[0],
            "openbookqa": lambda q, o: logp(q, o)[0] - logp("Answer:", o)[0]}
    best = {way: [max(q.options, key=lambda o: score(q.ask, o)) for q in questions] for way, score in ways.items()}
    assert best["hellaswag"] != best["neither"] != best["openbookqa"] != best["hellaswag"], "a case that tells them apart"
    for name in ("hellaswag", "openbookqa"):
        found = qa.choose_options(lm, t, name, questions, qa_opts("", shots=5, batch_size=7), "x")
        assert found == best[name], name


def test_prompts_are_the_template_or_helms():
    # kills: a sixth example; the test file's rows as MMLU's examples; examples beyond the window, or none within it
    t = tokenizer()
    with folder() as path:
        found = qa.read_scenarios(helm_folder(path))

        def prompt(name, i, shots, room=10):
            opts = qa_opts(path, shots=shots)
            q, shown = found[name][i], qa.worked_examples(name, found[name], opts)
            ids = qa.question_ids(q, shown[q.subject], opts, room, t)
            assert ids[0] == t.bos and t.bos not in ids[1:]
            return t.decode(ids[1:])
        assert prompt("boolq", 1, 0) == data.prompt_of("is it 1?", "P1")
        assert prompt("openbookqa", 1, 0) == data.prompt_of('"Cows" eat what')
        assert prompt("openbookqa", 1, 8) == '"Cows" eat what'
        block = "Question: {}?\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer:"
        head = "The following are multiple choice questions (with answers) about hard logic.\n\n"
        two = "".join(block.format(i) + " C\n\n" for i in range(2))
        assert prompt("mmlu", 2, 2) == head + two + block.format("2+2")
        assert prompt("mmlu", 2, 8).count("Answer: C\n") == 5
        assert prompt("mmlu", 3, 8).count("Question") == 1, "no dev file for zoo"
        full = prompt("boolq", 1, 8)
        assert full.startswith("Passage: P0\nQuestion: is it 0?\nAnswer: Yes\n\nPassage: P2\n") and full.count("Passage") == 6
        assert full.endswith("\n\nPassage: P1\nQuestion: is it 1?\nAnswer:")
        with patch.object(qa, "WINDOW", len(t.encode(full))):           # without BOS: one too few
            assert prompt("boolq", 1, 8, 0).count("Passage") == 5
        with patch.object(qa, "WINDOW", 3):
            assert prompt("boolq", 1, 8).count("Passage") == 1, "the question itself is never cut"


def test_generation_ends_behind_a_stop_piece():
    # kills: stop ignored
    lm, prompts = tiny_lm(), [random_tokens(n, seed=n).tolist() for n in (3, 9, 5, 7, 2)]
    free = model.generate(lm, prompts, 12, 1)
    stop = Counter(sum(free, [])).most_common(1)[0][0]
    cut = [ids[:ids.index(stop) + 1] if stop in ids else ids for ids in free]
    assert model.generate(lm, prompts, 12, 1, 3, stop=stop) == cut != free


def test_scenarios_are_scored_and_averaged():
    # kills: questions pooled, not scenarios averaged; a missing scenario as 0; examples scored; the first rows as --limit
    lm, t = tiny_lm(vocab_size=1024), tokenizer()
    with folder() as path, folder() as part, folder() as none:
        helm_folder(path)
        for shots, limit, totals in ((0, 0, [4, 12, 3, 2, 2, 3, 3, 2]), (8, 0, [4, 7, 2, 1, 1, 2, 3, 2]), (0, 2, [2] * 8)):
            found = quiet(evaluation.evaluate, lm, t, "dolly", qa_opts(path, shots=shots, limit=limit))
            scores = [s["score"] for s in found["scenarios"].values()]
            assert [s["total"] for s in found["scenarios"].values()] == totals and found["total"] == sum(totals)
            assert math.isclose(found["accuracy"], sum(scores) / 8)
            assert math.isclose(found["correct"], sum(n * s for n, s in zip(totals, scores)), abs_tol=1e-3)
        assert qa.spread(list(range(10)), 3) == [0, 3, 6]
        found = quiet(evaluation.evaluate, lm, t, "dolly", qa_opts(helm_folder(part, "boolq"), limit=3))
        assert found["scenarios"]["mmlu"] == {"metric": "exact match", "score": None, "total": 0} and found["total"] == 3
        assert found["accuracy"] == found["scenarios"]["boolq"]["score"]
        refused(lambda: evaluation.evaluate(lm, t, "dolly", qa_opts(none)), none / "helm_qa", "boolq/val.jsonl")


def test_predictions_of_all_scenarios_are_scored_by_their_indices():
    # kills: the row's number used as index; an index beyond the file; one given twice; an option's letter refused
    with folder() as path:
        helm_folder(path)

        def score(*rows):
            objects = [dict(zip(("scenario", "index", "text"), row)) for row in rows]
            (path / "p.jsonl").write_text("".join(json.dumps(o) + "\n" for o in objects))
            return quiet(qa.score_dolly_predictions, path / "p.jsonl", path)
        found = score(("mmlu", 2, "D"), ("mmlu", 1, "B"), ("hellaswag", 2, "B"), ("quac", 0, "one two three"),
                      ("openbookqa", 1, "red meat"))
        assert {n: s["score"] for n, s in found["scenarios"].items() if s["total"]} == {
            "mmlu": 0.5, "hellaswag": 1.0, "quac": 0.5, "openbookqa": 1.0}              # quac: P 1/3, R 1
        assert found["accuracy"] == 0.75 and found["correct"] == 3.5 and found["total"] == 5
        for row in (("mmlu", 4, "A"), ("mmlu", -1, "A"), ("mmlu", True, "A"), ("mmlu", "0", "A"), ("trivia", 0, "A"),
                    ("mmlu", 0, 7), ("mmlu", 0)):
            refused(lambda: score(("boolq", 0, "Yes"), row), path / "p.jsonl", "row 2")
        refused(lambda: score(("boolq", 0, "Yes"), ("boolq", 0, "No")), "row 2", "once")
        argv = ("--task", "dolly", "--predictions", path / "p.jsonl", "--data-dir", path)
        assert cli(*argv, main=evaluation.main)[0] == 2
        score(("boolq", 0, "Yes"))
        status, out, err = cli(*argv, main=evaluation.main)
        assert status == 0 and out.count("not run") == 7 and re.search(r"boolq +quasi-exact match +100.00% +1\n", out), out


def test_damaged_scenario_files_are_refused_by_name():
    # kills: an unreadable archive as a traceback; one unpacked without bound; a row of another format scored
    with folder() as path:
        helm_folder(path)
        root = path / "helm_qa"
        with patch.object(data, "LARGEST", 50):
            refused(lambda: data.read_rows(root / "narrativeqa/test.json.zip"), "test.json.zip", "unpacked")
        ending = {"activity_label": "a", "ctx_a": "", "ctx_b": "", "label": -1, "endings": ["a", "b", "c", "d"]}
        for name, content, *words in (
                ("narrativeqa/test.json.zip", b"PK\x03\x04 junk"), ("nq_open/nq-open-oracle.jsonl.gz", b"\x1f\x8b\x08junk"),
                ("mmlu/test/zoo_test.csv", b"1?,1,2,3,4,A\n2?,1,2,3,4,E\n", "row 2"),
                ("mmlu/test/zoo_test.csv", b"1?,1,2,A\n", "row 1"), ("boolq/val.jsonl", b'{"question": "q"}', "row 1"),
                ("openbookqa/test.tsv", b"ID\n1\tq\t(A) a (B) b\t-\tA\n", "row 2"),
                ("hellaswag/hellaswag_val.jsonl", json.dumps(ending).encode(), "row 1"),
                ("quac/quac_sample.json", b'{"data": 3}', "array"), ("quac/quac_sample.json", b"{", "malformed")):
            good = (root / name).read_bytes()
            (root / name).write_bytes(content)
            refused(lambda: qa.read_scenarios(path), root / name, *words)
            (root / name).write_bytes(good)


# ---- a model's programs -------------------------------------------------------------------------

ONE = {"task_id": "Python/0", "prompt": "def f():\n", "canonical_solution": "    return 1\n", "test": "assert f() == 1\n"}


def boxes() -> list:
    """Python's box in every isolation that works here."""
    kinds = [kind for kind in ("bwrap", "unshare") if shutil.which(kind)
             and not sandbox.run_sandboxed(["true"], {}, sandbox.Box(kind))[0]]
    if not kinds:
        raise Skip("neither bwrap nor unshare works here")
    return [humaneval.toolchain("python", [], None, kind, None) for kind in kinds]


def programs_in(folder: Path, name="") -> list[str]:
    """The command lines, with `name` in front, of all processes whose environment names a sandbox in the folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            line = (path / "cmdline").read_text(errors="replace")
            inside = f"HOME={folder}/fedbiot-sandbox".encode() in (path / "environ").read_bytes()
            found += [line] if inside and line.startswith(name) else []
    return found


def wait_for(condition, what: str, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"expected {what}"
        time.sleep(0.1)


def attack(body: str, *ways: str, seconds=30):
    """A hostile body of `f`, which returns 1 where it gets its way. It scores 0 in one of the `ways`; no process and
    no file is left, and the next program is scored as ever."""
    for box in boxes():
        with folder() as path, patch.object(tempfile, "tempdir", str(path)):
            verdict = humaneval.judge(ONE, "python", textwrap.indent(textwrap.dedent(body).strip("\n"), "    "), box, seconds)
            assert any(way in verdict for way in ways), f"{box.kind}: {verdict!r}, expected {ways}"
            assert not list(path.iterdir()) and not programs_in(path), (box.kind, "left behind")
            assert humaneval.judge(ONE, "python", ONE["canonical_solution"], box) == "passed", box.kind


def test_sandbox_stops_a_fork_bomb():
    # kills: prlimit without --nproc
    attack("""
        import os
        for n in range(400): os.posix_spawn('/bin/sleep', ['sleep', '60'], {})
        return 1""", "exit status 1")
    attack("""
        import os
        while True:
            try: os.fork()
            except OSError: pass""", "memory", "killed", "time", "processes", seconds=2)


def test_sandbox_stops_an_endless_loop_that_ignores_signals():
    # kills: timeout without -s KILL
    attack("""
        import signal
        for s in range(1, 64):
            try: signal.signal(s, signal.SIG_IGN)
            except (OSError, ValueError): pass
        while True: pass""", "killed", seconds=2)


def test_sandbox_stops_endless_output():
    # kills: watch without its look at the output
    attack("while True: print('passed ' * 1000)", "output")


def test_sandbox_stops_a_20_gb_allocation():
    # kills: prlimit without --as; watch without the sum over all processes
    attack("return len(bytearray(20 << 30)) > 0", "exit status 1")
    attack("""
        import os
        for _ in range(4): os.fork()
        block = b'x' * (200 << 20)
        return len(block) > 0""", "memory")


def test_sandbox_stops_a_program_that_fills_the_disk():
    # kills: watch without disk_use; prlimit without --fsize
    attack("""
        for i in range(10000): open(str(i), 'wb').write(bytes(30 << 20))
        return 1""", "files", seconds=120)
    attack("return open('big', 'wb').write(bytes(100 << 20)) > 0", "exit status 1")


def test_sandbox_outlives_a_program_that_kills_its_parent():
    # kills: no PID namespace
    attack(f"""
        import os
        if open('/proc/1/cmdline').read() == {Path("/proc/1/cmdline").read_text()!r}: return 1
        for pid in (os.getppid(), 1, -1):
            try: os.kill(pid, 9)
            except OSError: pass
        os._exit(0)""", "killed", "left", "exit status")


def test_sandbox_is_read_only_but_for_the_programs_own_folder():
    # kills: no --remount-ro / (as an ordinary user; under root the user id alone would hold)
    target = HERE / "evil"
    attack(f"""
        done = []
        for name in ('/', '/usr', '/tmp', '/dev', '/dev/shm', '/etc', '/var/tmp', '/home', '/root', '/old', '/proc/sys/kernel',
                     '..', {str(HERE)!r}, {tempfile.gettempdir()!r}):
            try: done.append(open(name + '/evil', 'w').write('x'))
            except OSError: pass
        open('mine', 'w').write('x')
        return len(done) > 0""", "exit status 1")
    assert not target.exists() and not Path("/tmp/evil").exists()


def test_sandbox_shows_none_of_the_users_files():
    # kills: more folders shown than the toolchain needs
    attack(f"""
        import os
        for name in ('/etc/shadow', '/etc/passwd', '~/.ssh', '~/.bashrc', '/old/etc', '/proc/1/root/etc/shadow', '/var', '/home',
                     {str(HERE / 'eval.py')!r}, {str(HERE / 'tiny')!r}):
            name = os.path.expanduser(name)
            try: return os.listdir(name) and 1
            except OSError: pass
            try: return open(name).read() and 1
            except OSError: pass
        return any(word in os.environ for word in ('USER', 'LOGNAME', 'SSH_AUTH_SOCK', 'TERM'))""", "exit status 1")


def test_sandbox_has_no_network():
    # kills: no network namespace
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as local:
        local.bind("\0fedbiot-" + str(os.getpid()))         # abstract: such a name is reachable without a file
        local.listen()
        attack(f"""
            import socket
            for family, name in ((socket.AF_INET, ('127.0.0.1', {server.getsockname()[1]})), (socket.AF_INET, ('1.1.1.1', 53)),
                                 (socket.AF_UNIX, '\\0fedbiot-{os.getpid()}')):
                try: return socket.socket(family).connect(name) is None
                except OSError: pass""", "exit status 1")


def test_sandbox_lets_no_daemon_live():
    # kills: no count of the processes after the program
    attack("""
        import os, time
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0: time.sleep(1000)
            os._exit(0)
        os.wait()
        return 1""", "left a process behind")


def test_nothing_stays_behind_where_the_harness_is_killed():
    # kills: folders removed by the harness alone; unshare without --pdeathsig
    script = ("import sys; sys.path.insert(0, sys.argv[1]); from tasks import sandbox\n"
              "with sandbox.scratch('tools'):\n"
              "    sandbox.run_sandboxed(['sleep', '1000'], {}, sandbox.Box(sys.argv[2]), 60)")
    for box, number in itertools.product(boxes(), (signal.SIGTERM, signal.SIGKILL)):
        with folder() as path:
            harness = subprocess.Popen([sys.executable, "-c", script, str(HERE), box.kind], env={**os.environ, "TMPDIR": str(path)})
            wait_for(lambda: programs_in(path, "sleep"), "a program that runs")
            harness.send_signal(number)
            assert harness.wait() == -number
            wait_for(lambda: not list(path.iterdir()) and not programs_in(path), f"nothing left ({box.kind}, {number})")


def test_sandbox_gives_no_rights():
    # kills: no chroot, in which user namespaces are refused
    if os.getuid() and "--disable-userns" not in subprocess.run(["bwrap", "--help"], capture_output=True, text=True).stdout:
        raise Skip("this bwrap cannot refuse user namespaces")
    attack("""
        import ctypes, re
        rights = re.findall('Cap(?:Eff|Prm|Bnd).([0-9a-f]+)', open('/proc/self/status').read())
        return any(int(right, 16) for right in rights) or ctypes.CDLL(None).unshare(0x10000000) == 0""", "exit status 1")


def test_a_program_cannot_say_that_it_passed():
    # kills: exit status 0 taken as a pass
    for end in ("raise SystemExit(0)", "os._exit(0)", "os.execv('/bin/true', ['true'])"):
        attack(f"import os\nprint('passed', 'OK', '1 passed', flush=True)\n{end}", "left before the end of its tests")
    attack("print(open('main.py').read()); return 1", "exit status 1")


def test_without_a_sandbox_programs_are_refused():
    # kills: unsafe by default
    with patch.object(shutil, "which", lambda name: None):
        refused(sandbox.make_box, "bwrap", "--unsafe-no-sandbox")
        with contextlib.redirect_stderr(io.StringIO()) as said:
            assert sandbox.make_box(unsafe=True).kind == "none" and "no sandbox" in said.getvalue()


def test_pass_at_k_is_the_share_of_draws_with_a_right_one():
    # kills: 1 - (1 - c/n)^k; C(n, k) with n - c in its place
    for n, c, k in itertools.product(range(1, 7), range(7), range(1, 7)):
        if c <= n and k <= n:
            draws = list(itertools.combinations([True] * c + [False] * (n - c), k))
            assert math.isclose(humaneval.pass_at_k(n, c, k), sum(map(any, draws)) / len(draws), abs_tol=1e-12), (n, c, k)


def test_completions_end_where_their_function_does():
    # kills: the last brace; braces in strings and comments; a comment at the margin; closing what is open
    cut = humaneval.truncate_completion
    body = "    x = '''\nnot the end\n'''\n# nor this\n    return x\n"
    assert cut(body + "\nprint(f())\n", "python") == body + "\n" and cut(body + "def g():\n    pass\n", "python") == body
    for lang in ("cpp", "go"):
        body = '    if (a) { s = "}}"; } // }\n    /* } */ c = \'}\';\n    return s;\n}'
        assert cut(body + "\nint main() { }\n", lang) == body + "\n", lang
        assert cut("    if (a) {\n    return 1;\n", lang) == "    if (a) {\n    return 1;\n", lang
    helper = "    return g(1)\n}\n\nfunc g(x int) int {\n    return x\n}"
    assert cut(helper + "\n\nfunc main() {\n}\n", "go") == helper + "\n"
    whole = "        return g();\n    }\n    int g() { return 1; }\n}"
    assert cut(whole + "\nclass Other { }\n", "java") == whole + "\n"
    assert cut("        return 1;\n    }\n    int g() {", "java") == "        return 1;\n    }\n}\n"
    assert cut("        while (true) {\n", "java") == "        while (true) {\n"


def test_go_imports_what_the_program_uses():
    # kills: the official list alone
    row = {"task_id": "Go/0", "import": 'import (\n    "math"\n)', "prompt": 'import (\n    "math"\n)\n// by math.Abs\nfunc F() int {\n',
           "test_setup": 'package main\n\nimport (\n    "testing"\n    "time"\n)\n', "test": "func TestF(t *testing.T) {\n}\n"}
    program = humaneval.program_of(row, "go", "    return strings.Count(s, t)\n}\n")
    assert re.findall(r'"(\S+)"', program) == ["testing", "strings"], program


def problems_and(path: Path, lines) -> Path:
    """A data folder with the problem ONE, and a file of predictions in it."""
    file = path / "humaneval_x" / "python" / "humaneval_python.jsonl.gz"
    file.parent.mkdir(parents=True)
    file.write_bytes(gzip.compress(json.dumps(ONE).encode()))
    (path / "samples.jsonl").write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))
    return path / "samples.jsonl"


def test_bundled_problems_refuse_a_constant_an_argument_and_what_is_left_out():
    # kills: six random cases alone, of which two problems expect 0 or false throughout
    found = {lang: humaneval.read_problems(evaluation.BUNDLED_DATA, lang) for lang in humaneval.LANGS.values()}
    for name, row in found["python"].items():
        def passes(body, row=row):
            try:
                exec(row["prompt"] + body + "\n" + row["test"], {})         # our own programs: no sandbox
                return True
            except (AssertionError, TypeError):
                return False
        first, right = re.search(r"\((\w+)", row["prompt"])[1], row["canonical_solution"]
        wrong = [first, f"bool({first})", f"len({first})", "None", *re.findall("== (.*)", row["test"])]
        wrong = [f"    return {body}\n" for body in wrong] + [
            body for word in ("True", "False") if (body := re.sub("if .*:", f"if {word}:", right)) != right]
        wrong += [right.replace(" % 10\n", "\n")] if "total % 10\n" in right else []
        if " and " in right and right.count("\n") == 1:            # less one of two conditions, where that makes a difference
            wrong += [f"    return {part}\n" for part in right.strip()[7:].split(" and ")
                      if any(eval(part) != eval(right.strip()[7:]) for n in range(41))]
        assert passes(right) and not any(map(passes, wrong)), name
        told = {lang: re.findall("[!=]= (\\w+)", found[lang][name.replace("Python", word)]["test"].lower())
                for word, lang in humaneval.LANGS.items()}
        assert told["cpp"] == told["go"] == told["java"] == told["python"], (name, told)


def test_canonical_solutions_pass_and_wrong_ones_fail():
    # kills: the last word before the tests (then no own solution passes); tests not joined to the program
    boxes()
    wrong = {"python": "    return None\n", "cpp": "    return {};\n}\n", "go": '    panic("wrong")\n}\n',
             "java": '        throw new RuntimeException("wrong");\n    }\n}\n'}
    with folder() as path:
        rows = []
        for word, lang in humaneval.LANGS.items():
            row = humaneval.read_problems(evaluation.BUNDLED_DATA, lang)[f"{word}/0"]
            rows += [{"task_id": row["task_id"], "generation": text} for text in (row["canonical_solution"], wrong[lang])]
        (path / "s.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        result = humaneval.score_code(path / "s.jsonl", evaluation.BUNDLED_DATA)
    ran = {lang: r for lang, r in result.items() if "not run" not in r}
    assert set(result) == set(humaneval.LANGS.values()) and "python" in ran
    assert not any("own solution" in r.get("not run", "") for r in result.values()), result
    assert all(r == {"problems": 1, "passed": 1, "samples": 2, "pass@1": 0.5} for r in ran.values()), result
    if len(ran) < 4:
        raise Skip("; ".join(f"{lang}: {r['not run']}" for lang, r in result.items() if "not run" in r))


def test_scoring_goes_on_where_it_was_stopped():
    # kills: verdicts by row number; a half-written line read as the end
    boxes()
    right, wrong = ({"task_id": "Python/0", "generation": f"    return {n}\n"} for n in (1, 2))
    with folder() as path:
        samples, judged = problems_and(path, [right, wrong, right]), []
        first = humaneval.score_code(samples, path)
        assert first == {"python": {"problems": 1, "passed": 1, "samples": 3, "pass@1": 2 / 3}}, first
        results = Path(f"{samples}.results.jsonl")
        lines = results.read_text().splitlines()
        assert len(lines) == 2                                          # equal samples are run once
        results.write_text(lines[0] + "\n" + lines[1][:20])
        real = humaneval.judge
        with patch.object(humaneval, "judge", lambda *a, **k: judged.append(a[2]) or real(*a, **k)):
            assert humaneval.score_code(samples, path) == first and len(judged) == 2       # the probe, and what was lost
            assert humaneval.score_code(samples, path) == first and len(judged) == 2


def test_a_language_without_its_tools_is_not_run():
    # kills: 0 for it
    boxes()
    with folder() as path:
        samples = problems_and(path, [{"task_id": "Python/0", "generation": "    return 1\n"}])
        which = shutil.which
        with patch.object(shutil, "which", lambda name: None if name == "python3" else which(name)):
            assert humaneval.score_code(samples, path) == {"python": {"not run": "no python3 on PATH"}}


def test_mistakes_in_code_predictions_are_one_line_each():
    # kills: any of the checks
    good = {"task_id": "Python/0", "generation": ""}
    for lines, k, words in (([good, {**good, "task_id": "Rust/0"}], 0, ("row 2", "Rust/0", "Java")),
                            ([good, {**good, "task_id": "Python/9"}], 0, ("row 2", "Python/9")),
                            ([good, "{\n"], 0, ("samples.jsonl, line 2",)), ([{"task_id": 3}], 0, ("row 1", "task_id")),
                            ([{**good, "generation": 3}], 0, ("row 1", "'generation'")),
                            ([good], 2, ("--k 2", "Python/0", "1"))):
        with folder() as path:
            samples = problems_and(path, lines)
            refused(lambda: humaneval.score_code(samples, path, k), *words)
    with folder() as path:
        samples = problems_and(path, [good])
        (path / "humaneval_x/python/humaneval_python.jsonl.gz").write_bytes(b"no archive")
        refused(lambda: humaneval.score_code(samples, path), "humaneval_python.jsonl.gz")
        refused(lambda: evaluation.main(["--task", "rosetta", "--predictions", str(samples)]), "--run-code")


# ---- FedBiOT ------------------------------------------------------------------------------------

def config(**changes) -> fedbiot.Config:
    """Five layers: emulator 0 and 2, dropped 1, adapter 3 and 4."""
    small = {"dropout": Fraction(1, 3), "adapter": 2, "rounds": 2, "local_steps": 3, "batch_size": 4, "align_init": 3,
             "align_steps": 2, "lr": 3e-3, "server_lr": 3e-3, "rank": 4, "alpha": 16.0, "prox": 0.5, "kl_weight": 0.7}
    return fedbiot.Config(**{**small, **changes})


def toy_shard(start=0, stop=40):
    return data.Shard(toy_examples(), list(range(start, stop)))


def toy_server(trained=True, dtype=torch.float32, **changes) -> fedbiot.Server:
    server = fedbiot.Server(tiny_lm().to(dtype), toy_shard(), config(**changes))
    if trained:
        noisy_lora(server.student, std=0.05)
    return server


def pair(**changes):
    server = toy_server(**changes)
    return server, fedbiot.Client(server.bootstrap(), server.cfg)


def copied(tensors) -> dict:
    return {n: t.detach().clone() for n, t in tensors.items()}


def test_emulator_without_dropout_equals_full():
    # kills: a layer of the emulator lost
    server, tokens = toy_server(False, dropout=Fraction(0)), random_tokens(2, 13)
    assert list(server.student.layers) == list("01234")
    for lm in server.models().values():
        assert torch.equal(lm(tokens), tiny_lm()(tokens))
    l2, kl = server.alignment_losses(next(server.public.batches(1, 4, (0,))))
    assert l2 == 0 and abs(kl) < 1e-6


def test_adapemu_and_adapfu_are_composed_as_the_paper_says():
    # kills: AdapFu with the emulator's LoRA; AdapEmu and AdapFu swapped
    server, tokens = toy_server(), random_tokens(1, 11)
    w = {n: t.double() for n, t in tiny_lm().state_dict().items()}
    learnt = {n: t.double() for n, t in server.state_dict()["learnt"].items()}
    assert {n.split(".")[1] for n in learnt} == set("0234"), "LoRA on the emulator and the adapter"
    on_top = {n: t for n, t in learnt.items() if n[7] in "34"}
    layers = {"base": w, "adapfu": w | on_top, "adapemu": {n: t for n, t in (w | learnt).items() if "layers.1." not in n}}
    assert list(server.models()) == ["base", "adapemu", "adapfu"]
    for name, lm in server.models().items():
        assert off(lm(tokens)[0], slow_logits(lm, tokens[0].tolist(), layers[name])) < 3e-6, name


def test_client_never_holds_a_dropped_layer():
    # kills: bootstrap of the full model; a view of a larger storage
    server, client = pair()
    bootstrap = server.bootstrap()
    frozen = [n for n in bootstrap if n != "config"]
    assert sorted({int(n.split(".")[1]) for n in frozen if n.startswith("layers.")}) == [0, 2, 3, 4]
    dropped = [t for n, t in tiny_lm().state_dict().items() if n.startswith("layers.1.")]
    for held in (*bootstrap.values(), *client.lm.state_dict().values(), *server.broadcast(0).values()):
        assert held.untyped_storage().nbytes() == held.nbytes, "a view would carry its whole storage along"
        assert not any(held.shape == t.shape and torch.equal(held, t) for t in dropped)
    assert same({n: bootstrap[n] for n in frozen}, {n: t for n, t in tiny_lm().state_dict().items() if n in frozen})
    assert len(frozen) == 3 + 4 * 9 and not any("lora" in n for n in frozen)


def test_only_lora_crosses_the_wire():
    # kills: weights sent each round; emulator's LoRA uploaded
    server, client = pair()
    down = server.broadcast(0)
    up, metrics = client.update(0, down, toy_shard(), 0)
    names = {i: {f"layers.{i}.attention.{w}.lora_{m}" for w in ("wq", "wv") for m in "AB"} for i in range(5)}
    assert set(down) == names[0] | names[2] | names[3] | names[4] and set(up) == names[3] | names[4]
    a_layer = 4 * (4 * 48 + 48 * 4 + 4 * 48 + 16 * 4)           # fp32, rank 4: A and B of wq, then of wv (2 kv heads)
    assert fedbiot.payload_bytes(down) == 4 * a_layer and fedbiot.payload_bytes(up) == 2 * a_layer
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
    assert all(p.data_ptr() != learnt[n].data_ptr() for n, p in client.received.items()), "a client has its own LoRA"


def leaves(tensors) -> dict:
    return {n: t.detach().double().requires_grad_() for n, t in tensors.items()}


def test_client_steps_match_float64_by_hand():
    # kills: prox for prox / 2; pull towards zero; betas (0.9, 0.999)
    server, client = pair()
    for t in (0, 1):
        sent = copied(server.broadcast(t))
        up, metrics = client.update(t, sent, toy_shard(0, 20), 1)
        w = {n: p.double() for n, p in client.lm.state_dict().items()} | {n: p.double() for n, p in sent.items()}
        tuned = leaves({n: sent[n] for n in up})
        optimizer, losses = torch.optim.AdamW(tuned.values(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.01), []
        for batch in toy_shard(0, 20).batches(3, 4, (0, t, 1)):
            z = torch.cat([slow_logits(client.lm, row.tolist(), w | tuned) for row in batch.tokens])[batch.rows]
            losses.append((batch.weights.double() * F.cross_entropy(z, batch.targets, reduction="none")).sum())
            pull = sum((4 * (tuned[n[:-1] + "B"] @ tuned[n] - (sent[n[:-1] + "B"] @ sent[n]).double())).pow(2).sum()
                       for n in tuned if n.endswith("A"))
            optimizer.zero_grad()
            (losses[-1] + 0.5 / 2 * pull).backward()
            optimizer.step()
        assert off(up.values(), [tuned[n].detach() for n in up]) < 1e-4
        assert off([up[n] - sent[n] for n in up], [tuned[n].detach() - sent[n] for n in up]) < 1e-2
        assert abs(metrics["loss"] - torch.stack(losses).mean()) < 1e-4


def test_alignment_steps_match_float64_by_hand():
    # kills: no rms; kl_weight or align_tokens ignored; optimizer never renewed; E steps at t = 0; betas (0.9, 0.999)
    for changes in ({}, {"align_norm": "none", "align_renew": True}, {"align_tokens": "all", "kl_weight": 3.0}):
        server = toy_server(**changes)
        cfg, w = server.cfg, {n: t.double() for n, t in server.student.state_dict().items()}
        full = {n: t.double() for n, t in server.teacher.state_dict().items()}
        tuned = leaves(copied(server.emulated))
        before, new = copied(server.emulated), lambda: torch.optim.AdamW(tuned.values(), lr=3e-3, betas=(0.9, 0.95))
        optimizer = new()
        for t, steps in ((0, 3), (1, 2)):
            optimizer = new() if cfg.align_renew else optimizer
            for batch in toy_shard().batches(steps, 4, (0, t, fedbiot.SERVER)):
                (z, x), (z_t, x_t) = (map(torch.cat, zip(*[slow_forward(server.full, row.tolist(), weights, cut=3)
                                      for row in batch.tokens])) for weights in (w | tuned, full))
                every = cfg.align_tokens == "all"
                rows = torch.arange(batch.tokens.numel()) if every else batch.rows
                p = torch.full((len(rows),), 1 / len(rows)).double() if every else batch.weights.double()
                l2 = (p * (x - x_t)[rows].pow(2).sum(-1)).sum()
                l2 = l2 / (p * x_t[rows].pow(2).sum(-1)).sum() if cfg.align_norm == "rms" else l2
                t_log, s_log = z_t[rows].log_softmax(-1), z[rows].log_softmax(-1)
                optimizer.zero_grad()
                (l2 + cfg.kl_weight * (p * (t_log.exp() * (t_log - s_log)).sum(-1)).sum()).backward()
                optimizer.step()
            down = server.broadcast(t)
        assert off([down[n] for n in tuned], [q.detach() for q in tuned.values()]) < 1e-4, changes
        assert off([down[n] - before[n] for n in tuned], [q.detach() - before[n] for n, q in tuned.items()]) < 1e-2, changes


def test_alignment_lowers_its_losses_and_never_moves_the_teacher():
    # kills: gradient with the wrong sign; adapter's LoRA trained too
    server, tokens = toy_server(align_init=60), random_tokens(3, 12)
    batch = next(server.public.batches(1, 30, (7,)))
    before, teacher, tuned = server.alignment_losses(batch), server.teacher(tokens), copied(server.tuned)
    server.broadcast(0)
    after = server.alignment_losses(batch)
    assert after[0] < 0.8 * before[0] and after[1] < 0.8 * before[1], (before, after)
    assert torch.equal(server.teacher(tokens), teacher) and same(copied(server.tuned), tuned)
    assert set(server.metrics) == {"align_l2", "align_kl"}
    for upload in (tuned, {n: t + 1 for n, t in tuned.items()}):
        server.aggregate(0, [upload], [1.0])
        assert torch.equal(server.teacher(tokens), teacher) == (upload is tuned), "it changes by the adapter's LoRA alone"
    assert torch.equal(server.full(tokens), tiny_lm()(tokens)), "the base model has none"


def test_aggregation_weighs_by_size():
    # kills: uniform mean; weights not normalised
    server = toy_server()
    ups = [{n: torch.full_like(p, v) for n, p in server.tuned.items()} for v in (1.0, 2.0, 6.0)]
    emulated = copied(server.emulated)
    server.aggregate(0, ups, [10.0, 20.0, 50.0])                # (10 + 40 + 300) / 80 = 4.375
    assert all((p == 4.375).all() for p in server.tuned.values()) and same(copied(server.emulated), emulated)


def run_rounds(server, client, shards, **keywords):
    return list(fedbiot.federate(server, client, shards, server.cfg, fedbiot.Wire(), **keywords))


def test_rounds_average_what_the_clients_learnt_from_their_own_shard():
    # kills: same shard for all; client number not passed; always or never uniform; loss unweighted
    shards = [toy_shard(0, 6), toy_shard(6, 12), toy_shard(12, 40)]
    for changes, p in (({}, (6 / 40, 6 / 40, 28 / 40)), ({"uniform_weights": True}, (1 / 3,) * 3)):
        server, client = pair(rounds=1, **changes)
        twin, other = pair(rounds=1, **changes)
        down = copied(twin.broadcast(0))
        ups = [other.update(0, down, shard, m) for m, shard in enumerate(shards)]
        record, = run_rounds(server, client, shards)
        expected = {n: sum(q * up[n].double() for q, (up, _) in zip(p, ups)) for n in server.tuned}
        assert off([server.tuned[n].detach() for n in expected], expected.values()) < 1e-6
        assert abs(record["client_loss"] - sum(q * m["loss"] for q, (_, m) in zip(p, ups))) < 1e-5
        assert record["round"] == 1 and record["bytes_down"] == 2 * record["bytes_up"] == fedbiot.payload_bytes(down)


def test_some_clients_take_part_where_asked():
    # kills: clients_per_round ignored; the same ones in every round
    cfg = config(clients_per_round=3)
    chosen = [fedbiot.choose_clients(cfg, 8, t) for t in range(30)]
    assert all(len(set(c)) == 3 and c == sorted(c) for c in chosen) and set(sum(chosen, [])) == set(range(8))
    assert chosen == [fedbiot.choose_clients(cfg, 8, t) for t in range(30)] and len(set(map(tuple, chosen))) > 5
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
    assert seen == [(3, 4, (0, 0, fedbiot.SERVER)), (2, 4, (0, 1, fedbiot.SERVER)), (2, 4, (0, 2, fedbiot.SERVER))]


def test_frozen_weights_do_not_move_in_a_round():
    # kills: optimizer over all parameters
    for dtype in (torch.float32, torch.bfloat16):
        server, client = pair(dtype=dtype)
        before = copied(server.full.state_dict())
        records = run_rounds(server, client, [toy_shard(0, 20), toy_shard(20, 40)])
        assert [r["round"] for r in records] == [1, 2] and all(math.isfinite(r["client_loss"]) for r in records)
        assert same(before, server.full.state_dict())
        frozen = {n: t for n, t in client.lm.state_dict().items() if "lora" not in n}
        assert same(frozen, {n: before[n] for n in frozen})


def test_zero_switches_a_part_off_exactly():
    # kills: align_steps 0 an error; prox computed at 0; some kl in the loss at 0
    server = toy_server(False, align_init=0, align_steps=0)
    start = copied(server.student.state_dict())
    assert server.broadcast(0) and server.broadcast(1) and same(start, server.student.state_dict())
    assert server.metrics == {}
    down = copied(toy_server().broadcast(0))

    def update(**changes):
        return pair(**changes)[1].update(0, down, toy_shard(), 0)[0]
    with patch.object(fedbiot, "proximal", lambda *_: 0 / 0):
        plain = update(prox=0.0)
    assert same(plain, update(prox=0.0)) and not same(plain, update(prox=0.5))
    far, near = (sum((up[n] - down[n]).norm() for n in up) for up in (plain, update(prox=1e4)))
    assert near < 0.9 * far, "a strong pull keeps the adapter near what was broadcast"

    def only_l2(server, batch, losses=fedbiot.Server.alignment_losses):
        return losses(server, batch)[0], torch.zeros(())
    server, alone = toy_server(kl_weight=0.0), toy_server(kl_weight=0.7)
    with patch.object(fedbiot.Server, "alignment_losses", only_l2):
        alone.broadcast(0)
    server.broadcast(0)
    assert same(copied(server.emulated), copied(alone.emulated))
    with patch.object(fedbiot.Server, "align", lambda *_: None):
        unaligned = copied(toy_server().broadcast(0))
    assert not same(unaligned, copied(toy_server(kl_weight=0.0).broadcast(0)))


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
    for wrong in ({n: t for n, t in first.items() if n[7] != "0"}, first | {"layers.1.attention.wq.lora_A": torch.ones(4, 48)}):
        asserts(lambda: client.update(0, wrong, toy_shard(), 0))


def test_a_server_goes_on_from_its_state_bit_for_bit():
    # kills: optimizer's moments not saved; emulator's LoRA not saved
    shards = [toy_shard(0, 20), toy_shard(20, 40)]
    whole, client = pair(rounds=3)
    run_rounds(whole, client, shards)
    half, client = pair(rounds=3)
    rounds = fedbiot.federate(half, client, shards, half.cfg, fedbiot.Wire())
    next(rounds)
    blob = io.BytesIO()
    torch.save(half.state_dict(), blob)
    blob.seek(0)
    other, client = pair(rounds=3, trained=False)
    other.load_state_dict(torch.load(blob, weights_only=True))
    records = run_rounds(other, client, shards, first_round=1)
    assert [r["round"] for r in records] == [2, 3]
    assert same(whole.state_dict()["learnt"], other.state_dict()["learnt"])


def test_a_loss_that_is_not_finite_is_explained():
    # kills: NaN averaged on in silence
    server, client = pair()
    down = server.broadcast(0)
    bad = down | {n: t * math.nan for n, t in down.items() if n.startswith("layers.3.")}
    refused(lambda: client.update(0, bad, toy_shard(), 1), "client 1", "nan", "--lr")
    for p in server.tuned.values():
        p.fill_(math.nan)
    refused(lambda: server.broadcast(1), "nan", "--server-lr")


# ---- the other methods --------------------------------------------------------------------------

def method_config(method: str, **changes) -> train.RunConfig:
    small = {"dropout": Fraction(1, 2), "adapter": 1, "rounds": 2, "local_steps": 3, "batch_size": 4, "align_init": 3,
             "align_steps": 2, "lr": 1e-2, "server_lr": 1e-2, "rank": 4, "clients": 2, "max_len": 64, "shots": 0,
             "max_update_norm": 0.0}
    return train.RunConfig(method=method, **{**small, **changes})


def method_run(method: str, full: LM | None = None, rounds=2, first_round=0, state=None, shards=None, **changes):
    """(server, client, records) of a method's rounds in this process, from the start or from a state."""
    cfg, module = method_config(method, rounds=rounds, **changes), train.baselines.module_of(method)
    server = module.Server(full or tiny_lm(), toy_shard(30, 40), cfg)
    if state:
        server.load_state_dict(state)
    client = module.Client(server.bootstrap(), cfg)
    shards = shards or [toy_shard(0, 16), toy_shard(16, 30)]
    return server, client, run_rounds(server, client, shards, first_round=first_round)


def sizes(tensors) -> int:
    return sum(4 * t.numel() for t in tensors.values())


def test_fedot_keeps_both_ends_and_its_adapter_only_travels():
    # kills: first layers left out; the emulator not shifted; emulator's LoRA sent every round; not aligned; a dropped layer sent
    emulator, adapter = offsite.split(32, method_config("fedot", adapter=2, dropout=Fraction("0.2")))
    assert adapter == [0, 1, 30, 31] and len(emulator) == 22 and (emulator[0], emulator[-1]) == (2, 29)
    assert len(offsite.split(32, method_config("fedot", adapter=2, dropout=Fraction("0.5")))[0]) == 14
    refused(lambda: offsite.split(4, method_config("fedot", adapter=2)), "--adapter 2", "1..1")
    server, client, records = method_run("fedot")
    assert list(client.lm.layers) == ["0", "1", "4"] and {n.split(".")[1] for n in server.broadcast(2)} == {"0", "4"}
    assert records[0]["bytes_down"] == records[1]["bytes_up"] == sizes(server.tuned)
    assert all(p.abs().max() > 0 for n, p in server.emulated.items() if n.endswith("lora_B"))
    assert same(copied(server.emulated), {n: client.lm.get_parameter(n).detach() for n in server.emulated})
    again = offsite.Server(tiny_lm(), toy_shard(30, 40), server.cfg)
    again.load_state_dict({"learnt": server.state_dict()["learnt"]})
    given = again.bootstrap()                                           # resumed: nothing is aligned anew
    assert same(copied(server.emulated), {n: given[n] for n in server.emulated})


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
    fresh = fedavg.Server(full, None, server.cfg)
    assert len(server.tuned) == 5 * 2 * 2
    ups = [client.update(0, fresh.broadcast(0), s, m)[0] for m, s in enumerate(shards)]
    assert all(off(p, (24 * ups[0][n] + 8 * ups[1][n]) / 32) < 1e-6 for n, p in server.tuned.items())
    assert all(not torch.equal(p, fresh.tuned[n]) for n, p in server.tuned.items() if n.endswith("B"))
    assert same(before, full.state_dict()) and same(copied(method_run("fedavg", full, 1, shards=shards)[0].tuned), copied(server.tuned))


def test_fedkseed_replay_equals_the_walked_weights():
    # kills: sign of g; perturbation left in; eta left out; lambda not normalised; other noise in the replay; tied weights
    # walked as two
    for method, clients in (("fedkseed", 1), ("fedkseed", 2), ("fedkseed-pro", 2)):
        full, shards = tiny_lm(tied=method == "fedkseed-pro"), [toy_shard(0, 10), toy_shard(10, 30)][:clients]
        cfg = method_config(method, local_steps=12, lr=1e-4, kseed_candidates=8)
        server = fedkseed.Server(full, None, cfg)
        walked, ups = [], []
        for m, shard in enumerate(shards):
            client = fedkseed.Client(server.bootstrap(), cfg)
            ups.append(client.update(0, server.broadcast(0), shard, m)[0])
            walked.append([p.double() for p in client.lm.parameters()])
            assert len(walked[0]) == len(list(full.parameters())), "a tied weight is walked once"
        server.aggregate(0, ups, [float(len(s)) for s in shards])
        w0, total = [p.double() for p in full.parameters()], sum(map(len, shards))
        update = [sum(len(s) / total * (w[i] - p) for w, s in zip(walked, shards)) for i, p in enumerate(w0)]
        replayed = [p.double() - q for p, q in zip(server.models()["full"].parameters(), w0)]
        assert off(replayed, update) < 1e-4, (method, clients, off(replayed, update))


def test_fedkseed_step_is_the_two_point_estimate():
    # kills: eps for 2 eps; two batches; noise of another seed
    full, shard, cfg = tiny_lm(), toy_shard(), method_config("fedkseed", local_steps=1, kseed_eps=1e-3)
    server = fedkseed.Server(full, None, cfg)
    up, _ = fedkseed.Client(server.bootstrap(), cfg).update(0, server.broadcast(0), shard, 0)
    batch = next(shard.batches(1, cfg.batch_size, (cfg.seed, 0, 0)))
    g = torch.Generator().manual_seed(fedkseed.candidates(server.learnt["seed"].item(), 4096)[up["j"].item()])
    z = {n: torch.randn(p.shape, generator=g).double() for n, p in full.named_parameters()}
    losses = []
    for sign in (1, -1):
        lm = tiny_lm().double()
        lm.load_state_dict({n: p.double() + sign * 1e-3 * z[n] for n, p in full.named_parameters()})
        losses.append(true_ce(lm.hidden(batch.tokens).flatten(0, 1)[batch.rows], lm.output.weight, batch.targets, batch.weights))
    assert abs(up["g"].item() / ((losses[0] - losses[1]) / 2e-3).item() - 1) < 1e-2


def test_fedkseed_sends_17988_bytes_a_round_and_pro_9796_whatever_the_model():
    # kills: int64 indices; p for plain FedKSeed; no master seed
    for method, expected in (("fedkseed", 17_988), ("fedkseed-pro", 9_796)):
        cfg = method_config(method, local_steps=200, kseed_candidates=train.resolve({"method": method}).kseed_candidates)
        for changes in ({}, {"n_layers": 2, "dim": 24}):
            server = fedkseed.Server(tiny_lm(**changes), None, cfg)
            up = server.expected(0)
            assert fedbiot.payload_bytes(server.broadcast(0)) + fedbiot.payload_bytes(up) == expected
        cfg = method_config(method, local_steps=2, batch_size=1)
        server = fedkseed.Server(tiny_lm(), None, cfg)
        up = fedkseed.Client(server.bootstrap(), cfg).update(0, server.broadcast(0), toy_shard(), 0)[0]
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
cfg = SimpleNamespace(method="fedkseed", kseed_candidates=4096, kseed_eps=1e-3, seed=0, local_steps=1, batch_size=1, lr=1e-4)
server = Server(LM.empty(ModelConfig(256, 24, 4, 4, 512, 768)).requires_grad_(False), None, cfg)
client = Client(server.bootstrap(), cfg)
data = Shard([Example([1] + [5] * 50, 4)], [0])
batch = next(data.batches(1, 1, (0,)))
def status(key):
    return int(re.search(key + r":\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
def peak(call):
    open("/proc/self/clear_refs", "w").write("5")                       # forgets the peak so far
    start = status("VmRSS")
    call()
    return status("VmHWM") - start
infer, step = lambda: torch.no_grad()(client.loss)(batch), lambda: client.update(0, server.broadcast(0), data, 0)
infer()
weights, inference = sum(4 * p.numel() for p in client.w), peak(infer)
print((weights + peak(step)) / (weights + inference))                   # the first step: what is freed stays resident
"""


def test_fedkseed_noise_is_the_same_elsewhere_and_a_step_needs_an_inferences_memory():
    # kills: the global generator; one generator for all draws; seeds from hash(); z kept; weights cloned in a step
    if not Path("/proc/self/clear_refs").exists():
        raise Skip("Linux only: /proc/self/clear_refs")
    weights, seeds = [torch.zeros(5, 3), torch.zeros(40)], fedkseed.candidates(7, 3)
    for seed in seeds:
        fedkseed.step_along(weights, seed, 1.0)
    there = subprocess.run([sys.executable, "-c", KSEED_ELSEWHERE], capture_output=True, text=True, check=True, cwd=HERE,
                           env=os.environ | {"PYTHONHASHSEED": "11"}).stdout.splitlines()
    assert there[0] == str([x.hex() for p in weights for x in p.flatten().tolist()])
    assert float(there[1]) < 1.1, f"a step needs {there[1]} of an inference's memory"
    one = [torch.zeros(5, 3)]
    fedkseed.step_along(one, seeds[0], 1.0)
    assert torch.equal(one[0], torch.randn(5, 3, generator=torch.Generator().manual_seed(seeds[0])))
    many = fedkseed.candidates(7, 4096)
    assert len(set(many)) == 4096 and 0 <= min(many) and max(many) < 2**31


def test_fedkseed_latecomer_needs_only_w0_and_the_accumulator():
    # kills: a client that goes on from where it stands; the round's start walked along
    server, client, _ = method_run("fedkseed", rounds=10, local_steps=1, kseed_candidates=8, lr=1e-4)
    late = fedkseed.Client(server.bootstrap(), server.cfg)
    for m in (0, 1):
        assert same(*(c.update(10, server.broadcast(10), toy_shard(), m)[0] for c in (client, late)))


def test_fedkseed_leaves_the_servers_weights_and_a_nan_step_moves_nothing():
    # kills: walking the shared tensors; a NaN applied, or sent
    full, cfg = tiny_lm(), method_config("fedkseed", local_steps=4, lr=1e-4)
    before, server = copied(full.state_dict()), fedkseed.Server(full, None, cfg)
    client = fedkseed.Client(server.bootstrap(), cfg)
    losses = iter([1.0, math.nan, 2.0, 1.5] + [math.inf] * 4)
    with patch.object(client, "loss", lambda batch: next(losses)), contextlib.redirect_stderr(io.StringIO()) as err:
        up, metrics = client.update(0, server.broadcast(0), toy_shard(), 0)
    assert (up["g"] != 0).tolist() == [False, True, False, False] and metrics["loss"] == 1.75 and "3 of 4" in err.getvalue()
    server.aggregate(0, [up], [1.0])
    assert off([p for p in client.w], list(server.models()["full"].parameters())) < 1e-6
    assert same(before, full.state_dict())


def test_fedkseed_pro_draws_larger_gradients_more_often():
    # kills: no clip; min-max left out; a history without its first zero
    server = fedkseed.Server(tiny_lm(), None, method_config("fedkseed-pro", kseed_candidates=4))
    assert torch.allclose(server.broadcast(0)["p"], torch.full((4,), .25))
    server.aggregate(0, [{"j": torch.tensor([0, 0, 1]).int(), "g": torch.tensor([3., -6., 5000.])}], [2.0])
    p = server.broadcast(1)["p"]
    assert off(p, torch.softmax(torch.tensor([9 / 3, 1000 / 2, 0, 0]) / 500, 0)) < 1e-6 and p.max() / p.min() < math.e + 1e-5
    assert server.learnt["a"].tolist() == [-3, 5000, 0, 0]


def tt_matrix(cores, d_in, d_out):
    """By the definition, core after core, in the dtype of the cores."""
    W = torch.ones(1, 1, dtype=torch.float64)
    for core in cores:
        W = torch.einsum("ap,pkq->akq", W, core.double()).flatten(0, 1)
    return W.reshape(d_in, d_out)


def test_tensor_train_of_4096_by_64_has_1100_parameters_and_is_its_contraction():
    # kills: rank at the ends; unbalanced factors; in and out swapped; a transposed core
    shapes = fedtt.core_shapes(4096, 64, 5)
    assert [k for _, k, _ in shapes] == [16, 16, 16, 4, 4, 4] and sum(map(math.prod, shapes)) == 1100
    assert [k for _, k, _ in fedtt.core_shapes(64, 4096, 5)] == [4, 4, 4, 16, 16, 16]
    assert [fedtt.factors(d) for d in (1000, 128, 7, 96)] == [[10, 10, 10], [4, 4, 8], [1, 1, 7], [4, 4, 6]]
    layer, x = fedtt.TTLinear(24, 12, 3, False, fedbiot.generator(1)).double(), random(5, 24).double()
    factors = fedtt.factors(24)
    y = torch.einsum("nxyz,pxq,qyr,rzs,sit,tju,ukv->nijk", x.view(5, *factors), *layer.cores).reshape(5, 12)
    assert off(layer(x), y) < 1e-12 and off(layer.matrix(), tt_matrix(layer.cores, 24, 12)) < 1e-12


def test_fedtt_is_the_identity_at_the_start_bit_for_bit_and_learns_all_cores():
    # kills: `up` not zero; an adapter around the stream; adapters in bf16; adapters skipped where rows are asked for
    for dtype in (torch.float32, torch.bfloat16):
        full = tiny_lm().to(dtype)
        tuned = fedtt.Server(full, None, method_config("fedtt")).models()["full"]
        assert torch.equal(full(random_tokens(2, 9)), tuned(random_tokens(2, 9)))
        assert all(p.dtype == torch.float32 for n, p in tuned.named_parameters() if ".cores." in n)
    server, _, records = method_run("fedtt", tiny_lm(n_layers=2), 3)
    fresh, lm = fedtt.Server(tiny_lm(n_layers=2), None, server.cfg), server.models()["full"]
    assert all(not torch.equal(p, fresh.learnt[n]) for n, p in server.learnt.items())
    floats = sum(math.prod(s) for d in ((48, 64), (64, 48)) for s in fedtt.core_shapes(*d, 5))
    assert records[0]["bytes_up"] == records[0]["bytes_down"] == 4 * 2 * 2 * floats
    cached_equals_uncached(lm)


def cached_equals_uncached(lm):
    prompts = [[1, 5, 9], [1, 7, 20, 11, 30]]
    for ids, prompt in zip(model.generate(lm, prompts, 6, 0), prompts):
        tokens = list(prompt)
        for _ in ids:
            assert lm(torch.tensor([tokens]))[0, -1].argmax() == ids[len(tokens) - len(prompt)]
            tokens.append(ids[len(tokens) - len(prompt)])
    rows = torch.tensor([1, 3, 7])
    tokens = random_tokens(2, 4)
    assert off(lm.hidden(tokens, rows=rows), lm.hidden(tokens).flatten(0, 1)[rows]) < 1e-6


def test_fedtt_plus_average_of_cores_is_the_average_of_matrices():
    # kills: two active cores at once
    weights, layer = [.2, .3, .5], fedtt.TTLinear(24, 12, 3, False, fedbiot.generator(1)).double()
    cores = {f"x.cores.{i}": p for i, p in enumerate(layer.cores)}
    for t in range(6):
        moved = fedtt.active(cores, t, method_config("fedtt+"))
        assert list(moved) == [f"x.cores.{5 - t}"]
        ups = [{n: p + random(*p.shape, seed=10 * t + m).double() for n, p in moved.items()} for m in range(3)]
        mean = {n: sum(w * up[n] for w, up in zip(weights, ups)) for n in moved}
        matrices = [tt_matrix((cores | up).values(), 24, 12) for up in ups]
        assert (tt_matrix((cores | mean).values(), 24, 12) - sum(w * W for w, W in zip(weights, matrices))).abs().max() < 1e-12


def test_fedtt_plus_sends_one_core_a_matrix_and_moves_no_other():
    # kills: all cores sent; an optimizer over all; state carried from client to client; a latecomer with stale cores
    server, client, records = method_run("fedtt+", tiny_lm(n_layers=2), 1)
    fresh = fedtt.Server(tiny_lm(n_layers=2), None, server.cfg)
    last = {n for n in server.learnt if n.endswith("cores.5")}
    assert {n for n, p in server.learnt.items() if not torch.equal(p, fresh.learnt[n])} == last
    assert records[0]["bytes_up"] == sizes({n: server.learnt[n] for n in last})
    assert off(server.lm(random_tokens(2, 9)), server.full(random_tokens(2, 9))) > 1e-3, "the zero core is the active one"
    sent = server.broadcast(1)
    assert sent.keys() == last
    ups = [client.update(1, sent, toy_shard(), m)[0] for m in (0, 1, 0)]
    late = fedtt.Client(server.bootstrap(), server.cfg).update(1, sent, toy_shard(), 0)[0]
    assert all(n.endswith("cores.4") for n in late) and same(ups[0], ups[2]) and same(ups[0], late)
    server, _, records = method_run("fedtt+", tiny_lm(n_layers=2), 2, clients_per_round=1)
    assert records[1]["bytes_down"] == sizes(server.learnt)            # absent clients: all cores go down


class BlackBox(torch.nn.Module):
    """A large model of which nothing can be asked but logits."""
    def __init__(self, lm):
        super().__init__()
        self.forward, self.config, self.output = lm.forward, lm.config, lm.output


def proxy_run(path: Path, *args, large=None, **changes):
    small = tiny_lm(5, n_layers=2, dim=24, n_heads=4, vocab_size=1024)
    meta_folder(path / "small", small, tokenizer=True, ffn_dim_multiplier=2.6)
    return method_run("fedpt", large or tiny_lm(vocab_size=1024), *args, proxy_ckpt=str(path / "small"), **changes)


def test_fedpt_untuned_proxy_is_the_large_model_exactly_and_the_tuned_one_a_sum_of_logits():
    # kills: z_S0 left out; alpha ignored; its sign; one cache for three models
    tokens = random_tokens(2, 9)
    with folder() as path:
        for dtype in (torch.float32, torch.bfloat16):
            large = tiny_lm(vocab_size=1024).to(dtype)
            assert torch.equal(proxy_run(path, 0, large=large)[0].models()["proxy"](tokens), large(tokens))
            server = proxy_run(path, 1, large=large, proxy_alpha=0.0)[0]
            assert torch.equal(server.models()["proxy"](tokens), large(tokens))
            assert not torch.equal(server.models()["small"](tokens), server.full(tokens))
        server = proxy_run(path, proxy_alpha=.7)[0]
        z = {name: lm(tokens).double() for name, lm in server.models().items()}
        assert list(z) == ["base", "small", "distilled", "proxy"]
        assert off(z["proxy"], z["base"] + .7 * (z["small"] - server.full(tokens))) < 1e-5
        cached_equals_uncached(server.models()["proxy"])
        again = proxy_run(path, 0, state={"learnt": server.state_dict()["learnt"]}, proxy_alpha=.7)[0]
        assert all(torch.equal(lm(tokens), server.models()[name](tokens)) for name, lm in again.models().items())


def test_fedpt_asks_the_large_model_for_logits_only():
    # kills: its hidden states, layers or gradients used in a round; its weights in a payload
    large = tiny_lm(vocab_size=1024)
    with folder() as path:
        server, client, records = proxy_run(path, large=BlackBox(large))
    assert all(p.grad is None and not p.requires_grad for p in large.parameters())
    assert same({n: t for n, t in server.bootstrap().items() if n != "config"}, dict(server.full.named_parameters()))
    assert all(p.shape[-1] in (4, 24) for p in server.broadcast(1).values()) and list(client.lm.layers) == ["0", "1"]
    assert records[0]["bytes_down"] == records[0]["bytes_up"] == sizes(server.tuned)


def test_fedpt_distillation_lowers_the_kl_to_its_frozen_teacher():
    # kills: a teacher that moves along; KL the wrong way round; z_L left out
    with folder() as path:
        server = proxy_run(path, 1, proxy_steps=0)[0]
    batch, teacher = next(server.public.batches(1, 10, (7,))), copied(server.averaged)

    def kl():
        z, s = (server.models()[n](batch.tokens).flatten(0, 1)[batch.rows].double().log_softmax(-1) for n in ("proxy", "distilled"))
        return (batch.weights * (z.exp() * (z - s)).sum(-1)).sum().item()
    before = kl()
    assert abs(server.distillation_loss(batch)[0].item() / before - 1) < 1e-4
    server.cfg = method_config("fedpt", proxy_steps=20)
    server.distil(0)
    assert kl() < .9 * before and same(teacher, copied(server.averaged))
    assert server.metrics["distill_kl"] > 0 and server.metrics["drift"] > 0


def test_fedpt_refuses_another_vocabulary():
    # kills: no check of the sizes; none of the pieces
    with folder() as path:
        for name in ("large", "small"):
            meta_folder(path / name, tiny_lm(vocab_size=1024), tokenizer=True)
        meta_folder(path / "smaller", tiny_lm(vocab_size=60), tokenizer=True)
        pieces = BUNDLED_TOKENIZER.read_bytes()
        (path / "small/tokenizer.model").write_bytes(pieces.replace(b"Response", b"Rezponse"))
        for small, expected in (("small", "other pieces"), ("smaller", "60")):
            flags = ["--method", "fedpt", "--ckpt", path / "large", "--proxy-ckpt", path / small, "--out", path / "run"]
            status, _, err = cli(*flags)
            assert status == 2 and err.count("\n") == 1 and expected in err and not (path / "run").exists(), err


def test_every_method_resumes_bit_for_bit():
    # kills: a part of the state not saved; randomness carried from round to round
    with folder() as path:
        for method in ("fedot", "fedavg", "fedkseed", "fedkseed-pro", "fedtt", "fedtt+", "fedpt"):
            flags = {"kseed_candidates": 8, "lr": 1e-4, "proxy_steps": 2, "local_steps": 2}
            run = (lambda **more: proxy_run(path, **flags, **more)) if method == "fedpt" else (
                lambda **more: method_run(method, **flags, **more))
            whole = run(rounds=2)[0].state_dict()["learnt"]
            state = run(rounds=1)[0].state_dict()
            assert same(whole, run(rounds=2, first_round=1, state=state)[0].state_dict()["learnt"]), method


# ---- command line -------------------------------------------------------------------------------

def cli(*argv, main=train.main) -> tuple[int, str, str]:
    """(exit status, stdout, stderr) of a command line, in this process."""
    out, err, threads = io.StringIO(), io.StringIO(), torch.get_num_threads()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            evaluation.main_guard(lambda: main([str(a) for a in argv]))
        except SystemExit as end:
            status = end.code
    torch.set_num_threads(threads)
    return status, out.getvalue(), err.getvalue()


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


def small_run(path: Path) -> list[str]:
    """A checkpoint of random weights, data of a few rows, and the flags of a short run over them."""
    meta_folder(path / "ckpt", tiny_lm(vocab_size=1024), tokenizer=True)
    gsm8k_folder(path / "data")
    flags = {"task": "gsm8k", "ckpt": path / "ckpt", "data-dir": path / "data", "dropout": "0.34", "adapter": 2, "rounds": 3,
             "local-steps": 2, "batch-size": 3, "align-init": 2, "align-steps": 1, "lr": 1e-3, "server-lr": 1e-3,
             "max-len": 200, "shots": 0, "eval-limit": 2, "threads": 1}
    return [str(x) for name, value in flags.items() for x in (f"--{name}", value)]


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


def scored(lm, tokenizer, task, opts, progress) -> dict:
    """In place of an evaluation: a number that depends on everything the model is made of."""
    total = sum(p.double().abs().mean().item() * (i + 1) for i, p in enumerate(lm.state_dict().values()))
    return {"correct": 1, "total": opts.limit, "accuracy": total}


def outcome(path: Path) -> tuple:
    """What of a run folder must not depend on how often it was stopped."""
    rows = [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(open(path / "log.csv"))]
    summary = json.loads((path / "summary.json").read_text())
    return rows, {k: v for k, v in summary.items() if k not in ("seconds", "peak_memory_bytes")}


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


# ---- hand-over ----------------------------------------------------------------------------------

def exported(path: Path, lm: LM, form: str, source: Path) -> Path:
    with contextlib.redirect_stderr(io.StringIO()):
        evaluation.export(lm, path, form, str(source))
    assert not list(path.parent.glob("*.part"))
    return path


def test_params_json_gives_back_every_width():
    # kills: multiple_of 256 for all; the half that keeps the multiplier's product above the width; n_kv_heads left out
    for dim, hidden in [(48, n) for n in (1, 2, 100, 127, 128, 129, 168, 256, 1000)] + [(16, 51), (4096, 11008), (5120, 13824), (8192, 28672)]:
        c = ModelConfig(dim, 5, 8, 2, 97, hidden, 1e-6, 5e5)
        p = json.loads(json.dumps(c.to_params()))
        assert ModelConfig.from_params(p) == c and ModelConfig.from_hf(json.loads(json.dumps(c.to_hf()))) == c
        assert (p["multiple_of"] == 256) == (hidden in (256, 11008, 13824)), "as published, where that gives the width"


def test_exported_folders_hold_the_merged_model():
    # kills: scale forgotten; layers not renumbered; q's rows left as Meta's; a tied head written; the model itself merged
    tokens = random_tokens(2, 13)
    for tied in (False, True):
        with folder() as path:
            full = tiny_lm(tied=tied)
            source = meta_folder(path / "ckpt", full, tokenizer=True)
            server = fedbiot.Server(full, toy_shard(), config())
            noisy_lora(server.student)
            for (name, lm), form in itertools.product(server.models().items(), ("hf", "meta")):
                before = lm(tokens)
                back = read(exported(path / f"{name}-{form}", lm, form, source))
                assert off(back(tokens), before) < 3e-6 and torch.equal(lm(tokens), before), (name, form)
                assert list(back.layers) == list("0123" if name == "adapemu" else "01234")
            held = model.read_safetensors(path / "adapfu-hf" / "model.safetensors")
            assert ("lm_head.weight" in held) != tied and (path / "adapfu-hf" / "tokenizer.model").is_file()
            if not tied:                                            # W + s B A in float64, and Hugging Face's rows by hand
                w = {n: t.double() for n, t in full.state_dict().items()}
                for n in [n for n in lora.lora_tensors(server.teacher) if n.endswith("A")]:
                    stem, own = n.removesuffix("lora_A"), lora.lora_tensors(server.teacher)
                    w[stem + "weight"] += 16 / 4 * own[stem + "lora_B"].double() @ own[n].double()
                assert all(off(held[n], t) < 1e-6 for n, t in hf_state(SimpleNamespace(
                    config=full.config, state_dict=lambda: w)).items()), "merged in Hugging Face's layout"


def test_merging_sums_in_fp32_and_keeps_the_stored_dtype():
    # kills: B A cast to bf16 before the sum; fp32 written for a bf16 checkpoint
    server = toy_server(dtype=torch.bfloat16)
    state, own = lora.merged(server.teacher), lora.lora_tensors(server.teacher)
    for stem in ("layers.3.attention.wq.", "layers.4.attention.wv."):
        W = server.full.state_dict()[stem + "weight"].double()
        exact = W + 4 * own[stem + "lora_B"].double() @ own[stem + "lora_A"].double()
        best = (exact.bfloat16().double() - exact).abs()
        assert ((state[stem + "weight"].double() - exact).abs() <= best * 1.01 + 1e-6).all(), "as near as bf16 can be"
    with folder() as path:
        meta_folder(path / "ckpt", server.full, tokenizer=True, vocab_size=97)
        for form in ("hf", "meta"):
            out = exported(path / form, server.teacher, form, path / "ckpt")
            kept = read(out, dtype=None)
            assert {p.dtype for p in kept.parameters()} == {torch.bfloat16} and same(dict(kept.state_dict()), state)


def test_a_peft_adapter_is_the_difference_in_hugging_faces_layout():
    # kills: lora_B of wq left as Meta's; alpha / r in place of alpha
    with folder() as path:
        server = toy_server()
        out = exported(path / "peft", server.teacher, "peft", path)
        about, held = json.loads((out / "adapter_config.json").read_text()), model.read_safetensors(out / "adapter_model.safetensors")
        assert {"peft_type": "LORA", "r": 4, "lora_alpha": 16.0, "target_modules": ["q_proj", "v_proj"],
                "layers_to_transform": [3, 4], "bias": "none"}.items() <= about.items()
        merged = hf_state(SimpleNamespace(config=CONFIG, state_dict=lambda: lora.merged(server.teacher)))
        for name, W in hf_state(server.full).items():
            if re.fullmatch(r"model\.layers\.[34]\.self_attn\.[qv]_proj\.weight", name):
                A, B = (held.pop("base_model.model." + name.replace("weight", f"lora_{m}.weight")) for m in "AB")
                assert off(4 * B @ A, merged[name] - W) < 1e-5, name
        assert not held, f"surplus {list(held)}"


def test_what_cannot_be_exported_is_refused_and_leaves_nothing():
    # kills: a folder of the user's overwritten; PEFT for fewer layers; FedPT's proxy or FedTT's cores tried
    with folder() as path:
        server = toy_server()
        source = meta_folder(path / "ckpt", server.full, tokenizer=True)
        for lm, form, word in ((server.full, "peft", "LoRA"), (server.student, "peft", "hf or meta"),
                               (SimpleNamespace(), "hf", "not a LLaMA"), (server.teacher, "hf", "cannot be written")):
            target = path / "ckpt" / "params.json" / "below" if word == "cannot be written" else path / "new"
            refused(lambda: evaluation.export(lm, target, form, str(source)), word)
        extra = server.full.with_layers({int(i): b for i, b in server.full.layers.items()})
        extra.layers["0"].more = torch.nn.Linear(2, 2)
        refused(lambda: evaluation.export(extra, path / "new", "meta", str(source)), "not a LLaMA")
        assert {p.name for p in path.iterdir()} == {"ckpt"}
        (path / "mine").mkdir()
        (path / "mine" / "x").write_text("x")
        status, out, err = cli("--ckpt", source, "--export", path / "mine", main=evaluation.main)
        assert status == 2 and "not empty" in err and err.count("\n") == 1 and [p.name for p in (path / "mine").iterdir()] == ["x"]


def test_lora_of_another_run_or_of_peft_is_a_start():
    # kills: alpha / r ignored; PEFT's rows not turned; PEFT's LoRA in the emulator; a wrong rank met by an assertion; DoRA read
    with folder() as path:
        there, tokens = toy_server(), random_tokens(2, 9)
        peft = exported(path / "peft", there.teacher, "peft", path)
        run = path / "run"
        run.mkdir()
        torch.save(there.state_dict()["learnt"], run / "lora.pt")
        (run / "config.json").write_text(json.dumps({"rank": 4, "alpha": 16.0}))

        def started(source, **changes):
            here, err = toy_server(False, **changes), io.StringIO()
            with contextlib.redirect_stderr(err):
                lora.start_from(source, here, CONFIG, here.cfg.alpha / here.cfg.rank)
            return here, err.getvalue()
        for source in (run, run / "lora.pt", peft):
            here, err = started(source, alpha=4.0)
            assert off(here.teacher(tokens), there.teacher(tokens)) < 3e-6 and not err, (source, err)
            alike = off(here.student(tokens), there.student(tokens)) < 3e-6
            assert alike == (source is not peft), "the emulator's LoRA comes from a run only"
        for source, adapter, words in ((run, 1, ("layers.3",)), (peft, 1, ("not used", "layers.3")), (peft, 3, ("anew", "layers.2"))):
            here, err = started(source, adapter=adapter, dropout=Fraction(0))
            assert all(w in err for w in words) or source is run, err
            assert off(here.tuned["layers.4.attention.wq.lora_B"], there.tuned["layers.4.attention.wq.lora_B"]) == 0
        refused(lambda: started(peft, rank=2), "--rank", "[4, 48]", "[2, 48]")
        refused(lambda: started(path / "none"), "--init-lora", "none")
        torch.save({"layers.77.attention.wq.lora_A": torch.ones(4, 48)}, run / "lora.pt")
        refused(lambda: started(run), "--init-lora", "layers.77", "another model")
        about = json.loads((peft / "adapter_config.json").read_text())
        (peft / "adapter_config.json").write_text(json.dumps(about | {"use_dora": True}))
        refused(lambda: started(peft), "use_dora")


def test_init_lora_and_export_on_the_command_line():
    # kills: --init-lora not read; --export of the base; fp32 written by default
    with folder() as path, patch.object(train, "evaluate", scored):
        flags = small_run(path)
        meta_folder(path / "ckpt", tiny_lm(vocab_size=1024).to(torch.bfloat16), tokenizer=True)
        assert cli(*flags, "--out", path / "a", "--rounds", 1)[0] == 0
        status, _, err = cli(*flags, "--out", path / "b", "--rounds", 1, "--init-lora", path / "a", "--align-init", 0, "--lr", 0, "--prox", 0)
        a, b = (torch.load(path / n / "lora.pt", weights_only=True) for n in "ab")
        assert status == 0 and all(off(b[n], t) < 1e-6 for n, t in a.items()), err
        assert json.loads((path / "b" / "config.json").read_text())["init_lora"] == str(path / "a")
        status, out, err = cli("--run", path / "a", "--export", path / "hf", main=evaluation.main)
        assert status == 0 and not out, err
        back, (models, _, _) = read(path / "hf", dtype=None), evaluation.models_of_run(path / "a", "cpu", torch.float32)
        assert {p.dtype for p in back.parameters()} == {torch.bfloat16}
        assert same(dict(back.float().state_dict()), {n: t.bfloat16().float() for n, t in lora.merged(models["adapfu"]).items()})
        status, _, err = cli("--run", path / "a", "--export", path / "x", "--model", "adapemu", "--format", "peft", main=evaluation.main)
        assert status == 2 and "hf or meta" in err and not (path / "x").exists()


def needs(*names):
    """Modules that the project itself never needs."""
    try:
        return [importlib.import_module(name) for name in names]
    except ImportError as error:
        raise Skip(f"{error.name} is not installed; see benchmarks/requirements.txt")


def test_transformers_and_peft_compute_the_same_logits():
    # kills: as the tests of the files above, but with the other side's own readers
    transformers, peft = needs("transformers", "peft")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    with folder() as path:
        server, tokens = toy_server(), random_tokens(2, 17)
        source = meta_folder(path / "ckpt", server.full, tokenizer=True)
        for name, lm in server.models().items():
            theirs = transformers.AutoModelForCausalLM.from_pretrained(exported(path / name, lm, "hf", source))
            assert type(theirs).__name__ == "LlamaForCausalLM" and theirs.dtype == torch.float32
            assert off(theirs(tokens).logits, lm(tokens)) < 1e-5 and (theirs(tokens).logits - lm(tokens)).abs().max() < 1e-4, name
        theirs = transformers.AutoModelForCausalLM.from_pretrained(path / "base")
        adapter = exported(path / "peft", server.teacher, "peft", source)
        tuned = peft.PeftModel.from_pretrained(theirs, adapter)
        assert (tuned(tokens).logits - server.teacher(tokens)).abs().max() < 1e-4
        tuned.save_pretrained(path / "again")                       # what PEFT writes is a start too
        here = toy_server(False)
        lora.start_from(path / "again", here, CONFIG, 4.0)
        assert off(here.teacher(tokens), server.teacher(tokens)) < 3e-6


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


def test_curves_read_every_column_of_the_log():
    # kills: bytes of one direction; not cumulative; an empty cell read
    spec = importlib.util.spec_from_file_location("plot", HERE / "benchmarks" / "plot.py")
    plot = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(plot)
    with folder() as path:
        train.write_log(path, [{"round": 1, "client_loss": 2.0, "bytes_down": 3e6, "bytes_up": 1e6, "seconds": 1.0},
                               {"round": 2, "client_loss": 1.0, "bytes_down": 3e6, "bytes_up": 2e6, "seconds": 1.0, "adapfu": 0.5}])
        rows = plot.read_log(path)
        assert plot.exchanged(rows) == ([1, 2], [4, 9]) and plot.column(rows, "adapfu") == ([2], [0.5])
        assert plot.column(rows, "align_kl") == ([], [])
        needs("matplotlib")
        with contextlib.redirect_stdout(io.StringIO()):
            plot.main([str(path), str(path), "--out", str(path / "p.png")])
        assert (path / "p.png").read_bytes()[:4] == b"\x89PNG"


def numbers(text: str) -> set[int]:
    """`3-5, 7` and `4 and 5` -> the numbers meant."""
    spans = re.findall(r"(\d+)(?:[-–](\d+))?", text)
    return {n for a, b in spans for n in range(int(a), int(b or a) + 1)}


def named(source: str, word: str) -> set[int]:
    return {n for found in re.findall(word + r" (\d+(?:(?:, | and |[-–])\d+)*)", source) for n in numbers(found)}


def test_the_readmes_map_of_the_paper_points_at_code_that_says_so():
    # kills: a function renamed; an equation's number changed in the code or in the table; an equation left out
    text = (HERE / "README.md").read_text() if (HERE / "README.md").is_file() else ""
    rows = re.findall(r"^\| (Eq\. [\d–-]+|Algorithm [12](?:, lines? [\d–-]+)?|AdapEmu, AdapFu) \|.*\| `(\w+\.py)`: (.*) \|$", text, re.M)
    if not rows:
        raise Skip("README.md has no map of the paper yet")
    for paper, file, places in rows:
        module = importlib.import_module(file.removesuffix(".py"))
        for place in re.findall(r"`([\w.]+)`", places):
            thing = module
            for part in place.split("."):
                assert hasattr(thing, part), f"README.md: {paper}: {file} has no {place}"
                thing = getattr(thing, part)
            source = inspect.getsource(thing)
            for word, where in (("Eq\\.", "Eq\\."), ("lines?", "[Ll]ines?"), ("Algorithm", "Algorithm")):
                wanted = named(paper, word) if word != "Algorithm" or "line" not in paper else set()
                assert wanted <= named(source, where), f"README.md: {paper}: {place} names {sorted(named(source, where))}"
    covered = {n for paper, *_ in rows for n in named(paper, "Eq\\.")}
    assert covered == set(range(3, 12)) and {"Algorithm 1", "Algorithm 2"} <= {r[0] for r in rows}, covered


# ---- processes, kills, attacks ------------------------------------------------------------------

def free_port() -> str:
    try:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            return str(s.getsockname()[1])
    except OSError as error:
        raise Skip(f"no port can be opened here ({error})") from None


def process(env: dict, argv: list, log: str, change: str):
    """What a process of these tests runs: train.py, after one change of the world around it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)    # ignored in what a shell runs in the background
    os.environ.update(env)
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout, sys.stderr = (os.fdopen(fd, "w", closefd=False, buffering=1) for fd in (1, 2))
    train.evaluate = scored
    if change:
        globals()[change]()
    evaluation.main_guard(lambda: train.main(argv))


def start(log: Path, *argv, change="", **env) -> multiprocessing.Process:
    context = multiprocessing.get_context("forkserver")         # one import of torch for all of them
    context.set_forkserver_preload([__name__, "torch._dynamo"])
    job = context.Process(target=process, args=(env, [str(a) for a in argv], str(log), change))
    job.start()
    return job


def ranks(path: Path, world: int, *argv, change="", own=lambda rank: [], then=lambda jobs: None) -> tuple[list, list]:
    """(exit statuses, outputs) of train.py on so many ranks; `then(jobs)` is done to them once they are started."""
    port, jobs = free_port(), []
    for rank in range(world):
        env = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world,
               "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        jobs.append(start(path / f"log{rank}", *argv, *own(rank), change=change, **{k: str(v) for k, v in env.items()}))
    then(jobs)
    for job in jobs:
        job.join(300)
        if job.is_alive():
            job.kill()
    return [job.exitcode for job in jobs], [(path / f"log{rank}").read_text() for rank in range(world)]


def assert_same_run(run: Path, other: Path):
    assert outcome(run) == outcome(other), f"{outcome(run)}\n{outcome(other)}"
    assert same(*(torch.load(p / "lora.pt", weights_only=True) for p in (run, other)))


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
                statuses, texts = ranks(path, world, *flags, *clients, "--out", run, change="first_rank_is_slow")
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
        statuses, texts = ranks(path, 2, *flags, "--out", path / "run", change="says_what_it_holds",
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
        statuses, texts = ranks(path, 4, *flags, "--out", path / "four", change="second_client_is_very_slow")
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
        statuses, texts = ranks(path, 4, *flags, "--out", path / "run", change="second_client_claims_a_giant")
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
                                    change="lingers_in_the_second_round")
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
import fedbiot, test_all, train
from eval import main_guard
update = fedbiot.Client.update
def dies(self, t, *args):
    if (t, os.environ["TORCHELASTIC_RESTART_COUNT"]) == (1, "0"):
        os.kill(os.getpid(), signal.SIGKILL)
    return update(self, t, *args)
fedbiot.Client.update, train.evaluate = dies, test_all.scored
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
        start(path / "log", *flags, "--out", path / "run", change="killed_within_its_fourth_state").join()
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
        job = start(path / "log", *flags, "--out", path / "run", "--resume", change="disk_is_full")
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


# ---- runner -------------------------------------------------------------------------------------

def main(substring="") -> int:
    counts = Counter()
    for name, test in [(n, f) for n, f in globals().items() if n.startswith("test_") and substring in n]:
        start, reason = time.perf_counter(), ""
        try:
            test()
            verdict = "passed"
        except unittest.SkipTest as skip:
            verdict, reason = "skipped", f": {skip}"
        except (Exception, SystemExit):
            traceback.print_exc()
            verdict = "failed"
        counts[verdict] += 1
        print(f"{verdict:7} {time.perf_counter() - start:6.2f} s  {name}{reason}", flush=True)
    print(f"{counts['passed']} passed, {counts['failed']} failed, {counts['skipped']} skipped")
    return 1 if counts["failed"] else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:2]))
