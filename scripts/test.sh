#!/usr/bin/env bash
# Makes the environment, checks the layout and runs all tests; arguments go to pytest:
#     bash scripts/test.sh -k packing
#     bash scripts/test.sh -m "not slow"
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/environment.sh
make_environment requirements-dev.txt
.venv/bin/python -m ruff format --check .
.venv/bin/python -m ruff check .
OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n 2 --dist loadfile "$@"  # two files at a time
