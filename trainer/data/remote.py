"""Remote datasets (s3://, gs://, hf://, file:// for a slow mount), cached on this machine under their fingerprint.

    CACHE/addresses/ADDRESS.json    which dataset was last seen at an address, in case it cannot be reached
    CACHE/FINGERPRINT/              the dataset, as `prepare` wrote it; shards are fetched when they are needed

dataset.json is fetched again at every start, so a dataset that was prepared again is noticed. Every file is fetched into a
scratch folder, checked there, and only then moved to its place. So what a killed process leaves behind is never read.
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from trainer.core.config import DataConfig
from trainer.core.errors import Damaged, MachineError, UserError
from trainer.core.files import may_pass, read_json, read_small, sealed, system_error, user_path, write_file
from trainer.core.text import printable
from trainer.data import dataset, index
from trainer.data.dataset import DatasetInfo
from trainer.data.index import Shard
from trainer.data.mds import import_streaming

TRIES = 3
SECONDS = 120.0  # limit of one download without progress
LOCK_SECONDS = 1800.0  # limit for another process to fetch a shard
SCRATCH = ".fetching-"
# Library errors for which another try is useless, and those that look like a missing file but mean "no network".
LASTING = ("NoCredentialsError", "PartialCredentialsError", "DefaultCredentialsError", "ParamValidationError")
PASSING = ("LocalEntryNotFoundError", "OfflineModeIsEnabled")

Say = Callable[[str], None]


def is_remote(path: str) -> bool:
    """Whether the dataset is remote and is cached here."""
    return "://" in path


def cache_folder(data: DataConfig, info: DatasetInfo) -> Path:
    """The folder of the cache that holds this remote dataset."""
    return _root(data) / info.fingerprint[:32]


def _root(data: DataConfig) -> Path:
    return Path.home() / ".cache" / "crescendo" if data.cache is None else user_path(data.cache, "data.cache")


def find(data: DataConfig, say: Say) -> DatasetInfo:
    """The dataset that is at `data.path` now, with its small files fetched and checked. If it cannot be reached: the one last seen
    there, and a line says so."""
    address, root = data.path or "", _root(data)
    own_folder(root / "addresses")
    note = root / "addresses" / f"{hashlib.sha256(address.encode()).hexdigest()[:32]}.json"
    with locked(root), scratch(root) as fetched:
        try:
            fetch(address, dataset.FILE, fetched)
        except UserError as error:
            info = _last_seen(data, note)
            if info is None:
                raise
            say(f"{error}; going on with the dataset that was last seen there, in {cache_folder(data, info)}")
            return info
        text = read_small(fetched / dataset.FILE)
        info = DatasetInfo.from_json(text, f"{address}/{dataset.FILE}")
        folder = cache_folder(data, info)
        if not _holds(folder, text):
            names = [dataset.TOKENIZER, *(f"{split}/{dataset.INDEX}" for split in info.splits)]
            for name in names:
                fetch(address, name, fetched)
            try:
                index.check_fingerprint(fetched, DatasetInfo.load(fetched))
            except Damaged as error:
                raise Damaged(f"data.path: {address}: {str(error).replace(f'{fetched}/', '')}") from None
            own_folder(folder)
            for name in [*names, dataset.FILE]:
                own_folder((folder / name).parent)
                keep(folder / name, (fetched / name).read_bytes())
        keep(note, sealed({"address": address, "fingerprint": info.fingerprint}))
    return info


def keep(path: Path, content: bytes | str) -> None:
    """Write a small file into the cache."""
    with system_errors(f"data.cache: {path}: cannot be written"):
        write_file(path, content)


def _holds(folder: Path, text: bytes) -> bool:
    """Whether `folder` holds the whole description of the dataset with this dataset.json."""
    try:
        _description(folder)
        return read_small(folder / dataset.FILE) == text
    except UserError:
        return False  # the caller fetches it again


def _last_seen(data: DataConfig, note: Path) -> DatasetInfo | None:
    try:
        fingerprint = dataset.hex_digits(read_json(note).get("fingerprint"), "fingerprint")
        info = _description(_root(data) / fingerprint[:32])
    except (UserError, ValueError):
        return None
    return info if info.fingerprint == fingerprint else None


def _description(folder: Path) -> DatasetInfo:
    """The dataset that `folder` of the cache describes. Raises UserError if a file of it is missing, damaged or a link."""
    info = DatasetInfo.load(folder)
    names = [dataset.FILE, dataset.TOKENIZER, *(f"{split}/{dataset.INDEX}" for split in info.splits)]
    links = [path for name in names for path in (folder / name, (folder / name).parent) if path.is_symlink()]
    if links:
        raise UserError(f"data.cache: {links[0]} is a link")
    index.check_fingerprint(folder, info)
    return info


def fetch_shard(address: str, split: str, shard: Shard, folder: Path) -> None:
    """Make sure that `folder` holds a shard, whole; a damaged one is replaced. Raises Damaged if the remote's own is damaged."""
    path = folder / split / shard.basename
    own_folder(folder)
    own_folder(path.parent)
    with locked(folder), scratch(folder) as fetched:
        if path.is_symlink():
            path.unlink()
        if dataset.present(path) and is_whole(path, shard):
            return
        for last in (False, True):
            fetch(address, f"{split}/{shard.basename}", fetched)
            arrived = fetched / split / shard.basename
            if is_whole(arrived, shard):
                with system_errors(f"data.cache: {path}: cannot be written"):
                    arrived.replace(path)
                return
            if last:
                raise Damaged(
                    f"data: cannot fetch shard {shard.basename} of {address}: it arrived damaged twice ({arrived.stat().st_size:,} "
                    f"bytes, xxh64 {dataset.xxh64_of(arrived)}; {shard.bytes:,} and {shard.xxh64} expected); copy the prepared "
                    "dataset there again"
                )


