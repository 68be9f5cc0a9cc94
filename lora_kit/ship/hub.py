"""To the Hub and back: `push` uploads a run in one commit, `pull` fetches one and checks it."""

from __future__ import annotations

import hashlib
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
from typing import Any

from lora_kit.adapter.files import WEIGHTS, Adapter, open_adapter
from lora_kit.adapter.finished import FinishedRun
from lora_kit.base.head import pooling_of
from lora_kit.base.tensors import INDEX, stored, stored_in
from lora_kit.errors import CheckFailed, UserError
from lora_kit.folders import new_folder
from lora_kit.hashes import file_hash
from lora_kit.hub_errors import cause_of, problem
from lora_kit.nano import MODEL as NANO
from lora_kit.run import read_json, read_lock
from lora_kit.ship.card import HUB_ID, LOCAL, Card, make_card
from lora_kit.ship.merge import RECORD
from lora_kit.ship.secrets import refuse_secrets
from lora_kit.trust import PULLED

_LEGAL = r"(?:LICEN[CS]E|USE_POLICY|COPYING|NOTICE)[\w-]*(?:\.txt|\.md)?"
# Of a folder of sentence-transformers.
_PARTS = r"(?:modules|sentence_bert_config|1_Pooling/config|2_Dense/config)\.json"
_PARTS += r"|2_Dense/model\.safetensors"
# What goes up, of the folder of the weights; README.md, the lock file and the report are made.
_PUSHED = re.compile(
    r"(?:adapter_)?model(?:-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json"
    r"|(?:(?:generation_)?config|tokenizer(?:_config)?|special_tokens_map|added_tokens|vocab)\.json"
    rf"|head\.json|{_PARTS}"
    rf"|chat_template\.jinja|(?:merges|vocab)\.txt|(?:tokenizer|spiece)\.model|{_LEGAL}"
)
# What is made here; of it and the others, what the next push does not mean is taken away.
_MADE = {"adapter_config.json", RECORD, "report.html", "report.json", "run.lock.json"}
# What comes down: neither pickles nor code.
_PULLED = re.compile(
    r"[\w.-]+\.(?:safetensors|json|jinja)|(?:merges|vocab)\.txt|(?:tokenizer|spiece)\.model"
    rf"|README\.md|{_LEGAL}|{_PARTS}"
)
# What report.json has without the rows of the data.
_FIGURES = (
    *("verdict", "domain", "general", "few_shot", "scratch", "prompt_use", "metrics", "harness"),
    *("not_measured", "overfitting", "audit", "training", "memory", "gate", "layers"),
    *("contenders", "classes", "generation"),
)
# From where an absolute path begins to its last slash; names may hold spaces and quotes. In a
# sentence it has two names at least, so that neither `3 / 4` nor `and/or` is one.
_PATH = re.compile(r"^/(?:.*/)?|(?<![\w.:/<~-])/(?=[^\s/]).*/", re.DOTALL)
_PASSING = (408, 429, 500, 502, 503, 504)  # what another try may mend
_TRIES, FIRST_WAIT, _LONGEST_WAIT = 5, 1.0, 300.0  # seconds


@dataclass
class Plan:
    """What a push will do. `files`: {name in the repo: content, or the file that holds it}."""

    repo: str
    public: bool
    base: str
    card: Card
    files: dict[str, bytes | Path]

    def to_json(self) -> dict[str, Any]:
        return {
            "repo": self.repo,
            "visibility": "public" if self.public else "private",
            "base": self.base,
            "license": self.card.licence,
            "files": {name: _size(content) for name, content in sorted(self.files.items())},
            "warnings": self.card.warnings,
        }

    def __str__(self) -> str:
        found = self.to_json()
        lines = [f"to {self.repo}, {found['visibility']}; base {self.base}, {found['license']}:"]
        lines += [f"  {size:>13,} bytes  {name}" for name, size in found["files"].items()]
        return "\n".join([*lines, *(f"warning: {line}" for line in self.card.warnings)])


