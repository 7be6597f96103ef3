"""States that ranks write together: whole ones are read back, torn and damaged ones are passed over."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import HashStore, TCPStore

from rung.pretrain.ranks import Ranks
from rung.pretrain.state_folder import Content, StateFolder, state_document, state_files, state_tensors
from rung.pretrain.store import Outcome, Snapshot, StateStore, to_host
from rung.pretrain.world import World

CPU = torch.device("cpu")
MINUTE = timedelta(minutes=1)


class TcpRanks(Ranks):
    """Ranks whose key-value store is a server in rank 0, as in a launched run; the tests' groups use a file."""

    def __init__(self) -> None:
        super().__init__(CPU, MINUTE)
        server = TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False) if self.rank == 0 else None
        port = int(self.sum_all_(torch.tensor([server.port if server else 0])))
        self.server = server or TCPStore("127.0.0.1", port, None, False, wait_for_workers=False)

    def store(self) -> Any:
        return self.server.clone()


def make_ranks(kind: str = "file") -> Ranks:
    return TcpRanks() if kind == "tcp" else Ranks(CPU, MINUTE)


def weights_of(rank: int, step: int) -> dict[str, torch.Tensor]:
    """Tensors of a few dtypes and shapes that tell rank and step."""
    random = torch.Generator().manual_seed(1000 * step + rank)
    return {
        "float64": torch.randn(5, 3, generator=random, dtype=torch.float64),
        "bfloat16": torch.randn(4, generator=random).bfloat16(),
        "count": torch.tensor(step),
        "empty": torch.zeros(0, 7),
    }


def snapshot_of(rank: int, step: int) -> Snapshot:
    return Snapshot(
        {f"rank_{rank:04d}.safetensors": weights_of(rank, step)},
        {f"rank_{rank:04d}.json": {"rank": rank, "step": step, "text": "\u00e5"}},
    )


def save(store: StateStore, step: int, best: bool = False) -> Outcome | None:
    store.save(step, snapshot_of(store.ranks.rank, step), {"seed": 7}, best=best)
    return store.wait()


def save_steps(folder: Path, steps: list[int], keep: int = 9) -> None:
    store = StateStore(folder, make_ranks(), keep)
    for step in steps:
        save(store, step)


def find(folder: Path) -> tuple[str, list[str]]:
    """Return the state found, or the error, and what was told on this rank."""
    told: list[str] = []
    try:
        return StateStore(folder, make_ranks(), 1, tell=told.append).find().name, told
    except (OSError, ValueError) as error:
        return f"{type(error).__name__}: {error}", told


def assert_whole(place: Path, step: int, world: int) -> None:
    """The state is what `save` wrote at `step`; coreutils agree with its digests."""
    subprocess.run(["sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS"], cwd=place, check=True)
    assert sorted(state_files(place)) == sorted(path.name for path in place.iterdir() if path.name != "SHA256SUMS")
    assert state_document(place) == {"version": 2, "world": world, "step": step, "seed": 7}
    for rank in range(world):
        assert state_document(place, f"rank_{rank:04d}.json") == {"rank": rank, "step": step, "text": "\u00e5"}
        tensors, expected = state_tensors(place, f"rank_{rank:04d}.safetensors"), weights_of(rank, step)
        assert tensors.keys() == expected.keys()
        for name, tensor in tensors.items():
            assert tensor.dtype == expected[name].dtype and torch.equal(tensor, expected[name])


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def round_trip(folder: Path, kind: str) -> tuple[str, str | None]:
    store = StateStore(folder, make_ranks(kind), 2)
    outcome = save(store, 3)
    assert outcome is not None and outcome.error is None and outcome.place is not None
    assert store.poll() is None and store.wait() is None
    found = store.find()
    store.close()
    return found.name, outcome.place.name


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["file", "tcp"])
@pytest.mark.parametrize("world", [1, 3])
@pytest.mark.slow
def test_a_state_of_all_ranks_is_read_back(world: int, kind: str, run_ranks: Any, tmp_path: Path) -> None:
    folder = tmp_path / "state"
    assert run_ranks(round_trip, world, folder, kind) == [("step_000000003", "step_000000003")] * world
    assert names_in(folder) == ["latest", "step_000000003"]
    assert (folder / "latest").read_text() == "step_000000003\n"
    assert_whole(folder / "step_000000003", 3, world)
    modes = {path.stat().st_mode for path in (folder / "step_000000003").iterdir()}
    assert len(modes) == 1  # whoever may read the pointer may read the tensors


