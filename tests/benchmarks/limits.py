"""What it takes to refuse a file that is over a limit: seconds and peak memory of each, in a process of its own.

    python tests/benchmarks/limits.py [--work FOLDER]

Files are made first (about 700 MB, in FOLDER or a temporary one), then each is read by `read_rows` as all verbs read data.
The last line of each row is what a person is told. "nothing" is Python with the same imports: the floor of all others.
"""

import argparse
import gzip
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

GOOD = json.dumps({"prompt": "a", "chosen": "yes", "rejected": "no"}).encode()
MIB = 2**20


def packed(file: Path, unit: bytes, count: int) -> None:
    """Write a gzip file of one unit of bytes, so many times."""
    with gzip.open(file, "wb", compresslevel=6) as stream:
        stream.write(GOOD + b"\n")
        for _ in range(count):
            stream.write(unit)


def long_line(file: Path) -> None:
    """Write a good row, a line of 300 MB, a good row."""
    with file.open("wb") as stream:
        stream.write(GOOD + b"\n" + b'{"prompt": "')
        for _ in range(300):
            stream.write(b"x" * MIB)
        stream.write(b'"}\n' + GOOD + b"\n")


def deep(file: Path) -> None:
    """Write a good row and one of 30 million levels."""
    file.write_bytes(GOOD + b"\n" + b"[" * 30_000_000 + b"]" * 30_000_000 + b"\n")


FILES: dict[str, Callable[[Path], object]] = {
    "nothing.jsonl": lambda file: file.write_bytes(GOOD + b"\n"),
    "line_of_300_MB.jsonl": long_line,
    "30_million_levels.jsonl": deep,
    "201_levels.jsonl": lambda file: file.write_bytes(
        GOOD + b"\n" + GOOD[:-1] + b', "x": ' + b"[" * 200 + b"]" * 200 + b"}"
    ),
    "blanks_300_MB.jsonl.gz": lambda file: packed(file, b" " * MIB, 300),
    "blanks_300_MB.json.gz": lambda file: packed(file, b" " * MIB, 300),
    "lines_300_MB.jsonl.gz": lambda file: packed(file, b"\n" * MIB, 300),
    "binary_300_MB.jsonl": lambda file: file.write_bytes(b"\x7fELF\x02\x01\0\0" * (300 * MIB // 8)),
    "gzip_under_another_name.jsonl": lambda file: file.write_bytes(gzip.compress(GOOD)),
    "not_there.csv": lambda file: None,
}


def read(file: str) -> None:
    """Read a file as all verbs do, and print seconds, peak memory in MiB, and what is said."""
    from rlhf.data.read import ReadReport, read_rows
    from rlhf.errors import UserError

    begin, report = time.perf_counter(), ReadReport(Path(file).name)
    try:
        report.kept = sum(1 for _ in read_rows(file, report))
        sentence = " ".join(" ".join(report.sentences()).split())
    except UserError as error:
        sentence = str(error).replace(str(Path(file).parent) + os.sep, "")
    seconds = time.perf_counter() - begin
    # getrusage would begin at what the process that started this one held.
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines())
    peak = int(status["VmHWM"].split()[0]) / 1024
    print(json.dumps({"seconds": seconds, "peak": peak, "sentence": sentence}))


def main() -> None:
    """Make the files, read each, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--read", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.read:
        read(arguments.read)
        return
    with tempfile.TemporaryDirectory() as temporary:
        work = arguments.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        print("| file | seconds | peak, MiB | what is said |\n|---|---|---|---|")
        for name, make in FILES.items():
            make(work / name)
            command = [sys.executable, __file__, "--read", str(work / name)]
            result = subprocess.run(command, capture_output=True, text=True, check=False)
            if result.returncode:
                print(f"| {name} | failed | | {result.stderr.strip().splitlines()[-1][:120]} |")
            else:
                row = json.loads(result.stdout)
                print(f"| {name} | {row['seconds']:.2f} | {row['peak']:.0f} | {row['sentence']} |", flush=True)
            (work / name).unlink(missing_ok=True)


if __name__ == "__main__":
    main()
