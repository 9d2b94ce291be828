"""A run's log.csv as TensorBoard events beside it: python benchmarks/tensorboard_log.py RUN …"""
import sys
from pathlib import Path

from plot import read_log

try:
    from torch.utils.tensorboard import SummaryWriter
except ImportError:
    sys.exit("error: tensorboard is not installed; pip install -r benchmarks/requirements.txt")
for folder in map(Path, sys.argv[1:]):
    rows = read_log(folder)
    with SummaryWriter(str(folder)) as writer:
        for row in rows:
            for name in row.keys() - {"round"}:
                writer.add_scalar(name, row[name], int(row["round"]))
