"""model.py and lora.py: the decoder, files, Meta's checkpoints, generation, LoRA."""
import io
import itertools
import json
import math
import os
import re
import zipfile
from collections import Counter
from pathlib import Path
from unittest.mock import patch

import numpy as np
import sentencepiece
import torch

import lora
import model
from extras import sampling
from model import LM, ModelConfig
from tests.common import (BUNDLED_TOKENIZER, CONFIG, PARAMS, Evil, asserts, folder, hf_folder,
                          meta_folder, noisy_lora, off, random, random_tokens, refused, same,
                          slow_forward, slow_logits, tiny_lm, with_lora)


# ---- the decoder --------------------------------------------------------------------------------

def test_decoder_matches_a_slow_float64_decoder():
    # kills: swap w1/w3; angles doubled; theta ignored; eps ignored; heads tiled over groups;
    # not causal; gain dropped
    for heads in (2, 6, 1):
        lm, tokens = tiny_lm(n_kv_heads=heads), random_tokens(2, 19)
        expected = torch.stack([slow_logits(lm, row) for row in tokens.tolist()])
        assert off(lm(tokens), expected) < 3e-6, (heads, off(lm(tokens), expected))


def test_hidden_gives_what_enters_a_layer_and_only_the_rows_asked_for():
    # kills: what leaves the layer; rows of the tap ignored; rows applied before the last attention
    lm, tokens = tiny_lm(), random_tokens(2, 11)
    logits, entered = slow_forward(lm, tokens[1].tolist(), cut=3)
    rows = torch.tensor([11 + 4, 11 + 9])
    tapped, hidden = lm.hidden(tokens, rows=rows, tap=3)
    assert off(tapped, entered[[4, 9]]) < 3e-6 and off(lm.output(hidden), logits[[4, 9]]) < 3e-6
    tapped, hidden = lm.hidden(tokens, tap=0)
    assert torch.equal(tapped, lm.tok_embeddings(tokens))
    assert torch.equal(hidden, lm.hidden(tokens))


def test_embeddings_are_not_tied_unless_the_configuration_says_so():
    # kills: tie always; never tie
    for tied in (False, True):
        lm = LM.empty(ModelConfig(**{**vars(CONFIG), "tied": tied}))
        assert (lm.output.weight is lm.tok_embeddings.weight) == tied
    lm = LM.empty(CONFIG).requires_grad_(False)
    before = lm.output.weight.clone()
    lm.tok_embeddings.weight.add_(1)
    assert torch.equal(before, lm.output.weight)


def test_norm_is_computed_in_fp32_and_rounded_before_the_gain():
    # kills: squares in the input's dtype (fp16 overflows above 255); the gain inside F.rms_norm
    norm = model.RMSNorm(48, 1e-5).half()
    x = random(3, 48).half() * 3000
    exact = x.double() / x.double().pow(2).mean(-1, True).sqrt()
    assert x.square().isinf().any() and off(norm(x), exact) < 1e-3
    x, norm = random(50, 48).bfloat16(), model.RMSNorm(48, 1e-5).bfloat16()
    with torch.no_grad():
        norm.weight.copy_(1 + random(48, seed=1, std=0.3))
    wide = x.float() * (x.float().square().mean(-1, True) + 1e-5).rsqrt()
    assert torch.equal(norm(x), wide.bfloat16() * norm.weight), "bit for bit as Meta's"


def test_feed_forward_width_is_that_of_the_published_llamas():
    # kills: 4 D for 8 D / 3; round down to multiple_of
    for dim, heads, kv, multiple, factor, width in (
            (4096, 32, None, 256, None, 11008), (5120, 40, None, 256, None, 13824),
            (8192, 64, 8, 4096, 1.3, 28672), (6656, 52, None, 256, None, 17920),
            (48, 6, 2, 4, 1.3, 168)):
        p = {"dim": dim, "n_layers": 2, "n_heads": heads, "multiple_of": multiple,
             "norm_eps": 1e-5, "vocab_size": -1}
        p |= {"n_kv_heads": kv} if kv else {}
        c = ModelConfig.from_params(p | ({"ffn_dim_multiplier": factor} if factor else {}))
        assert (c.hidden_dim, c.n_kv_heads, c.rope_theta) == (width, kv or heads, 10000.0), c


# ---- files --------------------------------------------------------------------------------------

