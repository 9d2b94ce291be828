"""What a GPU would do, seen without one: on the meta device, with tensors that say that they are on
a GPU, the CUDA branches run and every read of the host is counted."""
import contextlib
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fedbiot
import train
from extras import spool
from model import generate
from tests.common import config, tiny_lm, toy_shard
from tests.test_baselines import method_config

aten = torch.ops.aten

# Where the host waits once more, and why: FedTT+ compares a fingerprint of the cores that a client
# holds with the one that the server sent, before the first step. FedKSeed's uploads are seeds and
# scalars, which its client has read: their norms and their sum are the CPU's own.
READS = {  # method: (bootstrap, broadcast, update, accepted, aggregate)
    "fedbiot": (0, 1, 1, 1, 0), "fedot": (1, 0, 1, 1, 0), "offsite": (1, 0, 1, 1, 0),
    "fedavg": (0, 0, 1, 1, 0), "fedkseed": (0, 0, 1, 0, 0), "fedkseed-pro": (0, 0, 1, 0, 0),
    "fedtt": (0, 0, 1, 1, 0), "fedtt+": (0, 0, 3, 1, 0), "fedpt": (0, 0, 1, 1, 1)}
INDEXED = aten.index.Tensor, aten.index_put_.default
STALLS = aten.nonzero.default, aten.masked_select.default, aten.multinomial.default


class Reads(TorchDispatchMode):
    """Counts where the host would wait for a GPU: a number that is read, a tensor copied to the
    CPU, an index that comes from there, a shape that depends on numbers, multinomial's look at its
    probabilities. What it reads is 0 but for the last number, a 1."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        source = next((a for a in args if torch.is_tensor(a) and a.is_meta), None)
        to_cpu = str(kwargs.get("device", "")) == "cpu" or (
            function is aten.copy_.default and not args[0].is_meta)
        number = function is aten._local_scalar_dense.default
        masks = function in INDEXED and any(
            torch.is_tensor(i) and (i.dtype == torch.bool or not i.is_meta) for i in args[1])
        source = args[1] if to_cpu and source is None and len(args) > 1 else source
        if source is None or not source.is_meta or not (
                to_cpu or number or masks or function in STALLS):
            return function(*args, **kwargs)
        self.found.append(str(function))
        found = torch.zeros(source.shape, dtype=kwargs.get("dtype") or source.dtype).flatten()
        found[-1:] = 1
        return 1 if number else found.view(source.shape)


def reads(call, *args) -> tuple[list[str], object]:
    """The operators for which the host waits in a call, and the call's result."""
    on_gpu = patch.object(torch.Tensor, "is_cuda", property(lambda self: True))
    no_autocast = patch.object(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    with Reads() as mode, on_gpu, no_autocast:              # autocast does not know "meta"
        result = call(*args)
    return mode.found, result


def a_round(module, full, cfg) -> tuple[dict[str, list[str]], object]:
    """What the host reads in each part of round 1, and the server."""
    found, server = {}, module.Server(full, toy_shard(), cfg)
    found["bootstrap"], bootstrap = reads(server.bootstrap)
    client = module.Client(bootstrap, cfg, "meta")
    found["broadcast"], payload = reads(server.broadcast, 1)
    found["update"], (upload, metrics) = reads(client.update, 1, payload, toy_shard(), 0)
    results = {m: (upload, metrics | {"loss": 1.0, "examples": 4}) for m in range(6)}
    found["accepted"], _ = reads(fedbiot.accepted, 1, results, server.expected(1), cfg)
    found["aggregate"], _ = reads(server.aggregate, 1, [upload] * 6, [1.0] * 6)
    waits, kept = reads(spool.Spool(server.expected(1)).keep, upload)
    assert len(waits) <= 1 and fedbiot.payload_bytes(kept) == fedbiot.payload_bytes(upload)
    return found, server


def test_the_host_reads_a_gpu_once_a_client_and_once_an_alignment():
    # kills: loss.item() in a client's loop, or g.item() in FedKSeed's; rows looked for, or written,
    # by a mask; in an alignment or a distillation a copy to the CPU, a CPU tensor, an index from
    # there; uploads measured apart; an upload written to disk tensor by tensor
    for method, expected in READS.items():
        cfg = method_config(method, local_steps=3, align_init=3, align_steps=3)
        found, _ = a_round(train.method_of(method), tiny_lm().bfloat16().to("meta"), cfg)
        assert tuple(map(len, found.values())) == expected, (method, found)
    cfg = config(local_steps=3, align_init=3, align_steps=3, align_init_on="weights")
    found, _ = a_round(fedbiot, tiny_lm().to("meta"), cfg)
    assert tuple(map(len, found.values())) == (1, 1, 1, 1, 0), ("Eq. 5", found)


def test_the_host_reads_a_gpu_once_in_sixteen_tokens():
    # kills: a look at every token; a sampler that picks the pieces it may draw by a mask, or draws
    # by torch.multinomial
    for method, name in (("fedbiot", "adapfu"), ("fedkseed", "full"), ("fedpt", "proxy")):
        module, cfg = train.method_of(method), method_config(method, align_init=0)
        server = module.Server(tiny_lm(n_layers=3).to("meta"), None, cfg)
        replayed, models = reads(server.models)
        assert not replayed, replayed
        for heat, alike in ((0.0, [1] * 130), (0.7, [])):       # alike: computed once
            found, texts = reads(lambda lm=models[name], heat=heat, alike=alike: generate(
                lm, [alike + [1, 2, 3], alike + [1, 2]], 33, -1, temperature=heat, top_k=5,
                top_p=0.9))
            assert len(found) == 3 + 1, (name, heat, found)     # tokens 1, 17, 33, and the texts
            assert [len(text) for text in texts] == [33, 33]
