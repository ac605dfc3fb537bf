"""Runs the code blocks of the README and the docs, as a reader would.

    python docs/run_blocks.py [--list] [FILE ...]      default: README.md and docs/*.md

Python blocks of one file share a namespace and run in order; bash blocks run with `hasten` of this Python on
the PATH. Each file gets an empty working folder. A block with `<!-- not run: reason -->` on the line above it is
skipped and counted; blocks in other languages (yaml, text, json) are not code.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
FENCE = re.compile(r"^```(\w*)\s*$")
NOT_RUN = re.compile(r"^<!-- not run: (?P<reason>\S.*\S) -->$")
CODE = ("python", "bash")
PLAIN = ("yaml", "text", "json", "")


@dataclass(frozen=True)
class Block:
    """One fenced block. `line` is the 1-based line of its first line of code."""

    file: Path
    line: int
    language: str
    code: str
    not_run: str | None

    def __str__(self) -> str:
        return f"{self.file.name}:{self.line}"


def default_files() -> list[Path]:
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks_of(file: Path) -> list[Block]:
    """Every fenced block of a Markdown file, in order."""
    found: list[Block] = []
    lines = file.read_text(encoding="utf-8").splitlines()
    number, last_text = 0, ""
    while number < len(lines):
        fence = FENCE.match(lines[number])
        if fence is None:
            last_text = lines[number] or last_text
            number += 1
            continue
        end = next(i for i in range(number + 1, len(lines)) if lines[i].rstrip() == "```")
        mark = NOT_RUN.match(last_text)
        code = "\n".join(lines[number + 1 : end]) + "\n"
        found.append(Block(file, number + 2, fence[1], code, mark["reason"] if mark else None))
        number, last_text = end + 1, ""
    return found


def run_python(block: Block, namespace: dict[str, Any]) -> None:
    # Leading newlines make line numbers in a traceback those of the Markdown file.
    code = compile("\n" * (block.line - 1) + block.code, str(block.file), "exec")
    exec(code, namespace)  # noqa: S102 - our own documentation


def run_bash(block: Block) -> None:
    paths = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block.code],
        env=os.environ | {"PATH": paths},
        stdin=subprocess.DEVNULL,
        check=True,
    )


def run_file(file: Path) -> tuple[int, int, list[str]]:
    """Run one file's blocks; returns how many ran, how many were skipped, and what failed."""
    ran, skipped, failed = 0, 0, []
    namespace: dict[str, Any] = {"__name__": f"blocks_of_{file.stem}"}
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            for block in blocks_of(file):
                if block.language not in CODE:
                    continue
                if block.not_run is not None:
                    skipped += 1
                    print(f"-- {block} {block.language}: not run, {block.not_run}", flush=True)
                    continue
                start = time.perf_counter()
                try:
                    run_python(block, namespace) if block.language == "python" else run_bash(block)
                    outcome = "ok"
                except (Exception, SystemExit) as error:  # noqa: BLE001 - reported
                    traceback.print_exc()
                    failed.append(f"{block}: {type(error).__name__}: {error}")
                    outcome = "FAILED"
                ran += 1
                print(f"-- {block} {block.language}: {outcome}, {time.perf_counter() - start:.1f} s", flush=True)
        finally:
            os.chdir(before)
    return ran, skipped, failed


def main() -> int:
    parser = argparse.ArgumentParser(description="Run the code blocks of the README and the docs.")
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--list", action="store_true", help="print the blocks and run nothing")
    arguments = parser.parse_args()
    files = [file.resolve() for file in arguments.files] or default_files()
    if arguments.list:
        for file in files:
            for block in blocks_of(file):
                print(block, block.language or "-", f"not run: {block.not_run}" if block.not_run else "")
        return 0
    totals, failures = [0, 0], []
    for file in files:
        ran, skipped, failed = run_file(file)
        totals = [totals[0] + ran, totals[1] + skipped]
        failures += failed
    print(f"{totals[0]} blocks ran, {len(failures)} failed, {totals[1]} are marked as not run")
    for failure in failures:
        print(f"  {failure}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