def test_what_is_no_readable_file_is_one_line():
    # kills: no look at the kind of file (a FIFO waits, /dev/zero never ends); no limit; no LFS
    with folder() as path:
        os.mkfifo(path / "fifo")
        (path / "lfs").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
        (path / "long").write_bytes(b"123456")
        for name, word in ((path, "regular"), (path / "fifo", "regular"), ("/dev/zero", "regular"),
                           (path / "none", "No such file"), (path / ("x" * 300), "too long"),
                           (path / "a\0b", "null"), (path / "lfs", "git lfs pull")):
            for read in (model.read_bytes, model.read_saved, model.fingerprint):
                refused(lambda: read(name), word)
        refused(lambda: model.read_bytes(path / "long", 5), "at most 5 bytes", "found 6")
        assert model.read_bytes(path / "long", 6) == b"123456"


def test_json_that_is_not_json_is_one_line():
    # kills: NaN let through; RecursionError; bad UTF-8; surrogates as bytes
    with folder() as path:
        for text, word in ((b"\xff\xfe", "decode"), (b'"\xed\xa0\xbd"', "decode"), (b"{", "line 1"),
                           (b"[" * 200_000, "recursion"), (b"[NaN]", "NaN"), (b"", "line 1"),
                           (b"-Infinity", "Infinity"), (b"9" * 5000, "digits")):
            (path / "x").write_bytes(text)
            refused(lambda: model.read_json(path / "x", "a list"), "a list", word, path)
        (path / "x").write_bytes(b'\xef\xbb\xbf{"a": [1, null]}')
        assert model.read_json(path / "x") == {"a": [1, None]}, "a byte order mark is allowed"
    refused(lambda: model.parse_json("{1}", "rows.jsonl, line 3"), "rows.jsonl, line 3")


def only(path: Path, names: str):
    assert sorted(p.name for p in path.iterdir()) == sorted(names.split()), list(path.iterdir())


def test_files_are_written_whole_or_not_at_all():
    # kills: written in place; the temporary file left; a fixed temporary name
    def fails(file):
        file.write(b"half")
        raise error
    with folder() as path:
        (path / "a.part").write_text("the user's")
        model.write_file(path / "a", lambda file: file.write(b"old"))
        for error in (OSError("disk full"), RuntimeError("torch.save")):
            refused(lambda: model.write_file(path / "a", fails), "a: cannot be written", error)
        error = KeyboardInterrupt()
        try:
            model.write_file(path / "a", fails)
        except KeyboardInterrupt:
            only(path, "a a.part")
        assert (path / "a").read_bytes() == b"old"
        model.write_json(path / "deep" / "er" / ("x" * 250), {"a": 1})
        assert json.loads((path / "deep" / "er" / ("x" * 250)).read_text()) == {"a": 1}
        for wrong in (path / "a" / "below", path, Path("."), Path("/"), path / ("x" * 256)):
            refused(lambda: model.write_file(wrong, lambda file: None), "cannot be written")
        assert (path / "a.part").read_text() == "the user's"


def test_folders_are_written_whole_or_not_at_all():
    # kills: a non-empty folder replaced or emptied; x.part removed; half a folder left
    def write(path):
        with model.replacing(path) as part:
            part.mkdir()
            (part / "a").write_text("a")
            if broken:
                raise OSError("disk full")
    with folder() as path:
        for name in ("mine", "mine.part"):
            (path / name).mkdir()
            (path / name / "x").write_text("the user's")
        (path / "empty").mkdir()
        broken = True
        refused(lambda: write(path / "new"), "disk full")
        only(path, "mine mine.part empty")
        broken = False
        refused(lambda: write(path / "mine"), "mine: cannot be written")
        for name in ("new", "empty"):
            write(path / name)
            only(path / name, "a")
        for name in ("mine", "mine.part"):
            only(path / name, "x")
        only(path, "mine mine.part empty new")


