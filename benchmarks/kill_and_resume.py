"""A run of Reptile on two ranks that loses a random rank again and again, and one that does not: the same final hash.

    python benchmarks/kill_and_resume.py [--outer-steps 200] [--every 20] [--seed 0] [--output FILE]

Both runs go through `python -m rung.launch.supervise` and `rung pretrain --ranks 2` on the built-in data. The ranks of
the second one get SIGKILL from outside: a random one, whenever a random number of outer steps (on average --every) has
been logged since the last death, wherever in a step, an exchange or a save it then is.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

from rung.launch.supervise import ranks_below
from rung.pretrain.state_folder import state_document, state_files

RANKS = 2
INNER_STEPS, TASKS = 2, 2
STEPS_PER_OUTER = INNER_STEPS * TASKS
WORDS = [
    "mode=reptile", f"reptile.inner_steps={INNER_STEPS}", f"reptile.tasks_per_outer={TASKS}", "reptile.overlap=true",
    "reptile.exchange=bfloat16", "reptile.outer_optimizer=nesterov", "reptile.outer_rate=0.5",
    "model={channels: 16, num_layers: 2, l_max: 2}", "data.max_atoms=64", "data.max_edges=1024",
    f"log_every={STEPS_PER_OUTER}", f"save_every={5 * STEPS_PER_OUTER}", "evaluation={every: 200, max_structures: 16}",
]  # fmt: skip
POLL_SECONDS = 0.02


def command(output: Path, outer_steps: int) -> list[str]:
    words = ["debug", *WORDS, f"steps={outer_steps * STEPS_PER_OUTER}", f"output={output}"]
    supervise = [sys.executable, "-m", "rung.launch.supervise", "--output", str(output), "--wait", "0"]
    return [*supervise, "--", sys.executable, "-m", "rung.pretrain", *words, "--ranks", str(RANKS)]


def outer_step(output: Path) -> int:
    """Return the last outer step that the run logged."""
    path = output / "train.csv"
    lines = path.read_text().splitlines() if path.exists() else []
    last = lines[-1].split(",")[0] if len(lines) > 1 else "0"
    return int(last) // STEPS_PER_OUTER if last.isdecimal() else 0


def kill_rank(supervisor: int, rank: int) -> bool:
    """Kill one rank below the supervisor; False when it is not there (just ended, or not started yet)."""
    try:
        for process in ranks_below(psutil.Process(supervisor)):
            if process.environ().get("RANK") == str(rank):
                process.kill()
                return True
    except psutil.NoSuchProcess:
        pass
    return False


def run(output: Path, outer_steps: int, every: int, draws: random.Random | None) -> dict[str, Any]:
    """Run to the end, with deaths where there are `draws`; return what happened."""
    begin = time.perf_counter()
    kills: list[dict[str, int]] = []
    with (output.parent / f"{output.name}.log").open("w") as log:
        process = subprocess.Popen(command(output, outer_steps), stdout=log, stderr=log)
        due = draws.randint(1, 2 * every - 1) if draws else outer_steps + 1
        while process.poll() is None:
            time.sleep(POLL_SECONDS)
            step = outer_step(output)
            if draws is None or not due <= step < outer_steps:
                continue
            rank = draws.randrange(RANKS)
            time.sleep(draws.uniform(0, 0.2))  # so that it does not always hit the moment after a log line
            if kill_rank(process.pid, rank):
                kills.append({"outer_step": step, "rank": rank})
                print(f"killed rank {rank} after outer step {step}", flush=True)
                due = step + draws.randint(1, 2 * every - 1)
    if process.returncode != 0:
        raise RuntimeError(f"the supervisor ended with status {process.returncode}; see {log.name}")
    return {"kills": kills, "wall_seconds": round(time.perf_counter() - begin, 1), **hashes(output)}


def hashes(output: Path) -> dict[str, str]:
    """Return the SHA-256 of the last state's weights, and of all of it: weights, averages, optimizer, streams."""
    place = output / "state" / (output / "state" / "latest").read_text().strip()
    files = {name: digest for name, digest in state_files(place).items() if name != "state.json"}  # it has the paths
    everything = json.dumps([sorted(files.items()), state_document(place)["best"]])
    return {
        "weights_sha256": files["model.safetensors"],
        "state_sha256": hashlib.sha256(everything.encode()).hexdigest(),
    }


def commit() -> str:
    def git(*words: str) -> str:
        return subprocess.run(
            ["git", *words], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        ).stdout.strip()

    return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "--untracked-files=no") else "")


def main() -> int:
    """Run both and write the result; exit status 1 when they differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--outer-steps", type=int, default=200)
    parser.add_argument("--every", type=int, default=20, help="outer steps between two deaths, on average")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "kill_and_resume.json")
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("PYTHONSAFEPATH", "1")
    at_start = commit()
    with tempfile.TemporaryDirectory(prefix="rung-kills-") as folder:
        undisturbed = run(Path(folder) / "undisturbed", args.outer_steps, args.every, None)
        print(f"undisturbed: {undisturbed}", flush=True)
        killed = run(Path(folder) / "killed", args.outer_steps, args.every, random.Random(args.seed))
        print(f"killed: {killed}", flush=True)
    same = all(killed[name] == undisturbed[name] for name in ("weights_sha256", "state_sha256"))
    result = {
        "commit": at_start,
        "command": "python benchmarks/kill_and_resume.py "
        f"--outer-steps {args.outer_steps} --every {args.every} --seed {args.seed}",
        "words": WORDS,
        "ranks": RANKS,
        "outer_steps": args.outer_steps,
        "number_of_kills": len(killed["kills"]),
        "same": same,
        "undisturbed": {name: value for name, value in undisturbed.items() if name != "kills"},
        "killed": killed,
    }
    args.output.write_text(json.dumps(result, indent=2) + "\n")
    print(f"{len(killed['kills'])} deaths, the same final state: {same}")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
