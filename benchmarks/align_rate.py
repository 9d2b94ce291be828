"""The alignment before round 1 (Eq. 5): its rate and its steps, chosen on held-out public rows.

    python benchmarks/align_rate.py [--dropouts 0.5 0.2] [--rates 3e-4 1e-3 3e-3] [--steps 500 250]

The server aligns on all of the bundled public data but the last 300 rows; the table has the losses
on those. No client and no task's data take part, so the choice serves every method.
"""
import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import fedbiot  # noqa: E402
import train  # noqa: E402
from data import Shard, make_public  # noqa: E402
from measuring import table  # noqa: E402
from model import load  # noqa: E402

HELD_OUT = 300


def aligned(full, public: Shard, cfg) -> dict:
    """The means of Eq. 3 and 4 on the held-out rows, after cfg.align_init steps on the others."""
    server = fedbiot.Server(full, Shard(public.examples[:-HELD_OUT]), cfg)
    start = time.process_time()
    server.bootstrap()
    seconds = time.process_time() - start
    with torch.no_grad():
        batches = Shard(public.examples[-HELD_OUT:]).batches(HELD_OUT // 10, 10, (0,))
        found = [server.alignment_losses(batch) for batch in batches]
    l2, kl = (fmean(terms[name][1].item() for terms in found) for name in ("l2", "kl"))
    return {"beta": cfg.dropout, "steps": cfg.align_init, "rate": cfg.align_init_lr, "l2": l2,
            "kl": kl, "sum": l2 + kl, "cpu_s": seconds}


def main():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--dropouts", nargs="+", type=float, default=[0.5, 0.2])
    add("--rates", nargs="+", type=float, default=[3e-4, 1e-3, 3e-3])
    add("--steps", nargs="+", type=int, default=[500, 250])
    args, cfg = parser.parse_args(), train.parse([])
    torch.set_num_threads(1)
    full, tokenizer = load(cfg.ckpt)
    public = make_public(cfg.data_dir, tokenizer, cfg.max_len)
    table([aligned(full, public, replace(cfg, dropout=beta, align_init=steps, align_init_lr=rate))
           for beta in args.dropouts for steps in args.steps for rate in args.rates])


if __name__ == "__main__":
    main()
