"""extras/huggingface.py and extras/peft.py: checkpoints and adapters, in and out."""
import contextlib
import io
import itertools
import json
import math
import os
import re
import resource
import shutil
import signal
import struct
from pathlib import Path
from types import SimpleNamespace

import torch

import lora
import model
import train
from extras import huggingface, peft
from model import LM, ModelConfig
from tests.common import (CONFIG, PARAMS, folder, hf_config, hf_folder, hf_state,
                          meta_folder, needs, noisy_lora, off, random, random_tokens, refused, same,
                          tiny_lm, toy_server, with_lora, write_safetensors)
from tests.test_model import pieces, read


# ---- weights ------------------------------------------------------------------------------------

def test_hugging_face_folders_load_bit_for_bit():
    # kills: no permutation of q/k; wk permuted with n_heads; index ignored; rope_parameters
    # ignored; lm_head needed when tied; files that no index names read
    for kind, shards, index, version, tied in (
            ("safetensors", 1, True, 4, False), ("safetensors", 3, True, 5, False),
            ("safetensors", 2, False, 5, True), ("bin", 1, True, 4, True),
            ("bin", 3, True, 4, False), ("bin", 2, False, 5, False)):
        lm = tiny_lm(tied=tied)
        with folder() as path:
            found = read(hf_folder(path, lm, kind, shards, index, version))
            for name in (f"unrelated.{kind}", "training_args.bin", "adapter_model.safetensors",
                         "._model.safetensors", "._pytorch_model.bin"):         # a Mac's companions
                (path / name).write_bytes(b"x" * 40)
            assert same(read(path).state_dict(), lm.state_dict()), (kind, shards, index)
        with folder() as path:
            for file in hf_folder(path, lm, kind, 2, False).glob("*model*"):    # other names
                file.rename(path / file.name.replace("model", "weights").replace("-of-", "_"))
                (path / f"._{file.name}").write_bytes(b"x" * 40)
            assert same(read(path).state_dict(), lm.state_dict())
        assert found.config == lm.config and same(found.state_dict(), lm.state_dict())
        assert (found.output.weight is found.tok_embeddings.weight) == tied
        assert found.stored == torch.float32


def test_the_tensors_names_decide_whose_layout_it_is():
    # kills: the file's ending decides; the folder's configuration decides
    lm = tiny_lm()
    meta, theirs = dict(lm.state_dict()), hf_state(lm)
    for name, state in itertools.product(("pytorch_model.bin", "model.safetensors",
                                          "consolidated.00.pth"), (meta, theirs)):
        for about in ("config.json", "params.json"):
            with folder() as path:
                text = hf_config(CONFIG) if about == "config.json" else json.dumps(PARAMS)
                (path / about).write_text(text)
                state = {n: t.clone() for n, t in state.items()}
                write = write_safetensors if "safe" in name else lambda p, s: torch.save(s, p)
                write(path / name, state)
                assert same(read(path).state_dict(), lm.state_dict()), (name, about, [*state][0])


def test_a_mixture_of_naming_schemes_or_another_scheme_is_refused_by_name():
    # kills: unknown names passed through; part of a file translated
    lm = tiny_lm()
    theirs, q = hf_state(lm), "layers.0.attention.wq.weight"
    mixed = {n: t for n, t in theirs.items() if "layers.0.self_attn.q_proj" not in n}
    mixed[q] = lm.state_dict()[q]
    bare = {n.removeprefix("model."): t for n, t in theirs.items() if n != "lm_head.weight"}
    gpt = {f"transformer.h.{i}": t for i, t in enumerate(theirs.values())}
    biased = theirs | {"model.layers.0.self_attn.q_proj.bias": torch.ones(48)}
    for state, word in ((mixed, q), (bare, "embed_tokens"), (gpt, "transformer.h.0"),
                        (biased, "q_proj.bias"), (theirs | {"score.bias": random(2)}, "score")):
        for name in ("pytorch_model.bin", "model.safetensors", "consolidated.00.pth"):
            with folder() as path:
                (path / "config.json").write_text(hf_config(CONFIG))
                write = write_safetensors if "safe" in name else lambda p, s: torch.save(s, p)
                write(path / name, {n: t.clone() for n, t in state.items()})
                refused(lambda: read(path), name, word, "surplus")


def test_hugging_faces_names_are_not_split_over_metas_shards():
    # kills: q reordered by its part's rows, or not at all
    lm, by_columns = tiny_lm(vocab_size=96), ("o_proj.weight", "down_proj.weight", "tokens.weight")

    def halved(state, part):
        state.clear()
        for name, t in hf_state(lm).items():
            axis = 1 if name.endswith(by_columns) else 0
            state[name] = t if "norm" in name else t.chunk(2, axis)[part].clone()
    with folder() as path:
        meta_folder(path, lm, 2, edit=halved)
        refused(lambda: read(path), "q_proj", "[24, 48]", "[48, 48]")


def test_safetensors_are_read_at_any_alignment_and_in_every_float():
    # kills: no clone of misaligned bytes; BF16 read as F16
    for pad, dtype in itertools.product(range(4), (torch.float32, torch.float16, torch.bfloat16)):
        with folder() as path:
            state = {"a": random(3, 5).to(dtype), "b": random(7).half(),
                     "empty": torch.zeros(0, 4), "c": random(2, 2)}
            write_safetensors(path / "x", state, pad=pad)
            assert same(huggingface.read_safetensors(path / "x"), state), (pad, dtype)
            huggingface.write_safetensors(path / "y", state)
            assert same(huggingface.read_safetensors(path / "y"), state)