@pytest.mark.slow
def test_a_state_is_read_by_another_number_of_ranks(run_ranks: Any, tmp_path: Path) -> None:
    run_ranks(save_steps, 3, tmp_path / "state", [4])
    for world in (1, 2):
        assert run_ranks(find, world, tmp_path / "state") == [("step_000000004", [])] * world


def test_snapshots_refuse_what_a_state_cannot_hold() -> None:
    for name in ("weights.pt", "sub/weights.safetensors", "../weights.safetensors"):
        with pytest.raises(ValueError, match=r"expected a file name \*\.safetensors"):
            Snapshot({name: {}})
    with pytest.raises(ValueError, match=r"other than state\.json"):
        Snapshot({}, {"state.json": {}})
    with pytest.raises(ValueError, match="expected a tensor on the host, found meta"):
        Snapshot({"weights.safetensors": {"w": torch.zeros(2, device="meta")}})


def test_copies_on_the_host_do_not_follow_the_live_tensors() -> None:
    live = {"turned": torch.arange(6.0).reshape(2, 3).T, "weight": torch.nn.Parameter(torch.ones(2))}
    copies = to_host(live)
    assert all(copy.is_contiguous() and not copy.requires_grad for copy in copies.values())
    with torch.no_grad():
        for tensor in live.values():
            tensor.zero_()
    assert copies["turned"].tolist() == [[0, 3], [1, 4], [2, 5]] and copies["weight"].tolist() == [1, 1]


@pytest.mark.gpu
def test_copies_from_a_gpu_are_complete_and_pinned() -> None:
    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")
    live = torch.arange(1 << 22, device="cuda")
    copy = to_host({"live": live})["live"]
    live.zero_()
    assert copy.is_pinned() and torch.equal(copy, torch.arange(1 << 22))


# In the background


class Held(StateStore):
    """Writes nothing before the test lets it; notes what `latest` was when a step's writing began."""

    go: threading.Event
    latest_at: dict[str, str]

    def write_file(self, path: Path, content: Content) -> None:
        self.latest_at.setdefault(path.parent.name.split(".")[1], self.folder.pointer("latest"))
        self.go.wait()
        super().write_file(path, content)


def held_store(folder: Path, ranks: Ranks, timeout: timedelta = MINUTE) -> Held:
    store = Held(folder, ranks, 9, timeout=timeout)
    store.go, store.latest_at = threading.Event(), {}
    return store


def steps_while_a_rank_writes(folder: Path) -> tuple[list[float], bool, str]:
    ranks = make_ranks()
    store = held_store(folder, ranks)
    if ranks.rank == 0:
        store.go.set()
    store.save(1, snapshot_of(ranks.rank, 1), {"seed": 7})
    sums = [ranks.sum_all_(torch.tensor([float(step)])).item() for step in range(3)]
    early = store.poll() is None and store.folder.pointer("latest") == ""
    ranks.barrier()  # rank 1 may not let go before rank 0 has looked
    store.go.set()
    store.wait()
    return sums, early, store.folder.pointer("latest")


@pytest.mark.slow
def test_training_goes_on_while_a_rank_writes(run_ranks: Any, tmp_path: Path) -> None:
    assert run_ranks(steps_while_a_rank_writes, 2, tmp_path) == [([0, 2, 4], True, "step_000000001")] * 2


