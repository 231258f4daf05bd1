"""The router as a process: uvicorn, and a SIGTERM that lets what is in flight end.

SIGTERM   /health says 503; requests are still taken for --drain-delay-secs, so that balancers
          in front can notice; then the port closes and what is in flight has
          --shutdown-grace-period-secs. What is left then ends with an error, and aborts.
again     ends at once
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import resource
import signal
import sys
import threading
from contextlib import suppress
from types import FrameType
from typing import Any

import uvicorn

from sglang_kairos.router.app import RouterApp
from sglang_kairos.router.options import OptionError

logger = logging.getLogger("uvicorn.error")

# Between telling requests that the router ends and uvicorn's cancelling them.
_LAST_WORDS_S = 2.0
# A request has its client's connection and one to each server; the router itself has some, too.
_DESCRIPTORS_EACH, _OTHER_DESCRIPTORS = 3, 64


class DrainingServer(uvicorn.Server):
    """uvicorn with the signals above."""

    def __init__(self, config: uvicorn.Config, app: RouterApp) -> None:
        super().__init__(config)
        self._router = app.router
        self._ending: asyncio.Task[None] | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """First signal: drain. Second: as uvicorn does."""
        if self._router.draining or not self.started:
            self._router.proxy.interrupt_all()
            self.should_exit = True
            self.force_exit = self._router.draining and sig == signal.SIGINT
            return
        self._router.draining = True
        self._ending = asyncio.get_running_loop().create_task(self._drain())

    async def _drain(self) -> None:
        options = self._router.options
        logger.info("draining: %g s for balancers to notice", options.drain_delay_s)
        await asyncio.sleep(options.drain_delay_s)
        self.should_exit = True
        await asyncio.sleep(options.drain_s)
        self._router.proxy.interrupt_all()


def raise_descriptor_limit(max_in_flight: int) -> str:
    """Takes as many file descriptors as the process may have; what to say if they do not suffice."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with suppress(OSError, ValueError):  # some systems have a lower limit than they say
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
            soft = hard
    needed = _DESCRIPTORS_EACH * max_in_flight + _OTHER_DESCRIPTORS
    if soft == resource.RLIM_INFINITY or needed <= soft:
        return ""
    fits = max(0, soft - _OTHER_DESCRIPTORS) // _DESCRIPTORS_EACH
    return (
        f"--max-concurrent-requests {max_in_flight} needs {needed} file descriptors, this process may "
        f"have {soft}: from {fits} requests at once on, further ones get 503 (raise ulimit -Hn, or "
        "lower the flag)"
    )


def _log_to(folder: str) -> None:
    """The log into a file as well. OptionError if it cannot be written."""
    try:
        os.makedirs(folder, exist_ok=True)
        handler = logging.FileHandler(os.path.join(folder, "router.log"))
    except OSError as error:
        raise OptionError(f"--log-dir: {error}") from None
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.getLogger("uvicorn").addHandler(handler)
    own = logging.getLogger("sglang_kairos")
    own.addHandler(handler)
    own.addHandler(logging.StreamHandler())


def serve(app: RouterApp) -> int:
    """Serve until told to stop; the exit status."""
    options = app.router.options
    shortage = raise_descriptor_limit(options.max_in_flight)
    if shortage:
        logger.warning(shortage)
    settings: dict[str, Any] = {}
    if options.tls_cert:
        settings = {"ssl_certfile": options.tls_cert, "ssl_keyfile": options.tls_key}
    config = uvicorn.Config(
        app,
        host=options.host,
        port=options.port,
        loop="uvloop",
        http="httptools",
        log_level=options.log_level,
        access_log=False,
        timeout_graceful_shutdown=int(options.drain_s + _LAST_WORDS_S) + 1,
        backlog=4096,
        proxy_headers=False,
        server_header=False,
        **settings,
    )
    if options.log_dir:
        _log_to(options.log_dir)
    server = DrainingServer(config, app)
    # What was imported stays: the collector need not look through it again and again.
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)
    assert threading.current_thread() is threading.main_thread(), "signals need the main thread"
    server.run()
    return 0 if server.started else sys.exit(3)
