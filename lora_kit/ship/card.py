"""The model card: README.md of what is pushed, made from the lock file and the report alone."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from lora_kit.adapter.loaders import VLLM_RANKS, vllm_rank
from lora_kit.base.head import CAUSAL, SEQUENCE
from lora_kit.base.pin import licence_of
from lora_kit.errors import UserError, harmless
from lora_kit.prove.scores import compared_scores

# The Hub's names of what a model is for.
_PIPELINES = {CAUSAL: "text-generation", SEQUENCE: "text-classification"}
# A base that only whoever trained on it has; no name on the Hub, which somebody could take.
LOCAL = "a local folder"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[\w.-]{1,96}")
_TEMPLATE = Path(__file__).with_name("card.md.jinja")
# What the terms of a set's licence ask, by the part of its id.
_LIMITS = {
    "nc": "forbids commercial use",
    "nd": "forbids changed versions",
    "sa": "asks for the same licence on what is made of it",
}


@dataclass(frozen=True)
class Card:
    """`notice` is what a file NOTICE must hold, where the base's terms ask for one."""

    text: str
    licence: str
    notice: str | None
    warnings: list[str]


class Terms(NamedTuple):
    """What a base's own terms ask of whoever hands a changed version on."""

    family: str = ""
    notices: tuple[str, ...] = ()
    built_with: str = ""
    begins: str = ""  # how the name must begin


def make_card(
    repo: str,
    config: dict[str, Any],
    lock: dict[str, Any],
    report: dict[str, Any],
    *,
    merged: bool = False,
    has_licence: bool = False,
    auto: str = CAUSAL,
    pooled: str | None = None,
    chat: bool = False,
) -> Card:
    """Write the card. What stands in the files may come from a stranger, and is escaped.

    Args:
        repo: owner/name of the Hub.
        config: adapter_config.json; its base is a Hub id, `nano`, or none: LOCAL.
        lock, report: without paths and samples; empty where there are none.
        has_licence: whether the base's licence text goes along.
        auto: the class of transformers that loads the model.
        pooled: the pooling of a merged model whose head is a file of its own; None: it has none.
        chat: whether it was trained on conversations, in the tokenizer's chat template.

    Raises:
        UserError: lock file or report are not as they were written.
    """
    import yaml

    from lora_kit.prove.report import in_lines

    base, revision = config.get("base_model_name_or_path") or LOCAL, config.get("revision")
    name = repo.partition("/")[2]
    licence = (lock.get("base") or {}).get("licence") or "unknown"
    lost = config.get("use_dora") or config.get("modules_to_save")
    ranks = [config.get("r") or 0, *(config.get("rank_pattern") or {}).values()]
    try:
        data, terms = _data(lock), _terms(licence, base)
        warnings = [*_asked(terms, name, has_licence), *_licence_warnings(licence, base, data)]
        on_hub = bool(HUB_ID.fullmatch(base))
        library = "sentence-transformers" if pooled else "transformers" if merged else "peft"
        sets = list(dict.fromkeys(one["set"] for one in data if one["set"]))
        front: dict[str, Any] = {
            **({"base_model": base} if on_hub or base == "nano" else {}),
            "base_model_relation": "merge" if merged else "adapter",
            "library_name": library,
            "license": licence if re.fullmatch(r"[a-z0-9][a-z0-9.+-]{0,60}", licence) else "other",
            **({"pipeline_tag": _PIPELINES[auto]} if auto in _PIPELINES else {}),
            "tags": ["lora", "lora-kit"],
            **({"datasets": sets} if sets else {}),
        }
        # A result is filed under the name of a data set: right if all text came from one.
        if len(sets) == 1 and all(one["set"] for one in data) and report.get("domain"):
            front["model-index"] = [_result(name, data[0], report["domain"], auto)]
        body = _render(
            **{"repo": repo, "name": name, "config": config, "lock": lock, "report": report},
            **{"base": base, "local": base == LOCAL, "merged": merged, "licence": licence},
            **{"data": data, "terms": terms, "warnings": warnings},
            findings=in_lines(report) if report else [],
            scores_of=compared_scores,
            chat=chat,
            auto=auto,
            pooled=pooled,
            recipe=_recipe(lock),
            on_hub=on_hub,
            revision=revision if re.fullmatch("[0-9a-f]{40}", str(revision)) else None,
            vllm_rank=None if lost or max(ranks) > VLLM_RANKS[-1] else vllm_rank(max(ranks)),
        )
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise UserError(
            f"run.lock.json or report.json: not as they were written ({error!r:.80}): copy the "
            "run again, or leave them out"
        ) from None
    head = yaml.safe_dump(front, sort_keys=False, allow_unicode=True)
    notice = terms.notices[0] if terms.notices else None
    return Card(f"---\n{head}---\n\n{body}", front["license"], notice, warnings)


