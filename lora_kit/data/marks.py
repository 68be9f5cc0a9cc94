"""Columns, and keys of turns, that no format reads but that change what a row means.

A flag that excludes a row or a turn from training is used. Content that would be missing is
refused: a further part of the prompt, and what a text model cannot see. `data.ignore` names columns
that are not meant so.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from lora_kit.data.json_rows import short_repr
from lora_kit.errors import NotUsable
from lora_kit.schema import Json

# Flags of other training libraries, and whether a true one means: train on it. `label`: TRL's
# unpaired preference; `kto_tag`: LLaMA-Factory; `weight`: OpenAI; `train`, `training`: Axolotl;
# `loss`, of turns, and `loss_scale`: ms-swift; the others are what training scripts and annotation
# tools write.
FLAGS = {
    "label": True, "kto_tag": True, "weight": True, "train": True, "training": True, "loss": True,
    "loss_scale": True, "loss_mask": True, "trainable": True, "train_on_turn": True,
    "is_train": True, "chosen": True, "accepted": True, "keep": True, "valid": True,
    "is_valid": True, "rejected": False, "is_rejected": False, "exclude": False, "deleted": False,
    "masked": False,
}  # fmt: skip
_ZERO_OR_ONE = ("weight", "loss_scale", "loss_mask")
_ONLY_FLAGS = (*_ZERO_OR_ONE, "train", "training", "trainable", "train_on_turn", "kto_tag")
# Parts of a prompt: earlier turns, and tools under their old name; and texts, which are missing
# unless the turns hold them.
_PROMPT = ("history", "functions", "tools")
_TEXTS = (
    "context", "contexts", "documents", "passage", "passages", "instruction", "input",
    "system_prompt", "system_message",
)  # fmt: skip
# Keys of turns that say which of their words are trained on.
PARTS_OF_TURNS = frozenset({"train_detail", "training_detail", "mask"})
_SPLITS = ("split", "partition", "set")
MEDIA = frozenset({"image", "images", "img", "audio", "audios", "video", "videos"})
# Words of columns that name a file, as in ImageFolder, Common Voice and LibriSpeech.
_PATHS = MEDIA | {"file", "filename", "path", "picture", "photo", "wav", "clip", "speech"}
_MEDIA_FILES = (
    ".png", ".jpg", ".jpeg", ".gif", ".webp", ".bmp", ".tif", ".tiff", ".wav", ".mp3", ".flac",
    ".ogg", ".opus", ".m4a", ".mp4", ".webm", ".avi", ".mov", ".mkv",
)  # fmt: skip
# Where image processors and data of LLaVA's kind put an image into a prompt: special tokens and
# data anywhere; plain tags, which HTML has as well, at an end of the text or alone in a line.
_SPECIAL = re.compile(
    r"<\|(?:image|video|audio|vision)\w*\|>|<start_of_image>|<image_soft_token>"
    r"|data:(?:image|audio|video)/[-.+\w]+;base64,",
    re.IGNORECASE,
)
_NAMED = r"<(image|video|audio)_?\d*>"
_TAG = re.compile(rf"\A\s*{_NAMED}|^[ \t]*{_NAMED}[ \t]*$|{_NAMED}\s*\Z", re.MULTILINE)
_HINTS = ("<|", "<image", "<video", "<audio", "<start_of_image", "data:")  # faster than patterns
_LONGEST_PATH = 2000  # characters
# Names of held-out splits, as in `datasets.data_files`.
HELD_OUT = {"test", "testing", "eval", "evaluation", "validation", "valid", "val", "dev"}
# Reasons that begin so are meant by the data, and not counted by data.limits.dropped.
EXCLUDED = "excluded by "
_IGNORE = "remove it, or add it to data.ignore"


class Unseen(NotUsable):
    """A row has images, audio or video, which a text model cannot read: the run stops."""


def check(values: Json, prompted: bool, train: bool) -> None:
    """Check the columns of a row that its format does not read.

    Args:
        prompted: the row has a prompt and a completion, so that a `label` is no class.
        train: the row was read for data.train.

    Raises:
        NotUsable: a flag excludes the row; a flag has another value than true and false; or a
            column holds part of the prompt.
        Unseen: a column has images, audio or video.
    """
    for name, value in values.items():
        if is_media(name, value):
            raise Unseen(f"the column `{name}` ({short_repr(value)})")
        if prompted and name in _PROMPT and value:
            raise _left_out(name)
        if name in _SPLITS and train and str(value).lower() in HELD_OUT:
            raise NotUsable(f"whose `{name}` is not train", f"it is {short_repr(value)}: {_IGNORE}")
    flag = excluding(values, _row_flags(prompted) & values.keys())
    if flag:
        raise NotUsable(f"{EXCLUDED}`{flag}`")


def check_prompt(values: Json, turns: Iterable[str]) -> None:
    """Raises NotUsable if a column that a row's format does not read holds a text of the prompt
    that is not in its turns."""
    held = [name for name in _TEXTS if values.get(name)]
    said = " ".join(" ".join(turns).split()) if held else ""
    for name in held:
        value = values[name]
        for part in value if isinstance(value, list) else [value]:
            if part and not (isinstance(part, str) and " ".join(part.split()) in said):
                raise _left_out(name)


def _left_out(name: str) -> NotUsable:
    """The error for a part of the prompt that would be missing."""
    use = f"data.columns: {{system: {name}}}" if "system" in name else "`messages`"
    why = f"it is a part of the prompt: use {use}, {_IGNORE}"
    return NotUsable(f"whose `{name}` is not read", why)


def is_media(name: str, value: object) -> bool:
    """Whether a value is an image, audio or video, as `datasets` stores it, or names its file."""
    if isinstance(value, list):
        return bool(value) and is_media(name, value[0])
    if isinstance(value, bytes):
        return True
    if not value or not isinstance(value, (str, dict)):
        return False
    if name.lower() in MEDIA:
        return True
    if isinstance(value, dict):  # either of the two can be missing
        stored = value.keys() <= {"bytes", "path"}
        return stored and ("bytes" in value or is_media("path", value["path"]))
    return _is_media_file(value) and not _PATHS.isdisjoint(re.split("[^a-z]+", name.lower()))


def _is_media_file(path: str) -> bool:
    """Whether a path or an address is that of an image, a sound or a video."""
    return path.partition("?")[0].lower().endswith(_MEDIA_FILES)


def check_seen(text: str, document: bool) -> None:
    """Raises NotUsable if a prompt or a document is the path of an image, a sound or a video, or
    has a mark where one belongs; in a document only at its beginning."""
    found = text.strip() if len(text) < _LONGEST_PATH else ""
    if re.search(r"\s", found) or not _is_media_file(found):
        if not any(hint in text for hint in _HINTS):
            return
        special = None if document else _SPECIAL.search(text)
        tag = _TAG.match(text) if document else _TAG.search(text)
        if special:
            found = special[0]
        elif tag and f"</{tag[1] or tag[2] or tag[3]}>" not in text:  # else HTML
            found = tag[0].strip()
        else:
            return
    why = "a text model cannot read images, audio or video: remove the row"
    raise NotUsable("with an image, audio or video in its text", f"{short_repr(found)}: {why}")


def excluding(values: Json, names: Iterable[str], where: str = "") -> str:
    """The flag that excludes a row or turn from training, such as `train: False`; "" if none.

    Args:
        where: the turn, for messages; "": a row.

    Raises:
        NotUsable: a flag is neither true nor false: a number, or any value of a name that is
            nothing else than a flag.
    """
    for name in sorted(FLAGS.keys() & names):
        value = values[name]
        if value is None or value == "":
            continue
        text, flag = str(value), as_flag(value)
        if name in _ZERO_OR_ONE and flag is None:
            flag = {"0": False, "0.0": False, "1": True, "1.0": True}.get(text)
        number = text.lstrip("-").replace(".", "", 1).isdecimal()
        if flag is None and (number or name in _ONLY_FLAGS):
            expected = "0 or 1" if name in _ZERO_OR_ONE else "true or false"
            found = f"{where or 'it'} has {short_repr(value)}"
            fix = "" if where else f": {_IGNORE}"
            raise NotUsable(f"with a `{name}` other than {expected}", f"{found}{fix}")
        if flag is not None and flag != FLAGS[name]:
            return f"{name}: {short_repr(value)}"
    return ""


def _row_flags(prompted: bool) -> set[str]:
    """The flags of rows: `loss` is one of turns, and without a prompt `label` is a class."""
    return FLAGS.keys() - ({"loss"} if prompted else {"loss", "label"})


def is_flag(name: str, value: object, prompted: bool) -> bool:
    """Whether a column is used as a flag, by a value of it. prompted: as in `check`."""
    return name in _row_flags(prompted) and (name in _ZERO_OR_ONE or as_flag(value) is not None)


def as_flag(value: object) -> bool | None:
    """True or false, also as CSV has it; None for other values.

    >>> as_flag("False"), as_flag(True), as_flag(1)
    (False, True, None)
    """
    return {"true": True, "false": False}.get(str(value).lower())
