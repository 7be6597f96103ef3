"""The pre-flight: its arithmetic, its judgements, and real ranks that differ, die and hang."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rung.data.manifest import read_manifest, resolve_dataset
from rung.launch import check_data, check_network, check_software
from rung.launch.check import Table, add_arguments, checks, read
from rung.launch.check_memory import largest_batch
from rung.launch.check_site import Verdict, differing
from rung.pretrain.network import LOOPBACK, free_port
from rung.pretrain.plan import make_plan

HOSTS = {0: "nodea", 1: "nodea", 2: "nodeb", 3: "nodeb"}


def site(hosts: dict[int, str] = HOSTS) -> Any:
    """Enough of a site for a judgement."""

    def who(ranks: Sequence[int]) -> str:
        return ",".join(f"{rank}@{hosts[rank]}" for rank in ranks)

    place = SimpleNamespace(rank=0, world=len(hosts), launcher="a test")
    return SimpleNamespace(hosts=hosts, place=place, who=who)


def test_every_check_comes_after_those_that_it_needs() -> None:
    seen: set[str] = set()
    for check in checks():
        assert set(check.needs) <= seen and check.name not in seen
        seen.add(check.name)


def test_what_differs_is_told_of_the_few() -> None:
    readings = [{"torch": "2.13", "rung": "1"}] * 3 + [{"torch": "2.12", "rung": "1"}]
    assert differing(readings) == {3: "torch 2.12, elsewhere 2.13"}
    assert differing(readings[:3]) == {}
    assert list(differing([{"a": None}, {"a": "x"}])) == [1]  # of two, rank 0 is right


def test_shares_are_a_whole_epoch_and_differ_by_one() -> None:
    for total, consumers in ((100, 7), (5, 5), (3, 4)):
        shares = check_data.shares(total, consumers)
        assert sum(shares) == total and len(shares) == consumers
        assert set(shares) <= {total // consumers, -(-total // consumers)}


def test_the_sample_of_shards_is_spread_over_all() -> None:
    assert check_data.sample(100, 4) == [0, 25, 50, 75]
    assert check_data.sample(3, 16) == check_data.sample(3, None) == [0, 1, 2]
    assert check_data.sample(0, 4) == []


def test_ranks_on_one_gpu_are_found() -> None:
    gpu = {"device": "H200"}
    own = [{**gpu, "identity": identity} for identity in "ABAB"]  # the same numbers on another machine are others
    assert check_software._judge_world(site(), own).bad == {}
    shared = [{**gpu, "identity": identity} for identity in "ABAA"]
    assert check_software._judge_world(site(), shared).bad == {3: "computes on the same GPU as rank 2"}


@pytest.mark.parametrize(
    ("threads", "cores", "bad"),
    [
        (4, [range(8)] * 2, False),  # both ranks of a machine may use all of its cores
        (8, [range(8)] * 2, True),
        (4, [range(4), range(4, 8)], False),  # each is bound to its own
        (4, [range(4), range(4)], True),
        (8, [range(4), range(4, 12)], True),
        (1, [[0], [1]], False),
    ],
)
def test_threads_that_compete_for_cores(threads: int, cores: Sequence[Sequence[int]], bad: bool) -> None:
    readings = [{"threads": threads, "cores": list(cores[rank % 2])} for rank in HOSTS]
    verdict = check_software._judge_threads(site(), readings)
    assert bool(verdict.bad) == bad and verdict.passed


def test_a_wrong_clock_is_named_only_for_certain() -> None:
    bounds = [[0.0, 0.0], [-0.001, 0.002], [0.5, 3.0], [-9.0, -8.0]]
    verdict = check_network._judge_clock(site(), bounds)
    assert list(verdict.bad) == [3] and verdict.worst == 3


def test_a_slow_group_is_named() -> None:
    quick, slow = {"task group": [1e-4, 1e10]}, {"task group": [1e-3, 2e9]}
    assert check_network._judge_all_reduce(site(), [quick] * 4).bad == {}
    verdict = check_network._judge_all_reduce(site(), [quick, quick, quick, slow])
    assert list(verdict.bad) == [3] and verdict.worst == 3 and verdict.passed


def test_old_locks_are_named_and_young_ones_are_not() -> None:
    readings = [[["/a/lock", 5.0]], [], [["/b/lock", 1e4]], []]
    verdict = check_software._judge_locks(site(), readings)
    assert list(verdict.bad) == [2] and "/b/lock" in verdict.bad[2]


def test_the_table_joins_ranks_with_one_fault(capsys: pytest.CaptureFixture[str]) -> None:
    table = Table(site())
    table.row("good", Verdict("fine"))
    table.row("doubtful", Verdict("so so", {0: "slow"}, warning=True))
    table.row("shards", Verdict("failed", {2: "gone", 3: "gone"}, "copy them"))
    assert table.end() == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "good         ok    fine"
    assert "                   2@nodeb,3@nodeb: gone" in lines
    assert lines[-1] == "NOT FIT: shards failed, on nodeb, 1 warning(s)"


def arguments(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_intermixed_args(words)


@pytest.mark.parametrize(("atoms", "edges"), [(128, 4096), (64, 4096), (512, 2000)])
def test_the_largest_batch_fills_the_budget(atoms: int, edges: int) -> None:
    config = read(arguments("debug", f"data.max_atoms={atoms}", f"data.max_edges={edges}"))
    plan = make_plan(config, 1)
    batch = largest_batch(plan, config)
    assert batch.num_atoms <= atoms and batch.num_edges <= edges
    assert batch.num_atoms > 0.9 * atoms or batch.num_edges > 0.9 * edges
    assert torch.isfinite(batch.energy).any()


def test_a_structure_above_the_budget_is_named() -> None:
    config = read(arguments("debug", "data.max_atoms=4"))
    with pytest.raises(ValueError, match=r"structure '.*': 9 atoms .* exceed data.max_atoms=4"):
        largest_batch(make_plan(config, 1), config)


# Real ranks


def rung_check(*words: str) -> tuple[int, str]:
    """Run the command and return its exit status and what it printed."""
    command = [sys.executable, "-m", "rung.launch", "check", *words]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=250)
    return done.returncode, done.stdout


def row(output: str, name: str) -> str:
    """Return a row of the table with the lines that belong to it."""
    lines = output.splitlines()
    first = next(index for index, line in enumerate(lines) if line.startswith(f"{name} "))
    rest = [line.strip() for line in lines[first + 1 :]]
    last = next((i for i, line in enumerate(lines[first + 1 :]) if not line.startswith(" ")), len(rest))
    return " ".join([lines[first], *rest[:last]])


def ranks_check(
    words: Sequence[Sequence[str]], code: Sequence[str] = (), wait_for: Sequence[int] | None = None
) -> list[tuple[int, str]]:
    """Run one rank for each list of words and return status and output of each, or of those to `wait_for`.

    `code` of a rank runs before its check.
    """
    world = str(len(words))
    common = {**os.environ, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_ADDR": LOOPBACK}
    common["MASTER_PORT"] = str(free_port())
    processes = []
    for rank, arguments_of_rank in enumerate(words):
        main = f"{code[rank] if code else ''}\nimport sys, rung.launch.cli\nsys.exit(rung.launch.cli.main())"
        processes.append(
            subprocess.Popen(
                [sys.executable, "-c", main, "check", *arguments_of_rank],
                env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    try:
        awaited = [processes[rank] for rank in (range(len(words)) if wait_for is None else wait_for)]
        outputs = [process.communicate(timeout=200)[0] for process in awaited]
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    return [(process.returncode, output) for process, output in zip(awaited, outputs, strict=True)]


# A check of this rank is replaced by one that does what `{}` says.
IN_CHECK = """
import os, time
from dataclasses import replace
import rung.launch.check as check
real = check.checks
def checks():
    def bad(site):
        {action}
    return [replace(one, measure=bad) if one.name == {name!r} else one for one in real()]
