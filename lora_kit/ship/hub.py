"""To the Hub and back: `push` uploads a run in one commit, `pull` downloads one and verifies it."""

from __future__ import annotations

import json
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, TypedDict, TypeVar

from lora_kit import trust
from lora_kit.adapter.files import WEIGHTS, Adapter, open_adapter
from lora_kit.adapter.finished import FinishedRun
from lora_kit.base.head import pooling_of
from lora_kit.base.pin import LARGEST_FILE
from lora_kit.base.tensors import INDEX, stored, stored_in
from lora_kit.errors import CheckFailed, UserError
from lora_kit.folders import new_folder
from lora_kit.hashes import file_hash
from lora_kit.hub_errors import cause_of, problem
from lora_kit.nano import MODEL as NANO
from lora_kit.run import HUB_ID, read_json, read_lock
from lora_kit.schema import Json
from lora_kit.ship.card import LOCAL, Card, make_card
from lora_kit.ship.merge import RECORD
from lora_kit.ship.secrets import refuse_secrets
from lora_kit.trust import PULLED

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import ModelInfo, RepoFile

T = TypeVar("T")

_LEGAL = r"(?:LICEN[CS]E|USE_POLICY|COPYING|NOTICE)[\w-]*(?:\.txt|\.md)?"
# Further files of a sentence-transformers folder.
_PARTS = r"(?:modules|sentence_bert_config|1_Pooling/config|2_Dense/config)\.json"
_PARTS += r"|2_Dense/model\.safetensors"
# Files that are uploaded from the folder of the weights.
_PUSHED = re.compile(
    r"(?:adapter_)?model(?:-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json"
    r"|(?:(?:generation_)?config|tokenizer(?:_config)?|special_tokens_map|added_tokens|vocab)\.json"
    rf"|head\.json|{_PARTS}"
    rf"|chat_template\.jinja|(?:merges|vocab)\.txt|(?:tokenizer|spiece)\.model|{_LEGAL}"
)
# Files that a push generates. A later push removes files of both kinds that it does not contain.
_GENERATED = {"adapter_config.json", RECORD, "report.html", "report.json", "run.lock.json"}
# Files that are downloaded: neither pickles nor code.
_PULLED = re.compile(
    r"[\w.-]+\.(?:safetensors|json|jinja)|(?:merges|vocab)\.txt|(?:tokenizer|spiece)\.model"
    rf"|README\.md|{_LEGAL}|{_PARTS}"
)
# Keys of report.json without rows of the data.
_FIGURES = (
    "verdict", "domain", "general", "few_shot", "scratch", "prompt_use", "metrics", "harness",
    "not_measured", "overfitting", "audit", "training", "memory", "gate", "layers", "contenders",
    "classes", "generation", "evaluated", "into",
)  # fmt: skip
# An absolute path up to its last slash; names may contain spaces and quotes. Inside a sentence it
# needs at least two names, so that neither `3 / 4` nor `and/or` matches.
_PATH = re.compile(r"^/(?:.*/)?|(?<![\w.:/<~-])/(?=[^\s/]).*/", re.DOTALL)
_TEMPORARY = (408, 429, 500, 502, 503, 504)  # statuses for which a retry can succeed
_TRIES, FIRST_WAIT, _LONGEST_WAIT = 5, 1.0, 300.0  # seconds


@dataclass
class UploadPlan:
    """What a push will do. `files`: {name in the repository: content, or the file with it}."""

    repo: str
    public: bool
    base: str
    card: Card
    files: dict[str, bytes | Path]

    def to_json(self) -> dict[str, object]:
        """The output of `push --dry-run --json`."""
        return {
            "repo": self.repo,
            "visibility": self.visibility,
            "base": self.base,
            "license": self.card.licence,
            "files": self.sizes(),
            "warnings": self.card.warnings,
        }

    @property
    def visibility(self) -> str:
        return "public" if self.public else "private"

    def sizes(self) -> dict[str, int]:
        """{name: bytes}"""
        return {
            name: len(content) if isinstance(content, bytes) else content.stat().st_size
            for name, content in sorted(self.files.items())
        }

    def __str__(self) -> str:
        lines = [f"to {self.repo}, {self.visibility}; base {self.base}, {self.card.licence}:"]
        lines += [f"  {size:>13,} bytes  {name}" for name, size in self.sizes().items()]
        lines += [f"warning: {line}" for line in self.card.warnings]
        return "\n".join(lines)


