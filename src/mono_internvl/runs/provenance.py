"""What made a number: command, commit, versions and day, as they stand beside every number."""

from __future__ import annotations

import datetime
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mono_internvl.compute import ComputePlan


def command() -> str:
    """What was typed, for the record beside a number; folders are named without where they lie."""
    program = Path(sys.argv[0]).name
    words = ["mono-internvl" if program == "__main__.py" else program]  # python -m mono_internvl
    for word in sys.argv[1:]:
        option, sign, value = word.rpartition("=")
        words.append(f"{option}{sign}{Path(value).name if Path(value).is_absolute() else value}")
    # A name that is not UTF-8 is written escaped: this goes into files that are.
    return shlex.join(words).encode("utf-8", "backslashreplace").decode()


@cache
def commit() -> str:
    """Short commit of the source checkout, "+" behind it where the tree was changed.

    "unknown" for an installed copy, which may lie in the tree of another project.
    """
    here = Path(__file__).resolve()

    def git(*words: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(here.parent), *words],
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        )
        return done.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", here.name)
        is_changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "--short=12", "HEAD") + ("+" if is_changed else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def versions() -> dict[str, str]:
    """Version of Python and of the packages that numbers depend on."""
    import torch
    import transformers

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,  # says which build it is, unlike the package's metadata
        "transformers": transformers.__version__,
    }


def today() -> str:
    """The day in UTC, as 2026-01-31."""
    return datetime.datetime.now(datetime.UTC).date().isoformat()


@dataclass(frozen=True, kw_only=True)
class Origin:
    """What made the figures of a run.

    Attributes:
        command: That was typed.
        processes: That trained one model.
        device: Of training and evaluation.
        versions: Of what ran, commit included.
        date: Day, as 2026-01-31.
        plan: What it was computed with, as `ComputePlan.to_dict` gives it: precision, threads, what
            bf16 costs on the machine, ...; None for figures older than plans.
        protocol: How the model was asked, as `Protocol.to_dict` gives it; None where it was not
            asked, and for figures older than protocols.
    """

    command: str
    processes: int
    device: str
    versions: Mapping[str, str]
    date: str
    plan: Mapping[str, Any] | None = None
    protocol: Mapping[str, Any] | None = None


def origin(plan: ComputePlan, protocol: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The fields of an `Origin`, as they are now.

    Args:
        plan: What is computed with.
        protocol: How the model was asked; None if it was not.
    """
    made_by = {**versions(), "commit": commit()}
    return vars(
        Origin(
            command=command(),
            processes=plan.processes,
            device=plan.device,
            versions=made_by,
            date=today(),
            plan=plan.to_dict(),
            protocol=protocol,
        )
    )


def place_of(made: Mapping[str, Any]) -> str:
    """Device, and where it is known precision and vector instructions, in a few words.

    Args:
        made: The fields of an `Origin`.
    """
    device, plan = str(made["device"]), made.get("plan")
    if plan is None:
        return device
    where = f" ({plan['cpu_capability']})" if device == "cpu" else ""
    many = "s" if plan["threads"] != 1 else ""
    return f"{device}{where}, {plan['precision']}, {plan['threads']} thread{many} each"
