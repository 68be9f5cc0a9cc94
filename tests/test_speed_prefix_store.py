"""The file of frozen layers' states: found by all that decides them, whole or not believed."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_speed_prefix import Calls, adapted, base, data, keep, root, same, step, train

from lora_kit.data.rows import Rows
from lora_kit.speed import prefix as module
from lora_kit.speed.prefix import STATES, Prefix, Store
from lora_kit.tasks.packing import Packed

assert root  # a fixture of every test here: an empty cache
LENGTHS = np.array([5, 3, 8, 1])


def keys(root: Path) -> set[str]:
    return {file.parent.name for file in root.glob(f"*/{STATES}")}


def kept(model: Any, rows: Any) -> str:
    prefix = Prefix(model)
    said = keep(prefix, rows, 3)
    prefix.close()
    return said


def test_the_key_is_of_all_that_decides_the_states(root: Path) -> None:
    rows = data()
    kept(adapted(), rows)
    other = {"target_modules": ["v_proj"], "layers_to_transform": [2], "r": 3}
    kept(adapted(**other), rows)  # above the same layers
    kept(adapted(), data())
    assert len(keys(root)) == 1

    def with_weight(name: str) -> Any:
        model = base()
        with torch.no_grad():
            model.get_parameter(name).view(-1)[7] += 1e-6
        return adapted(model=model)

    longer, whole = data(8), list(data())
    whole[0]["input_ids"][3] += 1
    changed = Rows.of(whole)
    others: dict[str, tuple[Any, Any]] = {
        "a layer": (with_weight("model.layers.1.mlp.up_proj.weight"), rows),
        "an embedding": (with_weight("model.embed_tokens.weight"), rows),
        "dtype": (adapted(model=base().bfloat16()), rows),
        "a setting": (adapted(model=base(rms_norm_eps=1e-3)), rows),
        "layers": (adapted(target_modules=["q_proj"], layers_to_transform=[3]), rows),
        "a row more": (adapted(), longer),
        "a token": (adapted(), changed),
        "packed": (adapted(), Packed(rows, 40)),
        "packed otherwise": (adapted(), Packed(rows, 60)),
    }
    for number, (what, (model, some)) in enumerate(others.items(), 2):
        assert "later epochs skip them" in kept(model, some), what
        assert len(keys(root)) == number, what
    kept(with_weight("model.layers.3.mlp.up_proj.weight"), rows)  # it is above them
    assert len(keys(root)) == len(others) + 1


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "a bit flipped": lambda b: bytes([*b[:700], b[700] ^ 1, *b[701:]]),
    "cut short": lambda b: b[:-9],
    "empty": lambda b: b"",
    "a page never written": lambda b: b[:400] + bytes(300) + b[700:],
    "other states": lambda b: b[:4] + b[5:] + b"0",
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_what_is_damaged_is_computed_again(damage: Callable[[bytes], bytes], root: Path) -> None:
    rows = data()
    expected = train(adapted(), rows)
    prefix = Prefix(first := adapted())
    keep(prefix, rows, 3)
    train(first, rows, prefix)
    (file,) = root.glob(f"*/{STATES}")
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    prefix, calls = Prefix(model := adapted()), Calls(model)
    keep(prefix, rows, 3)
    calls.new()
    same(train(model, rows, prefix), expected)
    below, _, above, _ = calls.new()
    assert 1 <= below <= 4 and above == 12
    assert file.read_bytes() == whole


def states(rows: list[int], dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    count = int(LENGTHS[rows].sum())
    return torch.randn(1, count, 4, generator=torch.Generator().manual_seed(sum(rows))).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_come_back_bit_for_bit_in_any_order(tmp_path: Path, dtype: torch.dtype) -> None:
    """Written by one of two processes, read by the other."""
    one, other = (Store(tmp_path / "file", LENGTHS, 4, dtype) for _ in range(2))
    first, second = states([2, 0], dtype), states([3, 1], dtype)
    one.write([2, 0], first)
    assert other.read([0, 1]) is None
    other.write([3, 1], second)
    found = one.read([1, 0, 3, 2])
    parts = [second[:, 1:], first[:, 8:], second[:, :1], first[:, :8]]
    assert found is not None and torch.equal(found, torch.cat(parts, 1)) and found.dtype == dtype


def test_a_row_written_by_halves_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path / "file", LENGTHS, 4, torch.bfloat16)
    written = os.pwritev

    def killed(file: int, parts: list[Any], place: int) -> int:
        if place > 0:
            written(file, [bytes(parts[0]), parts[1][: len(parts[1]) // 2]], place)
            raise KeyboardInterrupt
        return written(file, parts, place)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwritev", killed)
        with pytest.raises(KeyboardInterrupt):
            store.write([0, 2], states([0, 2]))
    again = Store(tmp_path / "file", LENGTHS, 4, torch.bfloat16)
    assert again.read([0]) is not None and again.read([2]) is None and again.read([0, 2]) is None


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_not_kept(tmp_path: Path, value: float) -> None:
    store = Store(tmp_path / "file", LENGTHS, 4, torch.bfloat16)
    broken = states([0, 1])
    broken[0, 2, 1] = value
    store.write([0, 1], broken)
    assert store.read([0]) is None and (tmp_path / "file").stat().st_size == 0


def test_a_full_disk_ends_the_keeping_not_the_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = data()
    expected = train(adapted(), rows)
    written, times = os.pwritev, []

    def full(*given: Any) -> int:
        times.append(1)
        if len(times) > 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return written(*given)

    prefix = Prefix(model := adapted())
    keep(prefix, rows, 3)
    monkeypatch.setattr(os, "pwritev", full)
    same(train(model, rows, prefix), expected)
    assert len(times) == 4
    assert (
        capsys.readouterr().err.count("stopped caching hidden states: No space left on device") == 1
    )


def test_it_is_not_kept_where_it_is_too_large_or_of_no_use(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert kept(adapted(), data()).endswith("later epochs skip them")
    prefix = Prefix(adapted())
    assert keep(prefix, data(9), 1).endswith("not cached: there is only one epoch")
    monkeypatch.setattr(module, "MOST_BYTES", 1000)
    said = keep(Prefix(adapted()), data(8), 3)
    assert "not cached: 0 MiB, more than the 0 allowed" in said
    monkeypatch.setattr(module, "MOST_BYTES", 1 << 40)
    monkeypatch.setattr(module, "SHARE_OF_FREE", 0.0)
    assert "allowed" in keep(Prefix(adapted()), data(8), 3)
    assert len(keys(root)) == 1


def test_states_of_other_rows_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    prefix = Prefix(model := adapted())
    keep(prefix, data(), 3)
    with prefix.batch([0]):
        model(input_ids=torch.tensor([[5, 6]]))
    assert "stopped caching hidden states" in capsys.readouterr().err
    step(model, data(), [0], prefix)
