"""The one reader and the one writer of files.

A file is written beside its place under an unpredictable name, flushed to the disk and renamed. A reader sees
the old file or the whole new one, and a link at the place is replaced, not followed. Only regular files are
read: a pipe or a device may have no end.
"""

import atexit
import contextlib
import errno
import functools
import hashlib
import io
import json
import math
import os
import re
import secrets
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, TextIO, TypeVar

from hf_genlm.errors import UserError, utf8_name
from hf_genlm.memory import MAX_BYTES, check_size, check_values

Schema = TypeVar("Schema")
_PLAIN = getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0)
_NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0) | _PLAIN
_READ = os.O_RDONLY | _PLAIN
_NEW = os.O_RDWR | os.O_CREAT | os.O_EXCL | _NO_FOLLOW
_APPEND = os.O_RDWR | os.O_CREAT | os.O_APPEND | _NO_FOLLOW
_PRIVATE = re.compile(r"\..*\.[0-9a-f]{16}\.part")
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
_REMEDIES = {
    **dict.fromkeys(_NO_SPACE, "make room on the disk, or name a folder on another one"),
    errno.ELOOP: "put a file or folder in the place of the link",
    errno.EMLINK: "put a copy of the file there",
}


class WriteError(UserError):
    """A file or folder cannot be written. `reason` is the system's message, `errno` its number."""

    def __init__(self, path: str | Path, error: OSError):
        self.errno, self.reason = error.errno, error.strerror or str(error)
        remedy = _REMEDIES.get(error.errno or 0, "name a place that can be written")
        super().__init__(f"{str(path)!r} cannot be written ({self.reason}): {remedy}")


def private_name(path: Path) -> Path:
    """An unpredictable name in the folder of `path`, for what will take its place."""
    return path.with_name(f".{path.name[:200]}.{secrets.token_hex(8)}.part")


def is_private_name(path: Path) -> bool:
    """True if `path` has a name that `private_name` made, as a killed process leaves it behind."""
    return _PRIVATE.fullmatch(path.name) is not None


