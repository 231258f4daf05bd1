#!/usr/bin/env bash
# Runs pytest in .venv with the given arguments and passes its exit status through.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

.venv/bin/python -m pytest -q "$@"
status=$?
if ((status == 5)); then
    echo "pytest found no tests: that is a failure here" >&2
fi
exit "$status"
