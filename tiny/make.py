"""Makes the bundled model and its data from a seed: data files, tokenizer, pre-trained checkpoint.

`write_data` (official file formats), `train_tokenizer` (sentencepiece BPE), `pretrain` (Meta's format).
What the texts are stands in gen_maths.py, gen_code.py and gen_qa.py; README.md has the measurements.

    python tiny/make.py                 # all of it into tiny/, about 45 minutes on two cores
    python tiny/make.py --only small    # FedPT's small model, from the large one: minutes
    python tiny/make.py --only data     # the same files again, byte for byte
    python tiny/make.py --out /tmp/t --steps 5
"""
import argparse
import gzip
import io
import json
import math
import os
import random
import sys
import time
from pathlib import Path

import sentencepiece
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
import gen_code
import gen_helm
import gen_maths
import gen_qa
from fedbiot import spread
from model import LM, ModelConfig, Tokenizer, generate, load_weights

PREAMBLE = ("Below is an instruction that describes a task",
            ", paired with an input that provides further context",
            ". Write a response that appropriately completes the request.", "### Instruction:", "### Input:", "### Response:")
PARAMS = {"dim": 128, "n_layers": 12, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 1024,
          "multiple_of": 32, "norm_eps": 1e-5, "rope_theta": 10000.0}
# Shares of pre-training. Word problems come in STEPWISE's mix of bare numbers and worked answers.
MIX = {"maths": .65, "code": .09, "raw code": .03, "questions": .11, "choices": .02, "general": .10}
WORKED_FIRST = .67    # of pre-training: word problems are all worked out; STEPWISE's mix comes after that
SHORTS = .35          # pre-training's share of code for code requests, and of short answers to questions
PROMPT_WEIGHT = .1    # of the loss on prompt tokens, beside 1 on the answer's
BATCH, PEAK_LR, WARMUP = 64, 2e-3, 200
SMALL_LAYERS = 4      # of the second model


def template(instruction: str, text: str) -> str:
    """The Stanford-Alpaca prompt, as data.py has it."""
    return (f"{PREAMBLE[0]}{PREAMBLE[1] if text else ''}{PREAMBLE[2]}\n\n{PREAMBLE[3]}\n{instruction}\n\n"
            + (f"{PREAMBLE[4]}\n{text}\n\n" if text else "") + PREAMBLE[5])


# ---- pre-training's examples ----

def habits(done: float) -> dict:
    """How often a theme is worked out when the share `done` of pre-training is over."""
    return dict.fromkeys(gen_maths.STEPWISE, 1.0) if done < WORKED_FIRST else gen_maths.STEPWISE


def example(rng, worked: dict) -> tuple[str, str]:
    """(prompt, answer) of pre-training, word problems worked out as often as `worked` says; raw code has no prompt."""
    kind = rng.choices(list(MIX), MIX.values())[0]
    if kind == "raw code":
        return "", gen_code.raw_text(rng)
    row = {"maths": lambda r: gen_maths.pretrain_row(r, worked), "code": lambda r: gen_code.rosetta_row(r, "pretrain", SHORTS),
           "questions": gen_qa.pretrain_row, "choices": gen_qa.choice_row, "general": gen_qa.general_row}[kind](rng)
    return template(row["instruction"], row["input"]), row["output"]


def public_row(rng) -> dict:
    """Alpaca's stand-in: every skill but hardly a worked word problem (the clients' distribution)."""
    rare = {theme: .3 * p for theme, p in gen_maths.STEPWISE.items()}
    return rng.choices((lambda: gen_maths.pretrain_row(rng, rare), lambda: gen_qa.pretrain_row(rng),
                        lambda: gen_qa.general_row(rng), lambda: gen_code.rosetta_row(rng, "pretrain", SHORTS),
                        lambda: gen_qa.choice_row(rng)), (25, 25, 35, 12, 3))[0]()


# ---- data files ----

