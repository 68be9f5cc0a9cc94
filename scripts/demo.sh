#!/usr/bin/env bash
# Installs lora_kit into .venv and runs the whole journey on the embedded model. Needs Python and git.
#   ./scripts/demo.sh
. "$(dirname "$0")/environment.sh" ""
# The main job needs no network, and proves it.
HF_HUB_OFFLINE=1 exec .venv/bin/lora-kit demo
