"""The wire between processes: rank 0 of torchrun is the server, the other ranks serve the clients.

    torchrun --nproc-per-node 4 train.py --task gsm8k --dropout 0.2 --adapter 2 --threads 1

Short JSON messages go through torch.distributed's key-value store, tensors through its process
group. The server never waits for one rank: its transfers run in threads, and it looks for messages
in turn. So a client that is slow, or whose host falls asleep in the middle of a transfer, can be
left out of a round, and a rank that fails is heard by all. More: docs/running.md.
"""
import contextlib
import json
import os
import secrets
import sys
import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from data import TASKS, Shard, digest_of, make_shards, training_examples
from eval import BUNDLED_DATA, flag
from extras.spool import Spool, as_bytes
from fedbiot import HELD, Payload, misfit, payload_bytes
from model import ModelConfig, UserError, load_tokenizer
from train import FREE, as_json, method_of

DTYPES = {str(d): d for d in (torch.float32, torch.float16, torch.bfloat16, torch.int32,
                              torch.int64, torch.uint8, torch.bool)}
LONGEST = 2**20             # characters of a message; the header of a 7B bootstrap has 30,000


def described(header) -> Payload:
    """What a header claims, as tensors without memory; {} where it is no header."""
    try:
        return {str(name): torch.empty(shape, dtype=DTYPES[dtype], device="meta")
                for name, dtype, shape in header}
    except (ValueError, KeyError, TypeError, RuntimeError, OverflowError):
        return {}


def header_of(payload: Payload) -> list:
    return [[name, str(t.dtype), list(t.shape)] for name, t in payload.items()]


def data_of(rank: int) -> tuple[str, str]:
    """What a state calls the data of a client's rank: all clients', and, with --own-data, its own.
    No rank speaks of another's."""
    return "training data", f"training data of client {rank - 1}"


def meet(store, rank: int, world: int) -> str:
    """A random session id on which all ranks of this start agree. After a restart torchrun may
    reuse the store, so keys of the previous start must not match: rank 0 answers every greeting,
    and only ranks of this start reply to the answer."""
    session = mine = secrets.token_hex(8)
    if rank:
        store.set(f"hello {rank}", mine)
        session = store.get(f"welcome {mine}").decode()                 # waits
        store.set(f"here {session} {rank}", "")
    while rank == 0 and not store.check([f"here {session} {r}" for r in range(1, world)]):
        for r in range(1, world):
            store.set(f"welcome {store.get(f'hello {r}').decode()}", session)
        time.sleep(0.01)
    return session


@contextlib.contextmanager
def reaching(whom: str):
    try:
        yield
    except (RuntimeError, ValueError) as error:
        raise UserError(f"{whom} cannot be reached: {str(error).splitlines()[0][:120]}") from None


@dataclass
class Order:
    """What the server asked of a rank and has not got back."""
    t: int                          # round
    client: int
    transfer: Future                # of the payload; once there are metrics, of the upload
    since: float                    # the clock of --client-timeout
    metrics: dict | None = None

    def in_time(self, timeout: float) -> bool:
        return time.monotonic() - self.since < timeout


