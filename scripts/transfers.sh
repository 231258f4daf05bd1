#!/usr/bin/env bash
# Proves the ways to hand KV over on every supported SGLang (or those that KAIROS_TEST_VERSIONS names).
# Arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

export KAIROS_TEST_VERSIONS=${KAIROS_TEST_VERSIONS:-all}
bash scripts/beside.sh nixl
# shellcheck disable=SC2046
.venv/bin/python -m sglang_kairos.other_sglang $(PYTHONPATH=test .venv/bin/python test/helpers/trees.py)
export PYTHONPATH=$PWD/out/nixl${PYTHONPATH:+:$PYTHONPATH}
exec bash scripts/pytest.sh test/e2e/test_transfers.py "$@"