class Pulled(TypedDict):
    """The output of `pull --json`. `revision`: the full commit hash; `files`: {name: sha256};
    `left`: names of files that were not downloaded (pickles, code and other types)."""

    repo: str
    revision: str
    files: dict[str, str]
    out: str
    left: list[str]


def make_plan(
    run: FinishedRun,
    repo: str,
    *,
    public: bool = False,
    with_samples: bool = False,
    merged: str | Path | None = None,
) -> UploadPlan:
    """Everything that a push uploads, scanned for secrets. No network is needed, except for a base
    of the Hub that is named instead of the run's.

    Args:
        with_samples: include the report's sample rows of the data.
        merged: the folder of the merged model to upload instead of the adapter.

    Raises:
        UserError: there is no finished run, its files are damaged, or contain a secret.
    """
    from lora_kit.base.load import quiet_libraries

    quiet_libraries()
    _check_name(repo)
    adapter, lock, config = run.adapter, run.lock, dict(run.adapter.config)
    folder = Path(merged) if merged else adapter.folder
    if given := run.given:  # the base of --base replaces the recorded one
        config |= {"base_model_name_or_path": given.model, "revision": given.revision}
        known = {"model": given.model, "revision": given.revision}
        lock = {**lock, "base": {**lock.get("base", {}), **known}}
    if merged:
        stored_in(folder)  # raises if a shard is missing
    _check_finite(adapter)
    # Paths are collected before they are removed from config, lock and figures.
    private = _private_paths(run, config, lock)
    base = _public_base(str(config.get("base_model_name_or_path") or LOCAL), lock)
    config["base_model_name_or_path"] = None if base == LOCAL else base
    config, lock = _no_paths(config), _no_paths(_public_lock(lock, base))
    report = read_json(run.home / "report.json")
    # Rows are uploaded unchanged, or not at all.
    figures = _no_paths({key: value for key, value in report.items() if key in _FIGURES})
    report = {**report, **figures} if with_samples else figures
    files = _files_to_push(folder, within=bool(merged))
    made = _merged_config(run, folder, files, base) if merged else {"adapter_config.json": config}
    if saved := (lock.get("adapter") or {}).get("files"):
        uploaded = {name: saved[name] for name in saved if name in files}
        lock = {**lock, "adapter": {**lock["adapter"], "files": uploaded}}
    made |= {"run.lock.json": lock, "report.json": report}
    card = make_card(
        repo,
        config,
        lock,
        report,
        merged=bool(merged),
        has_licence=any(re.fullmatch(f"(?!NOTICE){_LEGAL}", name) for name in files),
        auto=run.auto,
        pooled=pooling_of(folder) if "modules.json" in files else None,
        chat=lock.get("kind", "chat") == "chat" and "chat_template.jinja" in files,
    )
    files["README.md"] = card.text.encode()
    if card.notice:
        # Below the text of the base's own NOTICE.
        own = (folder / "NOTICE").read_text("utf-8", "replace") if "NOTICE" in files else ""
        own = own.replace(card.notice, "").strip()
        files["NOTICE"] = f"{own}\n\n{card.notice}\n".lstrip().encode()
    files |= {name: _json(values) for name, values in made.items() if values}
    page = run.home / "report.html"
    if with_samples and page.is_file():
        files["report.html"] = _page_without(private, page)
    refuse_secrets(files, private)
    return UploadPlan(repo, public, base, card, files)


