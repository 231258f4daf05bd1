#!/usr/bin/env bash
# sglang-router 0.3.2 (SGLang's Rust gateway), plain HTTP mode, forwards /v1/completions as it came, and
# drops unknown fields of /generate and /v1/chat/completions on the way to the worker: `custom_params`,
# which SGLang's own endpoints take, among them. Request headers that it does not know are dropped on
# all three. So whatever a scheduler is to learn of a request does not arrive through two of three
# endpoints, and nobody is told.
#
# Seen:
#   generate: custom_params no, priority yes, header no
#   completions: custom_params yes, priority yes, header no
#   chat: custom_params no, priority no, header no
set -euo pipefail
folder=$(mktemp -d)
trap 'kill $(jobs -p) 2>/dev/null || true; rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q sglang-router==0.3.2
cat >"$folder/worker.py" <<'PY'
"""A worker that answers what a gateway asks of one, and keeps the last body and headers."""
import json, sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

LAST = {}

class Worker(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args): pass

    def reply(self, body):
        raw = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    def do_GET(self):
        if self.path == "/last":
            return self.reply(LAST)
        self.reply({"model_path": "m", "served_model_name": "m", "data": [{"id": "m"}], "status": "ok"})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers.get("content-length") or 0)) or b"{}")
        LAST.update(body=body, headers=[name.lower() for name in self.headers])
        self.reply({"id": "1", "object": "x", "created": 1, "model": "m", "text": "x", "choices": [],
                    "meta_info": {"id": "1"}})

ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Worker).serve_forever()
PY
cat >"$folder/ask.py" <<'PY'
import json, sys, time, urllib.request

gateway, worker = sys.argv[1:]
opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

def post(path, body):
    data = json.dumps(body | {"custom_params": {"note": 1}, "priority": 3}).encode()
    headers = {"content-type": "application/json", "x-note": "1"}
    opener.open(urllib.request.Request(gateway + path, data, headers), timeout=20).read()
    last = json.load(opener.open(worker + "/last", timeout=20))
    said = ["yes" if name in last["body"] else "no" for name in ("custom_params", "priority")]
    return (*said, "yes" if "x-note" in last["headers"] else "no")

for _ in range(120):
    try:
        post("/generate", {"text": "x"})
        break
    except OSError:
        time.sleep(0.5)
seen = {
    "generate": post("/generate", {"text": "x"}),
    "completions": post("/v1/completions", {"model": "m", "prompt": "x"}),
    "chat": post("/v1/chat/completions", {"model": "m", "messages": [{"role": "user", "content": "x"}]}),
}
for name, (params, priority, header) in seen.items():
    print(f"{name}: custom_params {params}, priority {priority}, header {header}")
expected = {"generate": ("no", "yes", "no"), "completions": ("yes", "yes", "no"), "chat": ("no", "no", "no")}
sys.exit(seen != expected)
PY
read -r gateway worker < <(python3 -c '
import socket
held = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
print(*(each.getsockname()[1] for each in held))')
python3 "$folder/worker.py" "$worker" &
"$folder/venv/bin/python" -m sglang_router.launch_router --host 127.0.0.1 --port "$gateway" \
    --worker-urls "http://127.0.0.1:$worker" --policy round_robin >"$folder/log" 2>&1 &
"$folder/venv/bin/python" "$folder/ask.py" "http://127.0.0.1:$gateway" "http://127.0.0.1:$worker" || {
    tail -n 20 "$folder/log"
    echo "changed: sglang-router no longer behaves as written above"
    exit 1
}