class Processes:
    """A rank's connection to the others; on rank 0 it is the wire of `federate`.

    Sums are in the order of the clients, so on the CPU any number of ranks gives the same bits.
    """
    def __init__(self):
        with reaching("torchrun's other processes"):
            store, self.rank, self.world = next(dist.rendezvous("env://"))
            self.store = dist.PrefixStore(meet(store, self.rank, self.world), store)
            backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
            dist.init_process_group(backend, None, timedelta(hours=24), self.world, self.rank,
                                    self.store)             # hours: a server may align for long
        self.busy: dict[int, Order] = {}                    # by rank
        self.quiet = contextlib.ExitStack()                 # while it is open, this rank is silent

    # ---- messages and tensors

    def post(self, rank: int, message, payload: Payload):
        """A message to a rank, and what tensors belong to it."""
        with reaching("torchrun's store"):
            self.store.set(f"{self.rank} to {rank}", json.dumps([message, header_of(payload)]))

    def look(self, rank: int) -> tuple | None:
        """A rank's message and header, once; None: not yet. Whatever is not of that form, or too
        long, is (None, []). Exits if the run has ended."""
        key = f"{rank} to {self.rank}"
        with reaching("torchrun's store"):
            if self.store.check(["end"]):
                sys.exit(int(self.store.get("end").split()[0]))
            if not self.store.check([key]):
                return None
            text = self.store.get(key)
            self.store.delete_key(key)
        try:
            message, header = json.loads(text if len(text) <= LONGEST else "")
        except (ValueError, TypeError, RecursionError):
            return None, []
        return message, header

    def has_posted(self, rank: int) -> bool:
        with reaching("torchrun's store"):
            return self.store.check([f"{rank} to {self.rank}"])

    def wait(self, rank: int = 0) -> tuple:
        """A rank's next message."""
        while (order := self.look(rank)) is None:
            time.sleep(0.01)
        return order

    def send(self, rank: int, payload: Payload):
        """Every tensor as its bytes: gloo does not know all dtypes. Waits for the receiver."""
        with reaching(f"rank {rank}"):
            for t in payload.values():
                dist.send(as_bytes(t.detach().to(self.place)), rank)

    def receive(self, rank: int, like: Payload) -> Payload:
        payload = {name: torch.empty_like(t, device=self.place) for name, t in like.items()}
        with reaching(f"rank {rank}"):
            for t in payload.values():
                dist.recv(as_bytes(t), rank)
        return {name: t.to(self.device) for name, t in payload.items()}

    def begin(self, transfer, *args) -> Future:
        """A transfer in a thread of its own, so that a host that sleeps holds up nobody else. (nccl
        queues transfers by itself, and none of its calls waits here.)"""
        done = Future()

        def run():
            try:
                done.set_result(transfer(*args))
            except Exception as error:                      # raised where the result is asked for
                done.set_exception(error)
        if self.place.type == "cuda":
            run()
        else:
            threading.Thread(target=run, daemon=True).start()
        return done

    def travel(self, device, own_gpu: bool):
        """Tensors go from GPU to GPU if every rank has one of its own, else by way of the CPU."""
        self.device, self.place = device, device if own_gpu else torch.device("cpu")
        if own_gpu and device.index is not None:                # --device cuda:1
            torch.cuda.set_device(device)

    # ---- the server's side

    def start_clients(self, cfg, device, bootstrap: Payload, known: dict[str, str]):
        """Sends every client rank the flags, fingerprints of the data that a resumed run had, and
        the bootstrap. Fingerprints that are new are added to `known`."""
        self.timeout = cfg.client_timeout or float("inf")
        own_gpu = device.type == "cuda" and torch.cuda.device_count() >= int(
            os.environ["LOCAL_WORLD_SIZE"])
        self.travel(device, own_gpu)
        for rank in range(1, self.world):
            own = {name: known[name] for name in data_of(rank) if name in known}
            self.post(rank, [as_json(cfg), own_gpu, own], bootstrap)
            self.send(rank, bootstrap)
        for rank in range(1, self.world):
            match self.wait(rank)[0]:
                case [str(name), str(found)] if name in data_of(rank):
                    known.setdefault(name, found[:64])
        return self

    def round(self, t: int, payload: Payload, client, shards, chosen, expected) -> tuple:
        """As Wire.round. A free rank takes the next client; with --own-data every rank is one. The
        clock of --client-timeout is a client's own work, its transfers included: a round goes on
        without those who are over it, once somebody has finished and nobody waits for a rank. What
        they offer in a later round is not asked for."""
        results, down, up, todo, spool = {}, [], [], list(chosen), None
        bar = tqdm(total=len(chosen), desc=f"round {t + 1}", leave=False, disable=None)
        while todo or not results or self.at_work(t):
            for rank in range(1, self.world):
                if rank in self.busy and (answer := self.answer(rank, t, expected)):
                    order = self.busy.pop(rank)
                    if order.t == t:
                        upload, metrics = answer
                        if not misfit(upload, expected):
                            up.append(payload_bytes(upload))
                        if len(up) * payload_bytes(expected) > HELD:
                            start, spool = time.monotonic(), spool or Spool(expected)
                            upload = spool.keep(upload)
                            for other in self.busy.values():            # a slow disk is not theirs
                                other.since += time.monotonic() - start
                        results[order.client] = upload, metrics
                        bar.update()
                wanted = [m for m in todo if shards[m] is None or shards[m] == rank]
                if rank not in self.busy and wanted:
                    todo.remove(wanted[0])
                    self.post(rank, [t, wanted[0]], payload)
                    sending = self.begin(self.send, rank, payload)
                    self.busy[rank] = Order(t, wanted[0], sending, time.monotonic())
                    down.append(payload_bytes(payload))
            if results and self.nobody_can(todo, shards, t):
                break
            time.sleep(0.01)
        bar.close()
        for m in sorted(set(chosen) - set(results)):
            print(f"round {t + 1}, client {m}: left out, no upload within --client-timeout "
                  f"{self.timeout:g} s", file=sys.stderr)
        return {m: results[m] for m in sorted(results)}, down, up

    def at_work(self, t: int) -> bool:
        return any(o.t == t and o.in_time(self.timeout) for o in self.busy.values())

    def nobody_can(self, todo: list, shards, t: int) -> bool:
        """Whether all that is left to do belongs to ranks (--own-data) that are still at work on an
        earlier round and over their time."""
        late = {rank for rank, o in self.busy.items() if not o.in_time(self.timeout)}
        return bool(todo) and not self.at_work(t) and all(shards[m] in late for m in todo)

    def answer(self, rank: int, t: int, expected: Payload) -> tuple[Payload, dict] | None:
        """(upload, metrics) of a rank that has ended its order; None: not yet. An upload is asked
        for if its header fits, once there is memory for it (HELD); else it is the header, which
        `accepted` rejects."""
        order = self.busy[rank]
        if order.transfer.done():
            upload = order.transfer.result()                # raises the transfer's error
            if order.metrics is not None:
                return upload, order.metrics
        if order.metrics is not None:
            return None
        coming = sum(o.metrics is not None and o.in_time(self.timeout) for o in self.busy.values())
        full = coming and (coming + 1) * payload_bytes(expected) > HELD
        if full and order.t == t and self.has_posted(rank):
            order.since = time.monotonic()                  # waiting for others is not its work
            return None
        if (message := self.look(rank)) is None:
            return None
        metrics, header = message
        order.metrics = metrics if isinstance(metrics, dict) else {}
        plausible = isinstance(header, list) and len(header) <= 2 * len(expected)
        upload = described(header) if plausible else {}
        if order.t != t or misfit(upload, expected):
            return upload, order.metrics
        self.post(rank, "send", {})
        order.transfer = self.begin(self.receive, rank, upload)
        return None

    # ---- a client's side

    def serve(self, cfg, device):
        """A client rank's life: reads its data, compares flags, builds itself from what it is sent,
        and obeys until the run ends. With --own-data its user may sit at another host than the
        server's, so it prints a line when it has joined and one for each of its rounds."""
        if cfg.own_data:
            self.quiet.close()
        tokenizer = load_tokenizer(cfg.ckpt, ModelConfig.read(cfg.ckpt))
        name, shards = self.own_shards(cfg, tokenizer)
        own, width = next(s for s in shards if s), len(f"round {cfg.rounds}")
        found = digest_of(own.examples)
        print(f"client {self.rank - 1} | {'joined':{width}} | {len(own):,} examples, waits for the "
              f"server", flush=True)
        message, header = self.wait()
        flags, own_gpu, known = message
        free = FREE | {"threads", "proxy_ckpt", "init_lora", "shots", "samples"}
        mine = as_json(cfg)
        if other := next((k for k in mine if k not in free and flags.get(k) != mine[k]), None):
            raise UserError(f"was started with {flag(other)} {mine[other]}, rank 0 with "
                            f"{flags.get(other)}; give all hosts the same flags")
        if known.get(name, found) != found:
            raise UserError("the run that is resumed had other training data here; put that back, "
                            "or choose another --out")
        self.travel(device, own_gpu)
        bootstrap = self.receive(0, described(header))
        self.post(0, [name, found], {})
        self.obey(method_of(cfg.method).Client(bootstrap, cfg, device), shards, width)

    def obey(self, client, shards, width: int):
        """Works on the server's orders until the run ends. `width`: of the lines' second column."""
        upload = {}
        while True:
            order, header = self.wait()
            if order == "send":
                self.send(0, upload)
                continue
            (t, m), start = order, time.perf_counter()
            payload = self.receive(0, described(header))
            upload, metrics = client.update(t, payload, shards[m], m)
            self.post(0, metrics | {"examples": len(shards[m])}, upload)
            print(f"client {m} | round {t + 1:{width - 6}d} | loss {metrics['loss']:.3f} | "
                  f"{time.perf_counter() - start:.0f} s", flush=True)

    def own_shards(self, cfg, tokenizer) -> tuple[str, list]:
        """(what the state calls this data, the shard of every client): with --own-data this rank is
        one client, whose folder holds that client's data alone."""
        if not cfg.own_data:
            shards = make_shards(cfg.task, cfg.data_dir, tokenizer, cfg.clients, cfg.max_len,
                                 cfg.seed, cfg.validate, cfg.strip_annotations)
            return data_of(self.rank)[0], shards
        path = Path(cfg.data_dir) / TASKS[cfg.task].training
        if not os.path.exists(path) or cfg.data_dir == str(BUNDLED_DATA):       # no download here
            raise UserError(f"--own-data: expected this client's own training data, found none at "
                            f"{path}; name its folder with --data-dir")
        own = Shard(training_examples(cfg.task, cfg.data_dir, tokenizer, cfg.max_len,
                                      cfg.validate, cfg.strip_annotations))
        shards = [None] * cfg.clients
        shards[self.rank - 1] = own
        return data_of(self.rank)[1], shards

    # ---- the end

    def end(self, status: int) -> bool:
        """All ranks stop. True for the first to say so: its line is the one to print, and its
        status, `final`, every rank's."""
        self.final, mine = status, f"{status} {self.rank}"
        first, until = True, time.monotonic() + 10
        try:
            said = self.store.compare_set("end", "", mine).decode()
            first, self.final = said == mine, int(said.split()[0])
            with contextlib.suppress(RuntimeError, ValueError):
                dist.destroy_process_group()                # whoever waits in a receive is woken
            others = [f"gone {r}" for r in range(1, self.world) if r != self.rank]
            waits = others if first or self.rank == 0 else []       # the store may be rank 0's
            while waits and time.monotonic() < until and not self.store.check(waits):
                time.sleep(0.01)
            self.store.set(f"gone {self.rank}", "")                 # a client's last word
        except RuntimeError:
            return first and (self.rank == 0 or status != 130)      # the store has gone already
        return first


def main(run, argv=None) -> int:
    """One rank: an error of any of them ends all, in one line. "cuda" is a rank's own GPU."""
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    processes = Processes()
    try:
        with processes.quiet as quiet:
            if processes.rank:              # rank 0 prints, --own-data's clients, who fails first
                nowhere = quiet.enter_context(open(os.devnull, "w"))
                quiet.enter_context(contextlib.redirect_stdout(nowhere))
                quiet.enter_context(contextlib.redirect_stderr(nowhere))
            status = run(argv, processes)
    except BaseException as error:
        status = {UserError: 2, KeyboardInterrupt: 130}.get(type(error), 1)         # 1: a bug
        status = error.code if isinstance(error, SystemExit) else status
        if processes.end(status) or status == 1:
            if processes.rank and isinstance(error, UserError):
                raise UserError(f"rank {processes.rank}: {error}") from None
            raise
        if processes.final and "--own-data" in (argv or sys.argv):      # a terminal for each rank
            print("ended: another rank has stopped, and its terminal says why", file=sys.stderr)
        sys.exit(processes.final)        # another rank has said why; 0: the run ended without us
    processes.end(status)
    return status
