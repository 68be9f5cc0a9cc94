# Makes .venv and installs lora_kit into it; sourced by demo.sh and test.sh. $1: extras, or nothing.
# May be run again, and after an interruption: it is done when .venv/installed holds the key below.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))' || {
  echo "error: $("$python" --version 2>&1): Python 3.11 to 3.14 is needed: PYTHON=python3.12 $0" >&2
  exit 2
}
extras=${1:-}
# The newest extras stay: after test.sh, demo.sh finds everything it needs.
key="$(cat pyproject.toml scripts/constraints.txt | cksum) $("$python" --version)"
if ! grep -qxF "$key $extras" .venv/installed 2>/dev/null; then
  echo "Installing into .venv (a few minutes the first time) ..." >&2
  [ -x .venv/bin/pip ] || "$python" -m venv --clear .venv
  # Python compiles what it imports; compiling everything takes as long as the rest.
  .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-compile \
    -c scripts/constraints.txt -e ".${extras:+[$extras]}"
  # One key a line: what was installed for other extras is still there, unless the key changed.
  grep -qF "$key" .venv/installed 2>/dev/null || : >.venv/installed
  echo "$key $extras" >>.venv/installed
fi
