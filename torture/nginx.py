# SPDX-License-Identifier: Apache-2.0
"""nginx from Debian's source, built with retpolines and nothing it can do without."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
import time
from pathlib import Path

from bench.build import Variant, build_once, variant_flags
from bench.commands import end_process, run_command
from bench.sources import Source, fetch_source
from torture.errors import TortureError

__all__ = ["Nginx", "build_nginx"]

_SOURCE = Source(name="nginx", debian="nginx", probe="src/core/nginx.c")
# Each needs a library that is not the server.
_WITHOUT = ("--without-http_rewrite_module", "--without-http_gzip_module")
_START_S = 10.0
_PAGE_SIZE = 4000
_CONFIG = """
daemon off;
{user}
worker_processes 1;
error_log {directory}/error.log;
pid {directory}/pid;
events {{ worker_connections 256; }}
http {{
    access_log {directory}/access.log;
    default_type text/plain;
    client_body_temp_path {directory}/body;
    proxy_temp_path {directory}/proxy;
    fastcgi_temp_path {directory}/fastcgi;
    uwsgi_temp_path {directory}/uwsgi;
    scgi_temp_path {directory}/scgi;
    server {{
        listen 127.0.0.1:{port};
        root {directory}/pages;
        location /again/ {{ alias {directory}/pages/; add_header Again $request_time; }}
    }}
}}
"""


def build_nginx() -> Path:
    """Build the server with retpolines; returns its executable.

    Raises:
        BenchError: if the source cannot be had or built.
    """
    root = fetch_source(_SOURCE)
    flags = variant_flags(Variant.RETPOLINE)

    def build(directory: Path) -> Path:
        tree = directory / "tree"
        shutil.copytree(root, tree, symlinks=True)
        options = [*_WITHOUT, f"--prefix={directory}", f"--with-cc-opt={' '.join(flags)}"]
        run_command(["./configure", *options], cwd=tree)
        run_command(["make", "-j2"], cwd=tree)
        shutil.copy2(tree / "objs" / "nginx", directory / "nginx")
        shutil.rmtree(tree)
        return directory / "nginx"

    return build_once("nginx", Variant.RETPOLINE, [*flags, *_WITHOUT], build)


class Nginx:
    """A running server with one worker; leaving the ``with`` block ends it.

    Attributes:
        pid: The worker.
        port: Where it listens, on the loopback interface.
        page: What it serves as ``/page``.
    """

    def __init__(self, executable: Path) -> None:
        """Start the server and wait until it accepts connections."""
        self._directory = Path(tempfile.mkdtemp(prefix="nginx-"))
        # The worker drops its rights, and has to come in.
        self._directory.chmod(0o755)
        (self._directory / "pages").mkdir()
        self.page = bytes(32 + i % 95 for i in range(_PAGE_SIZE))
        (self._directory / "pages" / "page").write_bytes(self.page)
        self.port = _find_port()
        user = "user nobody nogroup;" if os.geteuid() == 0 else ""
        config = self._directory / "nginx.conf"
        config.write_text(_CONFIG.format(user=user, directory=self._directory, port=self.port))
        error_log = self._directory / "error.log"
        self._process = subprocess.Popen(
            [str(executable), "-c", str(config), "-e", str(error_log)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            self.pid = self._find_worker()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the server, and remove what it wrote."""
        end_process(self._process)
        shutil.rmtree(self._directory, ignore_errors=True)

    def __enter__(self) -> Nginx:
        """Return the running server."""
        return self

    def __exit__(self, *_: object) -> None:
        """End the server."""
        self.close()

    def _find_worker(self) -> int:
        """Wait until the one worker is there and answers; return its pid."""
        master = self._process.pid
        children = Path(f"/proc/{master}/task/{master}/children")
        deadline = time.monotonic() + _START_S
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                words = (self._directory / "error.log").read_text(errors="replace")
                raise TortureError(f"nginx did not start: {words[-300:]}")
            try:
                with socket.create_connection(("127.0.0.1", self.port), timeout=1):
                    pids = [int(word) for word in children.read_text().split()]
            except OSError:
                pids = []
            if pids:
                return pids[0]
            time.sleep(0.02)
        raise TortureError(f"nginx did not start within {_START_S:.0f} s")


def _find_port() -> int:
    """Return a port of the loopback interface that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
