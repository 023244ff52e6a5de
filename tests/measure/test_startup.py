"""What `import pitome_vlm` and `pitome-vlm --help` leave out, and the command that times them."""

from __future__ import annotations

import subprocess
import sys

from scripts.speed import startup

HEAVY = {"torch", "transformers", "numpy", "PIL", "matplotlib", "peft", "datasets", "pydantic"}


def test_starts_import_nothing_heavy():
    for name, (code, limit) in startup.STARTS.items():
        if limit is None:
            continue
        script = (
            f"import atexit, sys\ncode = {code!r}\n"
            f"atexit.register(lambda: print('heavy:', sorted({HEAVY!r} & set(sys.modules))))\n"
            "exec(code)\n"
        )
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[-1] == "heavy: []", name


def test_the_command_prints_seconds(monkeypatch, capsys):
    monkeypatch.setattr(startup, "STARTS", {"nothing": ("pass", None), "a sum": ("1 + 1", 60.0)})
    monkeypatch.setattr(sys, "argv", ["startup", "--rounds", "1"])
    assert startup.main() == 0
    assert "| a sum | 0." in capsys.readouterr().out
    monkeypatch.setattr(startup, "STARTS", {"nothing": ("pass", None), "a sum": ("1 + 1", -60.0)})
    assert startup.main() == 1