def test_damaged_hugging_face_folders_are_refused_by_name():
    # kills: a header's gaps or tail unchecked; ../ in an index; half a set taken for whole
    lm, q, size = tiny_lm(), "model.layers.0.self_attn.q_proj.weight", 48 * 48 * 4

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

    def replaced(blob, kind="safetensors", name="model.safetensors"):
        return lambda path: (hf_folder(path, lm, kind), (path / name).write_bytes(blob))

    def without(name, **how):
        return lambda path: (hf_folder(path, lm, **how), (path / name).unlink())

    def gap(header):
        for entry in header.values():
            start, end = entry.get("data_offsets", (0, 0))
            if start:
                entry["data_offsets"] = [start + 4, end + 4]
    cases = [
        (lying(lambda h: h[q].update(data_offsets=[0, 10**12])), "q_proj"),
        (lying(lambda h: h[q].update(data_offsets=[-size, 0])), "q_proj"),
        (lying(lambda h: h[q].update(shape=[48, 47])), "q_proj"),
        (lying(lambda h: h[q].update(shape=[-48, -48])), "q_proj"),
        (lying(lambda h: h[q].update(dtype="F64")), "F64"),
        (lying(lambda h: h[q].pop("shape")), "header"),
        (lying(lambda h: h[q].update(data_offsets=h["lm_head.weight"]["data_offsets"])),
         "truncated or damaged"),
        (lying(lambda h: None, tail=b"more"), "4 bytes"),
        (lying(gap, tail=b"more"), "truncated or damaged"),
        (replaced(struct.pack("<Q", 2**63) + b"{}"), "header"),
        (replaced(struct.pack("<Q", 2) + b"[]"), "header"),
        (replaced(struct.pack("<Q", 200_000) + b"[" * 200_000), "recursion"),
        (replaced(b""), "header"),
        (replaced(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"), "git lfs pull"),
        (replaced(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "bin",
                  "pytorch_model.bin"), "git lfs pull", "pytorch_model.bin"),
        (indexed('{"weight_map": {"a": "../model.safetensors"}}'), "'../model.safetensors'"),
        (indexed('{"weight_map": {"a": "/etc/passwd"}}'), "/etc/passwd", "not a file"),
        (indexed('{"weight_map": {"a": "gone"}}'), "gone", "complete"),
        (indexed('{"weight_map": {"a": 3}}'), "3"), (indexed("[]"), "weight_map"),
        (indexed('{"weight_map": {"a": []}}'), "weight_map"), (indexed("{"), "weight_map"),
        (without("model-00002-of-00002.safetensors", shards=2), "00002-of-00002", "complete"),
        (without("model-00002-of-00002.safetensors", shards=2, index=False), "2 files", "complete"),
        (without("pytorch_model-00001-of-00003.bin", kind="bin", shards=3, index=False),
         "3 files", "found 2", "complete"),
        (lambda path: hf_folder(path, lm, edit=lambda s: s.update(
            {"model.embed_tokens.weight": random(98, 48)})), "tok_embeddings", "[98, 48]")]
    for make, *words in cases:
        with folder() as path:
            make(path)
            refused(lambda: read(path), *words)


# ---- two sources of one thing -------------------------------------------------------------------

def other(lm: LM) -> LM:
    """A model that differs in one number of one layer."""
    twin = tiny_lm(tied=lm.config.tied)
    twin.layers["3"].feed_forward.w2.weight[5, 7] += 1e-3
    return twin


def test_two_sets_of_weights_must_hold_the_same_numbers():
    # kills: one preferred in silence; the files compared by name or size
    lm, kinds = tiny_lm(), ("safetensors", "bin")

    def meta(path, lm):
        meta_folder(path, lm)

    def hf(*args, **how):
        return lambda path, lm: hf_folder(path, lm, *args, **how)

    def single(path, lm):
        write_safetensors(path / "model.safetensors", hf_state(lm))

    def metas_names(path, lm):
        write_safetensors(path / "consolidated.safetensors", lm.state_dict())
    for one, two in ((hf(kinds[0]), hf(kinds[1])), (hf(kinds[0], shards=2), single),
                     (hf(kinds[1], shards=2), hf(kinds[0])), (hf(kinds[0]), meta),
                     (hf(kinds[0], shards=2, index=False), hf(kinds[1], shards=3)),
                     (hf(kinds[0]), metas_names), (hf(kinds[0], shards=2), hf(kinds[0], shards=3))):
        with folder() as path, contextlib.redirect_stderr(io.StringIO()) as noise:
            one(path, lm), two(path, lm)
            assert same(read(path).state_dict(), lm.state_dict()) and not noise.getvalue()
            two(path, other(lm))
            refused(lambda: read(path), "layers.3", "other numbers", "remove one")
            assert off(read(path, [0, 1]).tok_embeddings.weight, lm.tok_embeddings.weight) == 0


def test_half_of_a_second_set_does_not_complete_the_first():
    # kills: two incomplete sets read as one model
    lm = tiny_lm()
    with folder() as path:
        for kind, name in (("safetensors", "model.norm.weight"), ("bin", "lm_head.weight")):
            hf_folder(path, lm, kind, edit=lambda s: s.pop(name))
        refused(lambda: read(path), "two sets", "model.safetensors", "norm.weight")


def test_a_tied_models_head_is_absent_or_its_embedding():
    # kills: a head that differs dropped in silence; a copy of the embedding refused
    lm = tiny_lm(tied=True)
    table = lm.tok_embeddings.weight
    for kind, names in itertools.product(("safetensors", "bin"), ("hf", "meta")):
        for head, fine in ((table.clone(), True), (table + 1e-6 * random(97, 48), False)):
            def with_head(state):
                state["lm_head.weight"] = head
                if names == "meta":
                    state.clear()
                    state.update(lm.state_dict() | {"output.weight": head})
            with folder() as path:
                hf_folder(path, lm, kind, edit=with_head)
                if fine:
                    found = read(path)
                    assert found.output.weight is found.tok_embeddings.weight
                    assert same(found.state_dict(), lm.state_dict())
                else:
                    refused(lambda: read(path), "other numbers", "output", "tok_embeddings")


def test_two_configurations_must_say_the_same():
    # kills: params.json preferred in silence, or config.json; old params without a vocabulary
    lm = tiny_lm()
    with folder() as path:
        hf_folder(path, lm), meta_folder(path, lm)
        for params, config, word in (
                ({}, {}, ""), ({"vocab_size": -1}, {}, ""), ({"norm_eps": 1e-5}, {}, "norm_eps"),
                ({}, {"num_key_value_heads": 6}, "n_kv_heads"),
                ({}, {"rope_theta": 1e4}, "rope_theta"), ({"moe": 1}, {}, "moe"),
                ({}, {"model_type": "qwen2"}, "qwen2")):
            (path / "params.json").write_text(json.dumps(PARAMS | params))
            (path / "config.json").write_text(hf_config(CONFIG, **config))
            if word:
                refused(lambda: ModelConfig.read(path), word)
            else:
                assert ModelConfig.read(path) == CONFIG
        (path / "params.json").write_text(json.dumps(PARAMS))
        (path / "config.json").write_text("{}")
        assert ModelConfig.read(path) == CONFIG


# ---- configuration ------------------------------------------------------------------------------

def test_what_is_not_a_plain_llama_is_refused_by_name():
    # kills: rope_scaling or attention_bias ignored; partial rotation ignored; a string as bool;
    # attention that also looks ahead (is_causal), or at a window
    scaled = {"rope_type": "llama3", "factor": 8.0, "rope_theta": 500.0}
    half = {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5}
    for changes, word in (
            ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope"),
            ({"rope_scaling": scaled}, "rope"), ({"rope_parameters": scaled}, "rope"),
            ({"rope_parameters": half}, "partial_rotary_factor"),
            ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "rope"),
            ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, "rope_theta"),
            ({"attention_bias": True}, "attention_bias"), ({"mlp_bias": True}, "mlp_bias"),
            ({"head_dim": 16}, "head_dim"), ({"model_type": "qwen2"}, "model"),
            ({"hidden_act": "gelu"}, "hidden_act"), ({"sliding_window": 512}, "sliding_window"),
            ({"quantization_config": {"bits": 4}}, "quantization"), ({"hidden_size": 50}, "50"),
            ({"num_key_value_heads": 4}, "n_kv_heads"), ({"num_hidden_layers": 0}, "n_layers"),
            ({"num_hidden_layers": 10**9}, "n_layers"), ({"hidden_size": "x"}, "config.json"),
            ({"tie_word_embeddings": "false"}, "tie_word_embeddings"),
            ({"is_causal": False}, "is_causal"),
            ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
            ({"rms_norm_eps": -1}, "norm_eps"), ({"num_attention_heads": 0}, "config.json")):
        with folder() as path:
            (path / "config.json").write_text(hf_config(CONFIG, **changes))
            refused(lambda: ModelConfig.read(path), word, "config.json")
    for text in ("{", "[]", "null", "[" * 200_000, "3", '{"model_type": "llama"}'):
        with folder() as path:
            (path / "config.json").write_text(text)
            refused(lambda: ModelConfig.read(path), "config.json")


