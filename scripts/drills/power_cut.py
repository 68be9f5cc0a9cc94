"""A drill: cut the power while a run trains, and look at what is on the disk.

    sudo python scripts/drills/power_cut.py [--steps 40] [--without-fsync]

A small run trains in an ext4 file system in an image file, on a loop device. After each seal, and
at the message "written to", its processes are stopped and the image is copied: the copy is the disk
as a power cut at that moment leaves it, since its journal is only committed by fsync. Each copy is
mounted, which replays its journal, and must hold what was there: every sealed checkpoint with all
its files, and after the message the finished run, which must load.

`--without-fsync` makes fsync do nothing, as a control: the drill must then fail.

Linux; needs root, mkfs.ext4, losetup and mount. Nothing outside of a temporary folder is changed.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
from interrupted import LORA_KIT, family

from lora_kit.errors import UserError
from lora_kit.run import read_lock, shipped
from lora_kit.train.save import SEAL, read_seal

RUN = Path("runs/drill")


@contextmanager
def mounted(image: Path, folder: Path) -> Iterator[Path]:
    """The file system of an image; its journal is committed only when it is told to."""
    folder.mkdir()
    subprocess.run(["mount", "-o", "loop,commit=3000", image, folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)
        folder.rmdir()


def train(work: Path, steps: int, environment: dict[str, str], image: Path) -> Iterator[Path]:
    """Train in `work`; yields a copy of the image at each moment."""
    settings = [
        "name=drill",
        "base.quantize=none",
        "base.dtype=float32",
        "prove.shots=0",
        "data.general=",
        f"train.max_steps={steps}",
        f"train.save_steps={steps // 4}",
        "train.per_device_train_batch_size=2",
        "train.save_total_limit=9",
    ]
    config = shipped("recipes") / "configs" / "nano-cpt.yaml"
    log = image.with_name("log")
    with log.open("w") as out:
        process = subprocess.Popen(
            [*LORA_KIT, "train", str(config), *settings], cwd=work, stderr=out, env=environment
        )
    seen: set[Path] = set()
    finished = False
    while not finished:
        ended = process.poll() is not None
        new = set((work / RUN).glob(f"checkpoints/*/{SEAL}")) - seen
        finished = f"written to {RUN}" in log.read_text()
        if ended and not finished:
            raise SystemExit(log.read_text())
        if new or finished:
            seen |= new
            with stopped(process.pid):
                yield shutil.copyfile(image, image.with_name(f"cut-{len(seen)}-{finished}"))
        time.sleep(0.001)
    process.wait()


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    """Hold a process and all that it started."""
    found = family(pid)
    for number in (signal.SIGSTOP, signal.SIGCONT):
        for process in found:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)
        if number is signal.SIGSTOP:
            yield


def problems(work: Path, seals: int, finished: bool) -> list[str]:
    """What a mounted copy does not hold."""
    run, found = work / RUN, []
    intact = 0
    for folder in sorted((run / "checkpoints").glob("*")):
        if (folder / SEAL).exists():  # else it is known to be incomplete
            try:
                read_seal(folder)
                intact += 1
            except UserError as error:
                found.append(str(error))
    # The newest may have been copied between the seal's renaming and the fsync of its folder.
    if intact < seals - (not finished):
        found.append(f"{intact} of {seals} sealed checkpoints")
    if finished:
        if not read_lock(run).get("finished"):
            found.append("run.lock.json: not finished")
        for name in ("report.json", "report.html", "metrics.jsonl", "census.json", "run.yaml"):
            if not (run / name).is_file() or not (run / name).stat().st_size:
                found.append(f"{name} is missing or empty")
        words = [*LORA_KIT, "generate", str(run), "A list", "--max-new-tokens", "2"]
        done = subprocess.run(words, capture_output=True, text=True)
        if done.returncode:
            found.append(done.stderr.strip())
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--without-fsync", action="store_true")
    given = parser.parse_args()
    failed = 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        image = folder / "image"
        image.write_bytes(b"")
        os.truncate(image, 256 * 2**20)
        subprocess.run(["mkfs.ext4", "-q", "-F", image], check=True)
        path = [str(Path(__file__).resolve().parents[2])]
        if given.without_fsync:
            (folder / "sitecustomize.py").write_text("import os\nos.fsync = lambda opened: None\n")
            path.insert(0, temporary)
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(path),
            "LORA_KIT_CACHE": str(folder / "cache"),
        }
        with mounted(image, folder / "work") as work:
            copies = list(train(work, given.steps, environment, image))
        for copy in copies:
            seals, finished = copy.name.removeprefix("cut-").split("-")
            with mounted(copy, folder / "after") as work:
                found = problems(work, int(seals), finished == "True")
            failed += bool(found)
            print(
                f"after {seals} seals{', finished' * (finished == 'True')}:", found or "all there"
            )
    print(f"{len(copies) - failed} of {len(copies)} survive")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
