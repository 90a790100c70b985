"""Compiler launcher: runs the command and keeps what ptxas says in OBJECT.ptxas.

`-Xptxas -v` reports registers, spills and serialized wgmma as remarks that scroll past and do not
fail a build. tests/build reads the files written here and does fail.
"""

import subprocess
import sys
from pathlib import Path


def main() -> int:
    command = sys.argv[1:]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    remarks = []
    for line in done.stdout.splitlines(keepends=True):
        # Remarks belong to the file; what is left (warnings, errors) belongs to the terminal.
        (remarks if line.startswith(("ptxas info", "    ")) else []).append(line)
        if not line.startswith(("ptxas info", "    ")) or done.returncode:
            sys.stderr.write(line)
    if "-o" in command and not done.returncode:
        target = Path(command[command.index("-o") + 1])
        if target.suffix == ".o":
            target.with_suffix(".o.ptxas").write_text("".join(remarks))
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
