#!/usr/bin/env bash
# The real backbone on a GPU, at 224 pixels: a computed front, and ten minutes of search. It needs no network:
# "python -m benchmarks.real --pack runs/real224" has made what it reads. Usage: benchmarks/gpu_front.sh [FOLDER [SECONDS]]
set -euo pipefail
cd "$(dirname "$0")/.."
folder=${1:-runs/real224}
seconds=${2:-600}
data=imagefolder:$folder/photographs
results=benchmarks/results/gpu
mkdir -p "$results"
gpus=$(python -c 'import torch; print(min(torch.cuda.device_count(), 1))')

prunesweep instant "$folder/source" --data "$data" --budgets 0.5,0.26,0.12,0.06 --align 8 --out "$folder/front"
prunesweep front "$folder/front" --json > "$results/front_computed.json"

# Ctrl-C ends a search cleanly: what is finished is its front
status=0
timeout --signal=INT "$seconds" prunesweep search benchmarks/gpu_front.toml --out "$folder/run" \
    --set "source.model=local-dir:$folder/source" --set "data.name=$data" \
    --set "search.start_from=[\"$folder/front\"]" --set "resources.gpus_per_trial=$gpus" || status=$?
[ "$status" -eq 0 ] || [ "$status" -eq 124 ] || [ "$status" -eq 130 ] || exit "$status"
prunesweep front "$folder/run" --json > "$results/front_searched.json"
