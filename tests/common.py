"""What the tests share: models with slow oracles, checkpoints, small data, runs and processes."""
import contextlib
import csv
import importlib.util
import io
import json
import math
import multiprocessing
import os
import re
import signal
import socket
import struct
import sys
import tempfile
import unittest
from pathlib import Path
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

HERE = Path(__file__).resolve().parent.parent
BUNDLED_TOKENIZER = HERE / "tiny" / "llama" / "tokenizer.model"


class Skip(unittest.SkipTest):
    """Raised by a test that needs what is absent here; counted, and the reason printed."""


def needs(*names):
    """Modules that the project itself never needs."""
    try:
        return [importlib.import_module(name) for name in names]
    except ImportError as error:
        reason = f"{error.name} is not installed; see benchmarks/requirements.txt"
        raise Skip(reason) from None


def benchmark(name: str):
    """A program of benchmarks/, which is no package, as a module."""
    path = HERE / "benchmarks" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ---- comparisons --------------------------------------------------------------------------------

def off(found, expected) -> float:
    """Relative distance of two tensors (or lists of them), in float64."""
    def flat(x):
        return torch.cat([t.double().flatten() for t in ([x] if torch.is_tensor(x) else x)])
    found, expected = flat(found), flat(expected)
    return ((found - expected).norm() / expected.norm()).item()


def same(a: dict, b: dict) -> bool:
    """Two dicts of tensors: the same names, and equal to the bit."""
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


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
    raise AssertionError(f"expected a UserError about {words}, but got {found!r:.200}")


def asserts(call):
    """`call()` ends in an AssertionError."""
    try:
        call()
    except AssertionError:
        return
    raise AssertionError("expected an assertion to fail")


def one_line(answer: tuple, *words, status=2) -> str:
    """`answer` is what `cli` gives: it ended with `status` and one line that holds the words."""
    found, _, err = answer
    assert found == status and err.count("\n") == 1, answer
    assert all(str(word) in err for word in words), (words, err)
    return err


# ---- random models ------------------------------------------------------------------------------

# Meta's params.json of CONFIG: 8*48/3 = 128, times 1.3 = 166.4, down to 166, up to 168.
PARAMS = {"dim": 48, "n_layers": 5, "n_heads": 6, "n_kv_heads": 2, "vocab_size": 97,
          "multiple_of": 4, "ffn_dim_multiplier": 1.3, "norm_eps": 1e-3, "rope_theta": 500.0}
CONFIG = ModelConfig(dim=48, n_layers=5, n_heads=6, n_kv_heads=2, vocab_size=97, hidden_dim=168,
                     norm_eps=1e-3, rope_theta=500.0)


def tiny_lm(seed=0, **changes) -> LM:
    """A random model of CONFIG in which every weight matters: no unit gains, no zeros."""
    g = torch.Generator().manual_seed(seed)
    lm = LM.empty(ModelConfig(**{**vars(CONFIG), **changes})).requires_grad_(False)
    for name, p in lm.named_parameters():
        mean, std = (1, 0.3) if "norm" in name else (0, 1.3 / math.sqrt(p.shape[-1]))
        p.normal_(mean, std, generator=g)
    return lm