check.checks = checks
"""


@pytest.mark.slow
def test_a_sound_machine_is_fit(tmp_path: Path) -> None:
    words = ["debug", f"output={tmp_path / 'run'}", "--ranks", "2", "--megabytes", "1"]
    words += ["mode=reptile", "reptile.tasks_per_outer=2", "reptile.inner_steps=2"]
    status, output = rung_check(*words)
    assert status == 0, output
    assert output.splitlines()[-1].startswith("fit")
    for check in checks():
        assert row(output, check.name).split()[len(check.name.split())] in ("ok", "warn"), output
    assert "exchange" in row(output, "all-reduce") and "2 task group(s) of 1" in row(output, "config")
    assert not list(tmp_path.iterdir())  # nothing is left in the output, nor the folder itself


@pytest.mark.slow
def test_shards_that_are_damaged_are_named(tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(resolve_dataset("builtin"), data)
    words = [f"tasks=[{{dataset: {data}, fidelity: gfn1_xtb}}]", f"output={tmp_path / 'run'}", "steps=2"]
    shard = data / read_manifest(data).shards_of("train")[0].file
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    status, output = rung_check("debug", *words, "--digests", "all")
    assert status == 1 and "SHA-256" in row(output, "digests"), output
    assert shard.name in row(output, "digests")
    shard.write_bytes(content[:-512])
    status, output = rung_check("debug", *words)
    assert status == 1 and "manifest says" in row(output, "shards") and "left out" in row(output, "digests"), output
    shard.unlink()
    assert f"{shard}: missing" in row(rung_check("debug", *words)[1], "shards")


@pytest.mark.slow
def test_ranks_that_differ_are_named(tmp_path: Path) -> None:
    """Rank 2 has another config; rank 1 has another version of a package, as its metadata say."""
    words = ["debug", f"output={tmp_path / 'run'}"]
    other_version = (
        "import importlib.metadata as m\nreal = m.version\n"
        "m.version = lambda name: '0.0' if name == 'vesin' else real(name)"
    )
    results = ranks_check([words, words, [*words, "optimizer.lr=1e-4"]], ["", other_version, ""])
    status, output = results[0]
    assert status == 1, output
    assert "rank 1 (" in row(output, "versions") and "vesin 0.0" in row(output, "versions")
    assert "rank 2 (" in row(output, "config") and "-> give every rank" in row(output, "config")
    assert "left out" in row(output, "memory")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("action", "name"),
    [("os._exit(1)", "all-reduce"), ("time.sleep(1000)", "all-reduce"), ("time.sleep(1000)", "manifests")],
    ids=["dies in a collective", "hangs in a collective", "hangs alone"],
)
def test_a_rank_that_dies_or_hangs_is_named(action: str, name: str, tmp_path: Path) -> None:
    words = ["debug", f"output={tmp_path / 'run'}", "--timeout", "4"]
    status, output = ranks_check([words, words], ["", IN_CHECK.format(action=action, name=name)], wait_for=[0])[0]
    assert status == 1 and "rank 1 (" in row(output, name) and "no answer within 4 s" in row(output, name), output
    assert output.splitlines()[-1].startswith(f"NOT FIT: {name} failed")


@pytest.mark.slow
def test_a_rank_that_never_comes_and_a_world_of_another_size(tmp_path: Path) -> None:
    environment = {**os.environ, "RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": LOOPBACK}
    environment |= {"LOCAL_RANK": "0", "MASTER_PORT": str(free_port())}
    command = [sys.executable, "-m", "rung.launch", "check", "debug", "--timeout", "1"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and "these did not come: 1" in done.stderr
    done = subprocess.run([*command, "--ranks", "3"], env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and "expected 3 rank(s)" in done.stderr


def test_wrong_arguments_are_refused() -> None:
    from rung.launch.cli import main

    for words in (["--digests", "some"], ["--timeout", "0"], ["--ranks", "0"]):
        assert main(["check", "debug", *words]) == 2


def test_verdicts_go_through_json() -> None:
    """What ranks measure travels as JSON: numbers of tuples come back as lists."""
    assert json.loads(json.dumps({"value": [(1, 2.5)]})) == {"value": [[1, 2.5]]}
    assert replace(Verdict("x"), bad={0: "y"}).passed is False
