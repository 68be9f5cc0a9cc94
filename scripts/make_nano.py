"""Train `nano`, the embedded base model, on the text that this Python carries.

    python scripts/make_nano.py --minutes 25

It reads the standard library's source and docstrings (never `pydoc_data`, never a held-out
docstring, see `lora_kit.nano.text`), learns a tokenizer, trains a small Llama from nothing, writes
both as a plain Hugging Face folder, and measures what it wrote. The learning rate follows the
clock, so a faster machine sees more tokens in the same minutes, and no two runs are bitwise equal.
"""

import argparse
import ast
import ctypes
import json
import math
import os
import platform
import random
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers  # noqa: E402
from transformers import (  # noqa: E402
    AttentionInterface,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from lora_kit.nano import text as nano_text  # noqa: E402

# Model. Every linear dimension is a multiple of 64, as 4-bit blocks and GPU kernels like it.
VOCABULARY = 4096
WIDTH = 256
LAYERS = 4
HEADS, KV_HEADS = 4, 2  # of 64: half the softmax of 8 of 32, and serving kernels know it
FEED_FORWARD = 640
CONTEXT = 512  # tokens
MAX_BYTES = 8_000_000  # model.safetensors, bfloat16

# Optimisation.
TOKENS = 8192  # a step
SHORT, LONG_FROM = 256, 0.65  # windows of SHORT tokens up to this share of the time: attention
# over CONTEXT tokens costs a fifth more, and most docstrings are shorter than SHORT
MUON_RATE = 0.02  # for the matrices inside the layers
ADAM_RATE = 4e-3  # for the embedding (tied to the head) and the norms
WEIGHT_DECAY = 0.05
WARMUP, DECAY = 0.02, 0.65  # shares of the time: rising, and falling linearly to zero

# Shares of the rows by kind of text, at the start and at the end; linear between.
MIXTURE = {
    "tests": (0.39, 0.02),
    "library": (0.42, 0.34),
    "prose": (0.15, 0.60),
    "chat": (0.04, 0.04),
}

Defined = tuple[str, nano_text.Definition, ast.Constant]  # name, node, its docstring
Encoded = list[tuple[int, list[int]]]  # (bytes, token ids) a document

END, TURN, TURN_END, PAD = "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


# ---------------------------------------------------------------------------- documents
class Guard:
    """Knows the held-out docstrings, and whether a text has one of them in it."""

    WORDS = 8  # shorter docstrings ("Return self+value.") are only compared whole

    def __init__(self) -> None:
        self.whole: set[str] = set()
        self.inside: dict[tuple[str, ...], list[str]] = {}
        for name, docstring in nano_text.docstrings():
            if nano_text.held_out(name):
                squeezed = nano_text.squeeze(docstring)
                self.whole.add(squeezed)
                words = squeezed.split()
                if len(words) >= self.WORDS:
                    self.inside.setdefault(tuple(words[: self.WORDS]), []).append(squeezed)

    def is_held_out(self, name: str, docstring: str) -> bool:
        """By its name, or because the same words stand under a held-out name."""
        return bool(nano_text.held_out(name)) or nano_text.squeeze(docstring) in self.whole

    def contains(self, text: str) -> bool:
        """Whether a held-out docstring of at least WORDS words stands anywhere in the text."""
        words = text.split()
        grams = zip(*(words[start:] for start in range(self.WORDS)), strict=False)
        heads = [self.inside[gram] for gram in grams if gram in self.inside]
        squeezed = " ".join(words) if heads else ""
        return any(docstring in squeezed for group in heads for docstring in group)


@dataclass
class Documents:
    """Training texts by kind; `dropped` counts the pieces that held held-out words."""

    tests: list[str] = field(default_factory=list)
    library: list[str] = field(default_factory=list)
    prose: list[str] = field(default_factory=list)
    chat: list[str] = field(default_factory=list)
    dropped: int = 0

    def kinds(self) -> dict[str, list[str]]:
        """The texts by the names that MIXTURE uses."""
        return {kind: getattr(self, kind) for kind in MIXTURE}


def documents(modules: set[str] | None = None) -> Documents:
    """Everything that nano is trained on, or the part of it from some modules (for the tests)."""
    guard = Guard()
    found = Documents()
    pages: dict[str, list[str]] = {}
    for name, docstring in nano_text.docstrings():
        package = name.split(".")[0]
        if modules is not None and package not in modules:
            continue
        if guard.is_held_out(name, docstring) or guard.contains(docstring):
            continue
        found.prose.append(docstring)
        entry = name + "\n    " + docstring.replace("\n", "\n    ")
        pages.setdefault(package, []).append(entry)
    found.prose += ["\n\n".join(page) for page in pages.values()]
    library = {path for _, path in nano_text.sources()}
    for module, path in nano_text.sources(tests=True):
        if modules is not None and module.split(".")[0] not in modules:
            continue
        parsed = nano_text.parse(path)
        if not parsed:
            continue
        source, tree = parsed
        defined = list(nano_text.definitions(module, tree))
        hidden = [node for name, _, node in defined if guard.is_held_out(name, str(node.value))]
        source = cut(source, hidden)
        # Top-level statements stand two blank lines apart: drop those with held-out words.
        pieces = source.split("\n\n\n")
        kept = [piece for piece in pieces if not guard.contains(piece)]
        found.dropped += len(pieces) - len(kept)
        source = "\n\n\n".join(kept).strip()
        if not source:
            continue
        if path not in library:
            found.tests.append(source)
            continue
        found.library.append(source)
        found.prose += [text for text in comments(source) if not guard.contains(text)]
        found.chat += chats(parsed[0], defined, guard)
    return found


def cut(source: str, nodes: list[ast.Constant]) -> str:
    """The source without the given docstring nodes (ast counts columns in UTF-8 bytes)."""
    lines = [line.encode() for line in source.splitlines(keepends=True)]
    for node in sorted(nodes, key=lambda node: -node.lineno):
        first, last = node.lineno - 1, (node.end_lineno or node.lineno) - 1
        rest = lines[first][: node.col_offset] + lines[last][node.end_col_offset :]
        lines[first : last + 1] = [rest] if rest.strip() else []
    return b"".join(lines).decode()


def comments(source: str) -> Iterator[str]:
    """Blocks of at least 3 comment lines of their own, without their marks: prose as well."""
    block: list[str] = []
    for line in [*source.splitlines(), ""]:
        stripped = line.strip()
        if stripped.startswith("#"):
            block.append(stripped.lstrip("#").removeprefix(" "))
            continue
        text = "\n".join(block).strip()
        letters = sum(letter.isalpha() or letter == " " for letter in text)
        if len(block) >= 3 and letters > 0.8 * len(text):
            yield text
        block = []


def chats(source: str, defined: list[Defined], guard: Guard) -> Iterator[str]:
    """A function without its docstring, and the docstring's first paragraph as the answer.

    It gives the chat markers a meaning. The task is not that of `nano_text.instructions`, which
    asks by name alone and only for docstrings that are held out here.
    """
    for name, node, constant in defined:
        docstring = str(constant.value)
        answer = docstring.strip().split("\n\n")[0]
        outer = any(other.startswith(f"{name}.") for other, _, _ in defined)
        if outer or guard.is_held_out(name, docstring):
            continue  # outer: a docstring within, which may be a held-out one
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        lines = cut(source, [constant]).splitlines()
        removed = len(source.splitlines()) - len(lines)
        lines = lines[node.lineno - 1 : (node.end_lineno or node.lineno) - removed]
        body = "\n".join(line.removeprefix(" " * node.col_offset) for line in lines)
        text = chat(body, nano_text.squeeze(answer))
        if len(body) <= 800 and len(answer) <= 400 and not guard.contains(text):
            yield text


def chat(question: str, answer: str) -> str:
    """One exchange, as CHAT_TEMPLATE writes it."""
    return f"{TURN}user\n{question}{TURN_END}\n{TURN}assistant\n{answer}{TURN_END}\n"


# ---------------------------------------------------------------------------- tokenizer
def train_tokenizer(found: Documents) -> PreTrainedTokenizerFast:
    """A byte-level BPE of VOCABULARY entries, with GPT-2's way of cutting words."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END, TURN, TURN_END, PAD],  # ids 0, 1, 2, 3
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),  # any bytes can be written
        show_progress=False,
    )
    # The prose counts three times: it is what nano is for.
    core.train_from_iterator([*found.prose * 3, *found.library], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=[TURN, TURN_END],
        clean_up_tokenization_spaces=False,
        model_max_length=CONTEXT,
        chat_template=CHAT_TEMPLATE,
    )


class Stream:
    """An endless row of windows from one kind of text, shuffled anew for each epoch."""

    def __init__(self, encoded: list[list[int]], rng: random.Random) -> None:
        self.encoded, self.rng = encoded, rng
        self.tokens = sum(len(ids) + 1 for ids in encoded)  # with one end marker each
        self.given = 0  # tokens so far
        self.buffer: list[int] = []
        self.order: list[int] = []

    def window(self, length: int) -> list[int]:
        """length + 1 token ids: documents joined by the end marker, id 0."""
        while len(self.buffer) <= length:
            if not self.order:
                self.order = self.rng.sample(range(len(self.encoded)), len(self.encoded))
            self.buffer += [0, *self.encoded[self.order.pop()]]
        # The last label is the next window's first input, so that each token is predicted once.
        self.given += length
        taken, self.buffer = self.buffer[: length + 1], self.buffer[length:]
        return taken


# ---------------------------------------------------------------------------- training
def new_model() -> LlamaForCausalLM:
    """The untrained model, float32."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=FEED_FORWARD,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=CONTEXT,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        attention_bias=False,
        mlp_bias=False,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=3,
    )
    model = LlamaForCausalLM(config)
    AttentionInterface.register("causal_attention", causal_attention)
    model.set_attn_implementation("causal_attention")
    for layer in model.model.layers:  # each block starts as the identity
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
        torch.nn.init.zeros_(layer.mlp.down_proj.weight)
    return model


