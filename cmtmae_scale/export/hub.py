"""Upload of a verified export to the Hugging Face hub.

The token is that of huggingface_hub's own login or environment; it is neither read nor shown here.
"""

import shlex
from pathlib import Path
from typing import NamedTuple, cast

from cmtmae_scale import __version__
from cmtmae_scale.errors import AGAIN, CmtMaeError, ConfigError, UploadError

MAY_PASS = frozenset({408, 409, 412, 425, 429})
"""Status codes below 500 of a request that may succeed later."""
LOG_IN = "log in with `hf auth login`, or set HF_TOKEN, with a token that may write"


class Target(NamedTuple):
    """A model repository on the hub."""

    repo: str
    """``OWNER/NAME``."""
    private: bool
    """Whether it must be private; a new repository is public otherwise, or as OWNER's default."""


def require_hub(target: Target) -> None:
    """Refuse what can never be uploaded, before anything is exported.

    Raises:
        ConfigError: if the repository's name is invalid, the hub is disabled, or there is no token.
    """
    from huggingface_hub import constants, get_token
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(target.repo)
        problem = "" if target.repo.count("/") == 1 else "it has no OWNER"
    except HFValidationError as error:
        problem = one_line(str(error))
    if problem:
        raise ConfigError(f"--push-to-hub={target.repo} is not OWNER/NAME of the hub: {problem}")
    if constants.HF_HUB_OFFLINE:
        raise ConfigError(
            "--push-to-hub needs the network, and HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE forbids "
            "it; unset the variable, or drop --push-to-hub"
        )
    try:
        has_token = get_token() is not None
    except OSError as error:  # of a token that is renewed
        raise explain(error, target) from error
    if not has_token:
        raise ConfigError(f"--push-to-hub={target.repo}: no token of the hub; {LOG_IN}")


def upload(folder: Path, target: Target) -> str:
    """Create the repository if it is missing, and upload a folder's files in one commit.

    Files that are already on the hub are not sent again.

    Returns:
        Address, visibility and commit.

    Raises:
        ConfigError: if the hub refuses the upload.
        UploadError: if the hub cannot be reached or fails.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    # httpx.HTTPError or, in huggingface_hub before 1.0, requests.HTTPError
    transport = cast(type[Exception], HfHubHTTPError.__bases__[0])
    errors = (transport, OSError, ValueError, RuntimeError)
    api = HfApi(library_name="cmtmae-scale", library_version=__version__)
    try:
        url = api.create_repo(target.repo, private=target.private or None, exist_ok=True)
        is_private = bool(api.model_info(target.repo).private)
        if target.private and not is_private:
            raise ConfigError(
                f"{url} exists and is public; make it private in its settings, or drop --private"
            )
        done = api.upload_folder(
            repo_id=target.repo, folder_path=folder, commit_message=f"Export {folder.name}"
        )
    except (ConfigError, *errors) as error:
        failure = error if isinstance(error, ConfigError) else explain(error, target)
        raise type(failure)(
            f"{failure}. The verified export stays in {folder}; its upload alone: "
            f"{upload_command(folder, target)}"
        ) from error
    return f"{url} ({'private' if is_private else 'public'}), commit {done.oid[:12]}"


def upload_command(folder: Path, target: Target) -> str:
    """Return the command of huggingface_hub that uploads a folder."""
    private = ["--private"] if target.private else []
    return shlex.join(["hf", "upload", target.repo, str(folder), ".", *private])


def explain(error: BaseException, target: Target) -> CmtMaeError:
    """Return the error to raise for an error of huggingface_hub, with cause and remedy."""
    status, detail = find_response(error)
    repo = target.repo
    if status == 401:
        return ConfigError(f"the hub does not accept the token (401: {detail}); {LOG_IN}")
    if status in (402, 403) or isinstance(error, PermissionError):
        return ConfigError(
            f"the token may not write to {repo} ({status or 'refused'}: {detail}); give it write "
            "access, or name a repository of your own (`hf auth whoami`)"
        )
    if status == 404:
        return ConfigError(
            f"the hub does not know {repo} ({status}: {detail}); check OWNER, NAME and HF_ENDPOINT"
        )
    if status is None and isinstance(error, ValueError):
        return ConfigError(f"the hub's answer cannot be used ({detail}); check HF_ENDPOINT")
    if status is None:
        return UploadError(f"the hub cannot be reached ({detail}); check the network and {AGAIN}")
    if status >= 500 or status in MAY_PASS:
        return UploadError(f"the hub failed ({status}: {detail}); {AGAIN} in some minutes")
    return ConfigError(f"the hub refuses the upload to {repo} ({status}: {detail}); correct that")


def find_response(error: BaseException) -> tuple[int | None, str]:
    """Return status code and message of the response behind an error, or ``None`` and its text."""
    while True:
        response = getattr(error, "response", None)
        if response is not None:
            text = getattr(error, "server_message", None) or str(error).partition("\n")[0]
            return int(response.status_code), one_line(text)
        if error.__cause__ is None:
            return None, one_line(f"{type(error).__name__}: {error}")
        error = error.__cause__


def one_line(text: str) -> str:
    """Return a text on one line, cut to 300 characters."""
    return " ".join(text.split())[:300].rstrip(".")
