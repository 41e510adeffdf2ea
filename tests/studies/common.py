"""What the studies share: the edited script, and the tables that they print and keep as JSON."""

import datetime
import json
import os
import platform
import sys
import tempfile
from pathlib import Path

import torch

STUDIES, THREADS = Path(__file__).resolve().parent, torch.get_num_threads()
sys.path.insert(0, str(STUDIES.parent))
import conftest  # noqa: E402

torch.set_num_threads(THREADS)  # the tests take one
ic, ROOT = conftest.ic, conftest.ROOT
QUICK = bool(os.environ.get("STUDY_QUICK"))  # all of it in small, the numbers into a temporary file


def changed_script(folder, constants, lines=""):
    """A copy of the script in `folder` with those constants, and lines before its end."""
    script = conftest.edited_script(folder, **constants)
    source, end = script.read_text(encoding="utf-8"), '\nif __name__ == "__main__":\n'
    assert source.count(end) == 1
    script.write_text(source.replace(end, f"\n{lines}\n{end}"), encoding="utf-8")
    return script


def machine():
    """The processors, what they can do, and the versions."""
    model, flags = platform.processor(), []
    if os.path.exists("/proc/cpuinfo"):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        facts = dict([part.strip() for part in line.partition(":")[::2]] for line in lines)
        model, flags = facts.get("model name", model), facts.get("flags", "").split()
    parts = [torch.cuda.get_device_name()] if torch.cuda.is_available() else []
    parts += [model, f"{os.cpu_count()} cores, {THREADS} threads"]
    parts += [flag for flag in ("avx512_bf16", "amx_bf16") if flag in flags] or ["no bf16 products"]
    return ", ".join([*parts, f"torch {torch.__version__}", f"Python {platform.python_version()}"])


def text(value):
    if isinstance(value, str):
        return value
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def as_markdown(title, rows):
    """{row: {column: value}} as a table."""
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    lines = [[title, *columns], ["---"] * (1 + len(columns))]
    lines += [[row, *(text(rows[row].get(name, "")) for name in columns)] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def keep(file, part, tables):
    """Make {title: {row: {column: value}}} that part of the JSON file, to four digits; print it."""
    part_of_file = {"date": str(datetime.date.today()), "machine": machine(), "tables": tables}
    exact = json.dumps(part_of_file)
    short = json.loads(exact, parse_float=lambda number: float(f"{float(number):.4g}"))
    path = (Path(tempfile.gettempdir()) if QUICK else STUDIES) / file
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    known[part] = short
    path.write_text(json.dumps(known, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    for title, rows in short["tables"].items():
        print("", as_markdown(title, rows), sep="\n", flush=True)