def make_plan(
    run: FinishedRun,
    repo: str,
    *,
    public: bool = False,
    with_samples: bool = False,
    merged: str | Path | None = None,
) -> Plan:
    """Everything that a push uploads, searched for secrets; no network is needed, but for a base of
    the Hub that is named in place of the run's.

    Raises:
        UserError: no finished run is there, its files are damaged, or hold what must stay here.
    """
    from markupsafe import escape

    from lora_kit.base.load import quiet_libraries

    quiet_libraries()
    _api(repo)
    adapter, home, lock = run.adapter, run.home, run.lock
    folder = Path(merged) if merged else adapter.folder
    report, config = read_json(home / "report.json"), dict(adapter.config)
    if given := run.given:
        config |= {"base_model_name_or_path": given.model, "revision": given.revision}
        known = {"model": given.model, "revision": given.revision}
        lock = {**lock, "base": {**lock.get("base", {}), **known}}
    if merged:
        stored_in(folder)  # whole
    _check_finite(adapter)
    # That only this machine should know, should a tokenizer's settings or template tell.
    named = [str(config.get("base_model_name_or_path")), *(lock.get("data") or {})]
    named += [str(Path.cwd()), str(home.resolve())]
    with suppress(UserError):  # a run file that cannot be read has nothing to tell
        named += _texts(run.run and run.run.model_dump())
    private = {path for path in named if re.match("/[^/]+/", path)}
    base = _public_base(str(config.get("base_model_name_or_path") or LOCAL), lock)
    config["base_model_name_or_path"] = None if base == LOCAL else base
    config, lock = _no_paths(config), _no_paths(_public_lock(lock, base))
    # Rows stay as they are, or do not go.
    figures = _no_paths({k: v for k, v in report.items() if k in _FIGURES})
    report = {**report, **figures} if with_samples else figures
    inside = folder.rglob("*") if merged else folder.iterdir()
    there = {file.relative_to(folder).as_posix(): file for file in sorted(inside)}
    files: dict[str, bytes | Path] = {
        name: file.resolve()
        for name, file in there.items()
        if _PUSHED.fullmatch(name) and file.is_file()
    }
    if merged:
        if any((folder / name).is_symlink() for name in files):
            raise UserError(f"{folder}: holds a link to somewhere else: put the file itself there")
        if "config.json" not in files:
            raise UserError(f"{folder}: no config.json: not a merged model")
        record = read_json(folder / RECORD)
        if record.get("adapter") != {"sha256": file_hash(adapter.folder / WEIGHTS)}:
            raise UserError(
                f"{folder}: not what `lora-kit merge` made of {run.path}: merge it first"
            )
        model = read_json(folder / "config.json")
        model.pop("_name_or_path", None)
        named_base = {**(record.get("base") or {}), "model": base}
        made = {"config.json": _no_paths(model), RECORD: _no_paths({**record, "base": named_base})}
    else:
        made = {"adapter_config.json": config}
    has_licence = any(re.fullmatch(f"(?!NOTICE){_LEGAL}", name) for name in files)
    card = make_card(
        repo,
        config,
        lock,
        report,
        merged=bool(merged),
        has_licence=has_licence,
        auto=run.auto,
        pooled=pooling_of(folder) if "modules.json" in files else None,
        chat=lock.get("kind", "chat") == "chat" and "chat_template.jinja" in files,
    )
    files["README.md"] = card.text.encode()
    if card.notice:
        # Below the base's own.
        own = (folder / "NOTICE").read_text("utf-8", "replace") if "NOTICE" in files else ""
        own = own.replace(card.notice, "").strip()
        files["NOTICE"] = f"{own}\n\n{card.notice}\n".lstrip().encode()
    made |= {"run.lock.json": lock, "report.json": report}
    files |= {name: _json(values) for name, values in made.items() if values}
    if with_samples and (home / "report.html").is_file():
        page = (home / "report.html").read_text(encoding="utf-8")
        # Rows and sentences look alike here: only what is known to be private is taken out.
        for path in sorted(private, key=len, reverse=True):
            page = page.replace(escape(path), escape(Path(path).name))
        files["report.html"] = page.encode()
    refuse_secrets(files, private)
    return Plan(repo, public, base, card, files)


