#!/bin/sh
# Check on one GPU, in at most eight minutes, what tests without a GPU cannot: see benchmarks/README.md.
cd "$(dirname "$0")/.." || exit 1
# Deterministic matrix products need this, before the first one.
export CUBLAS_WORKSPACE_CONFIG="${CUBLAS_WORKSPACE_CONFIG:-:4096:8}"
exec "${PYTHON:-python}" -m benchmarks.first_gpu "$@"
