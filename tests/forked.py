"""What `accelerate launch` starts, as forks of a process that has imported the libraries.

Importing them takes a new process ten seconds of CPU time. Tests of the results of several ranks
use this; tests of how ranks start and end run the commands themselves.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import sys
from pathlib import Path
from unittest.mock import patch

from accelerate.commands import launch as launching
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from accelerate.utils.other import get_free_port
from processes import LIMIT_S

from lora_kit.run import shipped

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["lora_kit.recipe", "transformers.trainer", "trl"])


def launch(config: str | Path, script: str | Path, *arguments: str) -> tuple[int, str]:
    """`accelerate launch --config_file CONFIG SCRIPT ARGUMENTS` on one machine, to its end.

    Returns:
        The highest exit code of the ranks (1 for one that a signal ended), and what they printed.
    """
    parser = launching.launch_command_parser()
    given = parser.parse_args(["--config_file", str(config), str(script), *arguments])
    launchers = dict.fromkeys(("multi_gpu_launcher", "deepspeed_launcher"), lambda _: None)
    with patch.multiple(launching, **launchers):
        launching.launch_command(given)  # takes the config's values up, and starts nothing
    if given.use_deepspeed:
        _, environment = prepare_deepspeed_cmd_env(given)
    else:
        environment = prepare_multi_gpu_env(given)
    world = given.num_processes
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(get_free_port())}
    environment |= {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    ranks = []
    for rank in range(world):
        own = {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        command = [str(Path(script).resolve()), *arguments]
        said = Path.cwd() / f"rank{rank}.txt"
        ranks.append((SERVER.Process(target=_run, args=(command, own, Path.cwd(), said)), said))
        ranks[-1][0].start()
    for process, _ in ranks:
        process.join(LIMIT_S)
    codes = [process.exitcode for process, _ in ranks]
    for process, _ in ranks:
        process.kill()  # one that hangs
    printed = "".join(said.read_text(encoding="utf-8") for _, said in ranks)
    for _, said in ranks:
        said.unlink()
    return max(1 if code is None or code < 0 else code for code in codes), printed


def two_ranks(recipe: str, *arguments: str | Path) -> tuple[int, str]:
    """`launch` of a recipe with two processes on the CPU."""
    config = shipped("accelerate_configs") / "cpu_2proc.yaml"
    return launch(config, shipped("recipes") / f"{recipe}.py", *map(str, arguments))


def _run(command: list[str], environment: dict[str, str], folder: Path, said: Path) -> None:
    """`python COMMAND`, in the fork."""
    output = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.path.insert(0, str(Path(command[0]).parent))
    sys.argv = command
    runpy.run_path(command[0], run_name="__main__")