def distinct(make, n: int, key) -> list:
    """n rows that differ in `key`."""
    rows = {}
    while len(rows) < n:
        row = make()
        rows.setdefault(key(row), row)
    return list(rows.values())


def save(path: Path, data: bytes | str):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())


def jsonl(rows) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write_data(out: Path, seed: int):
    rng = random.Random(f"{seed} gsm8k")                   # a stream a file: none depends on another
    for split, n in (("train", 6000), ("test", 800)):
        rows = distinct(lambda: gen_maths.gsm8k_row(gen_maths.problem(rng, split)), n, lambda r: r["question"])
        save(out / f"gsm8k/{split}.jsonl", jsonl(rows))
    rng = random.Random(f"{seed} alpaca")
    rows = distinct(lambda: public_row(rng), 4000, lambda r: (r["instruction"], r["input"], r["output"]))
    save(out / "alpaca/alpaca_data.json", json.dumps(rows, indent=1))
    rng = random.Random(f"{seed} rosetta")
    rows = distinct(lambda: gen_code.rosetta_row(rng), 2400, lambda r: (r["instruction"], r["input"]))
    save(out / "rosetta/rosetta_alpaca.json", json.dumps(rows, indent=1))
    rng = random.Random(f"{seed} dolly")
    rows = distinct(lambda: gen_qa.dolly_row(rng), 3000, lambda r: (r["instruction"], r["context"], r["response"]))
    save(out / "dolly/databricks-dolly-15k.jsonl", jsonl(rows))
    write_problems(out, seed)
    for name, content in gen_helm.files(seed).items():
        save(out / "helm_qa" / name, content)


def write_problems(out: Path, seed: int, skip: int = 0):
    """24 HumanEval-X problems in four languages; with `skip`, those behind as many others, on
    which rates can be chosen: no function of them is tested or trained on."""
    rng = random.Random(f"{seed} humaneval")
    specs = distinct(lambda: gen_code.spec_of(rng, "test"), skip + 24, lambda s: s.words)[skip:]
    for lang, folder in gen_code.TESTED.items():
        rows = [gen_code.humaneval(spec, lang, i, random.Random(f"{seed} {skip + i}"))
                for i, spec in enumerate(specs)]
        save(out / f"humaneval_x/{folder}/humaneval_{folder}.jsonl.gz",
             gzip.compress(jsonl(rows).encode(), mtime=0))


# ---- tokenizer ----

def train_tokenizer(folder: Path, seed: int):
    """BPE as LLaMA's: digits split, bytes for the unknown, every space and newline kept."""
    rng, model = random.Random(f"{seed} tokenizer"), io.BytesIO()
    texts = [part for i in range(40_000) for part in example(rng, habits(i / 40_000)) if part]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=model, model_type="bpe", vocab_size=PARAMS["vocab_size"],
        split_digits=True, byte_fallback=True, character_coverage=1.0, normalization_rule_name="identity",
        remove_extra_whitespaces=False, allow_whitespace_only_pieces=True, unk_id=0, bos_id=1, eos_id=2, pad_id=-1,
        user_defined_symbols=["\n", *(p.replace(" ", "▁") for p in PREAMBLE)], num_threads=1, minloglevel=2)
    save(folder / "tokenizer.model", model.getvalue())


# ---- pre-training ----

def encode(pieces, pairs, threads: int) -> list[tuple[list[int], int]]:
    """(BOS + prompt + answer + EOS, where the answer begins). Prompt and answer are encoded apart."""
    p, a = pieces
    prompts, answers = (p.encode([pair[i] for pair in pairs], num_threads=threads) for i in (0, 1))
    return [([a.bos_id()] + x + y + [a.eos_id()], 1 + len(x)) for x, y in zip(prompts, answers)]