def test_what_a_run_saved_is_read_without_running_it_and_damage_is_seen():
    # kills: weights_only=False; no checksums; a compressed record mapped
    with folder() as path:
        torch.save({"a": random(64), "b": [1, "x"]}, path / "s")
        assert model.read_saved(path / "s")["b"] == [1, "x"]
        blob = bytearray((path / "s").read_bytes())
        at = blob.index(random(64).numpy().tobytes()) + 100
        blob[at] ^= 1
        (path / "s").write_bytes(blob)
        for read in (model.read_saved, model.read_pickle):
            refused(lambda: read(path / "s"), "damaged", path / "s")
        torch.save({"a": random(64)}, path / "plain")
        with zipfile.ZipFile(path / "plain") as old:
            with zipfile.ZipFile(path / "small", "w", zipfile.ZIP_DEFLATED) as new:
                for name in old.namelist():
                    new.writestr(name, old.read(name))
        refused(lambda: model.read_pickle(path / "small"), "compressed")
        Evil.path = str(path / "pwned")
        torch.save({"a": Evil()}, path / "evil")
        refused(lambda: model.read_saved(path / "evil"), "evil")
        assert not Path(Evil.path).exists()


def test_fingerprints_know_every_byte():
    # kills: a size, or samples of a large file, in place of its content
    with folder() as path:
        prints = set()
        for content in (b"", b"a", b"b", b"ab"):
            (path / "x").write_bytes(content)
            prints.add(model.fingerprint(path / "x"))
        with open(path / "x", "wb") as file:
            file.truncate(2**26)
        for place in (0, 12_345_678, 2**26 - 1):
            with open(path / "x", "r+b") as file:
                file.seek(place)
                file.write(b"!")
            prints.add(model.fingerprint(path / "x"))
        assert len(prints) == 7


def test_text_is_cleaned_of_what_utf_8_cannot_hold():
    # kills: a pair becomes two marks; lone ones dropped
    for text, clean in (("a\ud83db", "a\ufffdb"), ("\ud83d", "\ufffd"), ("", ""),
                        ("\ude00\ud83d", "\ufffd" * 2), ("\ud83d\ude00!", "\U0001f600!"),
                        ("\ufeffé\0 𝔘", "\ufeffé\0 𝔘")):
        assert model.clean_text(text) == clean, ascii(text)
        model.clean_text(text).encode()


def test_a_room_that_is_absent_is_one_line():
    # kills: ModuleNotFoundError let through
    refused(lambda: model.room("extras.absent"), "extras.absent", "in this copy")
    refused(lambda: model.room("cellar.wine"), "cellar.wine")
    with folder() as path, patch.dict("sys.modules", {"extras.huggingface": None}):
        hf_folder(path, tiny_lm())
        refused(lambda: ModelConfig.read(path), "extras.huggingface")


# ---- Meta's checkpoints -------------------------------------------------------------------------

def read(path, layers=None, dtype=torch.float32) -> LM:
    return model.load_weights(path, ModelConfig.read(path), layers, dtype)


def test_meta_shards_load_bit_for_bit():
    # kills: embedding split over rows; wo split over rows; rope.freqs is surplus; every shard at
    # offset 0; stored: the dtype that was asked for, or the norms'
    lm, fp32, bf16, fp16 = tiny_lm(vocab_size=96), torch.float32, torch.bfloat16, torch.float16
    for parts, stored, wanted in ((1, fp32, fp32), (2, bf16, bf16), (4, fp32, fp32),
                                  (2, fp16, fp32), (1, bf16, fp16)):
        def as_stored(state, part):
            kinds = {n: fp32 if "norm" in n else stored for n in state}
            state.update({n: t.to(kinds[n]) for n, t in state.items()})
            state["norm.weight"] = state.pop("norm.weight")         # as the last of all
            state["rope.freqs"] = torch.ones(4)
        with folder() as path:
            found = read(meta_folder(path, lm, parts, edit=as_stored), dtype=wanted)
        assert found.config == lm.config and not any(p.requires_grad for p in found.parameters())
        expected = {n: (t if "norm" in n else t.to(stored)).to(wanted)
                    for n, t in lm.state_dict().items()}
        assert same(found.state_dict(), expected), (parts, stored, wanted)
        assert found.stored == with_lora(found).stored == stored and lm.stored is None


def test_only_the_layers_asked_for_are_kept():
    # kills: layer_ids ignored
    lm = tiny_lm(vocab_size=96)
    for make in (lambda p: meta_folder(p, lm, 2), lambda p: hf_folder(p, lm, shards=2)):
        with folder() as path:
            part = read(make(path), [0, 3])
        expected = {n: t for n, t in lm.state_dict().items()
                    if not re.match(r"layers\.[124]\.", n)}
        assert same(part.state_dict(), expected) and list(part.layers) == ["0", "3"]


