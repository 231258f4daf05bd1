"""``kairos pd``, also ``python -m sglang_kairos.launch_pd``: a PD cluster on this machine."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import shlex
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType

from sglang_kairos import processes
from sglang_kairos.cluster.run import ROUTERS, Cluster, ClusterError, ClusterSpec, quiet_zygote
from sglang_kairos.commands import parser_of
from sglang_kairos.config import ConfigError, KairosConfig, add_flags
from sglang_kairos.cpu import runtime as cpu_runtime
from sglang_kairos.other_sglang import NoSuchSglang, use

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
ARGS_FLAGS = ("--prefill-args", "--decode-args", "--router-args")
DESCRIPTION = """\
Start prefill servers, decode servers and a router on this machine.
Every flag that is not listed here goes to all prefill and decode servers.
Without a GPU and without --model-path a tiny random model is served.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Starts the cluster and stays until Ctrl-C (0) or until a part dies (1)."""
    try:
        spec, options = parse(sys.argv[1:] if argv is None else argv)
    except (ConfigError, ClusterError, NoSuchSglang) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for number in ENDING:
        # Who starts it under nohup wants it to outlive the terminal.
        if signal.getsignal(number) is not signal.SIG_IGN or number != signal.SIGHUP:
            signal.signal(number, _interrupt)
    # What a shell had started before it became this process.
    others = processes.descendants()
    processes.adopt_orphans()
    try:
        return _run(spec, options)
    finally:
        # Whatever a part left behind is a child of this process by now.
        processes.kill_descendants(spared=others)


def _run(spec: ClusterSpec, options: argparse.Namespace) -> int:
    with contextlib.ExitStack() as stack:
        try:
            if options.start == "fork":
                folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="kairos-zygote-"))
                spec.say("importing SGLang once for all parts")
                zygote = quiet_zygote((spec.log_dir or Path(folder)) / "zygote.log", spec.router)
                spec = dataclasses.replace(spec, zygote=stack.enter_context(zygote))
            cluster = Cluster(spec)
            if not options.quiet:
                stack.callback(_Follower(cluster).stop)
            with cluster:
                spec.say(f"ready after {cluster.started_in_s:.1f} s")
                spec.say(_greeting(cluster))
                while True:
                    cluster.check()
                    time.sleep(0.5)
        except ClusterError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            spec.say("stopped")
            return 0


def build_parser() -> argparse.ArgumentParser:
    """The cluster's flags and Kairos' own."""
    parser = parser_of("pd", description=DESCRIPTION, allow_abbrev=False)
    parser.add_argument("--prefill", type=int, default=1, metavar="N", help="prefill servers (1)")
    parser.add_argument("--decode", type=int, default=1, metavar="M", help="decode servers (1)")
    parser.add_argument("--model-path", "--model", default="", help="model to serve")
    parser.add_argument("--host", default="127.0.0.1", help="where the router listens (127.0.0.1)")
    parser.add_argument("--port", type=int, default=30000, help="the router's port (30000; 0: any)")
    parser.add_argument("--router", choices=ROUTERS, default="kairos")
    for flag in ARGS_FLAGS:
        parser.add_argument(
            flag, type=shlex.split, default=[], metavar='"…"', help="for this role only"
        )
    parser.add_argument(
        "--launcher", default="sglang_kairos.launch_server", help="module that starts each server"
    )
    parser.add_argument(
        "--sglang", help="version or folder of another SGLang than the installed one"
    )
    parser.add_argument("--log-dir", type=Path, help="keep each part's log here")
    parser.add_argument(
        "--start",
        choices=("fork", "spawn"),
        default="fork" if cpu_runtime.decide().active else "spawn",
        help="fork all parts from one process that has imported SGLang (the default without a "
        "GPU: three times as fast to start), or start each anew",
    )
    parser.add_argument("--quiet", action="store_true", help="do not show the parts' log lines")
    parser.add_argument("--ready-timeout", type=float, default=600.0, metavar="SECONDS")
    add_flags(parser)
    return parser


def parse(argv: Sequence[str]) -> tuple[ClusterSpec, argparse.Namespace]:
    """The spec that a command line asks for, and the options that are not part of it."""
    config, words = KairosConfig.load(argv)
    given, rest = build_parser().parse_known_args(_joined(words))
    if given.sglang:
        use(given.sglang)
    env: dict[str, str] = {}
    config.to_env(env)
    spec = ClusterSpec(
        prefill=given.prefill,
        decode=given.decode,
        host=given.host,
        port=given.port,
        model_path=given.model_path,
        router=given.router,
        launcher=given.launcher,
        kairos=config.enabled,
        env=env,
        server_args=rest,
        prefill_args=given.prefill_args,
        decode_args=given.decode_args,
        router_args=given.router_args,
        log_dir=given.log_dir,
        ready_timeout_s=given.ready_timeout,
        say=lambda line: print(line, flush=True),
    )
    return spec, given


def _joined(words: Sequence[str]) -> list[str]:
    """Without ``--``, and ``--decode-args --x`` as one word: argparse takes ``--x`` for a flag."""
    joined: list[str] = []
    for word in words:
        if joined and joined[-1] in ARGS_FLAGS:
            joined[-1] += "=" + word
        elif word != "--":
            joined.append(word)
    return joined


def _greeting(cluster: Cluster) -> str:
    lines = [f"prefill server: {url}" for url in cluster.prefill_urls]
    lines += [f"decode server:  {url}" for url in cluster.decode_urls]
    if cluster.spec.router == "none":
        return "\n".join(
            [*lines, "no router: send each request to both servers with a bootstrap room"]
        )
    body = (
        '{"text": "The capital of France is", "ttft_ms": 1000, "tpot_ms": 100, '
        '"sampling_params": {"max_new_tokens": 16, "temperature": 0}}'
    )
    return "\n".join(
        [
            *lines,
            f"serving at {cluster.url} (Ctrl-C stops everything); try",
            f"  curl -s {cluster.url}/generate -H 'Content-Type: application/json' -d '{body}'",
        ]
    )


def _interrupt(number: int, frame: FrameType | None) -> None:
    # A second signal while stopping must not break off the stopping.
    for each in ENDING:
        signal.signal(each, signal.SIG_IGN)
    raise KeyboardInterrupt


class _Follower:
    """Shows new log lines of every part, each behind the part's name."""

    def __init__(self, cluster: Cluster, interval_s: float = 0.2) -> None:
        self._cluster, self._interval_s = cluster, interval_s
        self._read: dict[Path, int] = {}
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Shows what is left and ends."""
        self._stopping.set()
        self._thread.join(timeout=5.0)

    def _run(self) -> None:
        while not self._stopping.wait(self._interval_s):
            self._show(self._cluster.logs)

    def _show(self, logs: Mapping[str, Path]) -> None:
        for name, log in logs.items():
            try:
                with log.open("rb") as file:
                    file.seek(self._read.get(log, 0))
                    text = file.read()
            except OSError:
                continue
            whole = text[: text.rfind(b"\n") + 1]
            self._read[log] = self._read.get(log, 0) + len(whole)
            for line in whole.decode(errors="replace").splitlines():
                print(f"{name}| {line}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