def test_configurations_of_either_transformers_are_read():
    # kills: swish refused, which is silu; a null taken for a value
    for version, changes in itertools.product((4, 5), (
            {}, {"hidden_act": "swish"}, {"head_dim": None}, {"torch_dtype": "float16"},
            {"rope_scaling": {"rope_type": "default"}}, {"sliding_window": None})):
        with folder() as path:
            (path / "config.json").write_text(hf_config(CONFIG, version, **changes))
            assert ModelConfig.read(path) == CONFIG, (version, changes)


def test_params_json_gives_back_every_width():
    # kills: multiple_of 256 for all; the half that keeps the multiplier's product above the width;
    # n_kv_heads left out
    widths = (1, 2, 100, 127, 128, 129, 168, 256, 1000)
    for dim, hidden in [(48, n) for n in widths] + [(16, 51), (4096, 11008), (5120, 13824),
                                                    (8192, 28672)]:
        c = ModelConfig(dim, 5, 8, 2, 97, hidden, 1e-6, 5e5)
        p = json.loads(json.dumps(huggingface.to_params(c)))
        assert ModelConfig.from_params(p) == c
        assert huggingface.from_config(json.loads(json.dumps(huggingface.to_config(c)))) == c
        assert (p["multiple_of"] == 256) == (hidden in (256, 11008, 13824)), "as published"


def test_ids_that_end_a_text_are_the_tokenizers_and_the_sources():
    # kills: generation_config.json ignored; config.json's added to it; the tokenizer's left out; an
    # id that no tensor can hold
    with folder() as path:
        hf_folder(path, tiny_lm())
        (path / "tokenizer.model").write_bytes(pieces())            # EOS 2
        for config, generation, ends in ((None, None, (2,)), (2, None, (2,)), (2, {}, (2,)),
                                         ([2, 9], None, (2, 9)), (7, None, (2, 7)),
                                         ([7], [2, 9, 11], (2, 9, 11)), ([5], 8, (2, 8))):
            (path / "config.json").write_text(hf_config(CONFIG, eos_token_id=config))
            text = {} if generation == {} else {"eos_token_id": generation}
            (path / "generation_config.json").write_text(json.dumps(text))
            assert model.load_tokenizer(path, CONFIG).ends == ends, (config, generation)
        for odd in ("</s>", -1, [2, "x"], {"a": 1}, 2.0, True, 2**70):
            (path / "generation_config.json").write_text(json.dumps({"eos_token_id": odd}))
            refused(lambda: model.load_tokenizer(path, CONFIG), "eos_token_id", "generation_config")


