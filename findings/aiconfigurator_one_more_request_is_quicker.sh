#!/usr/bin/env bash
# aiconfigurator-core 0.12.0 predicts that some decode steps get quicker by one more request. With
# Llama 3.1 8B on one H200, 225 requests of 128 tokens take 7 % less than 224, and 81 take 5 % less
# than 80. Whoever looks for the largest batch within a TPOT target, and takes step times to grow with
# the batch, may stop well short of it: below at 215, where 239 fit as well.
#
# Seen:
#   80 -> 81: 5.923 -> 5.629 ms
#   224 -> 225: 9.374 -> 8.722 ms
#   within 9.0 ms: all batches up to 215, the largest is 239
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check aiconfigurator-core==0.12.0
cat >"$folder/step.py" <<'PY'
import logging

from aiconfigurator_core import sdk

logging.disable(logging.WARNING)
engine = sdk.EngineHandle.compile("meta-llama/Meta-Llama-3.1-8B", "h200_sxm", "sglang", tp_size=1)
step = {batch: float(engine.predict_decode_latency(batch, 128)) for batch in range(1, 257)}
for batch in (80, 224):
    print(f"{batch} -> {batch + 1}: {step[batch]:.3f} -> {step[batch + 1]:.3f} ms")
first_over = next(batch for batch in step if step[batch] > 9.0)
largest = max(batch for batch in step if step[batch] <= 9.0)
print(f"within 9.0 ms: all batches up to {first_over - 1}, the largest is {largest}")
PY
"$folder/venv/bin/python" "$folder/step.py" 2>/dev/null | tee "$folder/seen"
diff "$folder/seen" <(sed -n '/^# Seen/,/^set/s/^#   //p' "$0")
echo "aiconfigurator-core 0.12.0: as described"
