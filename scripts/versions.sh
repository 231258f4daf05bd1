#!/usr/bin/env bash
# Proves every supported SGLang (or those that KAIROS_TEST_VERSIONS names): the tests that run on
# versions, and the identity test with the plugin and with the patched tree. Arguments go to pytest.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

export KAIROS_TEST_VERSIONS=${KAIROS_TEST_VERSIONS:-all}
# shellcheck disable=SC2046
.venv/bin/python -m sglang_kairos.other_sglang $(PYTHONPATH=test .venv/bin/python test/helpers/trees.py) || exit 1
mapfile -t units < <(grep -l TESTED_VERSIONS test/unit/*.py)
.venv/bin/python -m pytest -q -n 2 "${units[@]}" "$@" || exit 1
exec .venv/bin/python -m pytest -q test/e2e/test_versions.py "$@"
