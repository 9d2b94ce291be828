"""What bench.py sets beside this project: the naive forms, and the same work by other libraries.

In order: losses; the client's step, LoRA everywhere or with transformers + peft; the server's step,
with transformers + peft or with a copy of the model for each role; transformers' generate.
Libraries are imported where used.
"""
import copy

import torch
import torch.nn.functional as F

import fedbiot
from extras.huggingface import to_config, to_hf
from lora import add_lora, lora_tensors
from model import LM

# ---- losses -------------------------------------------------------------------------------------

def wide(z):
    return z if z.dtype == torch.float64 else z.float()


def naive_ce(h, W, y, w):
    return (w * F.cross_entropy(wide(h @ W.T), y, reduction="none")).sum()


def naive_kl(h_s, h_t, W, w):
    s, t = wide(h_s @ W.T).log_softmax(-1), wide(h_t @ W.T).log_softmax(-1)
    return (w * (t.exp() * (t - s)).sum(-1)).sum()


NAIVE = {"ce": naive_ce, "kl": naive_kl}


def loss_of(peer: str, kind: str):
    """The same function of another library; rows weigh the same there."""
    if peer == "naive":
        return NAIVE[kind]
    if peer == "compile":
        return torch.compile(NAIVE[kind])
    if peer == "native" and kind == "ce":
        return lambda h, W, y, w: F.linear_cross_entropy(h, W, y)
    if peer == "torchtune":
        from torchtune.modules import loss
        if kind == "ce":
            ce = loss.CEWithChunkedOutputLoss()
            return lambda h, W, y, w: ce([c @ W.T for c in h.chunk(8)], y[None])
        kl = loss.ForwardKLWithChunkedOutputLoss()
        return lambda s, t, W, w: kl([c @ W.T for c in s.chunk(8)], [c @ W.T for c in t.chunk(8)],
                                     torch.zeros(1, len(s), dtype=torch.int64, device=s.device))
    if peer == "liger" and kind == "kl":
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss
        jsd = LigerFusedLinearJSDLoss(0.0, 1.0, beta=0.0, compiled=False)       # beta 0: forward KL
        return lambda s, t, W, w: jsd(s, W, t, W, w.new_zeros(len(s), dtype=torch.int64))
    raise ImportError(f"{peer} has no such loss for this device")


def dense_proximal(pairs, scale):
    return sum((scale * (B @ A - B0 @ A0)).square().sum() for B, A, B0, A0 in pairs)


# ---- a client's step ----------------------------------------------------------------------------

def lora_everywhere(cfg, lm: LM, batches):
    """LoRA trained in every layer, the head on every position: what FedBiOT's client avoids."""
    lm = add_lora(lm, cfg.rank, cfg.alpha, fedbiot.generator(0))

    def loss(b):
        z = lm(b.tokens).flatten(0, 1)[b.rows].float()
        return (b.weights * F.cross_entropy(z, b.targets, reduction="none")).sum()
    return plain_steps(loss, list(lora_tensors(lm).values()), batches)