def push(plan: Plan, say: Callable[[str], None]) -> dict[str, Any]:
    """Upload what was planned in one commit, to a repository that is made where there is none.

    Returns:
        The plan's figures with `commit`, `committed` (false: the Hub had it all), `url`, and
        `removed`: of what a push brings, the files there that this one does not mean.

    Raises:
        UserError: the Hub refuses, cannot be reached, or holds the repository with the other
            visibility; nothing was committed, unless the message says so.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    repo = plan.repo
    api = _api(repo)

    def head() -> Any:
        api.create_repo(repo, private=not plan.public, exist_ok=True)
        return api.model_info(repo)

    def compared(sha: str) -> tuple[bool, list[str]]:
        there = _listed(api, repo, sha)
        more = sorted(there.keys() - plan.files.keys())
        old = [name for name in more if name in _MADE or _PUSHED.fullmatch(name)]
        return not old and all(_is(c, there.get(n)) for n, c in plan.files.items()), old

    info = _patiently(head, repo, say)
    if bool(info.private) == plan.public:
        now, fix = ("private", "remove --public") if info.private else ("public", "add --public")
        raise UserError(
            f"{repo}: already {now}, which a push does not change: {fix}, or name another"
        )
    held, old = _patiently(lambda: compared(info.sha), repo, say)
    done = {**plan.to_json(), "url": f"{api.endpoint}/{repo}", "removed": old}
    if held:
        return {**done, "commit": info.sha, "committed": False}

    def commit() -> Any:
        # Of a try before, the answer may be all that was lost.
        now = api.model_info(repo).sha
        if now != info.sha and compared(now)[0]:
            return now
        # Somebody else's commit meanwhile is not the parent that is named: the Hub answers 412.
        named = {"commit_message": "Upload with lora-kit", "parent_commit": info.sha}
        files = [CommitOperationAdd(n, content) for n, content in sorted(plan.files.items())]
        return api.create_commit(repo, [*files, *map(CommitOperationDelete, old)], **named).oid

    done["commit"] = _patiently(commit, repo, say)
    if old:
        say(f"{repo}: removed: {', '.join(old)}")
    return {**done, "committed": True}


def pull(
    repo: str, out: str | Path, revision: str | None, say: Callable[[str], None]
) -> dict[str, Any]:
    """Fetch an adapter or a model at one commit; the folder appears only when all of it is right.

    Returns:
        `repo`, `revision` (the full sha), `out`, `files` ({name: sha256}), `left` (names of what
        was not fetched: pickles, code and other kinds).

    Raises:
        UserError: it is not there, the Hub refuses, or it holds no safetensors.
        CheckFailed: what came is not what the Hub, or the lock file, names.
    """
    api = _api(repo)
    sha = _patiently(lambda: api.model_info(repo, revision=revision).sha, repo, say, revision)
    there = _patiently(lambda: _listed(api, repo, sha), repo, say)
    for name in there:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or "\\" in name or not name.isprintable():
            raise UserError(f"{repo}: names a file outside of its folder: {name!r:.80}")
    wanted = {n: f for n, f in there.items() if _PULLED.fullmatch(n) and n != PULLED}
    left = sorted(there.keys() - wanted.keys() - {".gitattributes"})
    if not wanted.keys() & {WEIGHTS, "model.safetensors", INDEX}:
        others = ", ".join(left[:5]) or "empty"
        raise UserError(f"{repo}: no safetensors weights at its top ({others}): nothing is fetched")
    hashes = {}
    with new_folder(Path(out), sum(file.size for file in wanted.values())) as folder:
        for name, file in sorted(wanted.items()):
            get = partial(api.hf_hub_download, repo, name, revision=sha, local_dir=folder)
            _patiently(get, repo, say)
            if (folder / name).is_symlink() or not _is(folder / name, file):
                raise CheckFailed(f"{repo}: {name}: not the bytes that the Hub lists: pull again")
            hashes[name] = file_hash(folder / name)
        shutil.rmtree(folder / ".cache", ignore_errors=True)
        _check_pulled(folder, repo, hashes)
        marker = {"repo": repo, "revision": sha, "files": hashes}
        (folder / PULLED).write_bytes(_json(marker))
    config = Path(out) / "adapter_config.json"
    if WEIGHTS in hashes and not read_json(config).get("base_model_name_or_path"):
        say(f"{config}: base_model_name_or_path was a folder of its author: write yours there")
    return {**marker, "out": str(out), "left": left}


def _api(repo: str) -> Any:
    """The client; nothing is asked yet. Raises UserError if no repository can have this name."""
    from huggingface_hub import HfApi
    from huggingface_hub.utils import disable_progress_bars

    if not HUB_ID.fullmatch(repo):
        raise UserError(f"{repo}: not a name on the Hub: write owner/name")
    if not sys.stderr.isatty():
        disable_progress_bars()
    return HfApi()


def _check_pulled(folder: Path, repo: str, hashes: dict[str, str]) -> None:
    """Raises CheckFailed or UserError if the files are damaged, or do not fit each other."""
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
    """Raises CheckFailed: such an adapter makes every output NaN."""
    for name, tensor in adapter.tensors().items():
        if not tensor.float().isfinite().all():
            raise CheckFailed(f"{adapter.folder / WEIGHTS}: {name} is NaN or infinite: train again")


def _check_json(file: Path) -> None:
    try:
        json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        raise UserError(f"{file}: no JSON: ask its owner") from None


def _public_base(named: str, lock: dict[str, Any]) -> str:
    """What others can find a base by: its id on the Hub, or `nano`."""
    locked = lock.get("base") or {}
    if named == "nano" or locked.get("model") == "nano" or Path(named) == NANO:
        return "nano"
    # With a lock file a local one is known by having no revision.
    on_hub = locked.get("revision") or not (lock or Path(named).exists())
    return named if HUB_ID.fullmatch(named) and on_hub else LOCAL


def _public_lock(lock: dict[str, Any], base: str) -> dict[str, Any]:
    """The lock file with names of the Hub's sets, but of no local file."""
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
    """JSON in whose texts only the last name of absolute paths is left."""
    if isinstance(value, dict):
        return {_no_paths(key): _no_paths(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_no_paths(one) for one in value]
    return _PATH.sub("", value) if isinstance(value, str) else value


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1) + "\n").encode()