def two_in_a_row(folder: Path) -> dict[str, str]:
    ranks = make_ranks()
    store = held_store(folder, ranks)
    store.save(1, snapshot_of(ranks.rank, 1), {"seed": 7})
    join, second_is_waiting = store._thread.join, threading.Event()

    def noted(timeout: float | None = None) -> None:
        second_is_waiting.set()
        join(timeout)

    store._thread.join = noted
    release = threading.Thread(target=lambda: (second_is_waiting.wait(5), store.go.set()))
    release.start()
    store.save(2, snapshot_of(ranks.rank, 2), {"seed": 7})
    assert store.poll().step == 1
    assert store.wait().step == 2
    release.join()
    return store.latest_at


@pytest.mark.slow
def test_a_second_save_waits_for_the_first(run_ranks: Any, tmp_path: Path) -> None:
    expected = {"step_000000001": "", "step_000000002": "step_000000001"}
    assert run_ranks(two_in_a_row, 2, tmp_path / "state") == [expected] * 2
    for step in (1, 2):
        assert_whole(tmp_path / "state" / f"step_{step:09d}", step, 2)


def stall_rank_1(folder: Path) -> tuple[str, str]:
    ranks = make_ranks()
    save_steps(folder, [1])
    store = held_store(folder, ranks, timedelta(seconds=0.5))
    if ranks.rank == 0:
        store.go.set()
    try:
        store.save(2, snapshot_of(ranks.rank, 2), {"seed": 7})
        if ranks.rank == 1:
            ranks.store().wait(["rank 0 gave up"], MINUTE)
            store.go.set()
        store.wait()
    except TimeoutError as error:
        if ranks.rank == 0:
            ranks.store().set("rank 0 gave up", "")
        return str(error), store.folder.pointer("latest")
    return "no error", ""


@pytest.mark.slow
@pytest.mark.slow
def test_a_stalled_rank_is_named(run_ranks: Any, tmp_path: Path) -> None:
    for text, latest in run_ranks(stall_rank_1, 2, tmp_path / "state"):
        assert "state of step 2 is not saved: rank 1 did not finish writing within 0.5 s of rank 0" in text
        assert latest == "step_000000001"


# Faults


class Deadly(StateStore):
    """Dies in the middle of a file of tensors."""

    victim = -1

    def write_file(self, path: Path, content: Content) -> None:
        super().write_file(path, content)
        if self.ranks.rank == self.victim and path.suffix == ".safetensors":
            os.truncate(path, path.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)


def die_while_saving(folder: Path, victim: int) -> None:
    save_steps(folder, [1])
    store = Deadly(folder, make_ranks(), 9, timeout=timedelta(seconds=2))
    store.victim = victim
    with pytest.raises(TimeoutError, match=f"rank {victim}"):
        save(store, 2)
    (folder / "survived").touch()


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.slow
def test_a_rank_killed_while_writing_leaves_the_state_before(victim: int, run_ranks: Any, tmp_path: Path) -> None:
    folder = tmp_path / "state"
    with pytest.raises(AssertionError, match="a rank died without a result") as failure:
        run_ranks(die_while_saving, 2, folder, victim)
    assert "Traceback" not in str(failure.value)
    (folder / "survived").unlink()
    assert (folder / "latest").read_text() == "step_000000001\n"
    assert run_ranks(find, 2, folder) == [("step_000000001", [])] * 2
    assert names_in(folder) == ["latest", "step_000000001"]
    run_ranks(save_steps, 2, folder, [2])
    assert_whole(folder / "step_000000002", 2, 2)


