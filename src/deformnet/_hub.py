"""Downloads, and exported networks on the Hugging Face Hub or in folders with its layout.

```
model.safetensors       the weights
model.json              their card, see `deformnet.engine.export`
README.md               the model card
```
"""

import hashlib
import logging
import os
import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from deformnet._errors import UserError, require_extra
from deformnet._files import matching, naming, read_json

WEIGHTS = "model.safetensors"
_CARD = "model.json"
_TIMEOUT = "DEFORMNET_DOWNLOAD_TIMEOUT"
_PATIENCE = 10.0  # seconds before the first warning about a download
_log = logging.getLogger(__name__)
_ADDRESS = re.compile(r"hf://([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")


def address_of(source: str | Path) -> str | None:
    """The URI hf://... of a string, or of a path made from it; None if it is not one."""
    scheme, _, rest = Path(source).as_posix().partition("/")  # a path has one slash of the two
    return f"hf://{rest}" if scheme == "hf:" else None


def local(source: str | Path) -> Path:
    """The local path of weights; those on the Hub are downloaded once.

    Args:
        source: hf://OWNER/REPO or hf://OWNER/REPO@REVISION, where the revision is a branch, tag or
            commit; a folder with an exported network; or any other path or name, which is returned
            unchanged.
    Raises:
        FileNotFoundError, UserError: see `download`; UserError also if a URI is malformed.
        OSError: if the download fails.
    """
    address = address_of(source)
    if address is None:
        path = Path(source)
        exported = path / WEIGHTS
        is_run = (path / "checkpoints").exists()
        return exported if exported.is_file() and not is_run else path
    match = _ADDRESS.fullmatch(address)
    if match is None:
        raise UserError(f"expected hf://OWNER/REPO or hf://OWNER/REPO@REVISION, but got {address}")
    return download(match[1], match[2])


def download(
    repo: str,
    revision: str | None = None,
    *,
    cache_dir: str | Path | None = None,
    force: bool = False,
    local_only: bool = False,
    token: str | bool | None = None,
) -> Path:
    """Downloads an exported network from the Hub, unless it is in the cache.

    Args:
        repo: OWNER/REPO.
        revision: branch, tag or commit; None uses the main branch.
        cache_dir: cache folder; None uses that of huggingface_hub.
        force: download files even if they are in the cache.
        local_only: use only the cache, without downloading.
        token: access token; None uses the one saved by `hf auth login`.
    Returns:
        The path of the weights; their card is in the same folder.
    Raises:
        FileNotFoundError: if there is no such repository, revision or file.
        UserError: if the files are damaged, or are not those of an exported network.
        OSError: if the download fails.
    """
    require_extra("hf://", "models", "huggingface_hub")
    from huggingface_hub import errors, hf_hub_download

    address = f"hf://{repo}" if revision is None else f"hf://{repo}@{revision}"

    def fetch(name: str, revision: str | None) -> Path:
        try:
            return Path(
                hf_hub_download(
                    repo,
                    name,
                    revision=revision,
                    cache_dir=cache_dir,
                    force_download=force,
                    local_files_only=local_only,
                    token=token,
                )
            )
        except errors.HFValidationError as error:
            raise UserError(f"{address}: expected OWNER/REPO, but got {repo}") from error
        except errors.RepositoryNotFoundError as error:
            raise FileNotFoundError(
                f"{address}: expected a repository that you can read, but found none; check the "
                "name, or for a private repository, run: hf auth login"
            ) from error
        except errors.RevisionNotFoundError as error:
            raise FileNotFoundError(
                f"{address}: expected a branch, tag or commit, but found no {revision}; omit "
                f"@{revision} to use the main branch"
            ) from error
        except Exception as error:  # the type of network errors differs between versions
            is_absent = isinstance(error, errors.EntryNotFoundError)
            if is_absent and not isinstance(error, errors.LocalEntryNotFoundError):
                raise FileNotFoundError(
                    f"{address}: expected {name}, as written by `deformnet export RUN {WEIGHTS}`, "
                    "but found no such file in the repository"
                ) from error
            raise OSError(
                f"{address}: cannot download {name} ({_first_line(error.__cause__ or error)}), "
                "and it is not in the cache; check the network connection, or pass the path of a "
                "local copy of the repository"
            ) from error

    with downloading(address):
        card = fetch(_CARD, revision)
        commit = card.parent.name  # the weights of the same commit, even if the branch moves
        weights = fetch(WEIGHTS, commit)
    try:
        _require_intact(card, weights)
    except UserError as error:
        cached = weights.parents[2]
        raise UserError(f"{address}: {error}; delete {cached} to download it again") from error
    return weights


def cached(repo: str) -> Iterator[Path]:
    """The files of a repository in the cache of huggingface_hub."""
    from huggingface_hub import constants

    folder = f"models--{repo.replace('/', '--')}"
    return matching(Path(constants.HF_HUB_CACHE, folder), "snapshots/*/*")


@contextmanager
def downloading(what: str) -> Iterator[None]:
    """Logs warnings, at growing intervals, while a download lasts.

    A download fails after DEFORMNET_DOWNLOAD_TIMEOUT seconds (an environment variable, 60 by
    default) without data, or, for the Hub, after HF_HUB_DOWNLOAD_TIMEOUT (10). huggingface_hub
    waits without limit for another process that downloads the same file.

    Raises:
        UserError: if the variable is not a number of seconds.
    """
    limit = os.environ.get(_TIMEOUT, "60")
    if not limit.isdecimal() or not 1 <= int(limit) <= 86400:
        raise UserError(f"expected {_TIMEOUT} to be 1 to 86400 seconds, but got {limit!r}")
    start, ended = time.monotonic(), threading.Event()

    def tell() -> None:
        due = _PATIENCE
        while not ended.wait(due):
            waited = time.monotonic() - start
            text = "the download of %s, here or in another process, has taken %.0f seconds so far"
            _log.warning(text, what, waited)
            due *= 2

    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(int(limit))
    threading.Thread(target=tell, daemon=True).start()
    try:
        yield
    finally:
        ended.set()
        socket.setdefaulttimeout(before)


def _require_intact(card: Path, weights: Path) -> None:
    """Verifies the SHA-256 of the weights against their card."""
    content = read_json(card)
    expected = content.get("sha256") if isinstance(content, dict) else None
    if not isinstance(expected, str):
        raise UserError(
            f"{card}: expected the card of an exported run, but got a damaged or another file"
        )
    with naming(weights), weights.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != expected:
        raise UserError(
            f"{weights}: damaged, expected the sha256 {expected[:12]}..., but got {digest[:12]}..."
        )


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
