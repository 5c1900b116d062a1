#!/bin/sh
# Check on one GPU, in at most eight minutes, what tests without a GPU cannot: see benchmarks/README.md.
cd "$(dirname "$0")/.." || exit 1
exec "${PYTHON:-python}" -m benchmarks.first_gpu "$@"