def test_on_the_meta_device_nothing_is_read_and_nothing_allocated():
    # kills: weights looked for
    with folder() as path:
        (path / "params.json").write_text(json.dumps(PARAMS))
        lm = model.load_weights(path, ModelConfig.read(path), dtype=torch.bfloat16, device="meta")
        assert {(p.device.type, p.dtype, p.requires_grad) for p in lm.parameters()} == {
            ("meta", torch.bfloat16, False)}
        assert {n: p.shape for n, p in lm.state_dict().items()} == {
            n: p.shape for n, p in tiny_lm().state_dict().items()}


def test_old_params_take_the_vocabulary_from_the_tokenizer():
    # kills: vocab_size -1 passed on; tokenizer not checked against vocab_size
    lm = tiny_lm(vocab_size=1024)
    with folder() as path:
        meta_folder(path, lm, tokenizer=True, vocab_size=-1)
        found, tokenizer = model.load(path)
        assert found.config.vocab_size == tokenizer.vocab_size == 1024
        assert same(found.state_dict(), lm.state_dict())
        for size in (97, 1025):
            (path / "params.json").write_text(json.dumps(PARAMS | {"vocab_size": size}))
            refused(lambda: model.load(path), "1024", size, "tokenizer", "pad token")


def test_an_error_says_expected_and_found_once():
    # kills: a line about a file wrapped into a second one; a folder that is not there taken for one
    # without a configuration
    with folder() as path:
        for make, *words in (
                (lambda: (path / "params.json").write_text("{"), "params.json", "JSON"),
                (lambda: meta_folder(path, tiny_lm()), "tokenizer.model", "one folder up"),
                (lambda: (path / "tokenizer.model").write_text("x"), "tokenizer.model", "piece")):
            make()
            try:
                model.load(path)
            except model.UserError as error:
                text = str(error)
            assert [text.count(word) for word in ("expected", "found")] == [1, 1], text
            assert all(word in text for word in words), text
        refused(lambda: ModelConfig.read(path / "nowhere"), "found no such folder")
        (path / "empty").mkdir()
        refused(lambda: ModelConfig.read(path / "empty"), "found neither")


def test_damaged_checkpoints_are_refused_by_name():
    # kills: missing or surplus let through; half a set taken for whole; anything but a dict read;
    # 8-bit numbers, which mean nothing without their scales, taken for weights
    lm, first = tiny_lm(), "layers.0.attention.wq.weight"

    def edited(change):
        return lambda path: meta_folder(path, lm, edit=lambda state, part: change(state))

    def rewritten(name, content):
        def make(path):
            meta_folder(path, lm)
            torch.save(content, path / name)
        return make

    def half(path):
        meta_folder(path, tiny_lm(vocab_size=96), 2)
        (path / "consolidated.01.pth").unlink()
    cases = [
        (edited(lambda s: s.pop(first)), first, "Missing"),
        (edited(lambda s: s.update({"layers.5.ffn_norm.weight": torch.ones(48)})),
         "layers.5.ffn_norm", "surplus"),
        (edited(lambda s: s.update({"layers.0.attention.wq.bias": torch.ones(48)})),
         "wq.bias", "surplus"),
        (edited(lambda s: s.update({first: s[first][:-1].clone()})), first, "47", "48"),
        (edited(lambda s: s.update({first: s[first].T.reshape(96, 24)})), first, "[96, 24]"),
        (edited(lambda s: s.update({first: s[first].long()})), first, "int64"),
        (edited(lambda s: s.update({first: s[first].to(torch.float8_e5m2)})), first, "float8"),
        (edited(lambda s: s.update({first: s[first][0, 0].clone()})), first, "[]"),
        (edited(lambda s: s.update({first: s[first].to_sparse()})), first, "plain tensors"),
        (edited(lambda s: s.clear()), "Missing"),
        (edited(lambda s: s.update({"output.weight": s["output.weight"][:96]})), "output.weight"),
        (half, "[96, 24]", "all shards (1)"),
        (rewritten("consolidated.00.pth", {"w": Evil()}), "consolidated.00.pth"),
        (rewritten("consolidated.00.pth", [torch.ones(2)]), "dict", "list"),
        (rewritten("consolidated.00.pth", {first: "text"}), "dict of plain tensors"),
        (rewritten("consolidated.02.pth", {}), "all shards (2)"),
        (lambda path: meta_folder(path, lm).joinpath("consolidated.00.pth").rename(path / "x.gguf"),
         "found no", "pth")]
    for make, *words in cases:
        with folder() as path:
            Evil.path = str(path / "pwned")
            make(path)
            refused(lambda: read(path), *words)
            assert not Path(Evil.path).exists(), "code in a checkpoint was run"