# ---- export -------------------------------------------------------------------------------------

def exported(path: Path, lm: LM, form: str, source: Path) -> Path:
    before = {p.name for p in path.parent.iterdir()}
    with contextlib.redirect_stderr(io.StringIO()):
        huggingface.export(lm, path, form, str(source))
    assert {p.name for p in path.parent.iterdir()} == before | {path.name}
    return path


def meta_source(path: Path, lm: LM, **tokens) -> Path:
    meta_folder(path, lm)
    (path / "tokenizer.model").write_bytes(pieces(**tokens))
    return path


def merged_by_hand(lm: LM) -> dict:
    """W + 4 B A in float64, by Meta's names."""
    own = lora.lora_tensors(lm)
    w = {n: t.double() for n, t in lm.state_dict().items() if ".lora_" not in n}
    for name in [n for n in own if n.endswith("lora_A")]:
        stem = name.removesuffix("lora_A")
        w[stem + "weight"] += 16 / 4 * own[stem + "lora_B"].double() @ own[name].double()
    return w


def test_merging_sums_in_fp32_and_numbers_the_layers_anew():
    # kills: B A cast to bf16 before the sum; layers keep the full model's numbers; the model merged
    full = tiny_lm().bfloat16()
    lm = noisy_lora(with_lora(full), std=0.05)
    part = lm.with_layers({i: lm.layers[str(i)] for i in (0, 3)})
    before, state, own = part.state_dict(), huggingface.merged(part), lora.lora_tensors(lm)
    assert {n.split(".")[1] for n in state if n.startswith("layers.")} == {"0", "1"}
    assert not any(".lora_" in n for n in state) and same(before, part.state_dict())
    for kind in ("wq", "wv"):
        stem = f"layers.3.attention.{kind}."
        delta = 4 * own[stem + "lora_B"].double() @ own[stem + "lora_A"].double()
        exact = before[stem + "weight"].double() + delta
        found = state[f"layers.1.attention.{kind}.weight"]
        best = (exact.bfloat16().double() - exact).abs()
        assert found.dtype == torch.bfloat16
        assert ((found.double() - exact).abs() <= best * 1.01 + 1e-6).all(), "near as bf16 can be"
    wk = "layers.{}.attention.wk.weight"
    assert torch.equal(state[wk.format(1)], before[wk.format(3)])


def test_exported_folders_hold_the_merged_model():
    # kills: scale forgotten; layers not renumbered; q's rows left as Meta's; a tied head written;
    # the model itself merged
    tokens = random_tokens(2, 13)
    for tied in (False, True):
        with folder() as path:
            server = toy_server()
            full = server.full if not tied else tiny_lm(tied=True)
            if tied:
                server = SimpleNamespace(models=lambda: {"base": full})
            source = meta_source(path / "ckpt", full)
            for (name, lm), form in itertools.product(server.models().items(), ("hf", "meta")):
                before = lm(tokens)
                back = read(exported(path / f"{name}-{form}", lm, form, source))
                assert off(back(tokens), before) < 3e-6, (name, form)
                assert torch.equal(lm(tokens), before), "the model itself is left as it was"
                assert list(back.layers) == list("0123" if name == "adapemu" else "01234")
            held = huggingface.read_safetensors(path / "base-hf" / "model.safetensors")
            assert ("lm_head.weight" in held) != tied
            if not tied:                            # Hugging Face's rows by hand
                w = merged_by_hand(server.teacher)
                theirs = hf_state(SimpleNamespace(config=CONFIG, state_dict=lambda: w))
                held = huggingface.read_safetensors(path / "adapfu-hf" / "model.safetensors")
                assert all(off(held[n], t) < 1e-6 for n, t in theirs.items())


def test_an_export_keeps_the_matrices_dtype_and_says_so():
    # kills: torch_dtype of the last norm; fp32 written for a bf16 checkpoint
    with folder() as path:
        lm = tiny_lm().bfloat16()
        source = meta_source(path / "ckpt", lm)
        for norms in (torch.bfloat16, torch.float32):
            state = {n: t.to(norms) if "norm" in n else t for n, t in lm.state_dict().items()}
            torch.save(state, source / "consolidated.00.pth")
            stored = read(source, dtype=None)
            for form in ("hf", "meta"):
                out = exported(path / f"{form}{norms}", stored, form, source)
                assert same(dict(read(out, dtype=None).state_dict()), state)
                if form == "hf":
                    about = json.loads((out / "config.json").read_text())
                    assert about["torch_dtype"] == "bfloat16"


def test_an_export_has_what_generation_needs_whatever_the_ids_are():
    # kills: ids 1 and 2 written for all; pieces <s> and </s> for all; no generation_config.json
    odd = {"bos_id": 5, "eos_id": 0, "unk_id": 1, "bos_piece": "<go>", "eos_piece": "<stop>"}
    with folder() as path:
        source = meta_source(path / "ckpt", tiny_lm(), **odd)
        (source / "tokenizer").mkdir()                              # a folder of somebody's
        out = exported(path / "hf", tiny_lm(), "hf", source)
        for name in ("config.json", "generation_config.json"):
            about = json.loads((out / name).read_text())
            assert (about["bos_token_id"], about["eos_token_id"]) == (5, 0), name
        about = json.loads((out / "tokenizer_config.json").read_text())
        assert (about["bos_token"], about["eos_token"]) == ("<go>", "<stop>")
        assert about["unk_token"] == "<unk>" and about["add_bos_token"] is True
        assert about["add_prefix_space"] is True
        for made in (out, exported(path / "meta", tiny_lm(), "meta", source)):
            assert (made / "tokenizer.model").read_bytes() == pieces(**odd)