def random(*shape, seed=0, std=1.0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * std


def random_tokens(*shape, seed=0, vocab=97):
    return torch.randint(3, vocab, shape, generator=torch.Generator().manual_seed(seed))


def noisy_lora(lm: LM, seed=0, std=0.1) -> LM:
    """LoRA as after training: every A and B holds something."""
    g = torch.Generator().manual_seed(seed)
    for p in lora.lora_tensors(lm).values():
        with torch.no_grad():
            p.add_(torch.randn(p.shape, generator=g) * std)
    return lm


def with_lora(lm: LM, seed=0, rank=4, alpha=16.0) -> LM:
    g = torch.Generator().manual_seed(seed)
    return lora.add_lora(lm, rank, alpha, g).requires_grad_(False)


def copied(tensors) -> dict:
    return {n: t.detach().clone() for n, t in tensors.items()}


# ---- slow oracles: float64, from the definitions ------------------------------------------------

def slow_forward(lm: LM, tokens: list[int], weights=None, cut=None) -> tuple:
    """(logits (T, V), what enters layer `cut` (T, D)) from LLaMA's definition, in float64.

    Head by head, rotations as complex numbers. Uses nothing of the model but its tensors, or
    `weights`; LoRA is added to its weight as a dense matrix of scale 16 / r.
    """
    c, w = lm.config, dict(weights or {name: t.double() for name, t in lm.state_dict().items()})
    for name in [n for n in w if n.endswith("lora_A")]:
        stem = name.removesuffix("lora_A")
        scale = 16 / len(w[name])
        w[stem + "weight"] = w[stem + "weight"] + scale * w[stem + "lora_B"] @ w[name]
    turn = slow_rotations(len(tokens), c.dim // c.n_heads, c.rope_theta)        # (T, d/2)
    x, entered = w["tok_embeddings.weight"][tokens], None
    for i in sorted({int(n.split(".")[1]) for n in w if n.startswith("layers.")}):
        p = {n.removeprefix(f"layers.{i}."): t for n, t in w.items() if f"layers.{i}." in n}
        entered = x if i == cut else entered
        x = slow_layer(x, p, c, turn)
    return slow_norm(x, w["norm.weight"], c) @ w["output.weight"].T, entered


def slow_rotations(T: int, d: int, theta: float) -> torch.Tensor:
    angle = [[t / theta ** (2 * i / d) for i in range(d // 2)] for t in range(T)]
    angle = torch.tensor(angle).double()
    return torch.complex(angle.cos(), angle.sin())                              # (T, d/2)


def slow_norm(x, gain, c: ModelConfig):
    return x / (x.pow(2).mean(-1, keepdim=True) + c.norm_eps).sqrt() * gain


def slow_layer(x, p: dict, c: ModelConfig, turn):
    d, T, heads = c.dim // c.n_heads, len(x), []
    h = slow_norm(x, p["attention_norm.weight"], c)
    q, k, v = (h @ p[f"attention.{n}.weight"].T for n in ("wq", "wk", "wv"))
    for a in range(c.n_heads):
        b = a * c.n_kv_heads // c.n_heads                   # the group that head a reads
        qa, kb, vb = (z[:, i * d:i * d + d] for z, i in ((q, a), (k, b), (v, b)))
        qa, kb = (torch.complex(z[:, 0::2], z[:, 1::2]) * turn for z in (qa, kb))
        scores = (qa @ kb.conj().T).real / math.sqrt(d)     # (T, T)
        scores = scores.masked_fill(torch.ones(T, T).triu(1).bool(), -math.inf)
        heads.append(scores.softmax(-1) @ vb)
    x = x + torch.cat(heads, -1) @ p["attention.wo.weight"].T
    h = slow_norm(x, p["ffn_norm.weight"], c)
    gate, up = (h @ p[f"feed_forward.{n}.weight"].T for n in ("w1", "w3"))
    return x + (gate * gate.sigmoid() * up) @ p["feed_forward.w2.weight"].T


def slow_logits(lm: LM, tokens: list[int], weights=None) -> torch.Tensor:
    return slow_forward(lm, tokens, weights)[0]


def true_ce(h, W, y, w):
    """Weighted next-token loss of hidden states (N, D) under a head (V, D)."""
    return (w.double() * F.cross_entropy(h @ W.T, y, reduction="none")).sum()


# ---- checkpoints --------------------------------------------------------------------------------

@contextlib.contextmanager
def folder():
    with tempfile.TemporaryDirectory() as path:
        yield Path(path)


class Evil:
    """Makes the folder `Evil.path` where somebody unpickles it."""
    def __reduce__(self):
        return os.mkdir, (Evil.path,)


def meta_folder(path: Path, lm: LM, parts=1, tokenizer=False, edit=lambda state, part: None,
                **params) -> Path:
    """Meta's format in `parts` files; `edit(state, part)` changes what a file will hold.

    Column-parallel matrices are split over rows; row-parallel ones and the embedding over columns.
    """
    path.mkdir(exist_ok=True)
    by_rows = ("wq", "wk", "wv", "w1", "w3", "output")
    for part in range(parts):
        state = {}
        for name, t in lm.state_dict().items():
            if "norm" not in name:
                axis = 0 if name.split(".")[-2] in by_rows else 1
                t = t.chunk(parts, axis)[part].clone()
            state[name] = t
        edit(state, part)
        torch.save(state, path / f"consolidated.{part:02d}.pth")
    given = {k: v for k, v in vars(lm.config).items() if k in PARAMS}
    (path / "params.json").write_text(json.dumps({**PARAMS, **given, **params}))
    if tokenizer:
        (path / "tokenizer.model").write_bytes(BUNDLED_TOKENIZER.read_bytes())
    return path


HF_ENDS = {"tok_embeddings.weight": "model.embed_tokens.weight", "norm.weight": "model.norm.weight",
           "output.weight": "lm_head.weight"}
HF_KINDS = {"wq": "self_attn.q_proj", "wk": "self_attn.k_proj", "wv": "self_attn.v_proj",
            "wo": "self_attn.o_proj", "w1": "mlp.gate_proj", "w3": "mlp.up_proj",
            "w2": "mlp.down_proj", "attention_norm": "input_layernorm",
            "ffn_norm": "post_attention_layernorm"}


def hf_state(lm: LM) -> dict:
    """Hugging Face's names; q and k with a head's even rows first, then its odd ones."""
    d, state = lm.config.head_dim, {}
    for name, t in lm.state_dict().items():
        if name in HF_ENDS:
            state[HF_ENDS[name]] = t.clone()
            continue
        _, i, *_, kind, _ = name.split(".")
        if kind in ("wq", "wk"):
            heads = range(len(t) // d)
            t = t[[h * d + 2 * j + odd for h in heads for odd in (0, 1) for j in range(d // 2)]]
        state[f"model.layers.{i}.{HF_KINDS[kind]}.weight"] = t.clone()
    return state


def raw(t: torch.Tensor) -> bytes:
    return t.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def write_safetensors(path: Path, state: dict, edit=lambda header: None, pad=0, tail=b""):
    """The format by hand; `edit(header)` may lie, `pad` shifts the data, `tail` is surplus."""
    kinds = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64"}
    header, blob = {"__metadata__": {"format": "pt"}}, b""
    for name, t in state.items():
        span = [len(blob), len(blob) + t.nbytes]
        header[name] = {"dtype": kinds[t.dtype], "shape": list(t.shape), "data_offsets": span}
        blob += raw(t)
    edit(header)
    text = json.dumps(header).encode() + b" " * pad
    path.write_bytes(struct.pack("<Q", len(text)) + text + blob + tail)


def hf_config(c: ModelConfig, version=4, **changes) -> str:
    """config.json as transformers 4 or 5 writes it."""
    fields = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
              "hidden_size": c.dim, "intermediate_size": c.hidden_dim, "head_dim": c.head_dim,
              "num_hidden_layers": c.n_layers, "num_attention_heads": c.n_heads,
              "num_key_value_heads": c.n_kv_heads, "vocab_size": c.vocab_size,
              "rms_norm_eps": c.norm_eps, "attention_bias": False, "mlp_bias": False,
              "tie_word_embeddings": c.tied}
    if version == 4:
        fields |= {"rope_theta": c.rope_theta, "rope_scaling": None, "torch_dtype": "float16"}
    else:
        rope = {"rope_theta": c.rope_theta, "rope_type": "default"}
        fields |= {"rope_parameters": rope, "dtype": "float16"}
    return json.dumps({**fields, **changes})


def hf_folder(path: Path, lm: LM, kind="safetensors", shards=1, index=True, version=4,
              edit=lambda state: None) -> Path:
    """Hugging Face's format, as `safetensors` or `bin`; `edit(state)` changes what it will hold."""
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(hf_config(lm.config, version))
    state = hf_state(lm)
    if lm.config.tied:
        del state["lm_head.weight"]
    edit(state)
    stem = "model" if kind == "safetensors" else "pytorch_model"
    names, where = list(state), {}
    for i in range(shards):
        number = f"-{i + 1:05d}-of-{shards:05d}" if shards > 1 else ""
        file, part = f"{stem}{number}.{kind}", {n: state[n] for n in names[i::shards]}
        where |= dict.fromkeys(part, file)
        if kind == "safetensors":
            write_safetensors(path / file, part)
        else:
            torch.save(part, path / file)
    if shards > 1 and index:
        text = json.dumps({"metadata": {}, "weight_map": where})
        (path / f"{stem}.{kind}.index.json").write_text(text)
    return path


# ---- small data ---------------------------------------------------------------------------------

def tokenizer():
    return model.Tokenizer(BUNDLED_TOKENIZER)


def toy_examples(n=40, seed=0, longest=30, vocab=97):
    """Examples of many lengths; the first token after BOS tells which one it is (n <= 90)."""
    rng, examples = np.random.default_rng(seed), []
    for i, length in enumerate(rng.integers(6, longest, n)):
        ids = [1, 3 + i % 94, *rng.integers(3, vocab, length - 3).tolist(), 2]
        examples.append(data.Example(ids, int(rng.integers(2, length - 1))))
    return examples


def toy_shard(start=0, stop=40):
    return data.Shard(toy_examples(), list(range(start, stop)))


def gsm8k_folder(path: Path, train_rows=30, test_rows=4) -> Path:
    """GSM8K's and Alpaca's official formats, a few rows of each."""
    (path / "gsm8k").mkdir(parents=True, exist_ok=True)
    for name, rows in (("train", train_rows), ("test", test_rows)):
        text = ""
        for i in range(rows):
            answer = f"{i}+{i}=<<{i}+{i}={2 * i}>>{2 * i}\n#### {2 * i}"
            text += json.dumps({"question": f"What is {i} and {i}?", "answer": answer}) + "\n"
        (path / "gsm8k" / f"{name}.jsonl").write_text(text)
    (path / "alpaca").mkdir(exist_ok=True)
    public = [{"instruction": f"Repeat {i}.", "input": "twice" * (i % 2), "output": f"{i} {i}"}
              for i in range(25)]
    (path / "alpaca" / "alpaca_data.json").write_text(json.dumps(public))
    return path


# ---- FedBiOT in one process ---------------------------------------------------------------------

def config(**changes) -> fedbiot.Config:
    """Five layers: emulator 0 and 2, dropped 1, adapter 3 and 4."""
    small = {"dropout": 0.3333, "adapter": 2, "rounds": 2, "local_steps": 3,
             "batch_size": 4, "align_init": 3, "align_steps": 2, "lr": 3e-3, "server_lr": 3e-3,
             "rank": 4, "alpha": 16.0, "prox": 0.5, "kl_weight": 0.7}
    return fedbiot.Config(**{**small, **changes})


def toy_server(trained=True, dtype=torch.float32, **changes) -> fedbiot.Server:
    server = fedbiot.Server(tiny_lm().to(dtype), toy_shard(), config(**changes))
    if trained:
        noisy_lora(server.student, std=0.05)
    return server


def pair(**changes):
    server = toy_server(**changes)
    return server, fedbiot.Client(server.bootstrap(), server.cfg)


def run_rounds(server, client, shards, **keywords):
    """The records of all rounds."""
    rounds = fedbiot.federate(server, client, shards, server.cfg, fedbiot.Wire(), **keywords)
    return list(rounds)


# ---- command lines and run folders --------------------------------------------------------------

RUN_FILES = {"config.json", "log.csv", "state.pt", "lora.pt", "summary.json"}
WEIGHTS = ("--align-init-on", "weights")                    # of a run that has emulator.pt too


def cli(*argv, main=train.main) -> tuple[int, str, str]:
    """(exit status, stdout, stderr) of a command line, in this process."""
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", newline="") for _ in range(2))
    threads = torch.get_num_threads()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            evaluation.main_guard(lambda: main([str(a) for a in argv]))
        except SystemExit as end:
            status = end.code
    torch.set_num_threads(threads)
    for stream in (out, err):
        stream.flush()
    return status, *(stream.buffer.getvalue().decode() for stream in (out, err))


def small_run(path: Path, *more) -> list[str]:
    """Writes a random checkpoint and a few rows of data; gives the flags of a short run, and
    `more` of them."""
    meta_folder(path / "ckpt", tiny_lm(vocab_size=1024), tokenizer=True)
    gsm8k_folder(path / "data")
    flags = {"task": "gsm8k", "ckpt": path / "ckpt", "data-dir": path / "data", "dropout": "0.34",
             "adapter": 2, "rounds": 3, "local-steps": 2, "batch-size": 3, "align-init": 2,
             "align-steps": 1, "lr": 1e-3, "server-lr": 1e-3, "max-len": 200, "shots": 0,
             "eval-limit": 2, "threads": 1}
    return [str(x) for name, value in flags.items() for x in (f"--{name}", value)] + [*more]


def scored(lm, tokenizer, cfg, progress) -> dict:
    """In place of an evaluation: a number that depends on everything the model is made of."""
    weights = enumerate(lm.state_dict().values(), start=1)
    total = sum(i * p.double().abs().mean().item() for i, p in weights)
    return {"correct": 1, "total": cfg.eval_limit, "accuracy": total}


def fast_scores():
    """While this lasts, a run in this process evaluates with `scored`."""
    return patch.object(evaluation, "score", side_effect=scored)


def stopped_before_evaluation():
    """While this lasts, a run in this process is stopped when its first round's state is saved."""
    return patch.object(train.Run, "evaluate_if_due", side_effect=KeyboardInterrupt)


def read_log(run: Path) -> list[dict]:
    with open(run / "log.csv", newline="") as file:
        return list(csv.DictReader(file))


def read_json(path: Path):
    return json.loads(path.read_text())


def read_saved(path: Path) -> dict:
    return torch.load(path, weights_only=True)


def outcome(run: Path) -> tuple:
    """What of a run folder must not depend on how often it was stopped, nor on the processes."""
    rows = [{k: v for k, v in row.items() if k != "seconds"} for row in read_log(run)]
    summary = read_json(run / "summary.json")
    assert summary["made_of"].pop("config.json"), "it holds the folder's name"
    return rows, {k: v for k, v in summary.items() if k not in ("seconds", "peak_memory_bytes")}


def assert_same_run(run: Path, other: Path):
    """Logs and summaries but for their times, and every tensor that was learnt, to the bit."""
    assert outcome(run) == outcome(other), f"{outcome(run)}\n{outcome(other)}"
    assert same(read_saved(run / "lora.pt"), read_saved(other / "lora.pt"))
    own = [(folder / "emulator.pt").exists() for folder in (run, other)]
    assert own[0] == own[1], "emulator.pt in one of the two runs"
    if own[0]:
        assert same(read_saved(run / "emulator.pt"), read_saved(other / "emulator.pt"))


@contextlib.contextmanager
def no_longer_than(seconds: int):
    """A wait without end, for a FIFO's writer, becomes a Ctrl-C, which ends in another status."""
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


# ---- processes ----------------------------------------------------------------------------------

def free_port() -> str:
    try:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            return str(s.getsockname()[1])
    except OSError as error:
        raise Skip(f"no port can be opened here ({error})") from None


def process(env: dict, argv: list, log: str, change):
    """What `start` runs elsewhere: train.py, with `scored`, after one change of its world."""
    signal.signal(signal.SIGINT, signal.default_int_handler)    # ignored in a shell's background
    os.environ.update(env)
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout, sys.stderr = (os.fdopen(fd, "w", closefd=False, buffering=1) for fd in (1, 2))
    with fast_scores():
        if change:
            change()
        evaluation.main_guard(lambda: train.main(argv))


def start(log: Path, *argv, change=None, **env) -> multiprocessing.Process:
    """train.py in a process of its own; all are forked from one that has imported torch. Those that
    are killed leave tqdm's semaphores, which Python removes at the end without a word."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "torch._dynamo"])
    job = context.Process(target=process, args=(env, [str(a) for a in argv], str(log), change))
    silent = "ignore::UserWarning:multiprocessing.resource_tracker"
    with patch.dict(os.environ, PYTHONPATH=str(HERE), PYTHONWARNINGS=silent):
        job.start()
    return job


def ranks(path: Path, world: int, *argv, change=None, own=lambda rank: [],
          then=lambda jobs: None) -> tuple[list, list]:
    """(exit statuses, outputs) of train.py on so many ranks, started as torchrun would.

    `own(rank)` are a rank's own flags; `then(jobs)` is done to them once they are started.
    """
    port, jobs = free_port(), []
    for rank in range(world):
        env = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world,
               "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        env = {name: str(value) for name, value in env.items()}
        jobs.append(start(path / f"log{rank}", *argv, *own(rank), change=change, **env))
    then(jobs)
    for job in jobs:
        job.join(300)
        if job.is_alive():
            job.kill()
    texts = [(path / f"log{rank}").read_text() for rank in range(world)]
    return [job.exitcode for job in jobs], texts


def errors_in(texts: list[str]) -> list[str]:
    """The lines by which a run over several ranks ended; no rank may print a traceback."""
    text = "\n".join(texts)
    assert "Traceback" not in text, text
    return re.findall(r"^error: .*$", text, re.MULTILINE)
