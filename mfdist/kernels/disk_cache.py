"""Where compiled kernels are kept between processes: numba's cache, in a folder that only this user can write.

numba unpickles what it finds, so whoever writes there runs code as us. Taken is the first of these that can be had:

    NUMBA_CACHE_DIR/mfdist                       where the environment names a folder
    XDG_CACHE_HOME/mfdist, or ~/.cache/mfdist
    mfdist-UID in the temporary folder           a home that is missing or read-only
    a folder of this process alone               nothing above is ours: another user made it first, or may write there

In it there is one folder for each state of the sources of a room (``data``, ``kernels`` ...), so that checkouts of the
same source share what they have compiled. A file that is empty, cut off or damaged counts as missing. A folder that is
new begins with what one behind it in the list holds that can be read but not written: that of a container's image.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import hashlib
import inspect
import os
import pickle
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from numba.core import caching as _caching
from numba.core import dispatcher as _dispatcher

caching: Any = _caching
dispatcher: Any = _dispatcher
PACKAGE = Path(__file__).parents[1]
FOLDER_MODE = 0o700
UNUSED_SECONDS = 30 * 86400
"""Folders of sources that nobody has used for so long are removed when a new one is made."""
DIGEST_BYTES = 16


@functools.cache
def folder() -> str:
    """The folder of all compiled kernels of this user."""
    for path, trusted in _candidates():
        if _is_ours(path, trusted):
            return path
    private = tempfile.mkdtemp(prefix="mfdist-kernels-")
    atexit.register(shutil.rmtree, private, ignore_errors=True)
    return private


def _candidates() -> Iterator[tuple[str, bool]]:
    """(folder, whether the folders above it are trusted, because the environment names them)."""
    named = os.environ.get("NUMBA_CACHE_DIR", "")
    if named:
        yield os.path.join(os.path.abspath(named), "mfdist"), True
    cache = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(cache):  # as the specification has it
        cache = os.path.join(os.path.expanduser("~"), ".cache")
    if os.path.isabs(cache):
        yield os.path.join(cache, "mfdist"), False
    yield os.path.join(tempfile.gettempdir(), f"mfdist-{os.getuid()}"), False


def _is_ours(path: str, trusted: bool) -> bool:
    """Make ``path`` where it is missing; whether this user may write it, and it is safe."""
    try:
        _make(Path(path))
        return os.access(path, os.W_OK | os.X_OK) and _is_safe(path, trusted)
    except OSError:
        return False


def _is_safe(path: str, trusted: bool) -> bool:
    """Whether a folder is this user's alone, and safe above (or ``trusted`` there)."""
    found = os.lstat(path)
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o022:
        return False
    return trusted or all(_keeps_others_out(parent.stat()) for parent in Path(os.path.realpath(path)).parents)


def _make(path: Path) -> None:
    missing = [parent for parent in (path, *path.parents) if not parent.exists()]
    for each in reversed(missing):
        with contextlib.suppress(FileExistsError):  # another process of this user, at the same moment
            each.mkdir(FOLDER_MODE)


def _keeps_others_out(found: os.stat_result) -> bool:
    """Whether nobody but this user and root can put another folder in the place of one in there."""
    open_to_others = found.st_mode & 0o022 and not found.st_mode & stat.S_ISVTX
    return found.st_uid in (0, os.geteuid()) and not open_to_others


@functools.cache
def folder_of(room: str) -> str:
    """The folder for the compiled functions of a room, for its sources as they are."""
    name = f"{room}-{sources_of(room)}"
    path = os.path.join(folder(), name)
    with contextlib.suppress(OSError):  # another process makes it at this moment; what cannot be written is not kept
        if not os.path.isdir(path):
            _remove_unused()
            _make_complete(path, name)
        os.utime(path)
    return path


def _make_complete(path: str, name: str) -> None:
    """Make a room's folder, with what a folder that cannot be written has of the same sources; OSError where it is."""
    fresh = tempfile.mkdtemp(dir=os.path.dirname(path))
    try:
        for other, trusted in _candidates():
            given = os.path.join(other, name)
            if os.path.isdir(given) and not os.access(given, os.W_OK) and _is_safe(other, trusted):
                shutil.copytree(given, fresh, dirs_exist_ok=True)
                os.chmod(fresh, FOLDER_MODE)
                break
        os.rename(fresh, path)  # whole at once: ranks that start together find all of it or make it themselves
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


