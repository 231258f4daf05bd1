#!/usr/bin/env bash
# aiperf 0.13.0 counts a streamed answer that ended with an error event as a completed request, once a
# token had come before the event. OpenAI-style servers (vLLM, SGLang) report a failure inside a 200
# stream as `data: {"error": …}`: a server that gives up on long answers then looks like one that
# finishes them, with good times and with goodput. Where the event comes before the first token, aiperf
# counts an error. Expected: an error in both.
#
# Seen, for ten answers of which five ended with an error event after their third token:
#   completed 10, errors 0, within the targets 10
set -euo pipefail
folder=$(mktemp -d)
trap 'kill $(jobs -p) 2>/dev/null || true; rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q aiperf==0.13.0
cat >"$folder/server.py" <<'PY'
"""Streams five tokens to every request; every second answer breaks off after three, and says so."""
import itertools, json, sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

turn = itertools.count()

class Server(BaseHTTPRequestHandler):
    def log_message(self, *args): pass

    def do_GET(self):
        self.send_response(404)
        self.end_headers()

    def do_POST(self):
        self.rfile.read(int(self.headers["content-length"]))
        broken = next(turn) % 2
        events = [{"id": "1", "object": "text_completion", "created": 1, "model": "m",
                   "choices": [{"index": 0, "text": " word", "finish_reason": None}]}] * (3 if broken else 5)
        if broken:
            events.append({"error": {"message": "time-out", "type": "SERVICE_UNAVAILABLE", "code": 503}})
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.end_headers()
        for event in [*map(json.dumps, events), "[DONE]"]:
            self.wfile.write(f"data: {event}\n\n".encode())

ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Server).serve_forever()
PY
mkdir "$folder/words"  # a tokenizer that needs no network, unlike --tokenizer builtin
cat >"$folder/words/tokenizer.json" <<'JSON'
{"version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
 "pre_tokenizer": {"type": "Whitespace"}, "post_processor": null, "decoder": null,
 "model": {"type": "WordLevel", "vocab": {"word": 0, "the": 1, "and": 2, "of": 3}, "unk_token": "word"}}
JSON
echo '{"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "word"}' >"$folder/words/tokenizer_config.json"
port=$(python3 -c 'import socket; print(socket.create_server(("127.0.0.1", 0)).getsockname()[1])')
python3 "$folder/server.py" "$port" &
"$folder/venv/bin/aiperf" profile --model m --tokenizer "$folder/words" --url "http://127.0.0.1:$port" \
    --endpoint-type completions --streaming --concurrency 1 --request-count 10 \
    --synthetic-input-tokens-mean 10 --output-tokens-mean 5 \
    --goodput "time_to_first_token:60000 inter_token_latency:60000" \
    --artifact-dir "$folder/out" --ui none >"$folder/log" 2>&1 || { tail -n 20 "$folder/log"; exit 1; }
python3 - "$folder/out/profile_export.jsonl" "$folder/out/profile_export_aiperf.json" <<'PY' || {
import json, sys

with open(sys.argv[1]) as file:
    records = [json.loads(line) for line in file]
with open(sys.argv[2]) as file:
    good = json.load(file)["good_request_count"]["avg"]
errors = sum(bool(record.get("error")) for record in records)
print(f"completed {len(records) - errors}, errors {errors}, within the targets {good:.0f}")
sys.exit((len(records), errors, good) != (10, 0, 10))
PY
    echo "changed: aiperf no longer behaves as written above"
    exit 1
}