def test_an_export_says_whether_its_tokenizer_begins_a_text_with_a_space():
    # kills: transformers' default, a space, for a tokenizer that sets none before a text
    with folder() as path:
        for given in (False, True):
            source = meta_source(path / f"{given}", tiny_lm(), add_dummy_prefix=given)
            out = exported(path / f"{given}-out", tiny_lm(), "hf", source)
            about = json.loads((out / "tokenizer_config.json").read_text())
            assert about["add_prefix_space"] is given


FACTS = {"config.json": {"max_position_embeddings": 777, "eos_token_id": [2, 9], "pad_token_id": 4,
                         "initializer_range": 0.03, "torch_dtype": "float64", "dtype": "float64"},
         "generation_config.json": {"eos_token_id": [2, 11], "temperature": 0.6, "pad_token_id": 4},
         "tokenizer_config.json": {"tokenizer_class": "LlamaTokenizer", "chat_template": "{{ 1 }}"},
         "special_tokens_map.json": {"pad_token": "</s>"}, "added_tokens.json": {}}


def hugging_face_source(path: Path, lm: LM) -> Path:
    hf_folder(path, lm)
    for name, facts in FACTS.items():
        own = json.loads(hf_config(CONFIG, 5)) if name == "config.json" else {}
        (path / name).write_text(json.dumps(own | facts))
    (path / "tokenizer.model").write_bytes(pieces())
    (path / "chat_template.jinja").write_text("{{ 2 }}")
    return path


def test_a_hugging_face_sources_own_facts_survive():
    # kills: context length 4096 for all; extra EOS ids dropped; chat template, special tokens or
    # generation settings dropped; the source's dtype kept
    with folder() as path:
        lm = tiny_lm()
        out = exported(path / "hf", lm, "hf", hugging_face_source(path / "ckpt", lm))
        about = json.loads((out / "config.json").read_text())
        expected = {"max_position_embeddings": 777, "pad_token_id": 4, "initializer_range": 0.03,
                    "eos_token_id": [2, 11], "bos_token_id": 1, "torch_dtype": "float32"}
        assert expected.items() <= about.items() and "dtype" not in about, about
        generation = json.loads((out / "generation_config.json").read_text())
        assert generation == {"eos_token_id": [2, 11], "temperature": 0.6, "pad_token_id": 4,
                              "bos_token_id": 1}
        for name in ("special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
                     "tokenizer.model"):
            assert (out / name).read_bytes() == (path / "ckpt" / name).read_bytes(), name
        tokens = json.loads((out / "tokenizer_config.json").read_text())
        assert (tokens["chat_template"], tokens["add_bos_token"]) == ("{{ 1 }}", True)
        for name in ("tokenizer.json", "tokenizer_config.json"):        # then all is as it was
            (path / "ckpt" / name).write_text('{"a": 1}')
        more = exported(path / "more", lm, "hf", path / "ckpt")
        assert all((more / n).read_text() == '{"a": 1}' for n in ("tokenizer.json",
                                                                  "tokenizer_config.json"))
        assert ModelConfig.read(out) == CONFIG and model.load_tokenizer(out, CONFIG).ends == (2, 11)
        again = exported(path / "again", lm, "hf", out)
        for name in os.listdir(out):
            assert (again / name).read_bytes() == (out / name).read_bytes(), name


def test_a_sources_facts_do_not_contradict_what_is_written():
    # kills: a type for each layer of the source beside fewer layers; the empty tokens, the class
    # and the lack of BOS that old tokenizer_config.json have
    with folder() as path:
        source = hugging_face_source(path / "hf", tiny_lm())
        config = json.loads((source / "config.json").read_text())
        config["layer_types"] = ["full_attention"] * CONFIG.n_layers
        (source / "config.json").write_text(json.dumps(config))
        (source / "tokenizer_config.json").write_text(json.dumps(
            {"tokenizer_class": "LLaMATokenizer", "bos_token": "", "eos_token": "", "unk_token": "",
             "add_bos_token": False, "add_eos_token": True, "model_max_length": 99}))
        out = exported(path / "out", model.load(source, layer_ids=[0, 3])[0], "hf", source)
        assert "layer_types" not in json.loads((out / "config.json").read_text())
        about = json.loads((out / "tokenizer_config.json").read_text())
        expected = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>",
                    "unk_token": "<unk>", "add_bos_token": True, "add_eos_token": False,
                    "model_max_length": 99}
        assert about | expected == about, about


def test_a_peft_adapter_is_the_difference_in_hugging_faces_layout():
    # kills: lora_B of wq left as Meta's; alpha / r in place of alpha
    with folder() as path:
        server = toy_server()
        out = exported(path / "peft", server.teacher, "peft", path)
        about = json.loads((out / "adapter_config.json").read_text())
        held = huggingface.read_safetensors(out / "adapter_model.safetensors")
        assert {"peft_type": "LORA", "r": 4, "lora_alpha": 16.0, "bias": "none",
                "target_modules": ["q_proj", "v_proj"],
                "layers_to_transform": [3, 4]}.items() <= about.items()
        w = merged_by_hand(server.teacher)
        merged = hf_state(SimpleNamespace(config=CONFIG, state_dict=lambda: w))
        for name, W in hf_state(server.full).items():
            if re.fullmatch(r"model\.layers\.[34]\.self_attn\.[qv]_proj\.weight", name):
                stem = "base_model.model." + name.removesuffix("weight")
                A, B = (held.pop(f"{stem}lora_{m}.weight") for m in "AB")
                assert off(4 * B @ A, merged[name] - W) < 1e-5, name
        assert not held, f"surplus {list(held)}"