def remove_private(folder: Path) -> None:
    """Remove the files and folders that killed writers left in `folder`."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if is_private_name(path):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


class PendingFile:
    """An open file under a private name beside `path`. `commit` puts it in the place of `path`.

    Raises:
        OSError: from every method, as the system says.
    """

    def __init__(self, path: Path, mode: int = 0o666):
        self.path = path
        self._private = private_name(path)
        self.file: BinaryIO = os.fdopen(os.open(self._private, _NEW, mode), "w+b")

    def commit(self) -> None:
        """Flush the content to the disk, close the file and rename it to `path`."""
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        self._private.replace(self.path)
        _sync(self.path.parent)

    def discard(self) -> None:
        """Close and remove what was not committed."""
        with contextlib.suppress(OSError):  # closing flushes, again to a full disk
            self.file.close()
        self._private.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_file(path: str | Path, mode: int = 0o666) -> Iterator[BinaryIO]:
    """An open file that takes the place of `path` at the end of the block, if the block raises nothing.

    Raises:
        WriteError: the block or the system raised an OSError; `path` is as it was.
    """
    path = Path(path)
    with _write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        pending = PendingFile(path, mode)
        try:
            yield pending.file
            pending.commit()
        finally:
            pending.discard()


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """A path in a private folder, for a library that opens a file by itself; else as `atomic_file`."""
    path = Path(path)
    with _write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        folder = private_name(path)
        folder.mkdir(mode=0o700)
        try:
            yield folder / path.name
            _sync(folder / path.name)
            (folder / path.name).replace(path)
            _sync(path.parent)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def atomic_folder(path: str | Path, replace: bool = False) -> Iterator[Path]:
    """A private folder that becomes `path` at the end of the block, if the block raises nothing.

    At `path` there may be nothing or an empty folder; with `replace` any folder, which is removed then.

    Raises:
        WriteError: something is at `path`, or the block or the system raised an OSError; `path` is as it was.
    """
    path = Path(utf8_name(path))
    with _write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        folder = private_name(path)
        folder.mkdir()
        try:
            yield folder
            sync_folder(folder)
            former = private_name(path)
            if path.is_dir() and not path.is_symlink():
                path.rename(former) if replace else path.rmdir()
            folder.rename(path)
            _sync(path.parent)
            shutil.rmtree(former, ignore_errors=True)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def append_file(path: str | Path) -> Iterator[BinaryIO]:
    """A file open for reading and for writing at its end, made where there is none.

    Raises:
        WriteError: `path` is a link, no regular file, or a file that has another name too, or the system
            raised an OSError.
    """
    with _write_errors(Path(path)), _regular(os.open(path, _APPEND, 0o666), path, "ab+") as file:
        if os.fstat(file.fileno()).st_nlink > 1:
            raise OSError(errno.EMLINK, "it is a hard link: the same file has another name", str(path))
        yield file


def write_bytes(path: str | Path, content: bytes, mode: int = 0o666) -> None:
    """Write a file. `mode` holds its permissions, from which the umask is taken."""
    with atomic_file(path, mode) as file:
        file.write(content)


def write_text(path: str | Path, content: str) -> None:
    """Write a text as UTF-8; a lone surrogate becomes a question mark."""
    write_bytes(path, content.encode("utf-8", "replace"))


def write_json(path: str | Path, content: Any, schema: Any = None) -> None:
    """Write `content` as JSON, in lines.

    Raises:
        pydantic.ValidationError: it does not fit `schema`, which is a fault of this package.
        WriteError: the file cannot be written.
    """
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    if schema is not None:
        _adapter_of(schema).validate_json(text.encode("utf-8", "replace"), strict=True)
    write_text(path, text)


def open_file(path: str | Path) -> BinaryIO:
    """Open a regular file for reading; a link to one is followed.

    Raises:
        OSError: it is missing, a folder, a pipe or a device, or cannot be read.
    """
    return _regular(os.open(path, _READ), path, "rb")


def open_text(path: str | Path, encoding: str = "utf-8") -> TextIO:
    """Open a text as `open_file` opens a file."""
    return io.TextIOWrapper(open_file(path), encoding=encoding)


def _regular(number: int, path: str | Path, mode: str) -> Any:
    kind = os.fstat(number).st_mode
    if stat.S_ISREG(kind):
        return os.fdopen(number, mode)
    os.close(number)
    if stat.S_ISDIR(kind):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    raise OSError(errno.EINVAL, "it is neither a file nor a folder", str(path))


def read_bytes(path: str | Path, max_bytes: int = MAX_BYTES) -> bytes:
    """Read a file.

    Raises:
        UserError: it cannot be read, or is too large to be held.
    """
    try:
        with open_file(path) as file:
            return check_size(file.read(max_bytes + 1), max_bytes, path)
    except OSError as error:
        raise UserError(f"{str(path)!r} cannot be read: {error.strerror}") from error


def read_text(path: str | Path, max_bytes: int = MAX_BYTES) -> str:
    """Read a UTF-8 file.

    Raises:
        UserError: it cannot be read, is too large, or is not UTF-8.
    """
    try:
        return read_bytes(path, max_bytes).decode("utf-8").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise _damaged(path, f"byte {error.start:,} is not UTF-8") from error


def read(path: str | Path, schema: type[Schema]) -> Schema:
    """Read a JSON file as an instance of `schema`, a dataclass. Unknown keys are ignored.

    Raises:
        UserError: the file is missing or does not fit; the message names the file and the field.
    """
    return parse(read_text(path), schema, path)


def read_json(path: str | Path, schema: Any = None) -> Any:
    """Read a JSON file as lists and dicts, checked against `schema` if there is one.

    Raises:
        UserError: the file is missing or does not fit; the message names the file and the field.
    """
    text = check_values(read_text(path), path)
    if schema is not None:
        parse(text, schema, path)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, str(error)) from error


def read_tensor_sizes(path: Path) -> dict[str, int]:
    """Number of elements of each tensor in a safetensors file, by name, from its header alone.

    Raises:
        UserError: the file is missing or damaged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        open_file(path).close()  # the library reads a path, and waits for a pipe
        with safe_open(path, framework="numpy") as file:
            return {name: math.prod(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{str(path)!r} cannot be read as safetensors ({error}): 'train' writes it"
        ) from error


def parse(text: str, schema: type[Schema], path: str | Path) -> Schema:
    """Parse JSON as an instance of `schema`. `path` is where it was read, for the message.

    Raises:
        UserError: the text does not fit.
    """
    from pydantic import ValidationError

    check_values(text, path)
    try:
        return _adapter_of(schema).validate_json(text, strict=True)  # type: ignore[arg-type]
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise _damaged(path, f"{place}: {first['msg']}" if place else first["msg"]) from error


@functools.cache
def _adapter_of(schema: Any) -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(schema)


def _damaged(path: str | Path, reason: str) -> UserError:
    return UserError(f"{str(path)!r} is damaged: {reason}")


def copy_file(source: Path, target: Path) -> None:
    """Copy the content of a file, without its permissions."""
    with open_file(source) as content, atomic_file(target) as file:
        shutil.copyfileobj(content, file)


def sha256_of(path: Path) -> str:
    """SHA-256 of the content of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open_file(path) as file:
        while content := file.read(1 << 20):
            digest.update(content)
    return digest.hexdigest()


def sync_folder(folder: Path) -> None:
    """Put all files of `folder` and their names on the disk."""
    for path in [*folder.rglob("*"), folder]:
        if not path.is_symlink():
            _sync(path)


def refuse_links_out(folder: str | Path) -> None:
    """Refuse a folder from which a link leads out, or that holds a pipe or a device.

    A verb that writes into such a folder could write somewhere else, and one that copies from it could copy
    a private file. The links of a Hub cache lead to the blobs of the same repository, and are let pass.

    Raises:
        UserError: there is such an entry, or a folder cannot be read.
    """
    root = os.path.realpath(folder)
    repository, is_snapshot, _ = root.rpartition(f"{os.sep}snapshots{os.sep}")
    is_cached = is_snapshot and re.match("(models|datasets|spaces)--", os.path.basename(repository))
    blobs = os.path.join(repository, "blobs") if is_cached else root

    def refuse(error: OSError) -> None:
        raise UserError(f"{error.filename!r} cannot be read: {error.strerror}") from error

    for parent, folders, names in os.walk(root, onerror=refuse):
        for name in sorted([*folders, *names]):
            path = os.path.join(parent, name)
            target = os.path.realpath(path)
            if os.path.islink(path) and not any(Path(target).is_relative_to(each) for each in (root, blobs)):
                raise UserError(
                    f"{path!r} is a link to {target!r}, outside of {str(folder)!r}: put the file or "
                    "folder itself there, or remove the link"
                )
            if os.path.lexists(target) and not os.path.isfile(path) and not os.path.isdir(path):
                raise UserError(f"{path!r} is neither a file nor a folder: remove it")


def cache_folder() -> Path:
    """Path of the cache folder, which may not exist yet. Raises UserError where this user has no home."""
    base, stated = os.environ.get("XDG_CACHE_HOME"), os.environ.get("HF_GENLM_CACHE")
    try:
        return Path(stated or f"{base or '~/.cache'}/hf_genlm").expanduser()
    except RuntimeError as error:
        raise UserError("there is no home folder for the cache: name a folder by HF_GENLM_CACHE") from error


def program_folder() -> Path:
    """The folder of compiled programs, which are executed: made with mode 0700 in the cache folder.

    Raises:
        UserError: another user could have put a program there, or it is a link.
        WriteError: it cannot be made.
    """
    path = cache_folder() / "programs"
    if path.is_symlink():
        raise UserError(f"{str(path)!r} is a link: remove it, or name another cache by HF_GENLM_CACHE")
    with _write_errors(path):
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        if (other := find_open_path(path)) is not None:
            why = "can be written by other users, whose programs would run"
            raise UserError(f"{str(other)!r} {why}: change its mode, or name another HF_GENLM_CACHE")
        path.chmod(0o700)
    return path


def find_open_path(path: Path) -> Path | None:
    """Return `path` or the folder above it that a user other than this one and root could replace or fill.

    None if there is none, or on a system without such owners.
    """
    if not hasattr(os, "geteuid"):
        return None
    path = Path(os.path.realpath(path))
    for place in (path, *path.parents):
        state = place.stat()
        is_sticky = place != path and state.st_mode & stat.S_ISVTX  # others cannot rename what is in it
        writers = stat.S_IWOTH | (0 if _is_own_group(state.st_gid) else stat.S_IWGRP)
        if state.st_uid not in (0, os.geteuid()) or (state.st_mode & writers and not is_sticky):
            return place
    return None


def _is_own_group(number: int) -> bool:
    """True for the group of root, and for the one that many systems give to each user alone."""
    import grp
    import pwd

    try:
        user, group = pwd.getpwuid(os.geteuid()).pw_name, grp.getgrgid(number)
    except KeyError:
        return False
    return number == 0 or (group.gr_name == user and not set(group.gr_mem) - {user})


def use_private_compiler_caches() -> None:
    """Let the compilers of torch keep their programs where no other user can put one.

    By default that is the temporary folder of the machine, under a name that anybody can take first. If the
    cache is not private either, this process gets a folder of its own.
    """
    stated = {name: os.environ.get(name) for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")}
    if all(path and os.path.isdir(path) and find_open_path(Path(path)) is None for path in stated.values()):
        return
    try:
        folder = program_folder()
    except UserError:
        folder = Path(tempfile.mkdtemp(prefix="hf-genlm-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
    for name in stated:
        (folder / name.lower()).mkdir(mode=0o700, exist_ok=True)
        os.environ[name] = str(folder / name.lower())


def require_new_folder(path: str | Path) -> None:
    """Refuse an --out folder that holds something.

    Raises:
        UserError: `path` is a file, or a folder with something in it, or its name is not UTF-8.
    """
    path = Path(utf8_name(path))
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        raise UserError(f"--out {str(path)!r} already holds files: name a new folder, or remove it")


def os_error_of(error: BaseException) -> OSError | None:
    """The failure of the system behind an exception of a library; None if there is none.

    safetensors names the number in words, torch none.
    """
    if isinstance(error, WriteError):
        return OSError(error.errno, error.reason)
    if isinstance(error, OSError):
        return error
    found = re.search(r"\(?os error (\d+)\)", str(error))
    if found:
        return OSError(int(found[1]), os.strerror(int(found[1])))
    if isinstance(error, RuntimeError) and "inline_container.cc" in str(error):
        return OSError(errno.ENOSPC, "torch could not write it, as on a full disk")
    return None


@contextlib.contextmanager
def note_write_errors(note: Callable[[str], None]) -> Iterator[None]:
    """Call `note` with the message of a WriteError instead of raising it, where results are printed too."""
    try:
        yield
    except WriteError as error:
        note(f"not kept: {error}")


@contextlib.contextmanager
def note_no_space(note: Callable[[str], None]) -> Iterator[None]:
    """Call `note` with the reason of a write that failed on a full disk, instead of raising."""
    try:
        yield
    except Exception as error:
        cause = os_error_of(error)
        if cause is None or cause.errno not in _NO_SPACE:
            raise
        note(cause.strerror or str(cause))


@contextlib.contextmanager
def _write_errors(path: Path) -> Iterator[None]:
    """Raise WriteError for an OSError of the system or of a library."""
    try:
        yield
    except Exception as error:
        cause = os_error_of(error)
        if cause is None:
            raise
        raise WriteError(path, cause) from error


def _sync(path: Path) -> None:
    if path.is_dir() and os.name != "posix":  # Windows keeps names by itself
        return
    number = os.open(path, (os.O_RDONLY if os.name == "posix" else os.O_RDWR) | _NO_FOLLOW)
    try:
        os.fsync(number)
    finally:
        os.close(number)
