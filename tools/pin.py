"""Write constraints.txt: resolve everything settings.ini asks for, for all interpreters at once. Needs `uv`.

torch stays where it is: it decides the CUDA packages, and the stored outputs of the notebooks were computed with it.
"""
import subprocess
from configparser import ConfigParser
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HEADER = """\
# The exact versions that `make` installs, for every Python from {min_python} on. Written by tools/pin.py.
"""
HELD = ["torch==2.13.0", "pip"]


def main():
    ini = ConfigParser(delimiters=["="], interpolation=None)
    ini.read(ROOT / "settings.ini", encoding="utf-8")
    cfg = ini["DEFAULT"]
    wanted = [spec for key in cfg if key.endswith("requirements") for spec in cfg[key].split()]
    command = ["uv", "pip", "compile", "-", "--quiet", "--universal", "--no-annotate", "--no-header",
               "--python-version", cfg["min_python"]]
    pins = subprocess.run(command, input="\n".join(wanted + HELD), capture_output=True, text=True, check=True).stdout
    (ROOT / "constraints.txt").write_text(HEADER.format(**cfg) + pins, encoding="utf-8")


if __name__ == "__main__":
    main()
