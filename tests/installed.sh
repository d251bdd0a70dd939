#!/usr/bin/env bash
# Installs a wheel into an empty environment and uses it there: no compiler on PATH, no checkout near.
# usage: tests/installed.sh WHEEL [PYTHON]
set -euo pipefail
package=$(realpath "$1")
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
begun=$SECONDS

"${2:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet "$package[plot]"
mkdir "$folder/empty"
cd "$folder/empty"
alone() { env -i PATH="$folder/venv/bin" HOME="$folder" LANG=C.UTF-8 "$@"; }

alone feste train --steps 20 --run-dir data/first > train.txt
grep -q "finished at step 20" train.txt
echo "installed, trained, first sample: $((SECONDS - begun)) s"
alone feste monitor --once > monitor.txt && grep -q first monitor.txt
echo "ROMEO:" | alone feste repl data --tokens 20 > repl.txt && grep -q . repl.txt
alone feste plot data -o loss.png > /dev/null
test -s loss.png
alone feste plot data -o report.html > /dev/null && grep -q "</html>" report.html
cat > screen.py << 'END'
import asyncio
from pathlib import Path

from feste.tools.monitor.app import Monitor
from feste.tools.monitor.runs import Watch


async def show():
    app = Monitor(Watch([Path("data")]))
    async with app.run_test(size=(100, 30)) as pilot:
        await pilot.pause(1.0)
        assert app.selected.name == "first"


asyncio.run(show())
END
alone python screen.py
alone feste compare data > /dev/null
echo "one text" > text.txt
alone feste prepare text.txt -o tokens --vocab-size 257 > /dev/null
alone python -m feste doctor > doctor.txt && grep -q "5,057,240 characters, in the package" doctor.txt
echo "$(basename "$package"): monitor, repl, plot, compare, prepare and doctor work"
