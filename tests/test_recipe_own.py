"""The recipe that recipes/README.md prints, outside the package: every verb that makes sense."""

from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import here, lora_kit

from lora_kit.errors import RunFileError, UserError
from lora_kit.launch import read_run
from lora_kit.run import shipped

WORDS = [a + b for a in "bdfgklmnpr" for b in "aeiou"]
LINES_OF_THE_EXAMPLE = 80


def printed(kind: str) -> str:
    """The first block of a kind in recipes/README.md."""
    text = (shipped("recipes") / "README.md").read_text(encoding="utf-8")
    found = re.search(rf"```{kind}\n(.*?)```", text, re.DOTALL)
    assert found
    return found.group(1)


def make_encoder(folder: Path) -> None:
    """A BERT that was never trained, of the vocabulary WORDS."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    vocabulary = {token: number for number, token in enumerate([*special, *WORDS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B [SEP]",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=backend, **names).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = BertConfig(
        vocab_size=len(vocabulary), intermediate_size=64, initializer_range=0.3, **sizes
    )
    BertModel(config).save_pretrained(folder)


def write_pairs(file: Path, count: int) -> None:
    """Pairs of sentences, each in one of two languages: the score is about 1 in the first one and
    about 0 in the second."""
    chooser = random.Random(0)
    rows = []
    for number in range(count):
        language = WORDS[: len(WORDS) // 2] if number % 2 else WORDS[len(WORDS) // 2 :]
        first, second = (" ".join(chooser.sample(language, 4)) for _ in range(2))
        score = number % 2 + chooser.uniform(-0.1, 0.1)
        rows.append({"sentence1": first, "sentence2": second, "score": score})
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the README prints, data and a base."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "similarity.py").write_text(printed("python"), encoding="utf-8")
    run = printed("yaml").replace("sentence-transformers/all-MiniLM-L6-v2", "base")
    (folder / "run.yaml").write_text(run, encoding="utf-8")
    make_encoder(folder / "base")
    write_pairs(folder / "pairs.jsonl", 400)
    return folder


@pytest.fixture(scope="module")
def trained(home: Path) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        code, said = lora_kit(
            "train", "run.yaml", "train.learning_rate=1e-2", "train.num_train_epochs=6"
        )
    assert code == 0, said
    return home / "runs" / "similarity"


def test_the_example_is_short() -> None:
    assert len(printed("python").splitlines()) <= LINES_OF_THE_EXAMPLE


@pytest.mark.slow
def test_it_trains_and_is_judged_against_the_mean(trained: Path) -> None:
    report = json.loads((trained / "report.json").read_text(encoding="utf-8"))
    assert report["domain"]["rival"] == "mean"
    assert set(report["contenders"]) == {"adapted", "mean"}
    found = report["domain"]["squared_error"]
    assert found["adapted"] == report["contenders"]["adapted"]["squared_error"]
    assert report["verdict"]["domain"] == "better" and found["ci95"][1] < 0
    lock = json.loads((trained / "run.lock.json").read_text(encoding="utf-8"))
    assert lock["auto"] == "AutoModelForSequenceClassification"
    assert lock["recipe"]["name"] == "similarity" and len(lock["recipe"]["sha256"]) == 64
    assert lock["facts"]["labels"] == ["score"] and lock["fresh"]


@pytest.mark.slow
def test_every_verb_that_makes_sense_takes_it(
    trained: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(home)
    for verb in (
        ["preview", "run.yaml", "--json"],
        ["plan", "run.yaml"],
        ["compare", "runs/similarity"],
        ["inspect", "runs/similarity"],
        ["doctor", "--loss", "run.yaml"],
    ):
        code, said = here(*verb)
        assert code == 0, said
    code, said = here("generate", "runs/similarity", "hello")
    assert code == 2 and "generate needs a language model" in said


def test_a_score_that_it_does_not_have_is_reported_before_it_trains(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(home)
    code, said = here("train", "run.yaml", "name=other", "prove.metrics=[rouge_l]")
    assert code == 2 and not Path("runs/other").exists()
    assert "prove.metrics: rouge_l: unknown; this recipe's scores: squared_error" in said


@pytest.mark.parametrize(
    "given",
    [
        "data.general=nano:docstrings",
        "data.packing=documents",
        "data.supervise=all",
        "data.chat_template=chatml",
        "data.labels=[a,b]",
        "prove.shots=2",
        "ship.target=vllm",
    ],
)
def test_keys_about_generated_text_are_not_read_unless_a_task_says_so(
    home: Path, given: str
) -> None:
    with pytest.raises(RunFileError, match=rf"{given.split('=')[0]}: recipe .* does not read it"):
        read_run(home / "run.yaml", [given])


@pytest.mark.slow
def test_a_head_without_names_of_its_outputs_is_refused(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(home, tmp_path / "unnamed")
    monkeypatch.chdir(tmp_path / "unnamed")
    recipe = Path("similarity.py")
    source = recipe.read_text(encoding="utf-8")
    recipe.write_text(source.replace('"labels": ["score"], ', ""), encoding="utf-8")
    code, said = here("train", "run.yaml", "name=unnamed")
    assert code == 2 and "TASK.facts: no `labels`: name the outputs of" in said
    assert not Path("runs/unnamed").exists()


@pytest.mark.slow
def test_a_run_that_goes_on_with_a_changed_recipe_reports_it(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(home, tmp_path / "changed", ignore=shutil.ignore_patterns("runs"))
    monkeypatch.chdir(tmp_path / "changed")
    recipe = Path("similarity.py")
    source = recipe.read_text(encoding="utf-8")
    wrong = source.replace('kit.Score("squared_error", sums', 'kit.Score("error", sums')
    recipe.write_text(wrong, encoding="utf-8")
    code, said = here("train", "run.yaml", "train.max_steps=4", "train.save_steps=2")
    assert code == 2 and "TASK.score: gives error; TASK.scores: squared_error" in said
    recipe.write_text(source, encoding="utf-8")
    code, said = here("compare", "runs/similarity")
    assert code == 2 and "continue it with train --resume" in said
    code, said = here("train", "runs/similarity/run.yaml", "--resume")
    assert code == 0, said
    assert "similarity.py changed since the run began: it continues with the new one" in said
    code, said = here("compare", "runs/similarity")
    assert code == 0, said


@pytest.mark.slow
def test_load_and_merge_never_run_it(
    trained: Path, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForSequenceClassification

    import lora_kit as package

    moved = tmp_path / "moved"
    shutil.copytree(home, moved)
    monkeypatch.chdir(moved)
    (moved / "similarity.py").unlink()
    model, tokenizer = package.load("runs/similarity")
    code, said = here("merge", "runs/similarity", "--out", "merged")
    assert code == 0, said
    merged = AutoModelForSequenceClassification.from_pretrained(moved / "merged").eval()
    batch = tokenizer(["ba de fi"], ["ko lu"], return_tensors="pt")
    inputs: dict[str, Any] = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        assert (model(**inputs).logits - merged(**inputs).logits).abs().max() < 1e-5
    code, said = here("compare", "runs/similarity")
    assert code == 2 and "similarity.py: no such file" in said


GOOD = """import lora_kit.recipe as kit


