#!/usr/bin/env bash
# Installs lora_kit with what its tests need into .venv and runs them; arguments go to pytest.
#   ./scripts/test.sh
#   ./scripts/test.sh tests/test_run.py -k override
all=$#
. "$(dirname "$0")/environment.sh" test
if [ "$all" = 0 ]; then
  .venv/bin/ruff check .
  .venv/bin/ruff format --check .
  .venv/bin/mypy
fi
HF_HUB_OFFLINE=1 exec .venv/bin/python -m pytest "$@"
