"""Images that the lab is made of: pulled, or where no registry can be reached, made of the distribution's packages.

A stand-in carries the name of what it stands in for, so that Dockerfile and compose file are the same everywhere. It
brings along what makes this machine's pip work: its certificates, its index and the folders of wheels that it names.
"""

from __future__ import annotations

import shutil
import ssl
import sys
import tempfile
from pathlib import Path

from node.errors import EngineUnavailable
from node.lab.engine import Say, may_install, output_of, run_logged

PYTHON = "python:3.11-slim"
PROMETHEUS = "prom/prometheus:v2.55.1"
GRAFANA = "grafana/grafana:11.4.0"

_DEBIAN = "resbm-lab/debian"
_SUITE = "bookworm"  # its Python is 3.11
_PACKAGES = "ca-certificates,python3,python3-venv,python3-pip"


def provide(image: str, say: Say) -> bool:
    """Has the image, pulls it, or builds its stand-in; False when there is no way. Raises EngineUnavailable."""
    if output_of(["docker", "image", "inspect", image]) is not None:
        return True
    say(f"pulling {image}")
    if output_of(["docker", "pull", "--quiet", image]) is not None:
        return True
    if image == GRAFANA:
        return False
    if not may_install():
        raise EngineUnavailable(f"{image} cannot be pulled, and a stand-in needs root and apt")
    if image == PROMETHEUS:
        provide(PYTHON, say)
        _stand_in_for_prometheus(say)
    else:
        _stand_in_for_python(say)
    return True


def _stand_in_for_python(say: Say) -> None:
    """A Debian whose Python is in /usr/local, where the official image has it."""
    say(f"{PYTHON} cannot be pulled: building a stand-in from Debian's packages (a minute or two)")
    with tempfile.TemporaryDirectory(prefix="resbm-lab-") as name:
        folder = Path(name)
        if output_of(["docker", "image", "inspect", _DEBIAN]) is None:
            _import_debian(folder / "root.tar")
        _copy_pip_settings(folder)
        (folder / "Dockerfile").write_text(_STAND_IN_FOR_PYTHON)
        _build(folder, PYTHON)


def _import_debian(root: Path) -> None:
    """A minimal Debian, for both stand-ins."""
    if shutil.which("mmdebstrap") is None:
        run_logged(["apt-get", "install", "-y", "-qq", "mmdebstrap"], "install mmdebstrap")
    bootstrap = ["mmdebstrap", "--variant=minbase", f"--include={_PACKAGES}", _SUITE, str(root)]
    run_logged(bootstrap, f"make a stand-in for {PYTHON}")
    run_logged(["docker", "import", str(root), _DEBIAN], "import the stand-in")
    root.unlink()


_STAND_IN_FOR_PYTHON = f"""\
FROM {_DEBIAN}
COPY ca-certificates.crt /etc/ssl/certs/ca-certificates.crt
COPY pip.conf /etc/pip.conf
COPY wheels /opt/wheels
ENV PATH=/usr/local/bin:/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin
RUN python3 -m venv /usr/local
CMD ["python3"]
"""


def _copy_pip_settings(folder: Path) -> None:
    """This machine's certificates, and a pip.conf with its index that finds its wheels in /opt/wheels."""
    bundle = ssl.get_default_verify_paths().cafile
    (folder / "ca-certificates.crt").write_bytes(Path(bundle).read_bytes() if bundle else b"")
    settings = _pip_settings()
    (folder / "wheels").mkdir()
    for place in filter(Path.is_dir, map(Path, settings.get("find-links", "").split())):
        shutil.copytree(place, folder / "wheels", dirs_exist_ok=True)
    index = [f"index-url = {settings['index-url']}"] if "index-url" in settings else []
    lines = ["[global]", "find-links = /opt/wheels", "retries = 1", "timeout = 15", *index, ""]
    (folder / "pip.conf").write_text("\n".join(lines))


def _pip_settings() -> dict[str, str]:
    """By key, wherever they are set; `pip config list` prints lines like global.index-url='...'."""
    listed = output_of([sys.executable, "-m", "pip", "config", "list"]) or ""
    pairs = (line.partition("=") for line in listed.splitlines())
    return {name.rpartition(".")[2]: value.strip("'") for name, _, value in pairs}


def _stand_in_for_prometheus(say: Say) -> None:
    """Debian's prometheus, with the wget that the official image has for health checks."""
    say(f"{PROMETHEUS} cannot be pulled: building a stand-in from Debian's package")
    with tempfile.TemporaryDirectory(prefix="resbm-lab-") as name:
        folder = Path(name)
        (folder / "Dockerfile").write_text(_STAND_IN_FOR_PROMETHEUS)
        _build(folder, PROMETHEUS)


_STAND_IN_FOR_PROMETHEUS = f"""\
FROM {_DEBIAN}
RUN apt-get update && apt-get install -y --no-install-recommends prometheus wget && rm -rf /var/lib/apt/lists/* \\
 && install -d -o nobody /prometheus
USER nobody
WORKDIR /prometheus
ENTRYPOINT ["/usr/bin/prometheus"]
"""


def _build(folder: Path, tag: str) -> None:
    run_logged(["docker", "build", "--quiet", "--tag", tag, str(folder)], f"make a stand-in for {tag}")