def causal_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    **_: object,
) -> tuple[torch.Tensor, None]:
    """Written-out causal attention: in bfloat16 on a CPU twice as fast as the fused kernel.

    query (rows, heads, length, 64), key and value (rows, kv heads, length, 64) ->
    (rows, length, heads, 64). Only for windows without padding or cache.
    """
    rows, heads, length, size = query.shape
    groups = key.shape[1]
    future = torch.full((length, length), -1e9, dtype=query.dtype).triu(1)
    stacked = (query * scaling).reshape(rows, groups, -1, size)  # a group's heads under each other
    scores = (stacked @ key.mT).view(rows, groups, -1, length, length) + future
    weights = torch.softmax(scores, -1).view(rows, groups, -1, length)
    return (weights @ value).view(rows, heads, length, size).transpose(1, 2), None


class Muon(torch.optim.Optimizer):
    """Momentum, made orthogonal by Newton-Schulz steps (Jordan 2024, github.com/KellerJordan/Muon).

    Matrices of one shape are worked on as one batch.
    """

    def __init__(self, matrices: list[torch.nn.Parameter], lr: float) -> None:
        super().__init__(matrices, {"lr": lr, "momentum": 0.95, "weight_decay": WEIGHT_DECAY})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            shapes: dict[torch.Size, list[torch.nn.Parameter]] = {}
            for matrix in group["params"]:
                shapes.setdefault(matrix.shape, []).append(matrix)
            for shape, matrices in shapes.items():
                updates = []
                for matrix in matrices:
                    assert matrix.grad is not None
                    state = self.state[matrix]
                    mean = state.setdefault("mean", torch.zeros_like(matrix))
                    mean.lerp_(matrix.grad, 1 - group["momentum"])
                    updates.append(matrix.grad.lerp(mean, group["momentum"]))  # Nesterov
                rate = group["lr"] * max(1.0, shape[0] / shape[1]) ** 0.5
                for matrix, update in zip(matrices, orthogonal(torch.stack(updates)), strict=True):
                    matrix.mul_(1 - group["lr"] * group["weight_decay"])
                    matrix.add_(update.to(matrix.dtype), alpha=-rate)