def test_shards_that_do_not_make_a_whole_tensor_are_refused():
    # kills: n // parts without the remainder (the last row would be left uninitialised)
    def changed(state, part):
        state["output.weight"] = change(state["output.weight"], part).clone()
    for change, word in ((lambda t, part: t[:48], "[48, 48]"),
                         (lambda t, part: t[:, :48 - part], "all shards")):
        with folder() as path:
            meta_folder(path, tiny_lm(), 2, edit=changed)
            refused(lambda: read(path), "output.weight", word)


def test_copies_of_a_norm_in_several_shards_must_agree():
    # kills: the last shard's taken in silence
    def apart(state, part):
        state["layers.2.ffn_norm.weight"] = state["layers.2.ffn_norm.weight"] + change * part
    lm = tiny_lm(vocab_size=96)
    with folder() as path:
        change = 0
        assert same(read(meta_folder(path, lm, 2, edit=apart)).state_dict(), lm.state_dict())
        change = 1
        refused(lambda: read(meta_folder(path, lm, 2, edit=apart)), "layers.2.ffn_norm", "01.pth")


def test_params_that_are_not_a_plain_llamas_are_refused_by_name():
    # kills: unknown keys of params.json ignored; no limit on sizes
    for text, word in ((json.dumps(PARAMS | {"use_scaled_rope": True}), "use_scaled_rope"),
                       ("{", "params.json"), (json.dumps(PARAMS | {"moe": 1}), "moe"),
                       ("[]", "params.json"), (b"\xff\xfe", "params.json"), ("null", "params.json"),
                       (json.dumps({k: v for k, v in PARAMS.items() if k != "dim"}), "dim"),
                       (json.dumps(PARAMS | {"multiple_of": 0}), "params.json"),
                       (json.dumps(PARAMS | {"dim": "x"}), "params.json"),
                       (json.dumps(PARAMS | {"dim": 50}), "50"),
                       (json.dumps(PARAMS | {"n_layers": 10**9}), "n_layers"),
                       (json.dumps(PARAMS | {"n_layers": True}), "n_layers"),
                       (json.dumps(PARAMS | {"norm_eps": 0}), "norm_eps"),
                       (json.dumps(PARAMS | {"rope_theta": 10**400}), "rope_theta"),
                       (json.dumps(PARAMS | {"dim": 1e999}), "params"),
                       ("[" * 200_000, "recursion")):
        with folder() as path:
            (path / "params.json").write_bytes(text if isinstance(text, bytes) else text.encode())
            refused(lambda: ModelConfig.read(path), word, path)
    with folder() as path:
        refused(lambda: ModelConfig.read(path), "params.json", "config.json")
        refused(lambda: ModelConfig.read(path / "none"), "params.json", "none")


# ---- the tokenizer ------------------------------------------------------------------------------

def pieces(**changes) -> bytes:
    """A sentencepiece model of 97 pieces, trained on a few words."""
    words = "one two three apples and pears are in the box that Tom has bought for his mother today"
    words, rng, blob = words.split(), np.random.default_rng(0), io.BytesIO()
    lines = [" ".join(rng.choice(words, 8)) for _ in range(200)]
    options = {"vocab_size": 97, "model_type": "bpe", "hard_vocab_limit": False, "minloglevel": 2}
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(lines), model_writer=blob,
                                             num_threads=1, **options | changes)
    return blob.getvalue()


def test_a_tokenizer_without_begin_or_end_is_refused_when_it_is_loaded():
    # kills: ids of -1 let through
    with folder() as path:
        meta_folder(path, tiny_lm())
        for missing in ({"bos_id": -1, "eos_id": 1, "unk_id": 0}, {"bos_id": 1, "eos_id": -1},
                        {"bos_id": -1, "eos_id": -1}):
            (path / "tokenizer.model").write_bytes(pieces(**missing))
            refused(lambda: model.load(path), "tokenizer.model", "-1")


