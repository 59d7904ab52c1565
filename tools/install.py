"""Create .venv if there is none, and install kda_lit into it with the exact versions of constraints.txt.

    python3 tools/install.py              # to run
    python3 tools/install.py dev docs     # with the extras `dev` and `docs` of settings.ini

Nothing is done when nothing has changed. This file runs on an old Python, too, to be able to say that it is too old.
"""
import hashlib
import json
import os
import re
import subprocess
import sys
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
VENV = os.path.join(ROOT, ".venv")
PYTHON = os.path.join(VENV, "bin", "python")
STAMP = os.path.join(VENV, "kda_lit.json")
LOG = os.path.join(VENV, "install.log")
INPUTS = ("settings.ini", "setup.py", "pyproject.toml", "constraints.txt")
OLDEST = (3, 10)
LINE = re.compile(r"\s*(?:Collecting ([\w.-]+)|Downloading (\S+) \((.+)\)|Progress (\d+) of (\d+)|Installing collected)")


def say(text): print("      " + text, flush=True)


def digest():
    "Changes when what is to be installed changes."
    total = hashlib.sha256(ROOT.encode())
    for name in INPUTS:
        with open(os.path.join(ROOT, name), "rb") as file: total.update(file.read())
    return total.hexdigest()


def installed():
    "`(digest, extras)` of the last installation that went through."
    try:
        with open(STAMP) as file: return tuple(json.load(file))
    except (OSError, ValueError): return "", []


def check_python(python):
    "Stop with a clear message if `python` is too old."
    code = "import sys; print('%d.%d.%d' % sys.version_info[:3])"
    version = subprocess.check_output([python, "-c", code], stdin=subprocess.DEVNULL).decode().strip()
    if tuple(map(int, version.split(".")))[:2] < OLDEST:
        sys.exit("%s is Python %s, and kda_lit needs %d.%d or newer.\nRemove .venv if there is one, and say which "
                 "Python to use:  make PYTHON=python3.11 ..." % ((python, version) + OLDEST))
    return version


def create():
    "An empty environment."
    say("creating .venv")
    made = subprocess.run([sys.executable, "-m", "venv", VENV], stdin=subprocess.DEVNULL)
    if made.returncode: sys.exit("Python could not create .venv. On Debian and Ubuntu: apt install python3-venv")


def words(line, before):
    "`(text, whether it is worth a line of its own)`: what pip says, in a few words; `before` if it says nothing new."
    found = LINE.match(line)
    if not found: return before, False
    name, file, size, done, total = found.groups()
    if name: return "collecting " + name, False
    if file: return "downloading %s (%s)" % (file.split("-")[0], size), re.match(r"\d\d.* MB|.* GB", size)
    if total: return "%s: %d%%" % (before.split(":")[0], 100 * int(done) // int(total)), False
    return "unpacking", True


def pip(*arguments):
    "Run pip in .venv; its own words go to a log, which is shown if it fails."
    text, terminal = "", sys.stdout.isatty()
    command = [PYTHON, "-m", "pip", "--disable-pip-version-check", "--no-input", "install", "-c", "constraints.txt"]
    pipes = dict(stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    with open(LOG, "wb") as log, subprocess.Popen(command + list(arguments), cwd=ROOT, **pipes) as run:
        for raw in run.stdout:
            text, big = words(raw.decode("utf-8", "replace"), text)
            if not raw.startswith(b"Progress"): log.write(raw)
            if terminal: print("\r\033[K      " + text, end="", flush=True)
            elif big: say(text)
    if terminal: print("\r\033[K", end="")
    if run.returncode:
        with open(LOG, encoding="utf-8", errors="replace") as log: sys.stderr.write("".join(log.readlines()[-30:]))
        sys.exit("pip failed; all that it said is in " + LOG)


def main():
    start, extras = time.time(), sorted(set(sys.argv[1:]))
    version = check_python(PYTHON if os.path.exists(PYTHON) else sys.executable)
    if not os.path.exists(PYTHON): create()
    before, had = installed()
    if before == digest() and set(extras) <= set(had): return say("Python %s, up to date" % version)
    if before == digest(): extras = sorted(set(extras) | set(had))
    say("collecting packages (all that pip says: .venv/install.log)")
    pip("--quiet", "--upgrade", "pip")
    pip("--progress-bar", "raw", "--editable", ".[%s]" % ",".join(extras) if extras else ".")
    with open(STAMP, "w") as file: json.dump([digest(), extras], file)
    say("Python %s, installed in %d s" % (version, time.time() - start))


if __name__ == "__main__":
    main()
