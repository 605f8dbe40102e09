"""What huggingface_hub's failures mean to a user, in one line each (its errors.py lists them).

Knows no names, files or caches of its own. huggingface_hub is imported on use.
"""

from __future__ import annotations

import errno
import json

from fastvlm_mlx.errors import FetchError


def is_unreachable(error: BaseException) -> bool:
    """Whether the hub gave no answer at all, or one that says it is down."""
    # huggingface_hub.errors imports the HTTPError of its HTTP client, httpx or httpx2 by version.
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled

    if isinstance(error, HfHubHTTPError):
        return error.response.status_code >= 500
    return isinstance(error, (OfflineModeIsEnabled, HTTPError))


def fetch_error(error: BaseException, repo: str, revision: str | None) -> FetchError:
    """What a failure of huggingface_hub (its errors.py) means, and what to do."""
    from huggingface_hub import constants, errors

    hub = constants.ENDPOINT
    no_cache = f"and {repo} is not whole in the cache {constants.HF_HUB_CACHE}"
    instead = "give a local folder or demo"
    match error:
        case errors.LocalEntryNotFoundError() if error.__cause__ is not None:
            return fetch_error(error.__cause__, repo, revision)
        case errors.OfflineModeIsEnabled() | errors.LocalEntryNotFoundError():
            line = f"HF_HUB_OFFLINE is set {no_cache}: unset it to download once, or {instead}"
        case errors.GatedRepoError():
            line = f"{repo} is gated: accept its terms at {hub}/{repo}, then set HF_TOKEN"
        case errors.RevisionNotFoundError():
            line = f"{repo} has no revision '{revision}': see {hub}/{repo}/tree/main"
        case errors.RepositoryNotFoundError():
            line = (
                f"there is no folder {repo} and no such model on {hub} "
                "(if it is private, set HF_TOKEN)"
            )
        case errors.HfHubHTTPError():
            line = _status_line(error.response.status_code, repo, hub)
        case errors.HTTPError():
            line = (
                f"the network is off or {hub} cannot be reached, {no_cache}: try again online "
                f"(later HF_HUB_OFFLINE=1 uses the cache), or {instead}"
            )
        case OSError(errno=errno.ENOSPC):
            line = f"the disk of {constants.HF_HUB_CACHE} is full: make room, or set HF_HOME"
        case errors.HFValidationError():
            line = f"'{repo}' is no hub name: it should look like apple/FastVLM-0.5B"
        case json.JSONDecodeError() | KeyError() | TypeError():
            line = f"{hub} does not answer as a Hugging Face hub does: check HF_ENDPOINT, proxies"
        case _:
            line = f"{repo} could not be downloaded: {_first_line(error)}; try again"
    return FetchError(line)


def _status_line(status: int, repo: str, hub: str) -> str:
    match status:
        case 401:
            return f"{hub} wants a valid token for {repo}: set or renew HF_TOKEN"
        case 403:
            return f"{hub} refuses {repo} (403): does the token in HF_TOKEN allow reading it?"
        case 429:
            return f"{hub} says too many requests: wait some minutes, or set HF_TOKEN"
    return f"{hub} answered {status} for {repo}: try again later"


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
