"""What is promised, one test a promise, in the order of reading: the first failure is the cause.

    python test_all.py [substring]

Each name is a claim; each `# kills:` names a mutation of the code that the test was seen to die of. Oracles are
independent: a slow form, an invariant, arithmetic by hand. No network, no GPU, nothing outside the repository.
"""
import contextlib
import csv
import io
import json
import math
import os
import re
import struct
import subprocess
import sys
import tempfile
import time
import traceback
import unittest
from collections import Counter
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F

import data
import eval as evaluation
import fedbiot
import lora
import model
import train
from model import LM, ModelConfig, UserError

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


def slow_logits(lm: LM, tokens: list[int]) -> torch.Tensor:
    """(T, V) in float64 from LLaMA's definition, head by head, with complex numbers for the rotations.

    Uses nothing of the model but its tensors; LoRA is added to its weight as a dense matrix."""
    c, w = lm.config, {name: t.double() for name, t in lm.state_dict().items()}
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
        h, heads = normed(x, p["attention_norm.weight"]), []
        q, k, v = (h @ p[f"attention.{n}.weight"].T for n in ("wq", "wk", "wv"))
        for a in range(c.n_heads):
            b = a * c.n_kv_heads // c.n_heads                                   # the group that head a reads
            qa, kb = (torch.complex(z[:, 0::2], z[:, 1::2]) * turn
                      for z in (q[:, a * d:a * d + d], k[:, b * d:b * d + d]))
            scores = (qa @ kb.conj().T).real / math.sqrt(d)
            scores[torch.ones(T, T).triu(1).bool()] = -math.inf
            heads.append(scores.softmax(-1) @ v[:, b * d:b * d + d])
        x = x + torch.cat(heads, -1) @ p["attention.wo.weight"].T
        h = normed(x, p["ffn_norm.weight"])
        gate = h @ p["feed_forward.w1.weight"].T
        x = x + (gate * gate.sigmoid() * (h @ p["feed_forward.w3.weight"].T)) @ p["feed_forward.w2.weight"].T
    return normed(x, w["norm.weight"]) @ w["output.weight"].T


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
    # kills: swap w1/w3; rotate (b, a); theta ignored; eps ignored; heads tiled over groups; not causal; gain dropped
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
    # kills: 4 D without the 2/3; ffn_dim_multiplier before the floor; round down to multiple_of
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
    # kills: layer_ids ignored; a kept layer renumbered
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
    # kills: strict=False; no shape check; no count; weights_only=False; header bounds unchecked; gap check dropped
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
        (lying(lambda h: None, tail=b"more"), "4 bytes"),
        (lambda path: (hf_folder(path, lm), (path / "model.safetensors").write_bytes(struct.pack("<Q", 2**63) + b"{}")), "header"),
        (lambda path: (hf_folder(path, lm), (path / "model.safetensors").write_bytes(struct.pack("<Q", 2) + b"[]")), "header"),
        (lambda path: (hf_folder(path, lm), (path / "more.safetensors").write_bytes((path / "model.safetensors").read_bytes())),
         "two files"),
        (indexed('{"weight_map": {"a": "../model.safetensors"}}'), "'../model.safetensors'"),
        (indexed('{"weight_map": {"a": "/etc/passwd"}}'), "/etc/passwd"), (indexed('{"weight_map": {"a": "gone"}}'), "gone"),
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
    # kills: rope_scaling ignored; attention_bias ignored; unknown keys of params.json ignored
    scaled = {"rope_type": "llama3", "factor": 8.0, "rope_theta": 500.0}
    for changes, word in (({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope"), ({"rope_scaling": scaled}, "rope"),
                          ({"rope_parameters": scaled}, "rope"), ({"attention_bias": True}, "attention_bias"),
                          ({"mlp_bias": True}, "mlp_bias"), ({"head_dim": 16}, "head_dim"), ({"model_type": "qwen2"}, "model"),
                          ({"hidden_act": "gelu"}, "hidden_act"), ({"quantization_config": {"bits": 4}}, "quantization"),
                          ({"hidden_size": 50}, "50"), ({"num_key_value_heads": 4}, "n_kv_heads"),
                          ({"num_hidden_layers": 0}, "n_layers"), ({"hidden_size": "x"}, "config.json")):
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
