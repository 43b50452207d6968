"""Fetch packages from the registries that this machine is configured for: npm, PyPI, Debian.

npm tarballs are checked against the registry's `integrity` field here; pip and apt check what they
download themselves. A package that is there already is not fetched again.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import urllib.error
import urllib.request
import zipfile
from pathlib import Path
from typing import Any

NPM = "https://registry.npmjs.org"
_TIMEOUT_S = 60


class Unreachable(RuntimeError):
    """A registry does not answer, or does not hold a package."""


def npm_registry() -> str:
    """The registry that the user's npm configuration names, or the public one."""
    named = os.environ.get("NPM_CONFIG_REGISTRY", "")
    if not named and (npm := shutil.which("npm")):  # reads the environment's lower case, too
        asked = subprocess.run([npm, "config", "get", "registry"], capture_output=True, text=True)
        named = asked.stdout.strip() if asked.returncode == 0 else ""
    return (named if named and named.startswith("http") else NPM).rstrip("/")


def fetch_npm(name: str, version: str, cache: Path, registry: str) -> Path:
    """The unpacked folder of an npm package.

    Raises:
        Unreachable: The registry does not answer, has no such version, or its file is damaged.
    """
    folder = cache / "npm" / f"{name.strip('@').replace('/', '-')}-{version}"
    if folder.is_dir():
        return folder
    dist = json.loads(_read(f"{registry}/{name.replace('/', '%2f')}/{version}"))["dist"]
    tarball = _read(dist["tarball"])
    check_integrity(tarball, dist, f"{name}@{version}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    archive = folder.with_suffix(".tgz.part")
    archive.write_bytes(tarball)
    unpacked = folder.with_suffix(".part")
    shutil.rmtree(unpacked, ignore_errors=True)
    with tarfile.open(archive) as tar:
        tar.extractall(unpacked, filter="data")
    archive.unlink()
    (unpacked / "package").rename(folder)
    shutil.rmtree(unpacked)
    return folder


def check_integrity(content: bytes, dist: dict[str, Any], what: str) -> None:
    """Compare a tarball with the digest that the registry gives for it.

    Args:
        content: Of the tarball.
        dist: The registry's record: `integrity` ("sha512-BASE64"), or for old packages `shasum`.
        what: For the message.

    Raises:
        Unreachable: It is another file, or the registry gives no digest.
    """
    if integrity := dist.get("integrity"):
        kind, _, expected = integrity.partition("-")
        found = base64.b64encode(hashlib.new(kind, content).digest()).decode()
    elif expected := dist.get("shasum", ""):
        found = hashlib.sha1(content).hexdigest()
    else:
        raise Unreachable(f"{what}: the registry gives no digest to check it against")
    if found != expected:
        raise Unreachable(f"{what}: damaged on the way: digest {found}, expected {expected}")


def fetch_wheel(name: str, version: str, cache: Path) -> Path:
    """The unpacked folder of a wheel, downloaded by pip from the indexes it is configured for.

    Raises:
        Unreachable: pip found no such wheel; with its own words.
    """
    folder = cache / "pypi" / f"{name}-{version}"
    if folder.is_dir():
        return folder
    wheels = cache / "pypi" / "wheels"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary"]
    _run([*command, ":all:", "--dest", str(wheels), f"{name}=={version}"])
    wheel = next(wheels.glob(f"{name.replace('-', '_')}-{version}-*.whl"))
    unpacked = folder.with_suffix(".part")
    shutil.rmtree(unpacked, ignore_errors=True)
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(unpacked)
    unpacked.rename(folder)
    return folder


def fetch_debian(name: str, cache: Path) -> Path:
    """The unpacked folder of a Debian package, downloaded by apt; nothing is installed.

    Raises:
        Unreachable: apt is not there, or does not find the package; with its own words.
    """
    if not shutil.which("apt-get") or not shutil.which("dpkg-deb"):
        raise Unreachable(f"{name}: no apt-get on this machine")
    folder = cache / "debian" / name
    if folder.is_dir():
        return folder
    downloads = cache / "debian" / f"{name}.part"
    shutil.rmtree(downloads, ignore_errors=True)
    downloads.mkdir(parents=True)
    _run(["apt-get", "download", name], at=downloads)
    package = next(downloads.glob("*.deb"))
    _run(["dpkg-deb", "-x", str(package), str(downloads / "unpacked")])
    (downloads / "unpacked").rename(folder)
    shutil.rmtree(downloads)
    return folder


def _read(url: str) -> bytes:
    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT_S) as answer:
            content: bytes = answer.read()
            return content
    except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
        raise Unreachable(f"{url}: {error}") from error


def _run(command: list[str], at: Path | None = None) -> None:
    done = subprocess.run(command, capture_output=True, text=True, cwd=at)
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
        raise Unreachable(f"{' '.join(command[:3])} ...: {last[0] if last else 'no output'}")