def _terms(licence: str, base: str) -> Terms:
    """Llama: section 1.b of https://www.llama.com/llama3_3/license; Gemma 1 to 3: section 3.1 of
    https://ai.google.dev/gemma/terms (Gemma 4 is Apache's). A card that says nothing of its
    licence is judged by the maker's name."""
    unsaid = licence in ("unknown", "other")
    meta = re.match(r"meta-llama/(?:Meta-)?Llama-(\d(?:\.\d)?)", base, re.IGNORECASE)
    if found := re.fullmatch(r"llama(\d(?:\.\d)?)", licence) or (meta if unsaid else None):
        version = found[1]
        family, built_with, begins = {
            "2": ("Llama 2", "", ""),
            "3": ("Meta Llama 3", "Built with Meta Llama 3", "Llama-3"),
        }.get(version, (f"Llama {version}", "Built with Llama", "Llama"))
        agreement, sign = ("LLAMA 2", "(c)") if version == "2" else (family, "©")
        notice = f"{family} is licensed under the {agreement} Community License, Copyright {sign} "
        notice += "Meta Platforms, Inc. All Rights Reserved."
        return Terms(family, (notice,), built_with, begins)
    if licence == "gemma" or (unsaid and re.match(r"google/\w*gemma-(?!4)", base)):
        notice = "Gemma is provided under and subject to the Gemma Terms of Use found at "
        changed = "These weights are a changed version of Gemma; its terms, with what they forbid, "
        changed += "bind whoever uses them or passes them on."
        return Terms("Gemma", (f"{notice}ai.google.dev/gemma/terms", changed))
    return Terms()


def _asked(terms: Terms, name: str, has_licence: bool) -> list[str]:
    """What is still to be done for the base's terms."""
    found, ask = [], f"{terms.family}'s terms ask"
    if terms.begins and not name.lower().startswith(terms.begins.lower()):
        found.append(f"{ask} for a name that begins with {terms.begins}: {terms.begins}-{name}")
    if terms.family and not has_licence:
        found.append(f"{ask} for a copy of them: put it into the folder of the weights as LICENSE")
    return found


def _licence_warnings(base: str, model: str, data: list[dict[str, Any]]) -> list[str]:
    found = ["the licence of the base is not known"] if base == "unknown" else []
    found += ["the base was a local folder: it cannot be found by others"] * (model == LOCAL)
    if unknown := sum(not one["licence"] for one in data):
        found.append(f"the licence of {unknown} of {len(data)} sets of data is not known")
    for one in data:
        own = set((one["licence"] or "").split("-")) - set(base.split("-"))
        found += [
            f"conflict of licences: {one['name']} is {one['licence']}, which {_LIMITS[mark]}; the "
            f"base's {base} does not: settle what binds these weights"
            for mark in sorted(own & _LIMITS.keys())
        ]
    return found


def _data(lock: dict[str, Any]) -> list[dict[str, Any]]:
    """What was read: name, hash, and of the Hub's sets commit and licence."""
    found = []
    for name, digest in (lock.get("data") or {}).items():
        commit = (lock.get("commits") or {}).get(name)
        # owner/set[split] or owner/set/config[split]
        known = re.match(rf"({HUB_ID.pattern})(?=[/[]|$)", name) if commit else None
        one = {"name": name, "set": known and known[1], "commit": commit, "sha256": digest}
        found.append({**one, "licence": _licence_of(known[1], str(commit)) if known else None})
    return found


def _licence_of(name: str, commit: str) -> str | None:
    """A set's licence, from its card in the Hub's cache; nothing is fetched."""
    from huggingface_hub import try_to_load_from_cache

    try:
        card = try_to_load_from_cache(name, "README.md", revision=commit, repo_type="dataset")
    except ValueError:  # no name of the Hub's
        return None
    value = licence_of(Path(card)) if isinstance(card, str) else None
    return value if value != "unknown" else None


def _recipe(lock: dict[str, Any]) -> str:
    """The name of the recipe; an older lock file has the kind of the rows instead."""
    recipe = (lock.get("recipe") or {}).get("name")
    return recipe or {"chat": "sft", "text": "cpt"}.get(str(lock.get("kind")), "not known")


def _result(name: str, data: dict[str, Any], domain: dict[str, Any], auto: str) -> dict[str, Any]:
    where = {"type": data["set"], "name": f"{data['set']}, held out", "revision": data["commit"]}
    scores = compared_scores(domain)
    metrics = [{"type": name, "value": found["adapted"]} for name, found in scores.items()]
    task = {"type": _PIPELINES.get(auto, "other")}
    return {"name": name, "results": [{"task": task, "dataset": where, "metrics": metrics}]}


def _render(**values: Any) -> str:
    """The page. Whatever a value holds stays text: no link, HTML, heading or new line; `ours` is
    for what was matched with the Hub's own alphabet."""
    import jinja2
    from markupsafe import Markup

    def escape(value: Any) -> Any:
        if isinstance(value, Markup):
            return value
        text = " ".join(harmless(str(value)).split())
        text = re.sub(r"([\\`*_{}\[\]<>#|!~$&])", r"\\\1", text)
        return text.replace("://", ":\\//").replace("www.", "www\\.")

    def code(value: Any) -> Any:
        value = ", ".join(sorted(map(str, value))) if isinstance(value, list) else value
        return Markup("`{}`").format(
            Markup(" ".join(re.sub("[`|]", "", harmless(str(value))).split()))
        )

    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, finalize=escape)
    environment.filters |= {"code": code, "ours": Markup}
    return environment.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(values)