def test_a_tokenizer_that_is_absent_or_no_sentencepiece_model_is_refused():
    # kills: an empty file loads as no model; a line that does not say where it may lie
    with folder() as path:
        meta_folder(path, tiny_lm())
        refused(lambda: model.load(path), "tokenizer.model", "one folder up")
        for content in (b"aGVsbG8= 0\n", b"", b"version https://git-lfs.github.com/spec/v1\n"):
            (path / "tokenizer.model").write_bytes(content)
            refused(lambda: model.load(path), "tokenizer.model", "lfs" if b"lfs" in content else
                    "tiktoken")


def test_texts_are_encoded_together_as_one_by_one():
    # kills: encode drops an empty text, or the order of several
    t = model.Tokenizer(BUNDLED_TOKENIZER)
    texts = ["One and 2.", "", "é ﷺ \t𝔘", "</s> <s>", "one\n\ntwo  "] * 20
    assert t.encode(texts) == [t.encode(text) for text in texts] and t.encode([]) == []
    assert [t.decode(t.encode(text)) for text in texts] == texts
    assert t.ends == (t.eos,) and t.vocab_size == 1024 and t.decode([]) == ""
    assert model.Tokenizer(BUNDLED_TOKENIZER, (7, t.eos, 7)).ends == (t.eos, 7)


# ---- generation ---------------------------------------------------------------------------------

def free_text(lm: LM, prompt: list[int], length: int) -> list[int]:
    """Greedy tokens without a cache and without an end."""
    ids = list(prompt)
    for _ in range(length):
        ids.append(lm(torch.tensor([ids]))[0, -1].argmax().item())
    return ids[len(prompt):]


PROMPTS = [random_tokens(n, seed=n).tolist() for n in (9, 1, 4, 17, 2, 9, 5)]


def ended(text: list[int], ends) -> list[int]:
    return text[:min([text.index(e) for e in ends if e in text], default=len(text))]


def test_generation_is_the_argmax_of_every_step_without_a_cache():
    # kills: mask < for <=; slots not advanced; caches keep the finished rows; output in sorted
    # order; head on the last slot; heads of a group in another order than wq's
    for heads, sizes in ((6, (3,)), (1, (3,)), (2, (1, 3, 64, 0))):
        lm = tiny_lm(3, n_kv_heads=heads)
        free = [free_text(lm, p, 14) for p in PROMPTS]
        often = Counter(t for text in free for t in set(text)).most_common(3)
        for eos in [t for t, _ in often] + [free[0][0]]:        # some meet it early, some never
            expected = [ended(text, [eos]) for text in free]
            for size in sizes:
                found = model.generate(lm, PROMPTS, 14, eos, size)
                assert found == expected, (heads, eos, size)
        assert len({len(t) for t in expected}) > 1, "the case must have rows that end early"
    assert model.generate(lm, PROMPTS, 1, 0) == [text[:1] for text in free]
    assert model.generate(lm, [], 5, 0) == []


def test_what_prompts_begin_with_alike_is_computed_once_and_the_texts_are_the_same():
    # kills: positions from 0 again behind the beginning; a mask that is a token off, or not
    # repeated for the heads of a group; the beginning's keys in the first row alone; the last
    # token's row; a prompt that is all beginning
    beginning = random_tokens(1, 130)[0].tolist()
    prompts = [beginning + prompt for prompt in PROMPTS] + [beginning]
    for heads in (6, 2, 1):
        lm, seen = tiny_lm(3, n_kv_heads=heads), []

        def watched(tokens, *args, hidden=lm.hidden, **keywords):
            seen.append(tuple(tokens.shape))
            return hidden(tokens, *args, **keywords)
        expected = [ended(free_text(lm, p, 9), [96]) for p in prompts]
        with patch.object(lm, "hidden", watched):
            assert model.generate(lm, prompts, 9, 96) == expected, heads
        assert seen[:2] == [(1, 129), (len(prompts), max(map(len, prompts)) - 129)]
        assert model.generate(lm, [prompts[0]] * 3, 9, 96) == expected[:1] * 3, "all alike"
    assert model.generate(lm, [prompts[1]], 9, 96) == expected[1:2], "alone"


def test_generation_ends_at_any_of_several_ids():
    # kills: the text is cut at the first of the ids alone
    lm = tiny_lm(3)
    free = [free_text(lm, p, 14) for p in PROMPTS]

    def texts(*ends):
        return [ended(text, ends) for text in free]
    pairs = itertools.combinations(sorted({t for text in free for t in text}), 2)
    a, b = next((a, b) for a, b in pairs if texts(a) != texts(a, b) != texts(b))
    for ends in ((a, b), (b, a)):
        assert model.generate(lm, PROMPTS, 14, ends, 3) == texts(a, b)