class Own(kit.Task):
    formats, scores = ('text',), ('loss',)
    encode = collate = score = show = lambda *_: None


"""
TEXT, LOSS = "('text',)", "('loss',)"
MAIN = "\n\ndef main(run, resume=False): ...\n"


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("import no_such_library\n", "own.py:1: cannot be imported: ModuleNotFoundError"),
        ("def main(:\n", "own.py:1: cannot be imported: SyntaxError"),
        (f"{GOOD}1 / 0\n", "own.py:9: cannot be imported: ZeroDivisionError"),
        (MAIN, "own.py: defines no TASK, an instance of lora_kit.recipe.Task"),
        (f"{GOOD}TASK = Own{MAIN}", "own.py: defines no TASK, an instance"),
        (f"{GOOD}TASK = Own()\n", "own.py: defines no main(run, resume)"),
        (
            f"{GOOD.replace('text', 'txt')}TASK = Own(){MAIN}",
            "unknown format 'txt'; did you mean `text`?",
        ),
        (f"{GOOD.replace(TEXT, '()')}TASK = Own(){MAIN}", "TASK.formats is empty"),
        (f"{GOOD.replace(LOSS, '()')}TASK = Own(){MAIN}", "TASK.scores is empty"),
        (f"{GOOD}raise SystemExit(3)\n", "own.py:9: cannot be imported: SystemExit: 3"),
        (f"{GOOD.replace('encode = ', '')}TASK = Own(){MAIN}", "TASK has no encode: see recipes/"),
        (f"{GOOD.replace(LOSS, 'None')}TASK = Own(){MAIN}", "TASK.scores is not a tuple of names"),
        (f"{GOOD.replace(TEXT, TEXT[1:7])}TASK = Own(){MAIN}", "TASK.formats is not a tuple of"),
    ],
)
def test_a_broken_recipe_is_one_line(
    broken: Callable[[str], Path], source: str, words: str
) -> None:
    with pytest.raises(RunFileError) as caught:
        read_run(broken(source), [])
    (line,) = caught.value.problems
    assert words in line and "\n" not in line


@pytest.fixture
def broken(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """A run file whose recipe is a source, in a folder of its own."""
    monkeypatch.chdir(tmp_path)

    def make(source: str) -> Path:
        shutil.copy(home / "pairs.jsonl", tmp_path)
        run = (home / "run.yaml").read_text(encoding="utf-8").replace("similarity.py", "own.py")
        run = run.replace("model: base", f"model: {home / 'base'}")
        (tmp_path / "run.yaml").write_text(run, encoding="utf-8")
        (tmp_path / "own.py").write_text(source, encoding="utf-8")
        return tmp_path / "run.yaml"

    return make


@pytest.mark.parametrize("verb", ["train", "preview"])
def test_a_broken_recipe_ends_with_2_and_leaves_nothing(
    broken: Callable[[str], Path], verb: str, tmp_path: Path
) -> None:
    broken("import no_such_library\n")
    before = sorted(tmp_path.iterdir())
    code, said = here(verb, "run.yaml")
    assert code == 2 and said.count("ModuleNotFoundError") == 1 and "Traceback" not in said
    assert sorted(p for p in tmp_path.iterdir() if p.name != "__pycache__") == before


def test_scores_of_pairs_are_no_classes(home: Path, tmp_path: Path) -> None:
    """Held-out rows have other scores than training rows, and no score must stay in training."""
    from lora_kit.base.pin import pin
    from lora_kit.tasks.encode import rows_of

    write_pairs(tmp_path / "pairs.jsonl", 60)
    lines = (home / "pairs.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "eval.jsonl").write_text("".join(lines[100:130]), encoding="utf-8")
    text = (home / "run.yaml").read_text(encoding="utf-8").replace("eval: 0.1", "eval: eval.jsonl")
    (tmp_path / "run.yaml").write_text(
        text.replace("similarity.py", str(home / "similarity.py")), encoding="utf-8"
    )
    run, recipe = read_run(tmp_path / "run.yaml", [f"base.model={home / 'base'}"])
    _, data = rows_of(recipe.task, run, pin(run.base))
    assert len(data.eval) == 30


def test_rows_are_made_anew_once_the_recipe_was_changed(home: Path, tmp_path: Path) -> None:
    """As where `encode` was corrected after a preview."""
    from lora_kit.base.pin import pin
    from lora_kit.tasks.encode import rows_of

    own, run_file = tmp_path / "similarity.py", tmp_path / "run.yaml"
    shutil.copy(home / "pairs.jsonl", tmp_path)
    shutil.copy(home / "run.yaml", run_file)
    source = (home / "similarity.py").read_text(encoding="utf-8")
    found = []
    for changed in (source, source.replace("float(example.label)}]", "-float(example.label)}]")):
        own.write_text(changed, encoding="utf-8")
        run, recipe = read_run(run_file, [f"base.model={home / 'base'}"])
        _, data = rows_of(recipe.task, run, pin(run.base))
        found.append(data.rows("train").column("labels"))
    assert found[1].tolist() == (-found[0]).tolist()


ROW = '{"input_ids": encoded["input_ids"], "labels": float(example.label)}'


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        (f"[{ROW}]", "None", r"pairs\.jsonl:1: expected a list of rows, not NoneType"),
        (f"[{ROW}]", ROW, r"pairs\.jsonl:1: expected a list of rows, not dict"),
        ("in examples:", "in examples[1:]:", r"\d+ results for \d+ examples"),
        (
            f"[{ROW}]",
            f'[{ROW} if "a" in pair[0] else {{"labels": 1.0}}]',
            "rows must all have the same col",
        ),
        (f"[{ROW}]", f'[{{**{ROW}, **({{"length": 2}} if "a" in pair[0] else {{}})}}]', "same col"),
        ('encoded["input_ids"], "l', 'example.label, "l', "TASK.tokens failed on its rows"),
    ],
)
def test_rows_that_encode_must_not_give_are_one_line(
    before: str, after: str, words: str, home: Path, broken: Callable[[str], Path]
) -> None:
    from lora_kit.base.pin import pin
    from lora_kit.tasks.encode import rows_of

    source = (home / "similarity.py").read_text(encoding="utf-8")
    assert before in source
    run, recipe = read_run(broken(source.replace(before, after)), [])
    with pytest.raises(UserError, match=words) as raised:
        rows_of(recipe.task, run, pin(run.base))
    assert str(raised.value).startswith("TASK.encode: ") and "\n" not in str(raised.value)


def test_a_new_head_needs_rivals_before_it_trains(
    home: Path, broken: Callable[[str], Path], tmp_path: Path
) -> None:
    import lora_kit as package

    source = (home / "similarity.py").read_text(encoding="utf-8").replace("def rivals", "def other")
    with pytest.raises(UserError, match=r"TASK\.rivals: missing: an untrained head is no baseline"):
        package.train(broken(source))
    assert not (tmp_path / "runs" / "similarity").exists()
