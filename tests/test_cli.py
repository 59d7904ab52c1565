"""The command `kda-lit demo` on a small text: what it writes, what it says to bad input, what Ctrl-C leaves behind."""
import fcntl
import json
import os
import pty
import signal
import struct
import subprocess
import sys
import termios
import threading
from pathlib import Path

import pytest
import torch

from kda_lit.language_model import bits_per_byte, gather, main, small_model
from kda_lit.model import KDAForCausalLM

SAVED = {"checkpoint", "results.json", "written.txt", "loss.png", "half_lives.png", "state.png"}
COMMAND = Path(sys.executable).with_name("kda-lit")


@pytest.fixture
def text(tmp_path):
    "3,000 bytes of Python."
    (tmp_path / "text.py").write_bytes(Path(__file__).with_name("test_chunk.py").read_bytes()[:3000])
    return tmp_path / "text.py"


def test_a_few_steps(text, tmp_path, capsys):
    out = tmp_path / "deep" / "run"
    assert main(["demo", "--text", str(text), "--steps", "8", "--out", str(out)]) == 0
    said, results = capsys.readouterr().out, json.loads((out / "results.json").read_text())
    scores = results["bits per byte"]
    assert {path.name for path in out.iterdir()} == SAVED
    assert all((out / name).read_bytes().startswith(b"\x89PNG") for name in SAVED if name.endswith(".png"))
    assert results["steps"] == 8
    for name, bits in scores.items(): assert f"{name:12}{bits:7.3f} bits per byte" in said
    assert scores["this model"] < 7 and set(scores) == {"this model", "gzip -9", "xz -9"}
    reading, exam = gather([text])
    assert reading + exam == text.read_bytes()                     # the exam is held out: its own end of the text
    learned = KDAForCausalLM.from_pretrained(out / "checkpoint")
    assert bits_per_byte(learned, exam) == pytest.approx(scores["this model"], rel=1e-4)


BAD = {  # a file of these bytes, or none: words of the message
    "no such file": (None, "No such file"),
    "empty": (b"", "is empty"),
    "binary": (bytes(range(256)) * 20, "is not a text"),
    "zeros": (b"a text, then" + bytes(5000), "is not a text"),
    "too short": (b"def f(): pass\n", "too little text"),
}


@pytest.mark.parametrize("wrong", BAD)
def test_bad_text(wrong, tmp_path, capsys):
    data, words = BAD[wrong]
    path, out = tmp_path / "text", tmp_path / "out"
    if data is not None: path.write_bytes(data)
    refused(["demo", "--text", str(path), "--out", str(out)], capsys, words, "" if wrong == "too short" else str(path))
    assert not out.exists()


def refused(arguments, capsys, *words):
    "Exit code 2 and one line that says why."
    with pytest.raises(SystemExit) as stop: main(arguments)
    line = capsys.readouterr().err
    assert stop.value.code == 2
    assert line.startswith("kda-lit: ") and line.count("\n") == 1
    for word in words: assert word in line


def test_a_folder_without_text(tmp_path, capsys):
    (tmp_path / "picture").write_bytes(bytes(range(256)))
    refused(["demo", "--text", str(tmp_path)], capsys, str(tmp_path), "holds no text")


def test_out_is_a_file(text, tmp_path, capsys):
    (tmp_path / "taken").write_text("mine")
    refused(["demo", "--text", str(text), "--out", str(tmp_path / "taken")], capsys, "taken", "exists")
    assert (tmp_path / "taken").read_text() == "mine"


@pytest.mark.parametrize("arguments", [[], ["dmeo"], ["demo", "--steps", "0"], ["demo", "--steps", "many"]], ids=str)
def test_usage(arguments, capsys):
    with pytest.raises(SystemExit) as stop: main(arguments)
    assert stop.value.code == 2 and "usage: kda-lit" in capsys.readouterr().err


def on_a_terminal(command, press_at):
    "Run a command whose stderr is a terminal; press Ctrl-C when that shows `press_at`. Exit code, what it showed."
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, 100, 0, 0))  # a new terminal has no columns yet
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=theirs)
    os.close(theirs)
    too_long, seen, pressed = threading.Timer(240, process.kill), "", False
    too_long.start()
    while part := read_or_nothing(ours):
        seen += part.decode(errors="replace")
        if press_at in seen and not pressed: process.send_signal(signal.SIGINT)
        pressed = pressed or press_at in seen
    too_long.cancel()
    return process.wait(), seen


def read_or_nothing(terminal):
    try: return os.read(terminal, 4096)
    except OSError: return b""                                     # Linux' way to say that the other side hung up


def test_ctrl_c_keeps_what_was_learned(text, tmp_path):
    "The installed command, with its progress bar; interrupted after its first steps."
    out = tmp_path / "run"
    command = [COMMAND, "demo", "--text", text, "--steps", "100000", "--out", out]
    code, seen = on_a_terminal(command, press_at="bits per byte")
    assert code == 0, seen
    assert "training" in seen and "Traceback" not in seen
    assert {path.name for path in out.iterdir()} == SAVED
    assert 1 <= json.loads((out / "results.json").read_text())["steps"] < 100000
    learned, fresh = KDAForCausalLM.from_pretrained(out / "checkpoint"), small_model()
    assert not torch.equal(learned.lm_head.weight, fresh.lm_head.weight)