def orthogonal(batch: torch.Tensor) -> torch.Tensor:
    """(n, rows, columns) -> the same with all singular values near one, in bfloat16."""
    work = batch.bfloat16()
    wide = work.shape[-2] <= work.shape[-1]
    work = work if wide else work.mT
    work = work / (work.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = work @ work.mT
        work = 3.4445 * work + (-4.7750 * gram + 2.0315 * gram @ gram) @ work
    return work if wide else work.mT


@dataclass
class Trained:
    """What the training run measured."""

    steps: int
    tokens: int
    seconds: float


def train(
    model: LlamaForCausalLM,
    streams: dict[str, Stream],
    minutes: float,
    measure: dict[str, Encoded],
) -> Trained:
    """Train in place until the time is up; prints the loss, and the held-out loss now and then."""
    inner = [p for p in model.model.layers.parameters() if p.ndim == 2]
    known = {id(p) for p in inner}
    outer = [p for p in model.parameters() if id(p) not in known]
    optimizers = [
        Muon(inner, MUON_RATE),
        torch.optim.AdamW(outer, ADAM_RATE, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]
    rates = [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]
    owed = dict.fromkeys(MIXTURE, 0.0)  # rows each kind is behind its share
    started = time.monotonic()
    step, progress, next_report, smooth = 0, 0.0, 0.0, math.nan
    while progress < 1:
        scale = min(progress / WARMUP + 0.02, 1.0, (1 - progress) / DECAY)
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        for group, rate in zip(groups, rates, strict=True):
            group["lr"] = rate * scale
        length = SHORT if progress < LONG_FROM else CONTEXT
        batch = torch.tensor(next_rows(streams, owed, progress, length))  # (rows, length + 1)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(batch[:, :-1], use_cache=False).logits  # (rows, length, VOCABULARY)
            loss = F.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        step += 1
        smooth = loss.item() if math.isnan(smooth) else 0.95 * smooth + 0.05 * loss.item()
        seconds = time.monotonic() - started
        progress = seconds / (60 * minutes)
        if progress >= next_report:
            next_report += 0.05
            held = " ".join(f"{k} {bits_per_byte(model, v):.4f}" for k, v in measure.items())
            speed = step * TOKENS / seconds
            print(f"{progress:4.0%} step {step} loss {smooth:.3f} {speed:.0f} tokens/s {held}")
            sys.stdout.flush()
    return Trained(step, step * TOKENS, time.monotonic() - started)


def next_rows(
    streams: dict[str, Stream], owed: dict[str, float], progress: float, length: int
) -> list[list[int]]:
    """Windows of TOKENS in all, the kinds in their shares; fractions of a row are carried over."""
    count = TOKENS // length
    for kind, (first, last) in MIXTURE.items():
        owed[kind] += count * (first + (last - first) * min(progress, 1.0))
    rows = []
    for _ in range(count):
        kind = max(owed, key=lambda kind: owed[kind])
        owed[kind] -= 1
        rows.append(streams[kind].window(length))
    return rows


# ---------------------------------------------------------------------------- measuring
@torch.no_grad()
def bits_per_byte(model: PreTrainedModel, encoded: Encoded) -> float:
    """Bits per UTF-8 byte: the end marker comes first, so that every byte is predicted.

    Documents are cut into windows of CONTEXT tokens without overlap.
    """
    nats, size = 0.0, 0
    for count, ids in encoded:
        size += count
        sequence = [0, *ids]
        for start in range(0, len(ids), CONTEXT):
            window = torch.tensor(sequence[start : start + CONTEXT + 1])
            logits = model(window[None, :-1], use_cache=False).logits[0].float()
            nats += F.cross_entropy(logits, window[1:], reduction="sum").item()
    return nats / math.log(2) / size


def unshared(found: Documents, texts: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """The texts that have no run of Guard.WORDS words in common with the training texts.

    The library says similar things of similar functions (`str.rfind`, `bytes.rfind`); without
    those, the figure is one for text that is new altogether.
    """

    def runs(text: str) -> set[tuple[str, ...]]:
        words = text.split()
        return set(zip(*(words[start:] for start in range(Guard.WORDS)), strict=False))

    asked = set().union(*(runs(text) for _, text in texts))
    trained = (text for kind in found.kinds().values() for text in kind)
    shared = set().union(*(asked & runs(text) for text in trained))
    return [(name, text) for name, text in texts if not shared & runs(text)]


def encode_all(tokenizer: PreTrainedTokenizerBase, texts: list[tuple[str, str]]) -> Encoded:
    """(bytes, token ids) of named texts."""
    return [(len(text.encode()), tokenizer(text, verbose=False)["input_ids"]) for _, text in texts]


# ---------------------------------------------------------------------------- the card
CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
language: en
tags:
- llama
- python
- lora_kit
---

# nano

The base model that lora_kit carries, so that adapting a language model can be tried without a
network: a Llama of {parameters:,} parameters ({layers} layers, width {width}, {heads} heads with
{kv_heads} for keys and values, vocabulary {vocabulary}, {context} tokens of context, bfloat16),
really trained, and small enough that adapting it takes a minute on two cores.

## What it learned

The text that Python {python} carries: the source of its standard library and of the library's
tests, its docstrings (Python and C, on their own, as pages and within the source) and its longer
comments. Of its rows, {chat:.0%} are chat: a function's source without its docstring is the user's
turn, the first paragraph of the docstring the assistant's, `<|im_start|>` and `<|im_end|>` around
them.

Held out, by a hash of the qualified name (`lora_kit.nano.held_out`): 5% of the docstrings, on which
it is measured below, and 20%, which make the rows of an instruction set on another task than that
of the chat rows ("What does `heapq.heappush` do?"). They were cut out of the source as well;
those of 8 words and more wherever they stand, shorter ones where they are a whole docstring.
It has never seen `pydoc_data`, the topics of `help()`: that is the domain to adapt it to.

## Figures

| | |
|---|---|
| Parameters | {parameters:,} |
| Trained on | {tokens:,} tokens, in {steps:,} steps of {batch:,} |
| Training time | {seconds:,.0f} seconds, {speed:,.0f} tokens a second |
| Machine | {cores} CPU cores, Python {python}, torch {torch} |
| Bits per byte, {docstrings_count} held-out docstrings | {docstrings:.3f} |
| Bits per byte, the {unshared_count} of them that share no {words} words in a row with the \
training text | {unshared:.3f} |
| Bits per byte, {topics_count} topics of `help()` | {topics:.3f} |
| Epochs | {epochs} |

Bits per byte are of these files as read back by transformers, in bfloat16. Each document follows
`<|endoftext|>`, so that every byte is predicted, and is cut into windows of {context} tokens
without overlap. The held-out docstrings are those of 200 bytes and more.

## What it is not good for

Facts, and anything that matters. It writes English that looks like Python's documentation and
code that looks like Python; both are mostly wrong. It knows no other language, it follows no
instructions but the form of a chat, and it says what the standard library's authors would say.

## Licence

The weights are part of lora_kit and under the Apache License 2.0. They were learned from text
under the Python Software Foundation License Version 2; none of that text is copied here.
Made by `scripts/make_nano.py`.
"""


def card(
    parameters: int,
    trained: Trained,
    bits: dict[str, float],
    counts: dict[str, int],
    epochs: dict[str, float],
) -> str:
    """The model card: measured bits per byte and document counts by text, epochs by kind."""
    return CARD.format(
        parameters=parameters,
        layers=LAYERS,
        width=WIDTH,
        heads=HEADS,
        kv_heads=KV_HEADS,
        vocabulary=VOCABULARY,
        context=CONTEXT,
        batch=TOKENS,
        chat=MIXTURE["chat"][0],
        tokens=trained.tokens,
        steps=trained.steps,
        seconds=trained.seconds,
        speed=trained.tokens / trained.seconds,
        cores=os.cpu_count(),
        python=platform.python_version(),
        torch=torch.__version__.split("+")[0],
        words=Guard.WORDS,
        docstrings=bits["docstrings"],
        unshared=bits["unshared"],
        unshared_count=counts["unshared"],
        topics=bits["topics"],
        docstrings_count=counts["docstrings"],
        topics_count=counts["topics"],
        epochs=", ".join(f"{kind} {number:.1f}" for kind, number in epochs.items()),
    )


# ---------------------------------------------------------------------------- the run
def main() -> None:
    """Read, train, write, measure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=25.0, help="training time (default 25)")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "lora_kit" / "nano" / "model", help="folder to write"
    )
    parser.add_argument("--seed", type=int, default=0, help="of weights and order (default 0)")
    options = parser.parse_args()
    keep_memory()
    random.seed(options.seed)
    torch.manual_seed(options.seed)

    # 1. Text.
    found = documents()
    for kind, texts in found.kinds().items():
        print(f"{kind}: {len(texts)} documents, {sum(map(len, texts)) / 1e6:.2f} M characters")
    print(f"dropped for held-out words: {found.dropped} pieces")

    # 2. Tokenizer.
    tokenizer = train_tokenizer(found)
    rng = random.Random(options.seed)
    streams = {
        kind: Stream(tokenizer(texts, verbose=False)["input_ids"], rng)
        for kind, texts in found.kinds().items()
    }
    for kind, stream in streams.items():
        print(f"{kind}: {stream.tokens / 1e6:.2f} M tokens an epoch")
    general = nano_text.general()
    measured = {
        "docstrings": general,
        "unshared": unshared(found, general),
        "topics": nano_text.topics(),
    }

    # 3. Model and training.
    model = new_model()
    parameters = sum(p.numel() for p in model.parameters())
    assert TOKENS % SHORT == TOKENS % CONTEXT == 0
    rows = f"{TOKENS // SHORT} rows x {SHORT}, then {TOKENS // CONTEXT} rows x {CONTEXT}"
    print(f"{parameters:,} parameters; tokens a step: {rows} = {TOKENS:,}")
    trained = train(model, streams, options.minutes, {"docstrings": encode_all(tokenizer, general)})
    epochs = {kind: stream.given / stream.tokens for kind, stream in streams.items()}
    print(f"epochs: {epochs}")

    # 4. Write to a folder beside, read back, measure what was read.
    temporary = options.out.with_name(options.out.name + ".partial")
    shutil.rmtree(temporary, ignore_errors=True)
    write(temporary, model, tokenizer)
    reader = AutoTokenizer.from_pretrained(temporary)
    written = AutoModelForCausalLM.from_pretrained(temporary)
    bits = {
        name: bits_per_byte(written, encode_all(reader, texts)) for name, texts in measured.items()
    }
    print(f"bits per byte of the written files: {bits}")
    counts = {name: len(texts) for name, texts in measured.items()}
    (temporary / "README.md").write_text(card(parameters, trained, bits, counts, epochs))

    # 5. Move it into place.
    shutil.rmtree(options.out, ignore_errors=True)
    temporary.rename(options.out)


def keep_memory() -> None:
    """Have glibc keep freed tensors: giving them back at each step costs up to half the speed."""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD, bytes
        libc.mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD, bytes


def write(folder: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """Save model and tokenizer as transformers does, the weights in bfloat16."""
    model.bfloat16()
    model.generation_config = GenerationConfig(eos_token_id=[0, 2], pad_token_id=3, do_sample=False)
    model.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)  # it is written for its owner alone
    tokenizer.save_pretrained(folder)
    # transformers 5 calls its class TokenizersBackend; this name is known to 4 as well.
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    size = (folder / "model.safetensors").stat().st_size
    if size > MAX_BYTES:
        raise SystemExit(f"model.safetensors has {size:,} bytes, more than {MAX_BYTES:,}")


if __name__ == "__main__":
    main()
