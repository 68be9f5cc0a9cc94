#!/usr/bin/env bash
# Installs lora_kit into .venv with what its tests need, and tests it.
#   ./scripts/test.sh           lint, types, and the quick tests (a few minutes)
#   ./scripts/test.sh --all     the slow tests too: everything that needs no GPU
#   ./scripts/test.sh tests/test_run.py -k override     any other arguments go to pytest
. "$(dirname "$0")/environment.sh" test
export HF_HUB_OFFLINE=1
tier="(quick or not slow) and not gpu"
if [ "${1:-}" = --all ]; then
  tier="not gpu"
  shift
elif [ $# -gt 0 ]; then
  exec .venv/bin/python -m pytest "$@"
fi
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
# Two processes; the tests of a module stay in one of them, with the runs that they share.
exec .venv/bin/python -m pytest -n 2 --dist loadscope -m "$tier" "$@"