def batches(examples, rng):
    """Batches of like length in random order: sorted within blocks of 50 batches, so little is padded."""
    block, found = 50 * BATCH, []
    for i in range(0, len(examples), block):
        rows = sorted(examples[i:i + block], key=lambda e: len(e[0]))
        group = [rows[j:j + BATCH] for j in range(0, len(rows), BATCH)]
        rng.shuffle(group)
        found += group
    return found


def tensors(batch):
    """tokens (B, T) and the loss's weights (B, T - 1): 1 on the answer, less on the prompt, 0 on padding."""
    T = max(len(ids) for ids, _ in batch)
    tokens, weights = torch.zeros(len(batch), T, dtype=torch.long), torch.zeros(len(batch), T - 1)
    for row, (ids, start) in enumerate(batch):
        tokens[row, :len(ids)] = torch.tensor(ids)
        weights[row, :start - 1], weights[row, start - 1:len(ids) - 1] = PROMPT_WEIGHT, 1.0
    return tokens, weights


def fresh_model(config, seed: int) -> LM:
    torch.manual_seed(seed)
    lm = LM.empty(config)
    for name, p in lm.named_parameters():
        if p.dim() == 2:
            into_stream = name.endswith(("wo.weight", "w2.weight"))
            torch.nn.init.normal_(p, std=.06 / (math.sqrt(2 * config.n_layers) if into_stream else 1))
    return lm


def shallow_model(config, folder: Path) -> LM:
    """The model in `folder`, or config.n_layers of its layers, evenly spread: where FedPT's small model starts."""
    large = load_weights(folder, ModelConfig.read(folder))
    picked = spread(large.config.n_layers, config.n_layers)
    lm = LM(config, {i: large.layers[str(k)] for i, k in enumerate(picked)}, large.tok_embeddings, large.norm, large.output)
    return lm.requires_grad_(True)


def save_checkpoint(lm: LM, folder: Path, params: dict):
    """Meta's params.json and consolidated.00.pth, bf16; renamed into place, so a reader never sees half."""
    state = {name: p.detach().to(torch.bfloat16).clone() for name, p in lm.state_dict().items()}
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(state, folder / "consolidated.tmp")
    os.replace(folder / "consolidated.tmp", folder / "consolidated.00.pth")
    save(folder / "params.json", json.dumps(params) + "\n")


def score(lm, tokenizer, problems, worked=False) -> tuple[float, float]:
    """(accuracy, share of worked answers) on word problems, greedy. `worked` forbids to begin with a
    number, so that the model must work the answer out: what it could do, beside what it does."""
    prompts = [[tokenizer.bos] + tokenizer.encode(template(p["question"], "")) for p in problems]
    if worked:
        space = tokenizer.encode("1")[0]                                 # a bare number begins with this piece
        for prompt in prompts:
            with torch.no_grad():
                logits = lm(torch.tensor([prompt]))[0, -1]
            logits[space] = -math.inf
            prompt.append(int(logits.argmax()))
    texts = [tokenizer.decode(ids) for ids in generate(lm, prompts, 110, tokenizer.eos)]
    said = [text.split("The answer is")[-1].strip().rstrip(".") for text in texts]
    return (sum(t == str(p["answer"]) for t, p in zip(said, problems)) / len(problems),
            sum("The answer is" in t for t in texts) / len(problems))


