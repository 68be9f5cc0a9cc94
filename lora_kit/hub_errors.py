"""Hub errors in one line: the cause and the fix."""

from __future__ import annotations

from json import JSONDecodeError
from typing import Any, Literal

from lora_kit.errors import reason_of


def cause_of(error: Exception) -> tuple[BaseException, int | None, str]:
    """The underlying cause of a "not in the cache" error, the HTTP status if the Hub responded, and
    its Retry-After."""
    cause = error.__cause__ if isinstance(error.__cause__, OSError) else error
    response: Any = getattr(cause, "response", None)
    if response is None:
        return cause, None, ""
    return cause, response.status_code, response.headers.get("Retry-After") or ""


def problem(
    error: Exception,
    name: str,
    revision: str | None = None,
    kind: Literal["model", "dataset", ""] = "",
) -> str:
    """The message for an error of the Hub client about the repository `name`.

    Args:
        kind: the repository type, if a local path would also have been valid.
    """
    from huggingface_hub import constants
    from huggingface_hub import errors as hub

    where, (cause, status, after) = constants.ENDPOINT, cause_of(error)
    here = {"model": "no such folder here, ", "dataset": "no such file or folder here, "}.get(kind)
    login = "run `hf auth login`, or set HF_TOKEN"
    if isinstance(error, hub.HFValidationError):
        return f"not a Hub id: {reason_of(error)}"
    if isinstance(error, hub.RevisionNotFoundError):
        return f"has no revision `{revision}`: remove it for the newest"
    # Gated is a kind of not found to the client.
    if isinstance(cause, hub.GatedRepoError) or status == 403:
        page = f"{where}/{'datasets/' * (kind == 'dataset')}{name}"
        return f"access denied ({status}): request it at {page}, then {login}"
    if isinstance(cause, hub.RepositoryNotFoundError) or status in (401, 404):
        what = "data set" if kind == "dataset" else "repository"
        return f"{here or ''}no such {what} on {where} ({status}), or it is private: {login}"
    if status is not None:
        later = "try again later: " if status >= 500 else ""
        return {
            409: "another commit is in progress (409): try again later",
            412: "changed by someone else in the meantime (412): review it, then push again",
            429: f"too many requests (429): try again in {after or 'some hundred'} seconds",
        }.get(status, f"{where} responds {status}: {later}{reason_of(error)}")
    lost = (FileNotFoundError, ConnectionError, TimeoutError, hub.HTTPError, JSONDecodeError)
    if isinstance(error, (*lost, hub.CachedRepoTreeNotFoundError)):
        offline = constants.HF_HUB_OFFLINE
        reason = "HF_HUB_OFFLINE is set" if offline else f"{where} cannot be reached"
        if not here:
            return f"{reason}: fix the connection and retry; retrying is safe"
        fetch = f"hf download {'--repo-type dataset ' * (kind == 'dataset')}{name}"
        return f"{here}not completely in the Hub's cache, and {reason}: download it with `{fetch}`"
    return reason_of(error)
