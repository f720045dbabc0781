"""Addresses of tars in object stores and on web servers, as text; nothing is opened."""

import os
import re
from urllib.parse import unquote, urlsplit

SCHEMES = ("s3", "gs", "https", "http")

_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
# User and password before @ in a host. A secret key of S3 may contain a /, which ends the host;
# then no port follows the colon.
_USER = re.compile(r"(?<=://)(?:[^/\s]*@|[^/\s:]*:(?!\d*(?:[/\s?:]|$))\S*@)")
_QUERY = re.compile(r"(://[^\s?]*)\?[^\s'\"]*")


def is_url(path: str | os.PathLike[str]) -> bool:
    """Return whether a path is an address, of any scheme."""
    return _ADDRESS.match(os.fspath(path)) is not None


def hide_secrets(text: str) -> str:
    """Return an address, or a text with addresses, without users, passwords and queries."""
    return _QUERY.sub(r"\1", _USER.sub("", text))


def split_address(url: str) -> tuple[str, str]:
    """Return (scheme and bucket or host, key) of a valid address."""
    scheme, _, rest = url.partition("://")
    place, _, key = rest.partition("/")
    return f"{scheme.lower()}://{place}", unquote(key) if scheme.startswith("http") else key


def find_address_problem(url: str) -> str | None:
    """Return why an address cannot be read, with a remedy and without its secrets.

    Returns ``None`` for an address that is well formed.
    """
    where = hide_secrets(url)
    scheme, _, rest = url.partition("://")
    host, _, key = rest.partition("/")
    if scheme.lower() not in SCHEMES:
        return (
            f"{where}: {scheme}:// is not read; use s3://, gs:// or https:// (any store with the "
            "protocol of S3: s3:// and AWS_ENDPOINT_URL), or copy or mount the data as files"
        )
    if "@" in host or where.partition("?")[0] != url.partition("?")[0]:
        return (
            f"{where}: an address must not hold a user or a password, which would get into logs "
            "and checkpoints; set the variables of the store (AWS_..., GOOGLE_...) instead"
        )
    if "?" in url:
        return (
            f"{where}: an address must not have a query (what follows ?): signed addresses expire, "
            "and would get into logs and checkpoints; use s3:// or gs:// with the variables of "
            "the store, and * in place of ? in patterns"
        )
    if not host:
        return f"{where}: names no {'host' if 'http' in scheme else 'bucket'}"
    if "//" in f"/{key}":
        return f"{where}: has an empty part (//) after {host}; write one /"
    try:
        urlsplit(f"http://{host}").port  # noqa: B018  # raises
    except ValueError:
        return f"{where}: {host} is not a host"
    return None
