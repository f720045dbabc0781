"""Tars in object stores and on web servers, read by ranges through obstore.

An address is ``s3://BUCKET/KEY``, ``gs://BUCKET/KEY`` or ``https://HOST/PATH``. Credentials, region
and endpoint are those of the store's own environment (``AWS_...``, ``GOOGLE_...``, the role of the
machine); an address never holds any. A store belongs to the process that opened it: its threads do
not survive a fork.
"""

import errno
import fnmatch
import functools
import hashlib
import importlib
import importlib.util
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

from dataloading.addresses import find_address_problem, is_url, split_address
from dataloading.errors import DataError, ReadError

LISTING_IN_FLIGHT = 64
"""Most requests for headers that a process has in flight while an index is built, each for another
tar."""

_REQUEST = timedelta(seconds=20)  # for an answer, to its last byte
_CONNECT = timedelta(seconds=5)
_QUIET_RETRIES = 2  # by the client, before a failure is logged and retried as that of a file
_QUIET = timedelta(seconds=5)
_FIRST_WINDOW, _LAST_WINDOW = 16 << 10, 1 << 20  # bytes of a request for headers
NO_ANSWER = f"no answer within {_REQUEST.seconds} s"
# Statuses below 500 that may differ at the next try. 416: the client went on with an answer that
# broke off after its last byte, and asked for a range of no bytes.
_TEMPORARY = frozenset({408, 416, 425, 429})
_SEPARATOR = "\t"  # in the text of a remote tar
_STATUS = re.compile(r"status code: (\d{3}) ([A-Za-z ]+)")
_CODE = re.compile(r"<Code>(\w{1,60})</Code>")
_VARIABLES = {
    "s3": "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION and AWS_ENDPOINT_URL",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS",
}


class RemoteTar(NamedTuple):
    """A tar in a store, as it was listed.

    Attributes:
        url: its address.
        size: bytes.
        version: its ETag; where the store gives none, when it was modified; else empty.
    """

    url: str
    size: int
    version: str

    def __str__(self) -> str:
        return self.url

    def version_number(self) -> int:
        """Return the version as an integer, in place of a file's modification time."""
        return int.from_bytes(hashlib.sha256(self.version.encode()).digest()[:7], "big")


TarPlace = Path | RemoteTar


def as_root(path: str | os.PathLike[str]) -> Path | str:
    """Return ``data.path`` as a path; an address as it is.

    Raises:
        DataError: for an empty text, such as that of a variable that is not set: as a path it would
            be the working folder.
    """
    if not os.fspath(path):
        raise DataError("the path of the images is empty; set data.path to their folder or tars")
    return os.fspath(path) if is_url(path) else Path(path)


def place_to_text(place: TarPlace) -> str:
    """Return the place of a tar as text, for other processes."""
    return _SEPARATOR.join(map(str, place)) if isinstance(place, RemoteTar) else str(place)


def place_from_text(text: str) -> TarPlace:
    """Return the place that ``place_to_text`` encoded."""
    if not is_url(text):
        return Path(text)
    url, size, version = text.split(_SEPARATOR)
    return RemoteTar(url, int(size), version)


def require_address(url: str) -> None:
    """Refuse an address that cannot be read, and a store without its library.

    Raises:
        DataError: for an address with credentials, of another scheme, or without obstore.
    """
    problem = find_address_problem(url)
    if problem is not None:
        raise DataError(problem)
    if importlib.util.find_spec("obstore") is None:
        raise DataError(
            f"{url}: obstore is not installed; install the extra stores "
            "(pip install 'cmtmae-scale[stores]')"
        )


@functools.cache
def open_store(root: str) -> Any:
    """Open the store of an address's scheme and bucket or host, once per process.

    Raises:
        DataError: if the variables of the store are invalid.
    """
    stores = importlib.import_module("obstore.store")
    scheme, _, bucket = root.partition("://")
    kinds = {"s3": (stores.S3Store, bucket), "gs": (stores.GCSStore, bucket)}
    kind, place = kinds.get(scheme, (stores.HTTPStore, root))
    # http:// is used only where the address, or the variable of the endpoint, has it.
    client = {"timeout": _REQUEST, "connect_timeout": _CONNECT, "allow_http": True}
    retries = {"max_retries": _QUIET_RETRIES, "retry_timeout": _QUIET}
    try:
        return kind(place, client_options=client, retry_config=retries)
    except _errors() as error:
        raise DataError(
            f"{root}: the store cannot be opened ({type(error).__name__}); correct "
            f"{_VARIABLES.get(scheme, 'the address')}"
        ) from None