def _private_paths(run: FinishedRun, config: Json, lock: Json) -> set[str]:
    """Absolute paths of this machine, of at least two names, that a run's files, or a tokenizer's
    settings, may contain."""
    named = [str(config.get("base_model_name_or_path")), *(lock.get("data") or {})]
    named += [str(Path.cwd()), str(run.home.resolve())]
    with suppress(UserError):  # an invalid run file
        named += _texts(run.run and run.run.model_dump())
    return {path for path in named if re.match("/[^/]+/", path)}


def _files_to_push(folder: Path, within: bool) -> dict[str, bytes | Path]:
    """{name: file} of the files in a folder that are uploaded; `within`: also in subfolders."""
    inside = folder.rglob("*") if within else folder.iterdir()
    named = {file.relative_to(folder).as_posix(): file for file in sorted(inside)}
    return {
        name: file.resolve()
        for name, file in named.items()
        if _PUSHED.fullmatch(name) and file.is_file()
    }


def _merged_config(
    run: FinishedRun, folder: Path, files: dict[str, bytes | Path], base: str
) -> dict[str, Json]:
    """config.json and the merge's record without paths. Raises UserError unless the folder is the
    unchanged result of merging this run."""
    if any((folder / name).is_symlink() for name in files):
        raise UserError(f"{folder}: holds a link to somewhere else: put the file itself there")
    if "config.json" not in files:
        raise UserError(f"{folder}: no config.json: not a merged model")
    record = read_json(folder / RECORD)
    if record.get("adapter") != {"sha256": file_hash(run.adapter.folder / WEIGHTS)}:
        raise UserError(f"{folder}: not what `lora-kit merge` made of {run.path}: merge it first")
    model = read_json(folder / "config.json")
    model.pop("_name_or_path", None)
    named_base = {**(record.get("base") or {}), "model": base}
    return {"config.json": _no_paths(model), RECORD: _no_paths({**record, "base": named_base})}


def _page_without(private: set[str], page: Path) -> bytes:
    """report.html with the private paths cut to their last name. Other paths stay: in the page,
    rows of the data cannot be told from sentences."""
    from markupsafe import escape

    text = page.read_text(encoding="utf-8")
    for path in sorted(private, key=len, reverse=True):
        text = text.replace(escape(path), escape(Path(path).name))
    return text.encode()


