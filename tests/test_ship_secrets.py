"""Secrets, home folders and e-mail addresses are found before they leave; words are left alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import make_tokenizer
from safetensors.torch import save_file

from lora_kit import nano
from lora_kit.errors import UserError, redact, secret_values
from lora_kit.ship.secrets import refuse_secrets
from lora_kit.train.directory import say

# {text: what it is taken for}. Put together here, so that no scanner takes this file for a leak.
FOUND = {
    "hf_" + "aB3dE6" * 6: "a Hugging Face token",
    "ghp_" + "aB3d" * 9: "a GitHub token",
    "github_pat_" + "aB3d_" * 8: "a GitHub token",
    "AKIA" + "Q3EGH6KL" * 2: "an AWS key",
    "sk-" + "ant-api03-" + "aB3d" * 8: "an API key",
    "sk-" + "proj-" + "aB3d" * 8: "an API key",
    "AIza" + "aB3dE" * 7: "an API key",
    "xoxb-" + "123456789012-abcdef": "a Slack token",
    "-----BEGIN " + "RSA PRIVATE KEY-----": "a private key",
    "-----BEGIN " + "PRIVATE KEY-----": "a private key",
    "glpat-" + "aB3d-" * 4: "a GitLab token",
    "Bearer " + "aB3d." * 6: "a bearer token",
    "eyJ" + "hbGciOiJI" * 2 + ".eyJ" + "zdWIiOiIx" * 2 + ".c2ln": "a JSON web token",
    "postgres://me:" + "s3cr3t@db.some-where.org/x": "a password in an address",
    "pass-in-an-address": "the value of DATABASE_URL",
    "key-by-another-name": "the value of OPENAI_KEY",
    "many-keys-at-once": "the value of API_KEYS",
    "postgres-pass": "the value of PGPASS",
    "{% set api_key = '" + "a1b2c3d4' %}": "a password or key",
    "{}mnt/c/Users/jane".format("/"): "a home folder",
    "{}var/home/jane".format("/"): "a home folder",
    "{}home/jane doe/my runs".format("/"): "a home folder",
    "jane@" + "example.corp.com": "an e-mail address",
    'password = "hunter2hunter2"': "a password or key",
    '"api_key": "0123456789abcdef"': "a password or key",
    "{}home/someone/data".format("/"): "a home folder",
    "file://{}home/someone".format("/"): "a home folder",
    "/Users/some.one": "a home folder",
    "C:\\Users\\someone": "a home folder",
    json.dumps("C:\\Users\\someone"): "a home folder",
    "write to some.one+x@mail.some-where.org": "an e-mail address",
    "the-value-in-the-environment": "the value of SOME_API_KEY",
    "pass-word-of-the-base": "the value of DB_PASSWORD",
    "/data/of/the/run.jsonl": "a path of this machine (22 letters)",
}
HARMLESS = (
    *("https://x.org/home/index.html", "see docs/home/a", "~/home/a", "a@b", "user@example.com"),
    *(
        "a@b.example",
        "to a@mail.example.org.",
        "git@github.com:a/b",
        "{% set secret = 'abcdefghi' %}",
    ),
    *("bearer of the-longest-word-there-is", "https://x.org:8080/a@b", "eyJust.eyJoking.a"),
    *("@property", "x @ y.T", "0" * 64, "sha256: " + "ab12" * 16, "c0ffee" + "0" * 34),
    *("hf_hub_download", "sk-learn", "task-oriented-and-long-enough-words", "xoxo", "AKIA"),
    *("password: none", "secret = {secret}", '"eos_token": "<|im_end|>"', "api_key=<yours>"),
    *("-----BEGIN PUBLIC KEY-----", "-----BEGIN CERTIFICATE-----", "the secret of good bread"),
)


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_API_KEY", "the-value-in-the-environment")
    monkeypatch.setenv("DB_PASSWORD", "pass-word-of-the-base")
    monkeypatch.setenv("DATABASE_URL", "postgres://me:pass-in-an-address@db/x")
    monkeypatch.setenv("OPENAI_KEY", "key-by-another-name")
    monkeypatch.setenv("API_KEYS", "many-keys-at-once")
    monkeypatch.setenv("PGPASS", "postgres-pass")
    monkeypatch.setenv("SITE_URL", "https://x.org:8080/a")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "falsefalse")
    monkeypatch.setenv("HOTKEY", "not-a-secret-at-all")
    monkeypatch.setenv("HF_TOKEN", "short")


@pytest.mark.parametrize(("text", "kind"), FOUND.items())
def test_what_must_stay_is_named_and_not_repeated(text: str, kind: str) -> None:
    files = {"README.md": f"# A card\n\nfirst {text} last\n".encode(), "b.json": b"{}"}
    with pytest.raises(UserError) as raised:
        refuse_secrets(files, ["/data/of/the/run.jsonl"])
    message = str(raised.value)
    assert f"README.md:3: {kind}" in message and "\n" not in message
    assert "nothing was uploaded" in message and text not in message
    with pytest.raises(UserError, match=r"a\.json:1: "):
        refuse_secrets({"a.json": json.dumps(f"line\n{text}").encode()}, ["/data/of/the/run.jsonl"])


@pytest.mark.parametrize("text", HARMLESS)
def test_ordinary_text_is_left_alone(text: str) -> None:
    refuse_secrets(
        {"README.md": f"first {text} last".encode(), "a.json": json.dumps(text).encode()}
    )


def test_all_places_are_named_at_once() -> None:
    key = "hf_" + "aB3dE6" * 6
    files = {f"{n}.json": f"\n{key} some.one@some-where.org".encode() for n in range(9)}
    with pytest.raises(UserError, match=r"0\.json:2: a Hugging.*0\.json:2: an e-mail.*10 more"):
        refuse_secrets(files)


def test_headers_of_weights_are_read(tmp_path: Path) -> None:
    import torch

    file = tmp_path / "adapter_model.safetensors"
    tensors = {"a": torch.zeros(100)}
    save_file(tensors, file, metadata={"format": "pt"})
    refuse_secrets({file.name: file})
    for where in ({"note": "hf_" + "aB3dE6" * 6}, {"from": "{}home/me/x".format("/")}):
        save_file(tensors, file, metadata=where)
        with pytest.raises(UserError, match=r"adapter_model\.safetensors:1: "):
            refuse_secrets({file.name: file})


def test_vocabularies_and_licences_raise_no_alarm(tmp_path: Path) -> None:
    make_tokenizer(tmp_path)
    words = [f"{a}@{b}.com" for a in "abc" for b in ("mail", "some")] + [
        "secret:abcdefgh",
        "{}home".format("/"),
    ]
    vocabulary = {word: n for n, word in enumerate(words)}
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary, indent=1))
    (tmp_path / "merges.txt").write_text("/ home\nhf _\n@ mail.com\npassword =abcdefghi\n")
    (tmp_path / "LICENSE").write_text("Report to LlamaUseReport@meta.com\n")
    nanos = {f"nano-{file.name}": file for file in nano.MODEL.iterdir() if file.suffix != ".md"}
    refuse_secrets({file.name: file for file in tmp_path.iterdir()} | nanos)
    # What can't be a word is found there too.
    (tmp_path / "vocab.json").write_text(json.dumps({"hf_" + "aB3dE6" * 6: 1}))
    with pytest.raises(UserError, match=r"vocab\.json:1: a Hugging Face token"):
        refuse_secrets({"vocab.json": tmp_path / "vocab.json"})


def test_added_tokens_and_escaped_letters_are_read() -> None:
    for mail in ("jane@some-where.org", "jane\\u0040some-where.org"):
        token = f'{{"content": "<|{mail}|>"}}'.encode()
        for name, text in (
            ("tokenizer.json", b'{"added_tokens": [%s], "model": {"vocab": {}}}' % token),
            ("tokenizer_config.json", b'{"added_tokens_decoder": {"1": %s}}' % token),
            ("added_tokens.json", b'{"%s": 1}' % mail.encode()),
        ):
            with pytest.raises(UserError, match=f"{name}:1: an e-mail address"):
                refuse_secrets({name: text})
    key = "hf_" + "aB3dE6" * 6
    with pytest.raises(UserError, match=r"vocab\.json:1: a Hugging Face token"):
        refuse_secrets({"vocab.json": f'{{"\\u0068{key[1:]}": 1}}'.encode()})


def test_the_line_is_that_of_the_file() -> None:
    tokens = [
        {"content": "<|first|>"},
        {"content": "a\nb\u0007"},
        {"content": "jane@some-where.org"},
    ]
    text = json.dumps({"version": "1.0", "added_tokens": tokens}, indent=1)
    line = next(n for n, one in enumerate(text.splitlines(), 1) if "jane" in one)
    assert line > 4
    with pytest.raises(UserError, match=rf"tokenizer\.json:{line}: an e-mail address"):
        refuse_secrets({"tokenizer.json": text.encode()})
    text = text.replace("a\\nb", "a\\u000ab")
    with pytest.raises(UserError, match=rf"tokenizer\.json:{line}: an e-mail address"):
        refuse_secrets({"tokenizer.json": text.encode()})


def test_a_long_line_is_no_trap() -> None:
    for piece in (
        "a",
        "a.",
        "a@",
        "password ",
        "-----BEGIN A",
        "sk-",
        "a@a.",
        "://a:",
        "eyJa",
        "/mnt/c",
        "set secret ",
    ):
        refuse_secrets({"README.md": piece.encode() * (2**17 // len(piece))})


def test_tokens_are_taken_out_of_what_is_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert secret_values().keys() >= {"SOME_API_KEY", "DB_PASSWORD"}
    assert not secret_values().keys() & {"TOKENIZERS_PARALLELISM", "HOTKEY", "HF_TOKEN", "SITE_URL"}
    key = "hf_" + "aB3dE6" * 6
    assert redact(f"a {key} b pass-word-of-the-base c") == "a *** b *** c"
    assert redact("at http://me:pw-1@proxy:80/") == "at http://***@proxy:80/"
    assert redact("nothing here") == "nothing here"
    # A sample of the data, as a training shows it.
    say(f"sample: {f'is{chr(10)}{key}'!r}")
    assert capsys.readouterr().err == "sample: 'is\\n***'\n"