def kill_at(operation: int, folder: Path, step: int) -> bool:
    """Save, and die before the given one of all changes to the disk; return True if there are fewer."""
    count = 0

    def counted(change: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*arguments: Any, **options: Any) -> Any:
            nonlocal count
            if count == operation:
                os.kill(os.getpid(), signal.SIGKILL)
            count += 1
            return change(*arguments, **options)

        return wrapper

    for module, name in ((os, "fsync"), (os, "replace"), (os, "unlink"), (os, "rmdir"), (os, "rename")):
        setattr(module, name, counted(getattr(module, name)))
    for name in ("write_bytes", "chmod", "mkdir"):
        setattr(Path, name, counted(getattr(Path, name)))
    save(StateStore(folder, make_ranks(), 1), step)
    return True


@pytest.mark.slow
@pytest.mark.parametrize("step", [1, 2])
def test_killed_at_any_moment_a_whole_state_is_left(step: int, run_ranks: Any, tmp_path: Path) -> None:
    """Saving step 1 again, or step 2 while one state is kept: there is always one that is whole and found."""
    first = tmp_path / "first"
    run_ranks(save_steps, 1, first, [1])
    found = set()
    for operation in range(100):
        folder = tmp_path / f"killed_{operation}"
        shutil.copytree(first, folder)
        try:
            finished = run_ranks(kill_at, 1, operation, folder, step)
        except AssertionError as error:
            assert str(error) == "a rank died without a result"
            finished = []
        ((name, told),) = run_ranks(find, 1, folder)
        assert told == []
        assert_whole(folder / name, int(name.removeprefix("step_")), 1)
        assert not list(folder.glob(".step*"))
        found.add(name)
        if finished:
            break
    assert finished and operation > 15
    assert found == {f"step_{number:09d}" for number in (1, step)}


def full_disk(folder: Path, big: str) -> tuple[list[str], str, list[str], Outcome | None]:
    """Rank 1 may write files of 4 KiB only, and wants more; afterwards it may again."""
    ranks = make_ranks()
    store = StateStore(folder, ranks, 9)
    save(store, 1)
    snapshots = {
        "tensors": Snapshot({f"rank_{ranks.rank}.safetensors": {"w": torch.zeros(10000)}}),
        "document": Snapshot({}, {f"rank_{ranks.rank}.json": "x" * 10000}),
    }
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    if ranks.rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
    store.save(2, snapshots[big], {"seed": 7})
    errors = []
    try:
        store.wait()
    except OSError as error:
        errors = [str(error)]
    left = names_in(folder)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    ranks.barrier()
    return errors, store.folder.pointer("latest"), left, save(store, 3)


@pytest.mark.parametrize("big", ["tensors", "document"])
@pytest.mark.slow
def test_a_full_disk_fails_the_save_on_every_rank(big: str, run_ranks: Any, tmp_path: Path) -> None:
    folder = tmp_path / "state"
    suffix = {"tensors": "safetensors", "document": "json"}[big]
    for (error,), latest, left, retried in run_ranks(full_disk, 2, folder, big):
        assert "state of step 2 is not saved: rank 1 (" in error and f"could not write rank_1.{suffix}" in error
        assert "File too large" in error
        assert latest == "step_000000001" and left == ["latest", "step_000000001"]
        assert retried.place.name == "step_000000003"
    assert_whole(folder / "step_000000003", 3, 2)


def save_and_poll(folder: Path, own_folder: bool, same_name: bool) -> tuple[int | None, str]:
    """Return the number and the text of the error that `poll` tells of."""
    ranks = make_ranks()
    store = StateStore(folder / str(ranks.rank) if own_folder else folder, ranks, 9)
    store.save(1, snapshot_of(0 if same_name else ranks.rank, 1), {})
    store._thread.join()
    error = store.poll().error
    return error.errno, str(error)


@pytest.mark.slow
def test_ranks_without_a_shared_folder_are_noticed(run_ranks: Any, tmp_path: Path) -> None:
    for number, text in run_ranks(save_and_poll, 2, tmp_path / "state", True, False):
        assert number == errno.ENOENT
        assert "rank_0001.json was written, but rank 0 does not see it" in text and "all nodes share" in text