@functools.cache
def sources_of(room: str) -> str:
    """A digest of the sources that may be compiled into a function of ``room``: its own files and those of the rooms
    below it, as far as they use numba."""
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for name in {"kernels": ["kernels"], "data": ["kernels", "data"]}.get(room, ["kernels", "data", "prepare", room]):
        for file in sorted((PACKAGE / name).glob("*.py")):
            content = file.read_bytes()
            if b"numba" in content or name == "kernels":
                digest.update(file.name.encode() + b"\0" + content + b"\0")
    return digest.hexdigest()


def _remove_unused() -> None:
    for entry in os.scandir(folder()):
        with contextlib.suppress(OSError):  # another process removes it, too
            if entry.is_dir(follow_symlinks=False) and time.time() - entry.stat().st_mtime > UNUSED_SECONDS:
                shutil.rmtree(entry.path, ignore_errors=True)


# What numba asks ----------------------------------------------------------------------------------


class _Locator(caching._CacheLocator):  # type: ignore[misc]
    """Where the compiled forms of one function are, and what they are compiled from."""

    def __init__(self, function: Any, file: str) -> None:
        self._py_file, self._line = file, function.__code__.co_firstlineno
        self._room = Path(file).relative_to(PACKAGE).parts[0]

    @classmethod
    def from_function(cls, function: Any, file: str) -> _Locator:
        return cls(function, file)

    def get_cache_path(self) -> str:
        return folder_of(self._room)

    def get_source_stamp(self) -> str:
        return sources_of(self._room)

    def get_disambiguator(self) -> str:
        return str(self._line)


class _Implementation(caching.CompileResultCacheImpl):  # type: ignore[misc]
    _locator_classes = (_Locator,)


class _Files(caching.IndexDataCacheFile):  # type: ignore[misc]
    """numba's files with a digest before the data; what is damaged is as if it were not there.

    numba numbers the data of a function's forms by its index, so two processes that each compile another form at one
    moment give both the same file, and who comes next runs one in place of the other. Here a file bears the name of
    its form; the index that is written last may lack the other's, which is then compiled once more.
    """

    def save(self, key: Any, data: Any) -> None:
        name = f"{self._index_name}.{_digest(repr(key).encode()).hex()}.nbc"
        self._save_data(name, data)
        self._save_index({**self._load_index(), key: name})

    def _load_index(self) -> Any:
        try:
            return super()._load_index()
        except Exception:  # whatever a damaged pickle raises: the function is compiled again, the file replaced
            return {}

    def _load_data(self, name: str) -> Any:
        content = Path(self._data_path(name)).read_bytes()
        if content[:DIGEST_BYTES] != _digest(content[DIGEST_BYTES:]):
            raise OSError  # numba takes it for a missing file, and replaces it
        return pickle.loads(content[DIGEST_BYTES:])

    def _save_data(self, name: str, data: Any) -> None:
        content = self._dump(data)
        with self._open_for_write(self._data_path(name)) as stream:
            stream.write(_digest(content) + content)


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=DIGEST_BYTES).digest()


class _Kept(caching.FunctionCache):  # type: ignore[misc]
    """The cache of one function of this package."""

    _impl_class = _Implementation

    def __init__(self, function: Any) -> None:
        super().__init__(function)
        locator = self._impl.locator
        self._cache_file = _Files(locator.get_cache_path(), self._impl.filename_base, locator.get_source_stamp())

    def _index_key(self, signature: Any, codegen: Any) -> Any:
        """numba's key, but of what a function takes from around it the name: numba pickles kernels and intrinsics with
        numbers that each process draws anew, so that no process finds what another has compiled. What the names stand
        for is the folder's: it is of these very sources."""
        code = hashlib.sha256(self._py_func.__code__.co_code).hexdigest()
        around = repr([_named(cell.cell_contents) for cell in self._py_func.__closure__ or ()])
        return signature, codegen.magic_tuple(), (code, hashlib.sha256(around.encode()).hexdigest())

    def save_overload(self, signature: Any, data: Any) -> None:
        with contextlib.suppress(OSError):  # a full disk costs the next process its time, this one nothing
            super().save_overload(signature, data)


def _named(value: Any) -> str:
    """A function, kernel or intrinsic by its name and what it takes from around it, anything else as it is written."""
    function = inspect.unwrap(getattr(value, "py_func", value))
    if not inspect.isfunction(function):
        return repr(value)
    around = [_named(cell.cell_contents) for cell in function.__closure__ or ()]
    return f"{function.__module__}.{function.__qualname__}{around}"


_numbas = dispatcher.FunctionCache


def _cache_of(function: Any) -> Any:
    file = Path(function.__code__.co_filename)
    return _Kept(function) if PACKAGE in file.parents else _numbas(function)


def use() -> None:
    """Let numba keep functions of this package here; before the first of them is defined."""
    vars(dispatcher)["FunctionCache"] = _cache_of  # numba has no argument for the cache's class