def find_tars(urls: Sequence[str]) -> list[RemoteTar]:
    """Return size and version of tars, with many requests in flight.

    Raises:
        OSError: for the first address that the store does not return.
    """
    with ThreadPoolExecutor(LISTING_IN_FLIGHT) as pool:
        return list(pool.map(_find_tar, urls))


def find_times(urls: Sequence[str]) -> list[float]:
    """Return when objects were modified, in seconds; 0 where the store does not report it.

    Raises:
        OSError: for the first address that the store does not return.
    """
    with ThreadPoolExecutor(LISTING_IN_FLIGHT) as pool:
        return [meta["last_modified"].timestamp() for meta in pool.map(_ask, urls)]


def list_tars(pattern: str) -> tuple[list[RemoteTar], list[str]]:
    """List the tars of a folder, ``s3://BUCKET/FOLDER/``, or of a pattern with ``*``, by name.

    Returns:
        The tars, and the keys of other objects there.

    Raises:
        DataError: for the address of a web server, which lists nothing.
        OSError: if the store does not list them.
    """
    root, key = split_address(pattern)
    if root.startswith("http"):
        raise DataError(
            f"{pattern}: a web server does not list its files; name the tars, for example "
            "https://HOST/train-{000..146}.tar"
        )
    wanted = key.rstrip("/").split("/") if has_magic(key) else [*key.strip("/").split("/"), "*"]
    wanted = [part for part in wanted if part]
    known = next(i for i, part in enumerate(wanted) if has_magic(part))
    prefix = "/".join(wanted[:known]) or None
    obstore = importlib.import_module("obstore")
    store = open_store(root)
    try:
        if known == len(wanted) - 1:
            found = obstore.list_with_delimiter(store, prefix)["objects"]
        else:
            found = [one for some in obstore.list(store, prefix, chunk_size=1000) for one in some]
    except _errors() as error:
        raise _os_error(error, pattern) from None
    tars: list[RemoteTar] = []
    others: list[str] = []
    for meta in sorted(found, key=lambda one: one["path"]):
        path: str = meta["path"]
        if not _matches(path.split("/"), wanted):
            continue
        if path.lower().endswith(".tar") and not path.rpartition("/")[2].startswith("."):
            tars.append(RemoteTar(f"{root}/{path}", meta["size"], _version(meta)))
        else:
            others.append(path)
    return tars, others


def has_magic(text: str) -> bool:
    """Return whether an address is a pattern with ``*`` or ``[...]``."""
    return "*" in text or "[" in text


def read_range(tar: RemoteTar, offset: int, size: int) -> Any:
    """Read ``size`` bytes of a tar from ``offset`` on; fewer only where it ends.

    Returns:
        The bytes, as an object with the buffer protocol.

    Raises:
        OSError: if the store does not return them.
        ReadError: if the tar is not the one that was listed.
    """
    end = min(offset + size, tar.size)
    if end <= offset:
        return b""
    root, key = split_address(tar.url)
    options: dict[str, Any] = {"range": (offset, end)}
    if tar.version.startswith('"'):  # a strong ETag
        options["if_match"] = tar.version
    try:
        answer = importlib.import_module("obstore").get(open_store(root), key, options=options)
        found = RemoteTar(tar.url, answer.meta["size"], _version(answer.meta))
        data = answer.bytes()
    except _errors() as error:
        if type(error).__name__ == "PreconditionError":
            raise _changed(tar) from None
        raise _os_error(error, tar.url) from None
    if found != tar:
        raise _changed(tar)
    return data


