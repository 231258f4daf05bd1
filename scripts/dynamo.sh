#!/usr/bin/env bash
# Installs what test/e2e/test_dynamo.py runs: NVIDIA Dynamo into out/dynamo (KAIROS_DYNAMO_FOLDER names
# another folder), and the SGLang that it pins beside the installed one. With nothing to do it ends at once.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

folder=${KAIROS_DYNAMO_FOLDER:-out/dynamo}
list=requirements/dynamo.txt
if ! cmp -s "$list" "$folder/installed.txt"; then
    echo "installing Dynamo into $folder"
    rm -rf "$folder"
    .venv/bin/python -m pip install -q --disable-pip-version-check --no-deps --no-compile \
        --target "$folder" -r "$list"
    cp "$list" "$folder/installed.txt"
fi
.venv/bin/python -m sglang_kairos.other_sglang 0.5.21
