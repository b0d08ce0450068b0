"""The command line as a whole."""

from __future__ import annotations

import subprocess
import sys

import pytest
from rich.console import Console

import logquant
from logquant.cli import interrupt, shared
from logquant.methods import method_names, parse_cache
from tests.helpers.cli import refused, run, succeed

WRITING = {
    "info": (),
    "plan": (),
    "eval": ("a.txt",),
    "calibrate": ("a.txt",),
    "train-residual": ("a.txt",),
    "generate": ("--prompt", "a"),
    "bench attend": (),
    "bench generate": (),
    "bench memory": (),
}


def test_help_names_every_command():
    output = succeed("--help").output
    assert all(command in output for command in ("generate", "info", "eval", "bench"))
    assert all(command in succeed("bench", "--help").output for command in ("attend", "memory"))


@pytest.mark.parametrize("group", [(), ("bench",)])
def test_help_shows_whole_lines(group):
    output = succeed(*group, "--help", columns=80).output
    assert "..." not in output.partition("Commands:")[2] and "memory" in output


def test_the_version_is_the_packages():
    assert succeed("--version").output == f"logquant {logquant.__version__}\n"


def modules_after(*args: str) -> tuple[int, set[str]]:
    """The exit code of a command in a process of its own, and what of the slow packages it has imported."""
    code = f"""
import sys
from logquant.cli import app
try:
    app({list(args)!r})
except SystemExit as end:
    print("modules", end.code, *({{"torch", "transformers", "numpy", "jinja2"}} & set(sys.modules)))
"""
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    _, code, *modules = output.splitlines()[-1].split()
    return int(code), set(modules)


@pytest.mark.parametrize(
    ("args", "code"),
    [
        (("--help",), 0),
        (("eval", "--help"), 0),
        (("--version",), 0),
        (("infoo",), 2),
        (("eval", "--tokns", "3"), 2),
        (("eval", "--caches", "kivy", __file__), 2),
        (("plan", "--caches", "kivi"), 2),
        (("eval", "nowhere.txt"), 2),
        (("generate", "--prompt", "a", "--model", "no/such/model"), 2),
    ],
)
def test_what_needs_no_torch_does_not_wait_for_it(args, code):
    """Importing torch and transformers takes seconds."""
    assert modules_after(*args) == (code, set())


def test_info_does_not_wait_for_transformers():
    code, modules = modules_after("info")
    assert code == 0 and "torch" in modules and "transformers" not in modules


def test_names_of_caches_are_those_that_are_registered():
    assert list(shared.METHODS) == method_names()
    of_packages = ("quanto", "hqq")  # made only where those are installed
    kinds = {name: parse_cache(name) for name in shared.METHODS if name not in of_packages}
    assert list(shared.OWN) == [name for name, spec in kinds.items() if spec.quantization is not None]


@pytest.mark.parametrize("command", WRITING)
def test_a_result_that_cannot_be_written_is_refused_before_the_work(command, tmp_path, monkeypatch):
    monkeypatch.setattr(shared, "texts", lambda *args: pytest.fail("the work has begun"))
    monkeypatch.setattr(shared, "check_model", lambda *args: pytest.fail("the work has begun"))
    args = (*command.split(), *WRITING[command], "--json")
    assert f"there is no directory {tmp_path / 'no'} to write x.json to" in refused(*args, tmp_path / "no" / "x.json")
    assert f"{tmp_path} is a directory, a file is needed" in refused(*args, tmp_path)


@pytest.mark.parametrize(
    ("command", "output"), [("calibrate", "x.safetensors"), ("train-residual", "x"), ("report", "x.html")]
)
def test_an_output_that_cannot_be_written_is_refused_before_the_work(command, output, tmp_path):
    for option in ("-o", "--output"):
        assert f"there is no directory {tmp_path / 'no'}" in refused(command, "a", option, tmp_path / "no" / output)


def test_what_is_read_is_not_written_over(tmp_path):
    text = tmp_path / "a.txt"
    text.write_text("abc")
    for args in (
        ("eval", text, "--json"),
        ("calibrate", text, "-o"),
        ("calibrate", text, "--json"),
        ("report", text, "-o"),
    ):
        assert f"{text} would be written over" in refused(*args, text)
    assert "would be written over" in refused("calibrate", text, "-o", tmp_path / "x", "--json", tmp_path / "x")
    assert text.read_text() == "abc" and not (tmp_path / "x").exists()


def test_checking_a_file_neither_makes_nor_changes_it(tmp_path):
    new, old = tmp_path / "new.json", tmp_path / "old.json"
    old.write_text("old")
    before = old.stat().st_mtime_ns
    assert shared.writable(new) is new and shared.writable(old) is old and shared.writable(None) is None
    assert list(tmp_path.iterdir()) == [old] and old.read_text() == "old" and old.stat().st_mtime_ns == before


def test_a_file_that_may_not_be_written_is_named(tmp_path, monkeypatch):
    """Whatever the system refuses; the tests may run as root, whom it refuses little."""
    monkeypatch.setattr(shared.tempfile, "TemporaryFile", refuse)
    assert "x.json cannot be written: Read-only file system" in refused("info", "--json", tmp_path / "x.json")


def refuse(**options):
    raise OSError(30, "Read-only file system")


def test_spinners_and_bars_move_on_a_terminal_alone(monkeypatch, capsys):
    def show() -> tuple[str, str]:
        with shared.spinner("loading it"):
            pass
        with shared.progress("measuring it", 2) as advance:
            advance()
        return capsys.readouterr()

    assert show() == ("", "")
    monkeypatch.setattr(shared, "Console", lambda stderr: Console(stderr=stderr, force_terminal=True))
    out, err = show()
    assert out == "" and "loading it" in err and "measuring it" in err


def test_an_interrupt_outside_of_the_main_thread_changes_nothing():
    from concurrent.futures import ThreadPoolExecutor

    def measure() -> bool:
        with interrupt.interruptible() as interrupted:
            return interrupted()

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(measure).result() is False


def test_no_arguments_show_the_help():
    assert "Usage:" in run().output and "Usage:" in run("bench").output
