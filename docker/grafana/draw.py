"""Draws every panel of the committed dashboards from a running Prometheus: one PNG a panel and one a dashboard.

python docker/grafana/draw.py OUT --url http://127.0.0.1:9090 --minutes 10

For docs, and for whoever has Prometheus but no Grafana. Ends with an error when a query fails or has no data.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from pathlib import Path

from drawing.paint import board_picture, panel_picture
from drawing.panels import Board
from drawing.queries import NoData, Prometheus, QueryFailed, Span

DASHBOARDS = Path(__file__).parent / "dashboards"
_POINTS = 300  # of a line
_PIXELS_PER_INCH = 110


def main() -> int:
    """Returns the exit status."""
    options = _options()
    end = options.end or time.time()
    seconds = 60 * options.minutes
    span = Span(end - seconds, end, max(1.0, round(seconds / _POINTS)))
    server = Prometheus(options.url.rstrip("/"), {"run": options.run}, options.rate_interval)
    boards = [Board.read(path) for path in sorted(DASHBOARDS.glob("*.json"))]
    failures = [failure for board in boards for failure in draw(board, server, span, options.out, options.boards_only)]
    for failure in failures:
        sys.stderr.write(f"{failure}\n")
    return 1 if failures else 0


def draw(board: Board, server: Prometheus, span: Span, out: Path, boards_only: bool = False) -> list[str]:
    """Draws one dashboard; returns what went wrong, a line each. Panels that went well are drawn all the same."""
    out.mkdir(parents=True, exist_ok=True)
    drawn, failures = [], []
    for panel in board.panels:
        try:
            series = server.ask(panel, span)
        except (QueryFailed, NoData) as error:
            failures.append(f"{board.name}: {error}")
            continue
        drawn.append((panel, series))
        if not boards_only:
            name = re.sub(r"\W+", "-", panel.title.lower())
            panel_picture(panel, series, span).savefig(out / f"{board.name}-{name}.png", dpi=_PIXELS_PER_INCH)
    board_picture(board, drawn, span).savefig(out / f"{board.name}.png", dpi=_PIXELS_PER_INCH)
    return failures


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder for the pictures")
    parser.add_argument("--url", default="http://127.0.0.1:9090", help="the Prometheus server")
    parser.add_argument("--minutes", type=float, default=10, help="time to show")
    parser.add_argument("--end", type=float, help="Unix time at which it ends; default: now")
    parser.add_argument("--run", default=".*", help="run id (a regular expression)")
    parser.add_argument("--rate-interval", default="1m", help="what $__rate_interval stands for")
    parser.add_argument("--boards-only", action="store_true", help="no picture of each panel")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
