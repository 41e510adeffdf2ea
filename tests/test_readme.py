"""The README's lines work as they stand there."""

import contextlib
import io
import re
import shutil

from conftest import ROOT, run_inside, edited_script

README = (ROOT / "README.md").read_text(encoding="utf-8")


def code(heading):
    """The first code block below a heading."""
    return re.search(rf"^{heading}\n.*?```\w+\n(.*?)```", README, flags=re.M | re.S)[1]


def test_the_lines_that_use_the_weights(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/sample").symlink_to(ROOT / "data/sample")
    script = edited_script(tmp_path)
    script.write_text(
        script.read_text(encoding="utf-8").replace('"NUM_EPOCHS": 60', '"NUM_EPOCHS": 1'), encoding="utf-8"
    )
    output, exit_code = run_inside(script)
    assert exit_code == 0, output
    monkeypatch.chdir(tmp_path)
    lines = code("## Using the weights")
    assert len([line for line in lines.splitlines() if line.strip()]) <= 13
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(lines, {})
    assert "data/sample/images/test/0." in printed.getvalue() and "red lehenga choli: [" in printed.getvalue()


def test_ci_runs_the_readmes_test_command():
    command = re.search(r"^python3 -m venv .*pytest tests$", README, flags=re.M)[0]
    assert command in (ROOT / ".ci/run").read_text(encoding="utf-8").splitlines()


def test_the_table_of_constants_gives_their_values():
    import indofashion_clip as ic

    for name, value in re.findall(r"^\| `([A-Z_]+)` \| `?([^`|]+?)`? \|", README, flags=re.M):
        assert str(getattr(ic, name)) == str(eval(value) if value[0].isdigit() else value), name


def test_nothing_else_at_the_top():
    import subprocess

    if not shutil.which("git") or not (ROOT / ".git").exists():
        return
    files = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    assert {file.split("/")[0] for file in files} == {
        "indofashion_clip.py",
        "requirements.txt",
        "README.md",
        "tests",
        "data",
        ".ci",
        ".gitignore",
    }