@pytest.mark.slow
def test_a_file_of_two_ranks_is_refused(run_ranks: Any, tmp_path: Path) -> None:
    for number, text in run_ranks(save_and_poll, 2, tmp_path / "state", False, True):
        # Which of the two notices depends on who is first.
        assert number == errno.EEXIST or "could not write" in text
    assert not list((tmp_path / "state").glob("step_*"))


def fail_after_success(folder: Path) -> list[bool]:
    """Two stores on one key-value store, as a relaunched run may find it; the second's save fails."""
    ranks = make_ranks()
    ended_well = []
    for same_name in (False, True):
        store = StateStore(folder, ranks, 9)
        store.save(1, snapshot_of(0 if same_name else ranks.rank, 1), {})
        store._thread.join()
        ended_well.append(store.poll().error is None)
    return ended_well


@pytest.mark.slow
def test_keys_of_an_earlier_run_are_not_believed(run_ranks: Any, tmp_path: Path) -> None:
    assert run_ranks(fail_after_success, 2, tmp_path / "state") == [[True, False]] * 2


def test_a_pointer_that_cannot_be_moved_fails_the_save(run_ranks: Any, tmp_path: Path) -> None:
    folder = tmp_path / "state"
    run_ranks(save_steps, 1, folder, [1])
    (folder / ".latest.partial").mkdir()
    with pytest.raises(AssertionError, match=r"state of step 2 is not saved: .*directory"):
        run_ranks(save_steps, 1, folder, [2])
    assert run_ranks(find, 1, folder) == [("step_000000001", [])]


# Damage


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