def fetch_once(address: str, name: str, folder: Path, sha256: str) -> None:
    """Make sure that `folder` holds a file of the dataset that few runs need. The caller checks its sha256 once more."""
    path = folder / name
    own_folder(path.parent)
    with locked(folder), scratch(folder) as fetched:
        if path.is_symlink():
            path.unlink()
        if dataset.present(path) and dataset.sha256_of(path) == sha256:
            return
        (fetched / name).parent.mkdir()
        fetch(address, name, fetched)
        with system_errors(f"data.cache: {path}: cannot be written"):
            (fetched / name).replace(path)


def is_whole(path: Path, shard: Shard) -> bool:
    """Whether a file has the size and the hash of `shard`."""
    with system_errors(f"{printable(path)}: cannot be read"):
        return path.stat().st_size == shard.bytes and dataset.xxh64_of(path) == shard.xxh64


def fetch(address: str, name: str, folder: Path) -> None:
    """Download `name` of the dataset at `address` to `folder`. Raises UserError, or MachineError if it may work later."""
    import_streaming()
    from streaming.base.storage.download import CloudDownloader

    remote, target = f"{address.removeprefix('file://')}/{name}", folder / name
    for left in reversed(range(TRIES)):
        target.unlink(missing_ok=True)
        try:
            downloader = CloudDownloader.get(remote)
            downloader.download(remote, str(target), SECONDS)
            downloader.clean_up()
            return
        except Exception as error:
            kind = kind_of(error)
            if left == 0 or kind is not MachineError:
                raise kind(f"data.path: cannot fetch {address}/{name}: {one_line(error)}") from None
        time.sleep(2.0 ** -(left - 1))


def kind_of(error: Exception) -> type[UserError]:
    """MachineError for an error of a downloader that may pass, UserError for one that the user must fix."""
    status = _http_status(error)
    if status is not None:
        return UserError if 400 <= status < 500 and status not in (408, 425, 429) else MachineError
    names = {cls.__name__ for cls in type(error).__mro__}
    if names & {*LASTING}:
        return UserError
    if names & {*PASSING}:
        return MachineError
    if isinstance(error, (FileNotFoundError, ImportError, ValueError)):
        return UserError
    return UserError if isinstance(error, OSError) and not may_pass(error) else MachineError


def _http_status(error: Any) -> int | None:
    response = getattr(error, "response", None)
    if isinstance(response, dict):  # botocore
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    else:  # requests and huggingface_hub; google
        status = getattr(response, "status_code", getattr(error, "code", None))
    return status if isinstance(status, int) and 100 <= status < 600 else None


def one_line(error: BaseException) -> str:
    """A library's error as one line."""
    return printable(" ".join(f"{type(error).__name__}: {error}".split()), 300)


@contextlib.contextmanager
def system_errors(what: str) -> Iterator[None]:
    """Turn system errors within the block into a one-line error that begins with `what`."""
    try:
        yield
    except OSError as error:
        raise system_error(error, what) from None


def own_folder(path: Path) -> None:
    """Make a folder of the cache. Raises UserError if it is a link, which would send files elsewhere."""
    with system_errors(f"data.cache: {path}: cannot be made"):
        path.mkdir(parents=True, exist_ok=True)
    if path.is_symlink():
        raise UserError(f"data.cache: {path} is a link; remove it or choose another --data.cache")


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock a folder of the cache against the other processes of this machine."""
    from filelock import FileLock, Timeout

    lock = FileLock(folder / ".lock", timeout=LOCK_SECONDS)
    try:
        lock.acquire()
    except Timeout:
        raise MachineError(
            f"data.cache: another process has held {folder / '.lock'} for {LOCK_SECONDS / 60:.0f} min"
        ) from None
    except OSError as error:
        raise system_error(error, f"data.cache: {folder / '.lock'}: cannot be locked") from None
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def scratch(folder: Path) -> Iterator[Path]:
    """An empty folder within `folder`, which must be locked. It is removed afterwards; what a killed process left is removed first."""
    with system_errors(f"data.cache: {folder}: cannot be written"):
        for left in folder.glob(f"{SCRATCH}*"):
            shutil.rmtree(left, ignore_errors=True)
        fetched = Path(tempfile.mkdtemp(prefix=SCRATCH, dir=folder))
    try:
        yield fetched
    finally:
        shutil.rmtree(fetched, ignore_errors=True)
