"""The model card: README.md of a pushed repository, made from lock file and report alone."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from lora_kit.adapter.loaders import VLLM_RANKS, vllm_rank
from lora_kit.base.head import CAUSAL, SEQUENCE
from lora_kit.base.pin import licence_of
from lora_kit.errors import UserError, harmless
from lora_kit.prove.scores import compared_scores
from lora_kit.run import HUB_ID
from lora_kit.schema import Json

if TYPE_CHECKING:
    from huggingface_hub import EvalResult, ModelCardData

# The Hub's names of tasks.
_PIPELINES = {CAUSAL: "text-generation", SEQUENCE: "text-classification"}
# Stands for a base that is not on the Hub. It is no valid repository name, which somebody could
# register.
LOCAL = "a local folder"
_TEMPLATE = Path(__file__).with_name("card.md.jinja")
# Uses of data, in words.
USES = {
    "train": "data",
    "eval": "held-out data",
    "general": "general text",
    "decontaminate": "text that was kept out of the training data",
}
# What a data set's licence requires, by the part of its id.
_LIMITS = {
    "nc": "forbids commercial use",
    "nd": "forbids changed versions",
    "sa": "asks for the same licence on what is made of it",
}


@dataclass(frozen=True)
class Card:
    """`notice`: the required content of a file NOTICE, if the base's terms ask for one."""

    text: str
    licence: str
    notice: str | None
    warnings: list[str]


class Terms(NamedTuple):
    """What a base's own terms require for publishing a changed version."""

    family: str = ""
    notices: tuple[str, ...] = ()
    built_with: str = ""
    begins: str = ""  # required beginning of the name


@dataclass(frozen=True)
class DataSource:
    """A source that the run read, for a `use`: a key of USES. `hub_id`, `commit` and `licence` are
    of a data set on the Hub; `sha256` is that of the rows read."""

    name: str
    hub_id: str | None
    commit: str | None
    sha256: str
    licence: str | None
    use: str = "train"


def make_card(
    repo: str,
    config: Json,
    lock: Json,
    report: Json,
    *,
    merged: bool = False,
    has_licence: bool = False,
    auto: str = CAUSAL,
    pooled: str | None = None,
    chat: bool = False,
) -> Card:
    """Write the card. The files may be a stranger's: their values are escaped.

    Args:
        repo: owner/name of the Hub.
        config: adapter_config.json; its base is a Hub id, `nano`, or none: LOCAL.
        lock, report: without paths and samples; empty where there are none.
        has_licence: whether the base's licence text is uploaded, too.
        auto: the class of transformers that loads the model.
        pooled: the pooling of a merged model whose head is a separate file; None: there is none.
        chat: whether it was trained on conversations, in the tokenizer's chat template.

    Raises:
        UserError: a value of the lock file or the report has the wrong type.
    """
    from lora_kit.prove.report import in_lines

    base, revision = config.get("base_model_name_or_path") or LOCAL, config.get("revision")
    name = repo.partition("/")[2]
    licence = (lock.get("base") or {}).get("licence") or "unknown"
    try:
        data, terms = _data(lock), _terms(licence, base)
        trained = [source for source in data if source.use == "train"]
        warnings = [*_asked(terms, name, has_licence), *_licence_warnings(licence, base, trained)]
        library = "sentence-transformers" if pooled else "transformers" if merged else "peft"
        front = _front_matter(name, base, licence, data, report.get("domain"), auto, library)
        body = _render(
            repo=repo,
            name=name,
            config=config,
            lock=lock,
            report=report,
            base=base,
            local=base == LOCAL,
            merged=merged,
            licence=licence,
            data=data,
            uses=USES,
            terms=terms,
            warnings=warnings,
            findings=in_lines(report) if report else [],
            scores_of=compared_scores,
            chat=chat,
            auto=auto,
            pooled=pooled,
            recipe=_recipe(lock),
            on_hub=bool(HUB_ID.fullmatch(base)),
            revision=revision if re.fullmatch("[0-9a-f]{40}", str(revision)) else None,
            vllm_rank=_vllm_rank(config),
        )
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise UserError(
            f"run.lock.json or report.json: not as they were written ({error!r:.80}): copy the "
            "run again, or remove them"
        ) from None
    notice = terms.notices[0] if terms.notices else None
    return Card(f"---\n{front.to_yaml()}\n---\n\n{body}", str(front.license), notice, warnings)


def _front_matter(
    name: str,
    base: str,
    licence: str,
    data: list[DataSource],
    domain: Json | None,
    auto: str,
    library: str,
) -> ModelCardData:
    """The metadata that the Hub reads; `domain`: the scores of the report, if there is one."""
    from huggingface_hub import ModelCardData

    trained = [source for source in data if source.use == "train"]
    hub_ids = list(dict.fromkeys(source.hub_id for source in trained if source.hub_id))
    # A result is listed under a data set: only if all rows came from one.
    held_out = [source for source in data if source.use == "eval"] or trained
    one_set = len({source.hub_id for source in held_out}) == 1 and held_out[0].hub_id
    results = _results(held_out[0], domain, auto) if one_set and domain else None
    return ModelCardData(
        base_model=base if HUB_ID.fullmatch(base) or base == "nano" else None,
        base_model_relation="adapter" if library == "peft" else "merge",
        library_name=library,
        license=licence if re.fullmatch(r"[a-z0-9][a-z0-9.+-]{0,60}", licence) else "other",
        pipeline_tag=_PIPELINES.get(auto),
        tags=["lora", "lora-kit"],
        datasets=hub_ids or None,
        model_name=name if results else None,
        eval_results=results,
    )