def push(plan: UploadPlan, say: Callable[[str], None]) -> dict[str, object]:
    """Upload what was planned in one commit, to a repository that is created if there is none.

    Returns:
        The plan's figures with `commit`, `committed` (false: the Hub had everything), `url`, and
        `removed`: files of an earlier push that are not part of this one.

    Raises:
        UserError: the Hub rejects it, cannot be reached, or has the repository with the other
            visibility; nothing was committed, unless the message says so.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    repo = plan.repo
    api = _api()

    def repository() -> ModelInfo:
        """The repository at its newest commit, created if there is none."""
        api.create_repo(repo, private=not plan.public, exist_ok=True)
        return api.model_info(repo)

    def stale(revision: str) -> list[str]:
        """Files at a revision that only an earlier push can have left."""
        more = sorted(_listed(api, repo, revision).keys() - plan.files.keys())
        return [name for name in more if name in _GENERATED or _PUSHED.fullmatch(name)]

    info = _with_retries(repository, repo, say)
    if bool(info.private) == plan.public:
        now, fix = ("private", "remove --public") if info.private else ("public", "add --public")
        raise UserError(
            f"{repo}: already {now}, which a push does not change: {fix}, or name another"
        )
    old = _with_retries(lambda: stale(str(info.sha)), repo, say)

    def commit() -> str:
        # The client skips files that the Hub has already, and without any other returns the newest
        # commit: a retry after a lost response commits nothing. With the parent named, the Hub
        # rejects a commit on top of somebody else's (412).
        files = [CommitOperationAdd(n, content) for n, content in sorted(plan.files.items())]
        gone = [CommitOperationDelete(name) for name in stale("main")]
        done = api.create_commit(
            repo, [*files, *gone], commit_message="Upload with lora-kit", parent_commit=info.sha
        )
        return done.oid

    newest = _with_retries(commit, repo, say)
    if old:
        say(f"{repo}: removed: {', '.join(old)}")
    return {
        **plan.to_json(),
        "url": f"{api.endpoint}/{repo}",
        "removed": old,
        "commit": newest,
        "committed": newest != info.sha,
    }


def pull(repo: str, out: str | Path, revision: str | None, say: Callable[[str], None]) -> Pulled:
    """Download an adapter or a model at one commit; the folder appears only when it is complete and
    verified.

    Raises:
        UserError: it does not exist, the Hub rejects it, or it has no safetensors.
        CheckFailed: the files are not those that the Hub, or the lock file, lists.
    """
    _check_name(repo)
    api = _api()
    info = _with_retries(lambda: api.model_info(repo, revision=revision), repo, say, revision)
    sha = str(info.sha)
    there = _with_retries(lambda: _listed(api, repo, sha), repo, say)
    for name in there:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or "\\" in name or not name.isprintable():
            raise UserError(f"{repo}: names a file outside of its folder: {name!r:.80}")
    wanted = {n: f for n, f in there.items() if _PULLED.fullmatch(n) and n != PULLED}
    for name, file in wanted.items():
        if file.size > LARGEST_FILE and not name.endswith(".safetensors"):
            raise UserError(f"{repo}: {name}: {file.size:,} bytes: not a file of this kind")
    left = sorted(there.keys() - wanted.keys() - {".gitattributes"})
    if not wanted.keys() & {WEIGHTS, "model.safetensors", INDEX}:
        others = ", ".join(left[:5]) or "empty"
        raise UserError(f"{repo}: no safetensors weights at its top ({others}): nothing is fetched")
    with new_folder(Path(out), sum(file.size for file in wanted.values())) as folder:
        for name in sorted(wanted):
            get = partial(api.hf_hub_download, repo, name, revision=sha, local_dir=folder)
            _with_retries(get, repo, say)
        compare = partial(api.verify_repo_checksums, repo, revision=sha, local_dir=folder)
        for wrong in _with_retries(compare, repo, say).mismatches:
            raise CheckFailed(
                f"{repo}: {wrong['path']}: not the bytes that the Hub lists: pull again"
            )
        shutil.rmtree(folder / ".cache", ignore_errors=True)
        hashes = {name: file_hash(folder / name) for name in sorted(wanted)}
        _check_pulled(folder, repo, hashes)
        marker = {"repo": repo, "revision": sha, "files": hashes}
        (folder / PULLED).write_bytes(_json(marker))
    config = Path(out) / "adapter_config.json"
    if WEIGHTS in hashes and not read_json(config).get("base_model_name_or_path"):
        say(f"{config}: base_model_name_or_path was a folder of its author: write yours there")
    return Pulled(repo=repo, revision=sha, files=hashes, out=str(out), left=left)


def _check_name(repo: str) -> None:
    """Raises UserError if no repository can have this name."""
    if not HUB_ID.fullmatch(repo):
        raise UserError(f"{repo}: not a name on the Hub: write owner/name")


def _api() -> HfApi:
    from huggingface_hub import HfApi
    from huggingface_hub.utils import disable_progress_bars, logging

    logging.set_verbosity_error()  # it warns if everything is already uploaded
    if not sys.stderr.isatty():
        disable_progress_bars()
    return HfApi()


def _check_pulled(folder: Path, repo: str, hashes: dict[str, str]) -> None:
    """Raises CheckFailed or UserError if files are damaged, or do not match each other."""
    try:
        for name in hashes:
            if name.endswith(".safetensors"):
                stored(folder / name)
            elif name.endswith(".json"):
                _check_json(folder / name)
        if WEIGHTS in hashes:
            _check_finite(open_adapter(folder))
        if INDEX in hashes:
            stored_in(folder)
        saved = (read_lock(folder).get("adapter") or {}).get("sha256")
    except (UserError, CheckFailed) as error:
        raise type(error)(f"{repo}: {str(error).replace(f'{folder.resolve()}/', '')}") from None
    if saved and hashes.get(WEIGHTS, saved) != saved:
        raise CheckFailed(f"{repo}: {WEIGHTS} is not the one that run.lock.json names: not kept")


def _check_finite(adapter: Adapter) -> None:
    """Raises CheckFailed for NaN or infinite values, which make every output NaN."""
    for name, tensor in adapter.tensors().items():
        if not tensor.float().isfinite().all():
            raise CheckFailed(f"{adapter.folder / WEIGHTS}: {name} is NaN or infinite: train again")


def _check_json(file: Path) -> None:
    """Raises UserError unless the file is JSON."""
    try:
        trust.read_json(file, LARGEST_FILE)
    except ValueError:
        raise UserError(f"{file}: no JSON: ask its owner") from None


def _public_base(named: str, lock: Json) -> str:
    """The name by which others find the base: its Hub id, or `nano`; else `LOCAL`."""
    locked = lock.get("base") or {}
    if named == "nano" or locked.get("model") == "nano" or Path(named) == NANO:
        return "nano"
    # With a lock file, a local base is recognised by its missing revision.
    on_hub = locked.get("revision") or not (lock or Path(named).exists())
    return named if HUB_ID.fullmatch(named) and on_hub else LOCAL


def _public_lock(lock: Json, base: str) -> Json:
    """The lock file with the names of data sets on the Hub, without those of local files."""
    if not lock:
        return {}
    data, local = {}, 0
    for name, digest in (lock.get("data") or {}).items():
        if name not in (lock.get("commits") or {}) and not name.startswith("nano:"):
            local += 1
            name = f"local data {local}"
        data[name] = digest
    return {**lock, "base": {**(lock.get("base") or {}), "model": base}, "data": data}


def _texts(value: Any) -> Iterator[str]:
    """All texts in nested lists and mappings."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | dict):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _texts(inner)


