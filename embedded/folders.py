"""Where an embedded instance keeps what, and whom its files belong to.

Everything lies in `<state folder>/<name>/`, with two exceptions:

- Sockets, whose paths end at 107 bytes, lie in a short private folder: under `$XDG_RUNTIME_DIR`, else under /tmp.
- PostgreSQL refuses to run as root, so for root it runs as `nobody`. That account cannot enter root's home,
  where the checkout may lie, and no folder's permissions are loosened for it; so PostgreSQL's data and
  socket lie under /var/lib/credit-refresh/, and so does a copy of its programs.

The data under /var/lib belong to the state folder: both carry the same token, and data whose state folder
was deleted are not picked up by another at the same path.
"""

from __future__ import annotations

import hashlib
import os
import pwd
import re
import secrets
import shutil
import stat
from dataclasses import dataclass
from pathlib import Path

from embedded.errors import EmbeddedError
from embedded.processes import Account

ROOTS_FOLDER = Path("/var/lib/credit-refresh")
_UNPRIVILEGED = "nobody"
_TOKEN = "token"  # noqa: S105 - a file's name
_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,31}")
_PLAIN_PATH = re.compile(
    r"/[A-Za-z0-9/._-]{1,60}"
)  # what needs no quoting in a URL and leaves room for a socket's name


@dataclass(frozen=True, slots=True)
class Folders:
    """The places of one instance."""

    state: Path
    """Lock, logs, addresses and Redis' data."""
    cluster: Path
    """PostgreSQL's data folder and access rules."""
    postgres_socket: Path
    redis_socket: Path
    account: Account | None
    """Whom PostgreSQL runs as; None: as ourselves."""
    marker: str
    """Appears in the command line of each of the instance's server processes, and in no other."""


def locate(name: str, state_dir: Path, runtime_dir: str | None) -> Folders:
    """Work out the places of an instance and make its state folder; nothing else is made.

    Args:
        name: of the instance: lower-case letters, digits and dashes.
        state_dir: the folder that holds the instances.
        runtime_dir: $XDG_RUNTIME_DIR, used for sockets when it is ours.

    Raises:
        EmbeddedError: the name or the folder cannot be used.
    """
    if not _NAME.fullmatch(name):
        raise EmbeddedError(f"instance name {name!r}: use at most 32 lower-case letters, digits and dashes")
    state = state_dir.resolve() / name
    try:
        state.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise EmbeddedError(f"cannot make the state folder {state}: {error.strerror}") from error
    digest = hashlib.sha256(os.fsencode(state)).hexdigest()[:8]
    sockets = _sockets_folder(runtime_dir, digest)
    marker = f"credits-{name}-{digest}"
    if os.geteuid() != 0:
        return Folders(state, state, sockets, sockets, None, marker)
    try:
        entry = pwd.getpwnam(_UNPRIVILEGED)
    except KeyError:
        raise EmbeddedError(f"PostgreSQL cannot run as root, and there is no account {_UNPRIVILEGED!r}") from None
    account = Account(entry.pw_uid, entry.pw_gid)
    cluster = ROOTS_FOLDER / f"{name}-{digest}"
    return Folders(state, cluster, cluster / "socket", sockets, account, marker)


def _sockets_folder(runtime_dir: str | None, digest: str) -> Path:
    if runtime_dir and _PLAIN_PATH.fullmatch(runtime_dir) and _is_private(Path(runtime_dir)):
        return Path(runtime_dir) / f"credits-{digest}"
    return Path("/tmp") / f"credits-{os.geteuid()}-{digest}"  # noqa: S108 - make_private() checks whose it is


def _is_private(folder: Path, uid: int | None = None) -> bool:
    try:
        found = folder.lstat()
    except OSError:
        return False
    ours = found.st_uid == (os.geteuid() if uid is None else uid)
    return stat.S_ISDIR(found.st_mode) and ours and not stat.S_IMODE(found.st_mode) & 0o077


def make_private(folder: Path, account: Account | None = None) -> None:
    """Make a folder that its owner alone may enter, or accept one that is so already.

    Raises:
        EmbeddedError: the folder belongs to somebody else or is open to others; it is not touched.
    """
    try:
        folder.mkdir(mode=0o700)
    except FileExistsError:
        pass
    except OSError as error:
        raise EmbeddedError(f"cannot make {folder}: {error.strerror}") from error
    else:
        if account is not None:
            os.chown(folder, account.uid, account.gid)
    if not _is_private(folder, account.uid if account else None):
        raise EmbeddedError(f"{folder} belongs to somebody else or is open to others; look at it and remove it")


def claim_cluster(folders: Folders) -> None:
    """Make root's PostgreSQL folder under /var/lib, empty unless it was made for this very state folder.

    Call it under the instance's lock. Does nothing where PostgreSQL runs as ourselves.

    Raises:
        EmbeddedError: the folder cannot be made or belongs to somebody else.
    """
    if folders.account is None:
        return
    token = folders.state / _TOKEN
    if not token.exists():
        token.write_text(secrets.token_hex())
    copy = folders.cluster / _TOKEN
    if folders.cluster.exists() and not (copy.exists() and copy.read_text() == token.read_text()):
        remove_tree(folders.cluster)
    make_roots_folder(ROOTS_FOLDER)
    make_roots_folder(folders.cluster)
    copy.write_text(token.read_text())
    copy.chmod(0o600)


def make_roots_folder(folder: Path) -> None:
    """Make a folder that root owns and others may enter, whatever the umask.

    Raises:
        EmbeddedError: it cannot be made, or others than root could put files there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        found = folder.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != 0 or found.st_mode & 0o022:
            raise EmbeddedError(f"{folder} is not root's alone; look at it and remove it")
        folder.chmod(0o755)
    except OSError as error:
        raise EmbeddedError(f"cannot make {folder}: {error.strerror}") from error


def remove_tree(folder: Path) -> None:
    """Remove a folder and all that it holds; one that is not there is fine.

    Raises:
        EmbeddedError: something in it cannot be removed.
    """
    try:
        shutil.rmtree(folder)
    except FileNotFoundError:
        pass
    except OSError as error:
        raise EmbeddedError(f"cannot remove {folder}: {error.strerror}") from error