def test_generation_keeps_a_stop_piece_and_ends_behind_it():
    # kills: stop cut off; stop taken for an EOS
    lm = tiny_lm(3)
    free = free_text(lm, PROMPTS[0], 14)
    stop = free[4]
    at = free.index(stop)
    assert model.generate(lm, PROMPTS[:1], 14, 96, stop=stop) == [free[:at + 1]]
    assert model.generate(lm, PROMPTS[:1], 14, (96, stop), stop=stop) == [free[:at]]


def batches_of(call) -> list[tuple[int, int]]:
    """(sequences, longest prompt) of every batch that `generate` makes."""
    made, batch = [], model.generate_batch

    def noted(lm, prompts, *args):
        made.append((len(prompts), max(map(len, prompts))))
        return batch(lm, prompts, *args)
    with patch.object(model, "generate_batch", noted):
        call()
    return made


def test_batches_are_bounded_by_the_bytes_of_their_caches():
    # kills: keys without values; new tokens not counted; the shortest prompt's length; no row
    lm = tiny_lm(3)
    slot = 5 * 2 * 2 * 8 * 4                    # layers, k and v, groups, head_dim, bytes
    expected = model.generate(lm, PROMPTS, 14, 96, 64)
    for rows, sizes in ((31, [(1, n) for n in (1, 2, 4, 5, 9, 9, 17)]),
                        (2 * 23, [(2, 2), (2, 5), (2, 9), (1, 17)]), (7 * 31, [(7, 17)]),
                        (1, [(1, n) for n in (1, 2, 4, 5, 9, 9, 17)])):
        with patch.object(model, "CACHE_BYTES", rows * slot):
            def call():
                assert model.generate(lm, PROMPTS, 14, 96) == expected
            assert batches_of(call) == sizes, rows
            assert batches_of(lambda: model.generate(lm, PROMPTS, 14, 96, 4)) == [(4, 5), (3, 17)]
    assert batches_of(lambda: model.generate(lm, [[1]] * 70, 1, 96)) == [(64, 1), (6, 1)]


def test_a_batch_that_is_too_large_for_the_gpu_is_halved_with_one_note():
    # kills: the run ends; the halved batch's rows left out; halved again for every batch; one row
    # tried forever
    lm, noise = tiny_lm(3), io.StringIO()
    expected, hidden = model.generate(lm, PROMPTS, 14, 96), lm.hidden

    def small(tokens, *args, **keywords):
        if len(tokens) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return hidden(tokens, *args, **keywords)
    with patch.object(lm, "hidden", small), patch("sys.stderr", noise):
        most, outputs = 3, []
        sizes = batches_of(lambda: outputs.extend(model.generate(lm, PROMPTS, 14, 96)))
        assert outputs == expected and [n for n, _ in sizes] == [7, 3, 3, 1]
        assert noise.getvalue().count("\n") == 1 and "3 sequences" in noise.getvalue()
        most = 0
        refused(lambda: model.generate(lm, PROMPTS, 14, 96), "memory", "tokens")


def test_numbers_that_are_not_finite_end_generation_in_one_line():
    # kills: no check; the head's own overflow not seen; sampling left to torch's own error
    for broken in ("layers.1.feed_forward.w2", "output"):
        lm = tiny_lm()
        lm.get_submodule(broken).weight.mul_(1e5)
        assert model.generate(lm, [[1, 5]], 3, 96), "it is fp16 that overflows"
        for heat in (0.0, 0.7):
            g = torch.Generator().manual_seed(0)
            refused(lambda: model.generate(lm.half(), [[1, 5, 6], [1]], 5, 96, temperature=heat,
                                           generator=g), "fp16", "bf16", "fp32")


def draw(z, *args, seed=1):
    return sampling.choose(z, *args, torch.Generator().manual_seed(seed))


