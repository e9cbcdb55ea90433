"""Puts the tables of committed result files into a document: `python -m node.bench.markdown docs/results.md`.

A section is what lies between `<!-- FILE -->` and `<!-- end -->`, FILE being a result file named from the document's
folder. So every figure of the document is that of a file beside it.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from node.bench.common import tables_of

_SECTION = re.compile(r"(<!-- (\S+\.json) -->\n).*?(<!-- end -->)", re.DOTALL)


def rendered(text: str, folder: Path) -> str:
    """The document with each section made anew of its file in `folder`."""

    def section(match: re.Match[str]) -> str:
        result = json.loads((folder / match[2]).read_text())
        return f"{match[1]}\n{_told(result, match[2])}\n\n{match[3]}"

    return _SECTION.sub(section, text)


def _told(result: Mapping[str, Any], file: str) -> str:
    machine = result["machine"]
    load = machine["load_average_before"][0]
    facts = (
        f"`{result['command']}`, {result['date']}; {machine['cpu']}, {machine['cores']} cores, "
        f"{machine['memory_bytes'] / 2**30:.0f} GiB, load average before {load:.1f}; torch {machine['torch']}, "
        f"Python {machine['python']}; took {result['seconds'] / 60:.0f} min; raw: [{file}]({file})"
    )
    tables = (f"**{table.title}**\n\n{table.markdown()}" for table in tables_of(result))
    return "\n\n".join([facts, *tables])


if __name__ == "__main__":
    for name in sys.argv[1:]:
        document = Path(name)
        document.write_text(rendered(document.read_text(), document.parent))
