"""What the studies share: the edited script, its runs, and tables, printed and kept as JSON."""

import datetime
import itertools
import json
import math
import os
import platform
import re
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean, stdev

import torch

STUDIES, THREADS = Path(__file__).resolve().parent, torch.get_num_threads()
sys.path.insert(0, str(STUDIES.parent))
import conftest  # noqa: E402

torch.set_num_threads(THREADS)  # the tests take one
ic, ROOT = conftest.ic, conftest.ROOT
COLUMNS = {"accuracy": "accuracy", "image → text R@5": "image_to_text_r5"}
COLUMNS["text → image R@5"] = "text_to_image_r5"  # each a key of metrics.jsonl


# ---- Runs ----
def write_dataset(folder, images, **splits):
    """The rows of each split → the constants that name this dataset."""
    folder.mkdir(exist_ok=True)
    for split, rows in splits.items():
        conftest.write_lines(folder / f"{split}_data.json", rows)
    return {"IMAGE_PATH": f"{images}", "JSON_PATH": f"{folder}/{{split}}_data.json"}


def changed_script(folder, constants, lines=""):
    """A copy of the script in `folder` with those constants, and lines before its end."""
    script = conftest.edited_script(folder, **constants)
    source, end = script.read_text(encoding="utf-8"), '\nif __name__ == "__main__":\n'
    assert source.count(end) == 1
    script.write_text(source.replace(end, f"\n{lines}\n{end}"), encoding="utf-8")
    return script


def run_all(variants, seeds, base, base_lines=""):
    """{variant: [{"folder split": the last such line of folder/metrics.jsonl} of each seed]}.

    variants: {name: (constants, lines before the script's end)}, besides the base's.
    """

    def run(job):
        (constants, lines), seed = variants[job[0]], job[1]
        with tempfile.TemporaryDirectory() as folder:
            how = base | {"SEED": seed} | constants
            conftest.launch(changed_script(Path(folder), how, base_lines + lines))
            files = list(Path(folder).glob("*/metrics.jsonl"))
            found = [(file, line) for file in files for line in conftest.read_lines(file)]
            return {f"{file.parent.name} {line['split']}": line for file, line in found}

    jobs = list(itertools.product(variants, seeds))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        done = dict(zip(jobs, pool.map(run, jobs), strict=True))
    return {name: [done[name, seed] for seed in seeds] for name in variants}


def compare(variants, last):
    """{variant: [a line of metrics.jsonl for each seed]} → a table, each cell mean ± deviation.

    The score is the mean of the rest; last: its distance from the first's, in pooled deviations.
    """
    table, base = {}, None
    for name, lines in variants.items():
        values = {column: [line[key] for line in lines] for column, key in COLUMNS.items()}
        values["score"] = [mean(of_seed) for of_seed in zip(*values.values(), strict=True)]
        base = base or values["score"]
        pooled = max(math.hypot(stdev(values["score"]), stdev(base)) / math.sqrt(2), 1e-3)
        row = {column: f"{mean(each):.3f} ± {stdev(each):.3f}" for column, each in values.items()}
        table[name] = row | {last: f"{(mean(values['score']) - mean(base)) / pooled:+.1f}"}
    return table


# ---- Tables: {title: {row: {column: value}}} ----
def machine():
    """The processors, what they can do, and the versions."""
    facts = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    parts = [torch.cuda.get_device_name()] if torch.cuda.is_available() else []
    parts += re.findall(r"^model name\s*: (.*)", facts, flags=re.M)[:1]
    parts.append(f"{os.cpu_count()} cores, {THREADS} threads")
    parts += sorted(set(re.findall(r" (\w+_bf16)\b", facts))) or ["no bf16 products"]
    return ", ".join([*parts, f"torch {torch.__version__}", f"Python {platform.python_version()}"])


def text(value):
    if isinstance(value, str):
        return value
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def as_markdown(title, rows):
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    lines = [[title, *columns], ["---"] * (1 + len(columns))]
    lines += [[row, *(text(rows[row].get(name, "")) for name in columns)] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def keep(file, part, tables):
    """Make the tables that part of the JSON file, to four digits; print them."""
    exact = json.dumps({"date": str(datetime.date.today()), "machine": machine(), "tables": tables})
    short = json.loads(exact, parse_float=lambda number: float(f"{float(number):.4g}"))
    known = json.loads((STUDIES / file).read_text(encoding="utf-8")) | {part: short}
    (STUDIES / file).write_text(json.dumps(known, indent=1, ensure_ascii=False) + "\n", "utf-8")
    for title, rows in short["tables"].items():
        print("", as_markdown(title, rows), sep="\n", flush=True)
