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
# The types are checked beside the tests: mypy uses one process for a minute where it has no cache.
types=$(mktemp)
.venv/bin/mypy >"$types" 2>&1 &
checked=$!
# Two processes; the tests of a module stay in one of them, with the runs that they share. Modules
# begin in the order of conftest.py.
status=0
.venv/bin/python -m pytest -n 2 --dist loadscope --no-loadscope-reorder -m "$tier" "$@" || status=$?
wait "$checked" || status=1
cat "$types"
rm "$types"
exit "$status"