@contextlib.contextmanager
def disk_of(size: int):
    """No file may grow beyond `size` bytes: a write fails as on a full disk."""
    handler, limits = (signal.signal(signal.SIGXFSZ, signal.SIG_IGN),
                       resource.getrlimit(resource.RLIMIT_FSIZE))
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


def test_what_cannot_be_exported_is_refused_and_leaves_nothing():
    # kills: a folder of the user's overwritten or removed; half a folder on a full disk; PEFT for
    # fewer layers; FedPT's proxy or FedTT's cores tried
    with folder() as path:
        server = toy_server()
        source = meta_source(path / "ckpt", server.full)
        for name in ("mine", "new.part"):
            (path / name).mkdir()
            (path / name / "x").write_text("the user's")
        extra = tiny_lm()
        extra.layers["0"].more = torch.nn.Linear(2, 2)
        for lm, form, name, word in (
                (server.full, "peft", "new", "LoRA"), (server.student, "peft", "new", "hf or meta"),
                (SimpleNamespace(), "hf", "new", "not a LLaMA"),
                (extra, "meta", "new", "not a LLaMA"),
                (server.teacher, "hf", "ckpt/params.json/below", "cannot be written"),
                (server.teacher, "hf", "mine", "another name"),
                (server.teacher, "meta", "mine", "another name"),
                (server.teacher, "peft", "mine", "another name")):
            refused(lambda: huggingface.export(lm, path / name, form, str(source)), word)
        for form, size in itertools.product(("hf", "meta", "peft"), (10, 3000)):
            with disk_of(size):
                refused(lambda: huggingface.export(server.teacher, path / "new", form, str(source)),
                        "cannot be written")
        assert {p.name for p in path.iterdir()} == {"ckpt", "mine", "new.part"}
        assert all([p.name for p in (path / n).iterdir()] == ["x"] for n in ("mine", "new.part"))


# ---- with the other side's own readers ----------------------------------------------------------

def quiet_transformers():
    transformers, = needs("transformers")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers


def test_transformers_and_peft_compute_the_same_logits():
    # kills: as the tests of the files above, but with the other side's own readers
    transformers, (theirs_peft,) = quiet_transformers(), needs("peft")
    with folder() as path:
        server, tokens = toy_server(), random_tokens(2, 17)
        source = meta_source(path / "ckpt", server.full)
        for name, lm in server.models().items():
            out = exported(path / name, lm, "hf", source)
            theirs = transformers.AutoModelForCausalLM.from_pretrained(out)
            assert type(theirs).__name__ == "LlamaForCausalLM" and theirs.dtype == torch.float32
            assert (theirs(tokens).logits - lm(tokens)).abs().max() < 1e-4, name
        theirs = transformers.AutoModelForCausalLM.from_pretrained(path / "base")
        adapter = exported(path / "peft", server.teacher, "peft", source)
        tuned = theirs_peft.PeftModel.from_pretrained(theirs, adapter)
        assert (tuned(tokens).logits - server.teacher(tokens)).abs().max() < 1e-4
        tuned.save_pretrained(path / "again")                   # what PEFT writes is a start too
        here = toy_server(False)
        peft.start_from(path / "again", here, CONFIG, 4.0)
        assert off(here.teacher(tokens), server.teacher(tokens)) < 3e-6


def test_peft_adapters_of_other_kinds_are_refused():
    # kills: a kind that changes the base or the scale read as plain
    transformers, (theirs_peft,) = quiet_transformers(), needs("peft")
    more = {"olora": {"init_lora_weights": "olora"}, "pissa": {"init_lora_weights": "pissa"},
            "rank": {"rank_pattern": {"layers.3.self_attn.q_proj": 2}}, "dora": {"use_dora": True},
            "alpha": {"alpha_pattern": {"q_proj": 3}}, "rslora": {"use_rslora": True},
            "bias": {"bias": "lora_only"}, "saved": {"modules_to_save": ["lm_head"]},
            "lora_bias": {"lora_bias": True}, "plain": {},
            "gaussian": {"init_lora_weights": "gaussian"}}
    with folder() as path:
        source = meta_source(path / "ckpt", tiny_lm())
        out = exported(path / "hf", tiny_lm(), "hf", source)
        for name, options in more.items():
            theirs = transformers.AutoModelForCausalLM.from_pretrained(out)
            options = {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"],
                       "task_type": "CAUSAL_LM"} | options
            tuned = theirs_peft.get_peft_model(theirs, theirs_peft.LoraConfig(**options))
            tuned.save_pretrained(path / name)
            if name in ("plain", "gaussian"):
                peft.read_peft(path / name, CONFIG)
            else:
                refused(lambda: peft.read_peft(path / name, CONFIG), "--init-lora", name)


def test_generate_gives_the_text_that_transformers_gives_to_the_last_token():
    # kills: no ids in the export; the source's extra EOS ids not looked at; </s> kept in a text
    transformers, lm = quiet_transformers(), tiny_lm(3)
    lm.output.weight[[0, 2, 11]] *= 2.5                     # these end most of the texts below
    odd = {"bos_id": 5, "eos_id": 0, "unk_id": 1, "bos_piece": "<go>", "eos_piece": "<stop>"}
    texts = ["one two three", "apples and pears", "the box", "pears", "two two two apples"]
    with folder() as path:
        for source in (meta_source(path / "meta", lm), meta_source(path / "odd", lm, **odd),
                       hugging_face_source(path / "hf", lm)):
            ours, tokenizer = model.load(source)
            prompts = [[tokenizer.bos, *tokenizer.encode(text)] for text in texts]
            found = model.generate(ours, prompts, 20, tokenizer.ends)
            assert 1 < len({len(ids) for ids in found}) and min(map(len, found)) < 20, found
            out = exported(path / f"{source.name}-out", ours, "hf", source)
            for ids, theirs in zip(found, theirs_generate(transformers, out, texts, prompts)):
                unknown = tokenizer.pieces.unk_id() in ids          # is printed in another way
                assert theirs == (ids, theirs[1] if unknown else tokenizer.decode(ids)), source