NEW, OLD = "step_000000002", "step_000000001"
DAMAGE: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "flipped": (lambda f: flip(f / NEW / "rank_0001.safetensors"), "rank_0001.safetensors is damaged", OLD),
    "truncated": (lambda f: os.truncate(f / NEW / "rank_0000.json", 3), "rank_0000.json is damaged", OLD),
    "missing": (lambda f: (f / NEW / "rank_0001.json").unlink(), "rank_0001.json is missing", OLD),
    "no state.json": (lambda f: (f / NEW / "state.json").unlink(), "state.json is missing", OLD),
    "unreadable": (
        lambda f: ((f / NEW / "rank_0001.json").unlink(), (f / NEW / "rank_0001.json").mkdir()),
        "rank_0001.json cannot be read",
        OLD,
    ),
    "no digests": (lambda f: (f / NEW / "SHA256SUMS").unlink(), "SHA256SUMS is missing", OLD),
    "cut digests": (lambda f: os.truncate(f / NEW / "SHA256SUMS", 90), "expected '<SHA-256>  <file name>'", OLD),
    "empty digests": (lambda f: os.truncate(f / NEW / "SHA256SUMS", 0), "it is cut off", OLD),
    "emptied folder": (lambda f: (shutil.rmtree(f / NEW), (f / NEW).mkdir()), "SHA256SUMS is missing", OLD),
    "removed": (lambda f: shutil.rmtree(f / NEW), f"latest names '{NEW}', which does not exist", OLD),
    "empty latest": (lambda f: os.truncate(f / "latest", 0), "latest is empty", NEW),
    "no latest": (lambda f: (f / "latest").unlink(), "latest is missing", NEW),
    "odd latest": (lambda f: (f / "latest").write_text("../state\n"), "latest names '../state'", NEW),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A place for the folder with states of steps 1 and 2, which the first test to use it fills."""
    return {"folder": tmp_path_factory.mktemp("saved") / "state"}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.slow
def test_a_damaged_state_is_passed_over(damage: str, saved: dict[str, Path], run_ranks: Any, tmp_path: Path) -> None:
    if not saved["folder"].exists():
        run_ranks(save_steps, 2, saved["folder"], [1, 2])
    folder = tmp_path / "state"
    shutil.copytree(saved["folder"], folder)
    do, words, expected = DAMAGE[damage]
    do(folder)
    (first, (told,)), (second, silence) = run_ranks(find, 2, folder)
    assert first == second == expected and silence == []
    assert words in told and told.endswith(f"; going on from {expected} instead")
    # The run that goes on replaces what was damaged.
    run_ranks(save_steps, 2, folder, [2])
    assert_whole(folder / NEW, 2, 2)
    assert run_ranks(find, 2, folder) == [(NEW, [])] * 2


@pytest.mark.slow
def test_without_any_whole_state_all_ranks_raise(run_ranks: Any, tmp_path: Path) -> None:
    folder = tmp_path / "state"
    for error, _ in run_ranks(find, 2, folder):
        assert error == f"FileNotFoundError: no state in {folder}"
    run_ranks(save_steps, 1, folder, [1, 2])
    for name in (OLD, NEW):
        flip(folder / name / "rank_0000.json")
    (error, told), (same, _) = run_ranks(find, 2, folder)
    assert error.startswith("ValueError: no whole state in") and told == []
    assert all(f"{name}: rank_0000.json is damaged" in error for name in (OLD, NEW))
    assert same.startswith("ValueError: no whole state in")


@pytest.mark.slow
def test_a_state_of_another_version_is_refused(run_ranks: Any, tmp_path: Path) -> None:
    folder = tmp_path / "state"
    run_ranks(save_steps, 1, folder, [1])
    document = folder / OLD / "state.json"
    document.write_text(json.dumps({**json.loads(document.read_text()), "version": 1}))
    sums = subprocess.run(
        ["sha256sum", *state_files(folder / OLD)], cwd=folder / OLD, check=True, capture_output=True, text=True
    )
    (folder / OLD / "SHA256SUMS").write_text(sums.stdout)
    for error, _ in run_ranks(find, 2, folder):
        assert "expected version 2, found 1" in error


# What stays


def keep_two(folder: Path) -> list[tuple[list[str], str, str]]:
    store = StateStore(folder, make_ranks(), 2)
    seen = []
    for step in range(1, 6):
        save(store, step, best=step == 2)
        store.ranks.barrier()
        present = [str(int(name.removeprefix("step_"))) for name in store.folder.states()]
        seen.append((present, store.folder.pointer("latest")[-1:], store.folder.pointer("best")[-1:]))
        store.ranks.barrier()
    return seen


@pytest.mark.slow
def test_the_newest_and_the_best_stay(run_ranks: Any, tmp_path: Path) -> None:
    (tmp_path / "state" / ".step_000000009.1-1.partial").mkdir(parents=True)
    (tmp_path / "state" / "step_notes").mkdir()
    seen, same = run_ranks(keep_two, 2, tmp_path / "state")
    assert [(present, latest, best) for present, latest, best in seen] == [
        (["1"], "1", ""),
        (["1", "2"], "2", "2"),
        (["2", "3"], "3", "2"),
        (["2", "3", "4"], "4", "2"),
        (["2", "4", "5"], "5", "2"),
    ]
    assert names_in(tmp_path / "state")[:3] == ["best", "latest", "step_000000002"]
    assert (tmp_path / "state" / "step_notes").is_dir()


def test_a_run_sent_back_keeps_its_states(run_ranks: Any, tmp_path: Path) -> None:
    """`latest` put to an earlier step by hand: the run goes on from there, and the later states are not in its way."""
    folder = tmp_path / "state"
    run_ranks(save_steps, 1, folder, [1, 2, 8, 9], 9)
    (folder / "latest").write_text(NEW + "\n")
    assert run_ranks(find, 1, folder) == [(NEW, [])]
    run_ranks(save_steps, 1, folder, [3], 2)
    assert StateFolder(folder).states() == [f"step_{step:09d}" for step in (2, 3, 8, 9)]
    assert run_ranks(find, 1, folder) == [("step_000000003", [])]


# Many ranks, and the end


class Counted:
    """A key-value store whose questions are counted."""

    def __init__(self, store: Any) -> None:
        self.store, self.calls = store, 0

    def __getattr__(self, name: str) -> Any:
        self.calls += 1
        return getattr(self.store, name)


class AllOthersReport(StateStore):
    """Rank 0 of a large world; when it writes, the reports of all others are there."""

    def write_file(self, path: Path, content: Content) -> None:
        tag = path.parent.name.split(".")[2]
        for rank in range(1, self.ranks.world.size):
            self.ranks.server.set(f"state/{tag}/report/{rank}", '{"files": {}}')
        super().write_file(path, content)


def collect_many(folder: Path, size: int) -> int:
    ranks = make_ranks()
    ranks.world, ranks.server = World(size), HashStore()
    counted = Counted(ranks.server)
    ranks.store = lambda: counted
    store = AllOthersReport(folder, ranks, 1)
    store.save(1, Snapshot(), {"seed": 7})
    assert store.wait().place is not None
    return counted.calls


def test_collecting_thousands_of_reports_takes_few_questions(run_ranks: Any, tmp_path: Path) -> None:
    assert run_ranks(collect_many, 1, tmp_path / "state", 4096)[0] <= 2 * 4096 / 256 + 4
    assert state_document(tmp_path / "state" / OLD)["world"] == 4096


def lose_rank_0(folder: Path) -> str:
    """Rank 0 ends while rank 1's thread waits for it to conclude the save."""
    ranks = make_ranks("tcp")
    store = held_store(folder, ranks)
    if ranks.rank == 1:
        store.go.set()
    store.save(1, snapshot_of(ranks.rank, 1), {})
    if ranks.rank == 0:
        ranks.server.wait([f"state/{store._token:x}-1/report/1"], MINUTE)
        torch.distributed.destroy_process_group()
        return ""
    torch.distributed.destroy_process_group()
    try:
        store.wait()
    except OSError as error:
        store.close()
        assert not store._thread.is_alive()
        return str(error)
    return "no error"