def _no_paths(value: Any) -> Any:
    """JSON in which absolute paths are cut to their last name."""
    if isinstance(value, dict):
        return {_no_paths(key): _no_paths(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_no_paths(one) for one in value]
    return _PATH.sub("", value) if isinstance(value, str) else value


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1) + "\n").encode()


def _listed(api: HfApi, repo: str, revision: str) -> dict[str, RepoFile]:
    """{path: entry} of every file at a commit, with its size."""
    from huggingface_hub.hf_api import RepoFile

    # The client raises one of these for an entry without a hash.
    with suppress(KeyError, TypeError, AttributeError):
        entries = api.list_repo_tree(repo, revision=revision, recursive=True)
        files = {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}
        if all(isinstance(n, str) and type(f.size) is int for n, f in files.items()):
            return files
    raise CheckFailed(f"{repo}: the Hub's list of its files is not readable: try again later")


def _with_retries(
    action: Callable[[], T], repo: str, say: Callable[[str], None], revision: str | None = None
) -> T:
    """The result of `action`, which is repeated while the Hub is busy or the connection fails.

    Raises:
        UserError: what is wrong, and how to fix it.
    """
    from huggingface_hub import errors as hub

    # JSON: the client parses a response before it looks at its status.
    broken = (ConnectionError, TimeoutError, hub.HTTPError, hub.LocalEntryNotFoundError)
    for attempt in range(_TRIES):
        try:
            return action()
        except UserError:
            raise
        except (*broken, ValueError) as error:
            _, status, retry_after = cause_of(error)
            pause = float(retry_after) if retry_after.isdigit() else FIRST_WAIT * 2**attempt
            no_response = status is None and isinstance(error, (*broken, json.JSONDecodeError))
            offline = isinstance(error, hub.OfflineModeIsEnabled)
            temporary = status in _TEMPORARY or (no_response and not offline)
            if not temporary or attempt == _TRIES - 1 or pause > _LONGEST_WAIT:
                raise UserError(f"{repo}: {problem(error, repo, revision)}") from error
            why = f"the Hub answers {status}" if status else "the Hub cannot be reached"
            say(f"{why}: retrying in {pause:g} s")
            time.sleep(pause)
    raise AssertionError("unreachable")
