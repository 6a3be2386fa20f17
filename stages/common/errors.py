"""One readable message and a non-zero exit for everything that a user can cause."""

from __future__ import annotations

import errno
import logging
import os
import pickle
import re
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

# What the operating system says when the machine, not the program, is at fault, and what helps.
_REMEDIES = {
    errno.ENOSPC: "the disk is full: free some space, then run the same command again",
    errno.EDQUOT: "the disk quota is used up: free some space, then run the same command again",
    errno.EACCES: "permission denied: make the file or its folder readable and writable for you",
    errno.EPERM: "not permitted: make the file or its folder writable for you",
    errno.EROFS: "the file system is read-only: work in a folder that you can write to",
    errno.EEXIST: "a file lies where a folder has to be: move it away",
    errno.ENOTDIR: "a file lies where a folder has to be: move it away",
    errno.EISDIR: "a folder lies where a file has to be: move it away",
    errno.ENOENT: "no such file: `dvc repro` makes the pipeline's own files, `dvc checkout` restores committed ones",
}
# A full disk in the words of safetensors and tokenizers (Rust), and of torch.save, which counts the bytes written.
_FULL_DISK = ("(os error 28)", "unexpected pos ")
# User and password of an address, which indexes, proxies and remotes have in the environment or in settings.
_CREDENTIALS = re.compile(r"(?<=://)[^/\s@'\"]+@")


class UserError(Exception):
    """Something a user can cause and mend.

    The message says what is wrong, where (file, row, key), what is allowed and what to do.
    """


class Stopped(BaseException):
    """A signal asked for the end; no failure, so that nothing that catches exceptions takes it for one.

    Attributes:
        number: the signal's.
    """

    def __init__(self, number: int, message: str = "nothing half-written stays; run the same command again") -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}: {message}")
        self.number = number


def run_stage(main: Callable[[], None], *, takes_arguments: bool = True) -> None:
    """Run a stage's `main` and end the process: 0 when it returned, 1 with one message where a user can help.

    Bugs keep their traceback: it is what their report needs. A stage that DVC runs ends when `dvc` does: it would write
    its outputs while a second `dvc repro` makes them again.

    Args:
        main: the stage.
        takes_arguments: whether `main` reads the command line; otherwise arguments are refused.
    """
    logging.setLogRecordFactory(_Record)
    try:
        if not takes_arguments:
            _refuse_arguments()
        if "DVC_STAGE" in os.environ:
            from stages.common.orphans import end_with_dvc

            end_with_dvc()
        main()
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        sys.exit(128 + stopped.number)
    except UserError as error:
        _fail(str(error))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except MemoryError:
        _fail("the machine is out of memory: close other programs, or use a smaller base model or table")
    except OSError as error:
        _fail_of_system(error)
        raise
    except Exception as error:
        if isinstance(error.__cause__, OSError):
            _fail_of_system(error.__cause__)  # datasets wraps it into an error that says nothing
        if any(words in str(error) for words in _FULL_DISK):
            _fail(f"{_REMEDIES[errno.ENOSPC]} ({error})")
        if "DataLoader worker (pid" in str(error):
            _fail(
                f"a process that prepares batches ended ({str(error).splitlines()[0]}); killed, perhaps because the "
                "machine is out of memory. Run the same command again: it goes on from the last checkpoint"
            )
        if isinstance(error, pickle.UnpicklingError):
            _fail(
                "a checkpoint holds something else than tensors and plain values, which could run code, and was not "
                f"loaded ({str(error).splitlines()[0]}). Remove the run's folder among the checkpoints to start anew"
            )
        if "DefaultCPUAllocator" in str(error):
            _fail("the machine is out of memory: close other programs, set MICRO_BATCH_SIZE=1, or take a smaller base")
        if "CUDA out of memory" in str(error):
            remedy = "end other programs on it, or use more GPUs or a smaller base model"
            _fail(f"the GPU is out of memory: {remedy} ({error})")
        raise


def _refuse_arguments() -> None:
    if sys.argv[1:]:
        raise UserError(
            f"stages.{Path(sys.argv[0]).stem}: unknown arguments {' '.join(sys.argv[1:])!r}. It takes none: its "
            "settings are in params.yaml, and docs/pipeline.md says what it reads and writes."
        )


def _fail_of_system(error: OSError) -> None:
    number, place = _number_and_place(error)
    if number in _REMEDIES:
        _fail(f"{place}: {_REMEDIES[number]}")


def _number_and_place(error: OSError) -> tuple[int | None, str]:
    if isinstance(error, shutil.Error) and isinstance(error.args[0], list):
        # Of a folder's copy: for each file origin, target and the error's text.
        _, target, text = error.args[0][0]
        return next((number for number in _REMEDIES if f"[Errno {number}]" in text), None), str(target)
    # Of a move the target says more. pyarrow's errors have no file name, but their text does.
    return error.errno, str(error.filename2 or error.filename or error)


def _fail(message: str) -> None:
    print(f"error: {without_credentials(message)}", file=sys.stderr)
    sys.exit(1)


def without_credentials(text: str) -> str:
    """A text whose addresses have lost the user and password before the host."""
    return _CREDENTIALS.sub("***@", text)


class _Record(logging.LogRecord):
    """What a library logs: huggingface_hub, for one, logs each address that it tries again."""

    def getMessage(self) -> str:  # noqa: N802 - logging's own name
        return without_credentials(super().getMessage())


def listing(items: list[str], most: int = 10) -> str:
    """The first `most` items in one line, and how many more there are."""
    shown = ", ".join(items[:most])
    return shown if len(items) <= most else f"{shown} and {len(items) - most:,} more"
