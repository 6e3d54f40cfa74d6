"""A run folder on shared storage, S3 or another that fsspec opens, for workers without a common disk.

URL/
  dog/result.json        sent last and deleted first: a run that has it is whole
  dog/.files.json        SHA-256 of each file below; only what it lists is fetched
  dog/...                the run folder
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from echodistill_cli.errors import ConfigError, EchoDistillError
from echodistill_cli.files import atomically, make_folder, remove, sha256
from echodistill_cli.runs import REPORT

_RESULT, _INDEX, _CHECKPOINTS = "result.json", ".files.json", "checkpoints"


def check_store(url: str) -> None:
    """Check that a storage can be opened and answers.

    Raises:
        ConfigError: its kind is unknown, or needs a package that is missing.
        EchoDistillError: it cannot be reached.
    """
    store = Store(url, Path())
    with _explained(url):
        store.system.exists(store.root)


class Store:
    """One run folder and its copy.

    Args:
        url: of the copy, such as s3://bucket/runs/dog.
        folder: the run folder; need not exist.

    Raises:
        ConfigError: the kind of the URL is unknown, or needs a package that is missing.
    """

    def __init__(self, url: str, folder: Path) -> None:
        import fsspec

        self.url, self.folder = url, folder
        try:
            self.system, self.root = fsspec.url_to_fs(url)
        except ImportError as error:
            hint = "Install it: pip install '.[s3]'" if url.startswith("s3") else None
            raise ConfigError(f"--store {url} needs a package that is missing ({error}).", hint) from error
        except ValueError as error:
            raise ConfigError(f"--store {url} is not the URL of a storage ({error}).") from error
        self._sent: dict[str, str] | None = None

    def read_result(self) -> str | None:
        """Return the text of the stored result.json; None if the run is not whole.

        Raises:
            EchoDistillError: the storage cannot be reached.
        """
        return self._read(_RESULT)

    def fetch(self) -> None:
        """Bring the run folder to the stored state, unless it has a later checkpoint itself.

        Raises:
            EchoDistillError: the storage cannot be reached or lists a path outside of the folder.
        """
        sent = self._index()
        is_whole = self.read_result() is not None
        if not sent or (not is_whole and _newest(self._local_files()) >= _newest(sent)):
            return
        for name, digest in sorted(sent.items()):
            self._fetch_file(name, digest)
        for name in self._local_files().keys() - sent.keys():
            remove(self.folder / name)
        if is_whole:  # last, as it says that the others are there
            self._fetch_file(_RESULT, "")

    def push(self) -> None:
        """Send the files that are new or changed, then the list of all, then delete what is gone.

        Raises:
            EchoDistillError: the storage cannot be reached.
        """
        before = self._index()
        files = {name: sha256(path) for name, path in self._local_files().items()}
        with _explained(self.url):
            for name, digest in files.items():
                if before.get(name) != digest:
                    self.system.makedirs(self._at(PurePosixPath(name).parent.as_posix()), exist_ok=True)
                    self.system.put_file(str(self.folder / name), self._at(name))
            if files != before:
                self.system.pipe_file(self._at(_INDEX), json.dumps(files, indent=1).encode())
            for name in before.keys() - files.keys():
                self._delete(name)
        self._sent = files

    def push_result(self) -> None:
        """Send result.json, after which the stored run is whole.

        Raises:
            EchoDistillError: the storage cannot be reached.
        """
        with _explained(self.url):
            self.system.put_file(str(self.folder / _RESULT), self._at(_RESULT))

    def delete_result(self) -> None:
        """Delete the stored result.json, because the run is not whole any more.

        Raises:
            EchoDistillError: the storage cannot be reached.
        """
        with _explained(self.url):
            self._delete(_RESULT)

    def _delete(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self.system.rm_file(self._at(name))

    def _fetch_file(self, name: str, digest: str) -> None:
        target = self.folder / name
        if digest and target.is_file() and sha256(target) == digest:
            return
        make_folder(target.parent)
        with _explained(self.url), atomically(target) as temporary:
            self.system.get_file(self._at(name), str(temporary))

    def _index(self) -> dict[str, str]:
        """Return the SHA-256 of each stored file by its path, as sent or read once."""
        if self._sent is None:
            text = self._read(_INDEX)
            try:
                self._sent = {str(name): str(digest) for name, digest in json.loads(text or "{}").items()}
            except (ValueError, AttributeError) as error:
                raise EchoDistillError(f"{self.url}/{_INDEX} is damaged ({error}).", "Delete it.") from error
            for name in self._sent:
                if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
                    raise EchoDistillError(f"{self.url}/{_INDEX} lists {name!r}, which is outside of the run.")
        return self._sent

    def _read(self, name: str) -> str | None:
        with _explained(self.url):
            try:
                content: bytes = self.system.cat_file(self._at(name))
            except FileNotFoundError:
                return None
            return content.decode("utf-8", "replace")

    def _at(self, name: str) -> str:
        return f"{self.root}/{name}" if name != "." else str(self.root)

    def _local_files(self) -> dict[str, Path]:
        """Return the files to send by their relative paths: no locks, temporary files, result or report."""
        files = (path for path in self.folder.rglob("*") if path.is_file())
        names = {path.relative_to(self.folder).as_posix(): path for path in files}
        hidden = {name for name in names if any(part.startswith(".") for part in PurePosixPath(name).parts)}
        return {name: path for name, path in sorted(names.items()) if name not in {*hidden, _RESULT, REPORT}}


def _newest(files: dict[str, Any]) -> str:
    """Return the name of the newest checkpoint among paths; "" without one. Names sort by their steps."""
    parts = [PurePosixPath(name).parts for name in files]
    return max((part[1] for part in parts if part[0] == _CHECKPOINTS and len(part) == 3), default="")


@contextlib.contextmanager
def _explained(url: str) -> Iterator[None]:
    """Context that turns any error of a storage into one line."""
    try:
        yield
    except EchoDistillError:
        raise
    except Exception as error:  # each kind of storage raises others
        reason = (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
        raise EchoDistillError(
            f"--store {url} cannot be used ({reason}).", "Check the address, your credentials and the network."
        ) from error