class HeaderReader:
    """Reads places of a tar in ascending order, a window of it at a time; for one thread.

    The window is small where headers are far apart, and grows where the tar is read nearly whole.
    """

    def __init__(self, tar: RemoteTar) -> None:
        self.size = tar.size
        self._tar = tar
        self._start, self._data, self._window = 0, b"", _FIRST_WINDOW

    def read(self, size: int, offset: int) -> bytes:
        """Read as ``os.pread``; errors are those of ``read_range``."""
        at = offset - self._start
        if at < 0 or at + size > len(self._data):
            is_near = 0 <= at <= len(self._data) + self._window
            self._window = min(2 * self._window, _LAST_WINDOW) if is_near else _FIRST_WINDOW
            data = read_range(self._tar, offset, max(size, self._window))
            self._start, self._data, at = offset, bytes(data), 0
        return self._data[at : at + size]


def explain_error(error: Exception) -> tuple[int, str]:
    """Return an ``errno`` and a short reason for an error of obstore.

    The text of the error holds addresses, signed addresses after a redirection, and bodies of
    answers: only a status and the store's code are passed on.
    """
    text = str(error)
    status = _STATUS.search(text)
    if re.search(r"http://(169\.254\.|metadata\.)", text.partition("\n")[0]):
        return errno.EACCES, "no credentials were found in the environment or for this machine"
    if "without LOCATION" in text:
        return errno.EPERM, "the bucket is in another region"
    if status is not None:
        number, code = int(status[1]), _CODE.search(text)
        reason = f"{number} {status[2].strip()}{f', {code[1]}' if code else ''}"
        if number in (401, 403):
            return errno.EACCES, reason
        if number == 404:
            return errno.ENOENT, reason
        is_lasting = number < 500 and number not in _TEMPORARY
        return (errno.EPERM if is_lasting else errno.EIO), reason
    if type(error).__name__ == "NotSupportedError":
        return errno.EPERM, "the server does not answer requests for a range of bytes"
    if "invalid peer certificate" in text:
        return errno.EPERM, "the certificate of the server is not accepted"
    if "dns error" in text:
        return errno.EIO, "the name of the host is not found"
    if "kind: Timeout" in text:
        return errno.ETIMEDOUT, NO_ANSWER
    for mark, reason in (
        ("kind: Connect", "the store cannot be reached"),
        ("UnexpectedRange", "the store sent another range than requested"),
        ("kind: Interrupted", "the answer ended early"),
        ("kind: Body", "the answer ended early"),
    ):
        if mark in text:
            return errno.EIO, reason
    return errno.EIO, f"the store failed ({type(error).__name__})"


def explain_remedy(url: str, error: OSError) -> str:
    """Return what to correct for a lasting error of a store."""
    scheme = url.partition("://")[0]
    variables = _VARIABLES.get(scheme)
    if error.errno == errno.EACCES and variables:
        return f"set {variables} to an account that may list and read it"
    if variables:
        return f"correct data.path, or {variables}"
    return "correct data.path, or serve the tars to this machine without a login"


def _ask(url: str) -> Any:
    """Return the store's metadata of an object."""
    root, key = split_address(url)
    try:
        return importlib.import_module("obstore").head(open_store(root), key)
    except _errors() as error:
        raise _os_error(error, url) from None


def _find_tar(url: str) -> RemoteTar:
    meta = _ask(url)
    return RemoteTar(url, meta["size"], _version(meta))


def _version(meta: Any) -> str:
    """Return ETag or time of modification of an object; empty where the store gives neither."""
    if meta["e_tag"]:
        return str(meta["e_tag"])
    modified = meta["last_modified"]
    return modified.isoformat() if modified.timestamp() > 0 else ""


def _matches(parts: Sequence[str], wanted: Sequence[str]) -> bool:
    """Return whether the parts of a key match those of a pattern; ``**``: any number of parts."""
    if not wanted:
        return not parts
    if wanted[0] == "**":
        return any(_matches(parts[k:], wanted[1:]) for k in range(len(parts) + 1))
    return (
        bool(parts) and fnmatch.fnmatchcase(parts[0], wanted[0]) and _matches(parts[1:], wanted[1:])
    )


def _errors() -> tuple[type[Exception], ...]:
    """Return the error types of obstore."""
    return (importlib.import_module("obstore.exceptions").BaseError, OSError, ValueError)


def _os_error(error: Exception, url: str) -> OSError:
    number, reason = explain_error(error)
    return OSError(number, reason, url)


def _changed(tar: RemoteTar) -> ReadError:
    return ReadError(
        f"{tar.url}: is no longer the tar that was indexed (size and ETag differ); put that tar "
        "back, or launch again, which indexes the new one"
    )
