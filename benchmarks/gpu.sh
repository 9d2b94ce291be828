#!/bin/sh
# Everything that RESULTS.md wants to know of a GPU, as tables on standard output:
#
#     sh benchmarks/gpu.sh > gpu.md          PYTHON=… takes another interpreter than python
#
# Losses beside the eager and the compiled naive form; a client's and a server's step of the shape
# of LLaMA-2-7B, random weights, bf16, beside transformers + peft, and what share the products are;
# decoding against the bandwidth bound; peaks of memory beside what --plan counts; how often the
# host waits; generation in too little memory; growth; the tests that stand in for a GPU. By count
# up to 75 GiB of the card's memory, most of it transformers' models; a peer that does not fit, or is
# not installed (pip install -r benchmarks/requirements.txt), says so in its row.
cd "$(dirname "$0")/.." || exit 1
python=${PYTHON:-python}
if ! "$python" -c 'import torch; raise SystemExit(not torch.cuda.is_available())' 2>/dev/null; then
    echo "error: no GPU here that PyTorch can use; gpu.sh needs one" >&2
    exit 2
fi
set -x
"$python" benchmarks/gpu.py card
"$python" benchmarks/bench.py losses --device cuda --tokens 4096 --dims 1024 4096 \
    --peer naive --peer compile
"$python" benchmarks/bench.py client --device cuda --shape 7b --peer transformers
"$python" benchmarks/bench.py server --device cuda --shape 7b --peer transformers
"$python" benchmarks/bench.py shares --device cuda --shape 7b
"$python" benchmarks/gpu.py decode
"$python" benchmarks/gpu.py memory
"$python" benchmarks/gpu.py reads --shape small
"$python" benchmarks/gpu.py halves
"$python" benchmarks/bench.py growth --device cuda
"$python" test_all.py host_reads_a_gpu