def pretrain(folder: Path, args, params=PARAMS, steps=0, start: Path | None = None, worked=habits, peak=PEAK_LR,
             warmup=WARMUP):
    """AdamW, warm-up, cosine to zero after `steps` (or `--minutes`, if those are over first)."""
    torch.set_num_threads(args.threads)
    rng, began = random.Random(f"{args.seed} pretrain{'' if worked is habits else ', settled'}"), time.time()
    tokenizer, config = Tokenizer(folder / "tokenizer.model"), ModelConfig.from_params(params)
    steps = steps or args.steps
    total = steps * BATCH
    pairs = [example(rng, worked(i / total)) for i in range(total)]
    examples = encode((tokenizer.pieces, tokenizer.pieces), pairs, args.threads)
    print(f"{len(pairs)} examples, {sum(len(ids) for ids, _ in examples) / len(pairs):.1f} tokens each, made in "
          f"{time.time() - began:.0f} s; e.g.\n{pairs[0][0]}{pairs[0][1]}", flush=True)
    watch = [gen_maths.problem(random.Random(f"watch {i}"), "test") for i in range(128)]
    lm = shallow_model(config, start) if start else fresh_model(config, args.seed)
    matrices = [p for p in lm.parameters() if p.dim() == 2]
    norms = [p for p in lm.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW([{"params": matrices}, {"params": norms, "weight_decay": 0.}], peak,
                                  betas=(.9, .95), weight_decay=.1, fused=True)
    began = saved = time.time()
    for step, batch in enumerate(batches(examples, rng)):
        done = max(step / steps, (time.time() - began) / 60 / args.minutes if args.minutes else 0)
        if done >= 1:
            break
        lr = peak * min(1, (step + 1) / warmup) * (.01 + .99 * (1 + math.cos(math.pi * done)) / 2)
        for group in optimizer.param_groups:
            group["lr"] = lr
        tokens, weights = tensors(batch)
        with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):  # flash: twice as slow here
            logits = lm(tokens[:, :-1])                                    # (B, T - 1, V)
        losses = F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
        loss = (losses * weights.flatten()).sum() / weights.sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(lm.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 0:
            print(f"step {step} | {done:.1%} | loss {loss.item():.3f} | lr {lr:.1e} | {time.time() - began:.0f} s", flush=True)
        if args.save_to and time.time() - saved > args.save_every:
            save_checkpoint(lm, args.save_to, params)
            print("  watch: right %.2f (worked %.2f) | made to work it out: right %.2f (worked %.2f)"
                  % (*score(lm, tokenizer, watch), *score(lm, tokenizer, watch, worked=True)), flush=True)
            saved = time.time()
    save_checkpoint(lm, folder, params)
    return step + 1


def settled(done: float) -> dict:
    return gen_maths.SETTLED


def settle(folder: Path, args):
    """A last short stage at a low rate: more word problems are worked out, so the base does so now and then."""
    pretrain(folder, args, steps=args.settle_steps, start=folder, worked=settled, peak=3e-4, warmup=20)


def make_small(out: Path, args):
    """FedPT's small model: four of the large one's layers and its tokenizer, trained on as the large one was."""
    save(out / "small" / "tokenizer.model", (out / "llama" / "tokenizer.model").read_bytes())
    pretrain(out / "small", args, PARAMS | {"n_layers": SMALL_LAYERS}, args.small_steps, out / "llama")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder to fill (default: this one)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=("data", "tokenizer", "model", "small", "settled", "held-out"),
                        help="just one of the parts; held-out: 24 HumanEval-X problems to choose rates on")
    parser.add_argument("--steps", type=int, default=4900, help=f"of {BATCH} examples each")
    parser.add_argument("--settle-steps", type=int, default=250, help="of the last stage")
    parser.add_argument("--small-steps", type=int, default=900, help="of the small model")
    parser.add_argument("--minutes", type=float, default=0, help="let the schedule end earlier, by the clock")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--save-every", type=float, default=300, help="seconds between those checkpoints")
    parser.add_argument("--save-to", type=Path, help="folder for checkpoints while it trains")
    args = parser.parse_args()
    parts = {"data": lambda: write_data(args.out / "data", args.seed),
             "tokenizer": lambda: train_tokenizer(args.out / "llama", args.seed),
             "model": lambda: pretrain(args.out / "llama", args),
             "small": lambda: make_small(args.out, args),
             "settled": lambda: settle(args.out / "llama", args),
             "held-out": lambda: write_problems(args.out / "data", args.seed, skip=24)}
    for name, make in parts.items():
        if args.only == name or args.only is None and name != "held-out":
            began = time.time()
            make()
            print(f"{name}: {time.time() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