def theirs_generate(transformers, out: Path, texts, prompts) -> list:
    """(new ids without the last if it ends the text, as text) of each, by their own tokenizer."""
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out)
    tokenizer, results = transformers.AutoTokenizer.from_pretrained(out), []
    ends = theirs.generation_config.eos_token_id
    for text, prompt in zip(texts, prompts):
        given = tokenizer(text, return_tensors="pt")
        assert given.input_ids[0].tolist() == prompt, text
        ids = theirs.generate(**given, max_new_tokens=20, do_sample=False, pad_token_id=3)
        ids = ids[0, len(prompt):].tolist()
        ids = ids[:-1] if ids[-1] in (ends if isinstance(ends, list) else [ends]) else ids
        results.append((ids, tokenizer.decode(ids, skip_special_tokens=True)))
    return results


# ---- --init-lora --------------------------------------------------------------------------------

def a_run(path: Path, server, **about) -> Path:
    """A finished run's folder, of rank 4 and alpha 16 unless `about` says otherwise."""
    path.mkdir()
    torch.save(server.state_dict()["learnt"], path / "lora.pt")
    config = train.as_json(train.parse(["--rank", "4"])) | about
    (path / "config.json").write_text(json.dumps(config))
    return sealed(path)


def sealed(path: Path) -> Path:
    """The folder's files as they are now are the run's own."""
    cfg = train.parse(["--rank", "4"])                      # names the checkpoint
    made_of = train.made_of(path) | train.checkpoints(cfg)
    (path / "summary.json").write_text(json.dumps({"made_of": made_of}))
    return path


def started(source, **changes):
    here, err = toy_server(False, **changes), io.StringIO()
    with contextlib.redirect_stderr(err):
        peft.start_from(source, here, CONFIG, here.cfg.alpha / here.cfg.rank)
    return here, err.getvalue()


def test_lora_of_another_run_or_of_peft_is_a_start():
    # kills: alpha / r ignored; PEFT's rows not turned; PEFT's LoRA in the emulator; notes left out
    with folder() as path:
        there, tokens = toy_server(), random_tokens(2, 9)
        adapter = exported(path / "peft", there.teacher, "peft", path)
        run = a_run(path / "run", there)
        for source in (run, run / "lora.pt", adapter):
            here, err = started(source, alpha=4.0)
            assert off(here.teacher(tokens), there.teacher(tokens)) < 3e-6 and not err, source
            alike = off(here.student(tokens), there.student(tokens)) < 3e-6
            assert alike == (source is not adapter), "the emulator's LoRA comes from a run only"
        name = "layers.4.attention.wq.lora_B"
        for source, layers, words in ((run, 1, ()), (adapter, 1, ("not used", "layers.3")),
                                      (adapter, 3, ("anew", "layers.2"))):
            here, err = started(source, adapter=layers, dropout=0.0)
            assert all(w in err for w in words), err
            assert torch.equal(here.tuned[name], there.tuned[name])


def test_what_cannot_be_a_start_is_refused_and_nothing_is_copied():
    # kills: a wrong rank met by an assertion; a lora.pt whose configuration says another rank
    with folder() as path:
        there = toy_server()
        adapter = exported(path / "peft", there.teacher, "peft", path)
        run = a_run(path / "run", there)
        refused(lambda: started(adapter, rank=2), "--rank", "[4, 48]", "[2, 48]")
        refused(lambda: started(path / "none"), "--init-lora", "none")
        refused(lambda: started(path), "--init-lora", "lora.pt")
        shutil.copy(run / "lora.pt", adapter / "lora.pt")
        refused(lambda: started(adapter), "both")
        for i, about in enumerate(({"rank": 2}, {"alpha": "x"}, {"rank": 0}, {"alpha": 0.0},
                                   {"rank": 4.0})):
            refused(lambda: started(a_run(path / f"run{i}", there, **about)), f"run{i}", *about)
        far = {f"layers.77.attention.wq.lora_{x}": random(*shape)
               for x, shape in (("A", (4, 48)), ("B", (48, 4)))}
        for content, word in ((far, "another model"), ([1], "dict"), ({}, "another model"),
                              ({n: t for n, t in far.items() if n.endswith("A")}, "lora_B")):
            torch.save(content, run / "lora.pt")
            sealed(run)
            refused(lambda: started(run), word)


def test_a_run_whose_files_are_not_its_own_is_no_start():
    # kills: alpha taken from an edited config.json; a folder without a summary; another lora.pt
    with folder() as path:
        there = toy_server()
        run = a_run(path / "run", there)
        shutil.copy(run / "lora.pt", run / "best.pt")
        refused(lambda: started(run / "best.pt"), "--init-lora", "lora.pt")
        other = a_run(path / "other", toy_server(rank=4, adapter=1))
        about = (run / "config.json").read_bytes().replace(b'"alpha": 16.0', b'"alpha": 32.0')
        for name, content in (("config.json", about), ("summary.json", b"[]"),
                              ("lora.pt", (other / "lora.pt").read_bytes())):
            shutil.copytree(run, path / name)
            (path / name / name).write_bytes(content)
            refused(lambda: started(path / name), "as the run wrote them")
        (run / "summary.json").unlink()
        refused(lambda: started(run), "--init-lora", "finished run")


