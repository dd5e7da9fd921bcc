#!/usr/bin/env bash
# From nothing to a chat model: makes the environment, then runs scripts/quickstart.py with the same arguments.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/environment.sh
make_environment requirements.txt
exec .venv/bin/python scripts/quickstart.py "$@"