def transformers_client(cfg, lm: LM, batches):
    """The step that a user writes with transformers + peft: labels, -100 where no answer is."""
    from peft import LoraConfig, get_peft_model
    top = list(range(len(lm.layers)))[-cfg.adapter:]
    lora = LoraConfig(r=cfg.rank, lora_alpha=cfg.alpha, target_modules=["q_proj", "v_proj"],
                      layers_to_transform=top, task_type="CAUSAL_LM")
    model = get_peft_model(hf_model(lm), lora).train()
    given = []
    for b in batches:
        ids, T = F.pad(b.tokens, (0, 1)), b.tokens.shape[1]     # ours leaves the last token out
        labels = torch.full_like(ids, -100)
        rows, targets = b.rows[b.weights > 0], b.targets[b.weights > 0]
        ids[rows // T, rows % T + 1] = labels[rows // T, rows % T + 1] = targets
        given.append({"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": labels})
    return plain_steps(lambda b: model(**b, use_cache=False).loss,
                       [p for p in model.parameters() if p.requires_grad], given)


def transformers_server(server, batches):
    """An alignment step by transformers + peft: the full model, and the compressed one with LoRA on
    the layers below the adapter, both with logits at every position."""
    from peft import LoraConfig, get_peft_model
    full, cfg, below = server.full, server.cfg, len(server.kept)
    layers = {i: full.layers[str(i)] for i in server.kept + server.adapter}
    lora = LoraConfig(r=cfg.rank, lora_alpha=cfg.alpha, target_modules=["q_proj", "v_proj"],
                      layers_to_transform=list(range(below)), task_type="CAUSAL_LM")
    teacher, student = hf_model(full), get_peft_model(hf_model(full.with_layers(layers)), lora)

    def at(model, layer: int, b):
        """(what enters a layer, logits) at the rows that answer."""
        out = model(input_ids=b.tokens, attention_mask=(b.tokens != 0).long(), use_cache=False,
                    output_hidden_states=True)
        entered, logits = (x.flatten(0, 1)[b.rows].float()
                           for x in (out.hidden_states[layer], out.logits))
        return entered, logits.log_softmax(-1)

    def loss(b):
        with torch.no_grad():
            target, t = at(teacher, server.cut, b)
        entered, s = at(student, below, b)
        l2 = (b.weights * (entered - target).square().sum(-1)).sum()
        l2 = l2 / (b.weights * target.square().sum(-1)).sum()
        return l2 + (b.weights * (t.exp() * (t - s)).sum(-1)).sum()
    return plain_steps(loss, [p for p in student.parameters() if p.requires_grad], batches)


def plain_steps(loss_of_batch, parameters, batches):
    """AdamW over the batches, from the same start every time."""
    start = [p.detach().clone() for p in parameters]

    def steps():
        with torch.no_grad():
            for p, q in zip(parameters, start):
                p.copy_(q)
        optimizer, values = torch.optim.AdamW(parameters, lr=1e-4, betas=(0.9, 0.95)), []
        for b in batches:
            loss = loss_of_batch(b)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            values.append(loss.detach().float())
        return torch.stack(values).mean()
    return steps


def hf_model(lm: LM):
    """The same weights as a transformers model; its layers are numbered through."""
    from transformers import LlamaConfig, LlamaForCausalLM
    renamed = lm.with_layers(dict(enumerate(lm.layers.values())))
    config = LlamaConfig(**to_config(lm.config) | {"num_hidden_layers": len(lm.layers)})
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    weights = {name: p.detach() for name, p in renamed.named_parameters()}
    model.load_state_dict(to_hf(weights, lm.config), strict=True, assign=True)
    d, device = lm.config.head_dim, lm.output.weight.device
    inv = 1 / lm.config.rope_theta ** (torch.arange(0, d, 2).float() / d)
    for rope in [m for m in model.modules() if hasattr(m, "inv_freq")]:     # meta's are empty
        rope.inv_freq = rope.original_inv_freq = inv.to(device)
    return model.eval()


# ---- the server's step, generation --------------------------------------------------------------

def copy_for_each_role(server):
    """A server whose roles share nothing, with both models' logits at every position."""
    server.teacher, server.student = (copy.deepcopy(lm) for lm in (server.teacher, server.student))
    layers = server.split(server.full.config.n_layers, server.cfg)[0]
    server.emulated = lora_tensors(server.student, layers)
    server.alignment_losses = lambda batch: naive_alignment(server, batch)


def naive_alignment(server, batch):
    cut, rows, w = server.cut, batch.rows, batch.weights
    with torch.no_grad():
        target, h = server.teacher.hidden(batch.tokens, tap=cut)
        t = server.teacher.output(h).float().log_softmax(-1).flatten(0, 1)[rows]
    entered, h = server.student.hidden(batch.tokens, tap=cut)
    s = server.student.output(h).float().log_softmax(-1).flatten(0, 1)[rows]
    target, entered = (x.flatten(0, 1)[rows].float() for x in (target, entered))
    l2 = (w * (entered - target).square().sum(-1)).sum() / (w * target.square().sum(-1)).sum()
    return {"l2": (1.0, l2), "kl": (1.0, (w * (t.exp() * (t - s)).sum(-1)).sum())}


def transformers_texts(model, prompts, new_tokens: int, eos: int, batch: int) -> list[list[int]]:
    """New ids of every prompt, without EOS: transformers' generate, padded on the left."""
    texts = []
    for part in (prompts[i:i + batch] for i in range(0, len(prompts), batch)):
        width = max(map(len, part))
        ids = torch.tensor([[eos] * (width - len(p)) + p for p in part], device=model.device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in part]).to(ids.device)
        out = model.generate(ids, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False,
                             eos_token_id=eos, pad_token_id=eos)
        texts += [t[:t.index(eos)] if eos in t else t for t in out[:, width:].tolist()]
    return texts
