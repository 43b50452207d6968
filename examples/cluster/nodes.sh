#!/bin/bash
# A recipe on several nodes without a scheduler: call this on every node, at about the same time.
#
#   NODES=2 FIRST=node-0 examples/cluster/nodes.sh sft --model START --data META.json --out RUN
#
# FIRST is the name of one of the nodes, which the others reach at PORT. Data and run folder are on a
# file system that all nodes see. After a stop, call it again on every node.
set -euo pipefail
: "${NODES:?how many nodes}" "${FIRST:?name of the first node}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

exec torchrun \
    --nnodes "$NODES" \
    --nproc-per-node "${GPUS:-8}" \
    --rdzv-backend c10d \
    --rdzv-endpoint "$FIRST:${PORT:-29500}" \
    --rdzv-id mono-internvl \
    -m mono_internvl train "$@" --device "${DEVICE:-cuda}" --parallel "${PARALLEL:-fsdp}"
