"""What goes wrong on the way to the Hub, in one line: the cause and the fix."""

from __future__ import annotations

from json import JSONDecodeError
from typing import Any, Literal


def cause_of(error: Exception) -> tuple[BaseException, int | None, str]:
    """What went wrong on the way is the cause of "not in the cache": the cause, the HTTP status if
    the Hub answered, and its Retry-After."""
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
    """What `error`, of the Hub's client, means for the repository `name`.

    Args:
        kind: what was to be read, where a folder or a file of this machine would do as well.
    """
    from huggingface_hub import constants
    from huggingface_hub import errors as hub

    where, (cause, status, after) = constants.ENDPOINT, cause_of(error)
    here = {"model": "no such folder here, ", "dataset": "no such file or folder here, "}.get(kind)
    login = "run `hf auth login`, or set HF_TOKEN"
    if isinstance(error, hub.HFValidationError):
        return f"not a Hub id: {_short(error)}"
    if isinstance(error, hub.RevisionNotFoundError):
        return f"has no revision `{revision}`: leave it out for the newest"
    # Gated is a kind of not found to the client.
    if isinstance(cause, hub.GatedRepoError) or status == 403:
        page = f"{where}/{'datasets/' * (kind == 'dataset')}{name}"
        return f"access refused ({status}): ask for it at {page}, then log in so: {login}"
    if isinstance(cause, hub.RepositoryNotFoundError) or status in (401, 404):
        what = "data set" if kind == "dataset" else "repository"
        return f"{here or ''}no such {what} on {where} ({status}), or it is private: {login}"
    if status is not None:
        later = "try again later: " if status >= 500 else ""
        return {
            409: "another change of it is being made (409): wait for that one, then try again",
            412: "somebody else changed it meanwhile (412): look at it, then push again",
            429: f"too many requests (429): try again in {after or 'some hundred'} seconds",
        }.get(status, f"{where} answers {status}: {later}{_short(error)}")
    lost = (FileNotFoundError, ConnectionError, TimeoutError, hub.HTTPError, JSONDecodeError)
    if isinstance(error, (*lost, hub.CachedRepoTreeNotFoundError)):
        offline = constants.HF_HUB_OFFLINE
        reason = "HF_HUB_OFFLINE is set" if offline else f"{where} cannot be reached"
        if not here:
            return f"{reason}: mend that, then try again: nothing is done twice"
        fetch = f"hf download {'--repo-type dataset ' * (kind == 'dataset')}{name}"
        return f"{here}not wholly in the Hub's cache, and {reason}: fetch it with `{fetch}`"
    return _short(error)


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:160] or type(error).__name__
