#!/usr/bin/env bash
# ai-dynamo-runtime 1.6.1 reads DYN_SYSTEM_PORT, the port of a worker's own /metrics and /health, as a
# signed 16-bit number. A valid port from 32768 on (half of all, and all that Linux gives out by itself)
# is no port to it: the worker does not start.
#
# Seen:
#   32767: started
#   32768: invalid value unsigned int `32768`, expected i16 for key "SYSTEM_PORT" in `DYN_SYSTEM_` environment variable(s)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q ai-dynamo-runtime==1.6.1
cat >"$folder/start.py" <<'PY'
import asyncio
from dynamo.runtime import DistributedRuntime

async def main():
    try:
        DistributedRuntime(asyncio.get_running_loop(), "mem", "tcp")
        print("started")
    except Exception as error:
        print(error)

asyncio.run(main())
PY
for port in 32767 32768; do
    printf '%s: ' "$port"
    DYN_SYSTEM_PORT=$port "$folder/venv/bin/python" "$folder/start.py" 2>/dev/null
done | grep -v 'tasks still running' | tee "$folder/seen"
diff "$folder/seen" <(sed -n 's/^#   \(327\)/\1/p' "$0")
echo "ai-dynamo-runtime 1.6.1: as described"
