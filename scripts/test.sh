#!/usr/bin/env bash
# Sets up, checks lint, format and types, and runs all tests; arguments go to pytest.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
cd "$root"
ruff check .
ruff format --check .
mypy
# Two processes, a test file in one of them: the pipeline tests beside the kernel tests.
python -m pytest -n 2 --dist loadfile "$@"