def test_numbers_that_are_not_finite_or_stand_twice_are_no_start():
    # kills: a NaN copied into the server's LoRA; of two tensors with one meaning the last taken
    with folder() as path:
        adapter = exported(path / "peft", toy_server().teacher, "peft", path)
        file = adapter / "adapter_model.safetensors"
        named = {n: t.clone() for n, t in huggingface.read_safetensors(file).items()}
        q = "base_model.model.model.layers.4.self_attn.q_proj.lora_A.weight"
        bare = q.removeprefix("base_model.model.")
        for change, words in (({bare: named[q] + 1}, (bare, "another name")),
                              ({q: named[q] * math.inf}, ("layers.4.attention.wq", "finite"))):
            write_safetensors(file, named | change)
            refused(lambda: started(adapter), "--init-lora", *words)
        run = toy_server()
        run.tuned["layers.4.attention.wv.lora_B"].data[0, 0] = math.nan
        refused(lambda: started(a_run(path / "run", run)), "--init-lora", "wv.lora_B", "finite")


def test_an_adapter_is_read_only_where_all_it_says_is_known_to_be_plain():
    # kills: a list of what cannot be read; ranks taken from the configuration alone
    with folder() as path:
        adapter = exported(path / "peft", toy_server().teacher, "peft", path)
        plain = json.loads((adapter / "adapter_config.json").read_text())
        named = dict(huggingface.read_safetensors(adapter / "adapter_model.safetensors"))
        named = {n: t.clone() for n, t in named.items()}
        q = "base_model.model.model.layers.3.self_attn.q_proj.lora_"
        for change in ({"use_dora": True}, {"use_rslora": True}, {"rank_pattern": {"q_proj": 2}},
                       {"alpha_pattern": {"q_proj": 2}}, {"modules_to_save": ["lm_head"]},
                       {"bias": "all"}, {"init_lora_weights": "olora"}, {"peft_type": "LOHA"},
                       {"init_lora_weights": "pissa_niter_4"}, {"fan_in_fan_out": True},
                       {"layer_replication": [[0, 4]]}, {"trainable_token_indices": [1]},
                       {"a_key_of_the_future": 1}, {"loftq_config": {"bits": 4}},
                       {"lora_bias": True}, {"target_parameters": ["x"]},
                       {"task_type": "SEQ_CLS"}, {"r": 5}, {"r": 0},
                       {"lora_alpha": None}, {"lora_alpha": 0}, {"peft_type": None}):
            (adapter / "adapter_config.json").write_text(json.dumps(plain | change))
            name, = change
            word = {"r": "rank", "lora_alpha": "alpha"}.get(name, name)
            refused(lambda: started(adapter), "--init-lora", word)
        fine = {"init_lora_weights": True, "use_dora": False, "rank_pattern": {}, "bias": "none",
                "loftq_config": None, "peft_version": "0.21.2", "modules_to_save": None,
                "qalora_group_size": 16, "corda_config": None, "target_modules": "all-linear"}
        (adapter / "adapter_config.json").write_text(json.dumps(plain | fine))
        started(adapter)
        for change, word in (({q + "magnitude_vector": random(48)}, "magnitude"),
                             ({"base_model.model.lm_head.weight": random(97, 48)}, "lm_head"),
                             ({q + "A.weight": random(2, 48)}, "rank 4"),
                             ({q + "B.weight": random(24, 4)}, "another model"),
                             ({q + "embedding_A": random(4, 4)}, "embedding_A"),
                             ({q.replace("q_proj", "bias") + "A.weight": random(4, 48)}, "bias"),
                             ({q.replace("q_", "k_") + "A.weight": random(4, 48)}, "lora_B")):
            write_safetensors(adapter / "adapter_model.safetensors", named | change)
            refused(lambda: started(adapter), "--init-lora", word)


def test_two_adapters_in_one_folder_must_be_equal():
    # kills: adapter_model.bin ignored
    with folder() as path:
        adapter = exported(path / "peft", toy_server().teacher, "peft", path)
        held = huggingface.read_safetensors(adapter / "adapter_model.safetensors")
        torch.save({n: t.clone() for n, t in held.items()}, adapter / "adapter_model.bin")
        here, err = started(adapter)
        assert not err
        torch.save({n: t + 1e-3 for n, t in held.items()}, adapter / "adapter_model.bin")
        refused(lambda: started(adapter), "differ", "adapter_model.bin")
        (adapter / "adapter_model.safetensors").unlink()
        assert off([*started(adapter)[0].tuned.values()], [*here.tuned.values()]) > 1e-4
        (adapter / "adapter_model.bin").unlink()
        refused(lambda: started(adapter), "no adapter_model.safetensors")


def test_the_emulators_weights_of_a_run_are_a_start_too():
    # kills: emulator.pt ignored; its weights divided by LoRA's scale; names of another cut taken
    name = "layers.2.attention.wq.weight"

    def started_with(own: dict):
        server, err = toy_server(False), io.StringIO()
        server.emulator = own
        with contextlib.redirect_stderr(err):
            peft.start_from(run, server, CONFIG, 4.0)
        return server, err.getvalue()
    with folder() as path:
        run, own = a_run(path / "run", toy_server()), {name: random(48, 48)}
        assert name.removesuffix(".weight") in started_with(dict(own))[1], "a note: it starts anew"
        torch.save({name: random(48, 48, seed=5).bfloat16()}, run / "emulator.pt")
        sealed(run)
        server, err = started_with({name: random(48, 48)})
        assert torch.equal(server.emulator[name], random(48, 48, seed=5).bfloat16().float()), err
        assert "not used" in started_with({})[1]
        torch.save({name: random(48, 47)}, run / "emulator.pt")
        sealed(run)
        refused(lambda: started_with(own), name, "[48, 47]")
        torch.save([1], run / "emulator.pt")
        sealed(run)
        refused(lambda: started_with(own), "emulator.pt", "dict")