def _size(content: bytes | Path) -> int:
    return len(content) if isinstance(content, bytes) else content.stat().st_size


def _listed(api: Any, repo: str, sha: str) -> dict[str, Any]:
    """{path: entry} of every file at a commit, with size and hash."""
    # Of an entry without a hash the client itself makes one of these.
    with suppress(KeyError, TypeError, AttributeError):
        entries = list(api.list_repo_tree(repo, revision=sha, recursive=True))
        files = {entry.path: entry for entry in entries if hasattr(entry, "blob_id")}
        if all(isinstance(n, str) and type(f.size) is int for n, f in files.items()):
            return files
    raise CheckFailed(f"{repo}: the Hub's list of its files is not readable: try again later")


def _is(content: bytes | Path, entry: Any) -> bool:
    """Whether bytes are those that the Hub lists: large files by sha256, others as git does."""
    if entry is None or _size(content) != entry.size:
        return False
    if isinstance(content, Path) and entry.lfs is not None:
        return bool(file_hash(content) == entry.lfs.sha256)
    whole = content.read_bytes() if isinstance(content, Path) else content
    if entry.lfs is not None:
        return bool(hashlib.sha256(whole).hexdigest() == entry.lfs.sha256)
    return bool(hashlib.sha1(b"blob %d\0" % len(whole) + whole).hexdigest() == entry.blob_id)


def _patiently(
    action: Callable[[], Any], repo: str, say: Callable[[str], None], revision: str | None = None
) -> Any:
    """Do it; where the Hub is busy or the line breaks, wait and do it again.

    Raises:
        UserError: what is wrong, and what to do about it.
    """
    from huggingface_hub import errors as hub

    # JSON: the client takes an answer apart before it looks at its status.
    broken = (ConnectionError, TimeoutError, hub.HTTPError, hub.LocalEntryNotFoundError)
    for attempt in range(_TRIES):
        try:
            return action()
        except UserError:
            raise
        except (*broken, ValueError) as error:
            _, status, asked = cause_of(error)
            pause = float(asked) if asked.isdigit() else FIRST_WAIT * 2**attempt
            cut = status is None and isinstance(error, (*broken, json.JSONDecodeError))
            offline = isinstance(error, hub.OfflineModeIsEnabled)
            passing = status in _PASSING or (cut and not offline)
            if not passing or attempt == _TRIES - 1 or pause > _LONGEST_WAIT:
                raise UserError(f"{repo}: {problem(error, repo, revision)}") from error
            why = f"the Hub answers {status}" if status else "the Hub cannot be reached"
            say(f"{why}: retrying in {pause:g} s")
            time.sleep(pause)