def _vllm_rank(config: Json) -> int | None:
    """vLLM's --max-lora-rank for an adapter; None if vLLM does not load it."""
    rank = max([config.get("r") or 0, *(config.get("rank_pattern") or {}).values()])
    unsupported = config.get("use_dora") or config.get("modules_to_save")
    return None if unsupported or rank > VLLM_RANKS[-1] else vllm_rank(rank)


def _terms(licence: str, base: str) -> Terms:
    """The terms of Llama and Gemma; without a known licence, the owner's name decides.

    Llama: section 1.b of https://www.llama.com/llama3_3/license. Gemma 1 to 3: section 3.1 of
    https://ai.google.dev/gemma/terms; Gemma 4 has Apache's licence.
    """
    unknown = licence in ("unknown", "other")
    meta = re.match(r"meta-llama/(?:Meta-)?Llama-(\d(?:\.\d)?)", base, re.IGNORECASE)
    if found := re.fullmatch(r"llama(\d(?:\.\d)?)", licence) or (meta if unknown else None):
        version = found[1]
        family, built_with, begins = {
            "2": ("Llama 2", "", ""),
            "3": ("Meta Llama 3", "Built with Meta Llama 3", "Llama-3"),
        }.get(version, (f"Llama {version}", "Built with Llama", "Llama"))
        agreement, sign = ("LLAMA 2", "(c)") if version == "2" else (family, "©")
        notice = f"{family} is licensed under the {agreement} Community License, Copyright {sign} "
        notice += "Meta Platforms, Inc. All Rights Reserved."
        return Terms(family, (notice,), built_with, begins)
    if licence == "gemma" or (unknown and re.match(r"google/\w*gemma-(?!4)", base)):
        notice = "Gemma is provided under and subject to the Gemma Terms of Use found at "
        changed = "These weights are a changed version of Gemma; its terms, with what they forbid, "
        changed += "bind whoever uses them or passes them on."
        return Terms("Gemma", (f"{notice}ai.google.dev/gemma/terms", changed))
    return Terms()


def _asked(terms: Terms, name: str, has_licence: bool) -> list[str]:
    """Unmet requirements of the base's terms."""
    found, ask = [], f"{terms.family}'s terms ask"
    if terms.begins and not name.lower().startswith(terms.begins.lower()):
        found.append(f"{ask} for a name that begins with {terms.begins}: {terms.begins}-{name}")
    if terms.family and not has_licence:
        found.append(f"{ask} for a copy of them: put it into the folder of the weights as LICENSE")
    return found


def _licence_warnings(licence: str, base: str, data: list[DataSource]) -> list[str]:
    """Warnings about unknown and conflicting licences; `licence`: that of the base."""
    found = ["the licence of the base is not known"] if licence == "unknown" else []
    if base == LOCAL:
        found.append("the base was a local folder: it cannot be found by others")
    unknown = sum(not source.licence for source in data)
    if unknown:
        found.append(f"the licence of {unknown} of {len(data)} sets of data is not known")
    for source in data:
        # `cc-by-nc-4.0` has the part `nc`.
        beyond_base = set((source.licence or "").split("-")) - set(licence.split("-"))
        for mark in sorted(beyond_base & _LIMITS.keys()):
            found.append(
                f"conflict of licences: {source.name} is {source.licence}, which {_LIMITS[mark]}; "
                f"the base's {licence} does not: settle what binds these weights"
            )
    return found


def _data(lock: Json) -> list[DataSource]:
    """The sources of data that a lock file names."""
    found = []
    for name, digest in (lock.get("data") or {}).items():
        commit = (lock.get("commits") or {}).get(name)
        # owner/set[split] or owner/set/config[split]
        known = re.match(rf"({HUB_ID.pattern})(?=[/[]|$)", name) if commit else None
        hub_id = known[1] if known else None
        licence = _licence_of(hub_id, str(commit)) if hub_id else None
        # Older lock files do not name the use.
        use = (lock.get("uses") or {}).get(digest, "train")
        found.append(DataSource(name, hub_id, commit, digest, licence, use))
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


def _recipe(lock: Json) -> str:
    """The name of the recipe; older lock files have the kind of the rows instead."""
    recipe = (lock.get("recipe") or {}).get("name")
    return recipe or {"chat": "sft", "text": "cpt"}.get(str(lock.get("kind")), "not known")


def _results(source: DataSource, domain: Json, auto: str) -> list[EvalResult]:
    """The adapted model's scores on the held-out rows of a data set, as the Hub lists them."""
    from huggingface_hub import EvalResult

    return [
        EvalResult(
            task_type=_PIPELINES.get(auto, "other"),
            dataset_type=str(source.hub_id),
            dataset_name=f"{source.hub_id}, held out",
            dataset_revision=source.commit,
            metric_type=name,
            metric_value=score["adapted"],
        )
        for name, score in compared_scores(domain).items()
    ]


def _render(**values: object) -> str:
    """The page. Every value stays plain text: no link, HTML, heading or new line. The filter `code`
    writes a value as code; `ours` leaves one unescaped that can only have harmless characters."""
    import jinja2
    from markupsafe import Markup

    def plain(value: object) -> str:
        return " ".join(harmless(str(value)).split())

    def escape(value: object) -> str:
        if isinstance(value, Markup):
            return value
        text = re.sub(r"([\\`*_{}\[\]<>#|!~$&])", r"\\\1", plain(value))
        return text.replace("://", ":\\//").replace("www.", "www\\.")

    def code(value: object) -> str:
        if isinstance(value, list):
            value = ", ".join(sorted(map(str, value)))
        return Markup(f"`{re.sub('[`|]', '', plain(value))}`")

    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, finalize=escape)
    environment.filters |= {"code": code, "ours": Markup}
    return environment.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(values)