@pytest.mark.slow
@pytest.mark.slow
def test_a_thread_notices_that_rank_0_is_gone(run_ranks: Any, tmp_path: Path) -> None:
    assert "the key-value store of the run does not answer" in run_ranks(lose_rank_0, 2, tmp_path / "state")[1]


def close_early(folder: Path) -> str:
    """Rank 1 never writes; rank 0 ends without it."""
    ranks = make_ranks()
    store = held_store(folder, ranks)
    if ranks.rank == 0:
        store.go.set()
        store.save(1, snapshot_of(0, 1), {})
        store.close(0)
        assert not store._thread.is_alive()
        return str(store.poll().error)
    return ""


@pytest.mark.slow
def test_closing_abandons_a_save(run_ranks: Any, tmp_path: Path) -> None:
    assert "the run ended before every rank had written" in run_ranks(close_early, 2, tmp_path / "state")[0]
    assert names_in(tmp_path / "state") == []


FAILING_RUN = """
import sys, threading
from datetime import timedelta
from pathlib import Path
import torch
from rung.pretrain.ranks import Ranks
from rung.pretrain.store import Snapshot, StateStore
class Stuck(StateStore):
    def write_file(self, path, content):
        threading.Event().wait()
store = torch.distributed.FileStore(sys.argv[1] + "/keys", 1)
torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
store = Stuck(Path(sys.argv[1]), Ranks(torch.device("cpu"), timedelta(minutes=30)), 1)
store.save(1, Snapshot(), {})
raise FloatingPointError("the loss is NaN")
"""


@pytest.mark.slow
def test_a_stuck_save_does_not_keep_a_failed_process_alive(tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", FAILING_RUN, str(tmp_path)], capture_output=True, text=True, timeout=120, check=False
    )
    assert ended.returncode == 1 and "the loss is NaN" in ended.stderr
    assert not (tmp_path / "latest").exists()
