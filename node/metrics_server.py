"""/metrics over HTTP, for Prometheus to scrape."""

from __future__ import annotations

import errno

from prometheus_client import start_http_server

from node.errors import PortTaken
from node.metrics import WorkerMetrics


class MetricsServer:
    """Serves on a thread of its own until `close`."""

    def __init__(self, metrics: WorkerMetrics, host: str, port: int) -> None:
        """`port` 0 takes any free one, see `endpoint`. Raises PortTaken."""
        try:
            self._server, self._thread = start_http_server(port, host, registry=metrics.registry)
        except OSError as error:
            if error.errno not in (errno.EADDRINUSE, errno.EADDRNOTAVAIL, errno.EACCES):
                raise
            cause = f"cannot serve metrics on {host}:{port}: {error.strerror}"
            raise PortTaken(cause, remedy="choose another --metrics-port (0: any free one)") from None
        self.endpoint = f"{host}:{self._server.server_port}"

    def close(self) -> None:
        """Stops serving and frees the port."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