def test_sampling_stays_within_top_k_and_top_p_and_follows_the_softmax():
    # kills: top_k + 1; nucleus without the piece that crosses top_p; temperature multiplied; ids
    # not mapped back; logits that overflow at a temperature near 0
    z = random(1, 12, std=1.5).flip(1).repeat(20000, 1)
    order, p = z[0].argsort(descending=True), z[0].double().softmax(-1)
    for t, k, top_p in ((1.0, 1, 1.0), (1.0, 0, 1e-9), (1.0, 0, 0.0), (1e-4, 0, 1.0),
                        (1e-40, 0, 1.0)):
        assert (draw(z, t, k, top_p) == z[0].argmax()).all(), (t, k, top_p)
    assert set(draw(z, 1.0, 3, 1.0).tolist()) == set(order[:3].tolist())
    nucleus = next(n for n in range(1, 13) if p[order[:n]].sum() >= 0.7)
    assert set(draw(z, 1.0, 0, 0.7).tolist()) == set(order[:nucleus].tolist())
    inner = p[order[:5]] / p[order[:5]].sum()                   # top p of what top k left
    both = next(n for n in range(1, 6) if inner[:n].sum() >= 0.6)
    assert set(draw(z, 1.0, 5, 0.6).tolist()) == set(order[:both].tolist())
    warm = (z[0].double() / 0.7).softmax(-1)
    share = torch.bincount(draw(z, 0.7, 0, 1.0), minlength=12) / 20000
    assert (share - warm).abs().max() < 5 * 0.5 / math.sqrt(20000)
    assert torch.equal(draw(z, 1.0, 0, 1.0), draw(z, 1.0, 0, 1.0))
    assert not torch.equal(draw(z, 1.0, 0, 1.0), draw(z, 1.0, 0, 1.0, seed=2))


def test_sampling_draws_as_multinomial_does():
    # kills: uniform numbers in place of Exp(1)'s; the draw not mapped back to its piece
    z, g = random(500, 40, std=2.0), torch.Generator().manual_seed(1)
    p, ids = z.softmax(-1).sort(dim=-1, descending=True, stable=True)
    expected = ids.gather(1, torch.multinomial(p, 1, generator=g))[:, 0]
    assert torch.equal(draw(z, 1.0, 0, 1.0), expected)


def test_samples_of_a_model_depend_on_their_generator_alone():
    # kills: torch's global generator
    lm = tiny_lm(3)

    def sample(seed):
        torch.manual_seed(sample.calls)
        sample.calls += 1
        g = torch.Generator().manual_seed(seed)
        return model.generate(lm, PROMPTS, 9, 96, temperature=1.0, top_k=20, generator=g)
    sample.calls = 0
    assert sample(1) == sample(1) != sample(2)


# ---- LoRA ---------------------------------------------------------------------------------------

def test_lora_is_identity_at_init():
    # kills: B of ones; another bound for A
    for dtype in (torch.float32, torch.bfloat16):
        lm, tokens = tiny_lm().to(dtype), random_tokens(2, 9)
        twin = with_lora(lm)
        assert torch.equal(twin(tokens), lm(tokens))
        A = [p.flatten() for n, p in lora.lora_tensors(twin).items() if n.endswith("A")]
        A, bound = torch.cat(A), 1 / math.sqrt(48)  # Kaiming-uniform(sqrt 5): sqrt(6 / (1 + 5) / d)
        assert 0.99 * bound < A.abs().max() <= bound
        assert abs(A.std() - bound / math.sqrt(3)) < 0.05 * bound
    one, two = ([*lora.lora_tensors(with_lora(lm, seed)).values()][0] for seed in (0, 1))
    assert not torch.equal(one, two)


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
    frozen = {n: p.data_ptr() for n, p in twin.named_parameters() if ".lora_" not in n}
    assert frozen == {n: p.data_ptr() for n, p in lm.named_parameters()}
    assert not any(".lora_" in n for n, _ in lm.named_parameters()), "the model must stay as it is"


def test_lora_over_bf16_trains_in_fp32_and_only_itself():
    # kills: lora in the base's dtype; W left trainable
    lm = lora.add_lora(tiny_lm().to(torch.bfloat16), 4, 16.0, torch.Generator())
    trained = {n for n, p in lm.named_parameters() if p.requires_grad}
    assert trained == set(lora.lora_tensors(lm))
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
    for wrong in ({n: t for n, t in other.items() if n != name},
                  other | {"layers.9.attention.wq.lora_A": other[name]},
                  other | {name: other[name][:, :1]}, other | {name: torch.zeros(1, 1)}):
        asserts(lambda: lora.copy_into(own, wrong))
