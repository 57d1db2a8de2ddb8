"""The lines of a Dockerfile's target in a clean root folder, where no container engine builds: as far as it goes.

    debootstrap --variant=minbase --include=python3,python3-venv,python-is-python3,ca-certificates bookworm ROOT
    python -m tests.faults.replay_docker ROOT --target cpu --out replay.json --then "--version"

As root, on Linux. ROOT takes the place of `python:3.11-slim-bookworm` (Debian's Python is the same 3.11). Every RUN, ENV, WORKDIR
and USER line of the target and of what it is built on is done in ROOT, files are copied into it, then the entrypoint runs with
the arguments of `--then`. Folders named by `--bind` are there while it runs, such as a local package index. `--index-url` of
PyTorch may be left out where only another index can be had; the figures say so.
"""

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

PROJECT = Path(__file__).parents[2]
PYTORCH_INDEX = re.compile(r" --index-url https://download\.pytorch\.org/\S+")


class Line(NamedTuple):
    """An instruction of a Dockerfile and what stands behind it."""

    word: str
    text: str


def lines_of(dockerfile: Path) -> Iterator[Line]:
    """Yield the instructions, continued lines joined."""
    text = "\n".join(x for x in dockerfile.read_text(encoding="utf-8").splitlines() if not x.startswith("#"))
    for line in text.replace("\\\n", " ").splitlines():
        if line.strip():
            word, _, rest = line.strip().partition(" ")
            yield Line(word, rest.strip())


def stages_of(dockerfile: Path) -> dict[str, list[Line]]:
    """Return the instructions of each stage, FROM first."""
    stages: dict[str, list[Line]] = {}
    for line in lines_of(dockerfile):
        if line.word == "FROM":
            stages[line.text.rpartition(" ")[2]] = []
        if stages:
            list(stages.values())[-1].append(line)
    return stages


def wanted(stages: dict[str, list[Line]], target: str) -> list[str]:
    """Return the stages that a target is built of, in their order: those it begins with, and those it copies from."""
    needed = {target}
    for name in reversed(stages):
        if name in needed:
            needed |= {line.text.split()[0] for line in stages[name] if line.word == "FROM"}
            needed |= {found for line in stages[name] for found in re.findall(r"--from=(\S+)", line.text)}
    return [name for name in stages if name in needed]


class Root:
    """A root folder with what the lines so far have set."""

    def __init__(self, folder: Path, *, keep_index: bool):
        self.folder, self.keep_index = folder, keep_index
        self.ran: list[dict[str, Any]] = []
        self.entrypoint: list[str] = []
        self.begin("", goes_on=False)

    def begin(self, stage: str, *, goes_on: bool) -> None:
        """Begin a stage, where the one that it is built on ended, or anew; files stay, since all stages share one root."""
        self.stage = stage
        if not goes_on:
            self.environment = {"PATH": "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin", "HOME": "/tmp"}
            self.place, self.user = "/", "0"

    def call(self, command: list[str], *, user: str) -> subprocess.CompletedProcess[str]:
        """Run a command in the root."""
        pip = {name: value for name, value in os.environ.items() if name.startswith(("PIP_", "SSL_"))}
        inside = f"cd {shlex.quote(self.place)} && exec {shlex.join(command)}"
        return subprocess.run(
            ["chroot", f"--userspec={user}:{user}", str(self.folder), "/bin/sh", "-c", inside],
            env={**pip, **self.environment}, capture_output=True, text=True, check=False,
        )  # fmt: skip

    def do(self, line: Line) -> None:
        """Do one instruction.

        Raises:
            RuntimeError: a command failed.
        """
        match line.word:
            case "ENV":
                for name, value in (part.split("=", 1) for part in shlex.split(line.text)):
                    self.environment[name] = value.replace("$PATH", self.environment["PATH"])
            case "WORKDIR":
                self.place = line.text
                (self.folder / line.text.strip("/")).mkdir(parents=True, exist_ok=True)
            case "USER":
                self.user = line.text
            case "ENTRYPOINT":
                self.entrypoint = json.loads(line.text)
            case "COPY" if "--from=" not in line.text:  # of another stage: it lies in this root already
                *names, to = line.text.split()
                for name in names:
                    self.copy(PROJECT / name, to, is_one=len(names) == 1)
            case "RUN":
                self.run(re.sub(r"--mount=\S+", "", line.text).strip())

    def copy(self, source: Path, to: str, *, is_one: bool) -> None:
        """Copy a file into a folder, or a folder to a place."""
        place = self.folder / os.path.normpath(f"{self.place}/{to}" if not to.startswith("/") else to).strip("/")
        if source.is_dir() and is_one:
            shutil.copytree(source, place, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            place.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, place)

    def run(self, command: str) -> None:
        """Run a RUN line, and note it."""
        used = command if self.keep_index else PYTORCH_INDEX.sub("", command)
        begin = time.monotonic()
        result = self.call(["/bin/sh", "-c", used], user=self.user)
        seconds = round(time.monotonic() - begin, 1)
        self.ran.append({"stage": self.stage, "run": command, "exit": result.returncode, "seconds": seconds})
        if used != command:
            self.ran[-1]["without"] = "the index of PyTorch"
        print(json.dumps(self.ran[-1]), flush=True)
        if result.returncode != 0:
            raise RuntimeError(f"{used}\n{(result.stdout + result.stderr)[-2000:]}")


def main() -> None:
    """Do the lines, run the entrypoint, and write what ran with its exit codes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path)
    parser.add_argument("--target", default="cpu")
    parser.add_argument("--bind", nargs="*", type=Path, default=[])
    parser.add_argument("--without-index", action="store_true", help="take torch from the usual index")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--then", default="--version", help="arguments of the entrypoint")
    options = parser.parse_args()
    stages = stages_of(PROJECT / "docker" / "Dockerfile")
    root = Root(options.root.resolve(), keep_index=not options.without_index)
    with ExitStack() as ends:
        for place in [*options.bind, Path("/proc")]:
            inside = root.folder / place.relative_to("/")
            inside.mkdir(parents=True, exist_ok=True)
            subprocess.run(["mount", "--bind", str(place), str(inside)], check=True)
            ends.callback(subprocess.run, ["umount", str(inside)], check=True)
        for name in wanted(stages, options.target):
            root.begin(name, goes_on=stages[name][0].text.split()[0] in stages)
            for line in stages[name]:
                root.do(line)
        result = root.call([*root.entrypoint, *shlex.split(options.then)], user=root.user)
    print(result.stdout[-1500:], result.stderr[-1500:])
    entry = shlex.join([*root.entrypoint, *shlex.split(options.then)])
    ran = [*root.ran, {"stage": options.target, "run": entry, "user": root.user, "exit": result.returncode}]
    options.out.write_text(json.dumps(ran, indent=1) + "\n", encoding="utf-8")
    raise SystemExit(1 if any(each["exit"] for each in ran) else 0)


if __name__ == "__main__":
    main()
