"""`accelerate launch` without its traceback: it ends with the exit code of the worker that failed
first, as a shell gives it (128 + the signal that killed it)."""

from __future__ import annotations

import logging
import os
import subprocess
import sys

from lora_kit.errors import in_a_line


def quiet_agent() -> None:
    """Silence what torch's launcher says when another machine's launcher has ended before it: its
    last wait, once its own workers have ended, then loses the store that the two shared."""
    agent = logging.getLogger("torch.distributed.elastic.agent.server.api")
    agent.addFilter(lambda record: "exit barrier" not in record.getMessage())
    if "TORCH_CPP_LOG_LEVEL" not in os.environ:
        os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"  # read when torch is imported
        import torch  # noqa: F401

        del os.environ["TORCH_CPP_LOG_LEVEL"]  # the workers' warnings stay


def main() -> None:
    from lora_kit.base.load import quiet_libraries

    quiet_libraries()
    quiet_agent()
    from accelerate.commands.launch import main as launch
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    code = 0
    try:
        launch()
    except subprocess.CalledProcessError as error:
        code = error.returncode
    except ChildFailedError as error:
        code = error.get_first_failure()[1].exitcode
    except SignalException as error:
        code = -error.sigval
    except Exception as error:
        print(f"accelerate: {in_a_line(error)}", file=sys.stderr)
        code = 1
    raise SystemExit(code if code >= 0 else 128 - code)


if __name__ == "__main__":
    main()
