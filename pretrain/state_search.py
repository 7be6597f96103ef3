"""The search for the state to go on from: all ranks together verify the files of the newest, then of the one before.

Only collectives are used, and only of what rank 0 sees: on a network file system the ranks may for a while see
different listings of one folder.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from rung.data.shard import file_sha256
from rung.pretrain.ranks import Ranks
from rung.pretrain.state_folder import (
    DIGESTS,
    STATE_VERSION,
    Fault,
    StateFolder,
    fault_of,
    state_document,
    state_files,
)


def find_state(folder: StateFolder, ranks: Ranks, tell: Callable[[str], None] = print) -> Path:
    """Return the newest state that is whole; all ranks call it, and each verifies its share of the files.

    Rank 0 first removes what a killed run was writing. A damaged state is passed over for the one before it, and rank 0
    tells which files were wrong and which state is taken instead.

    Raises:
        FileNotFoundError: there is no state.
        ValueError: none of those found is whole, or the one to take is of another version.
    """
    problems: list[str] = []
    offers = _offers(folder, problems)
    while True:
        offer = _share(next(offers) if ranks.rank == 0 else {}, ranks)
        if "error" in offer:
            raise FileNotFoundError(offer["error"]) if offer["none"] else ValueError(offer["error"])
        name: str = offer["name"]
        place = folder.path / name
        wrong = _verify(place, offer["digest"], offer["files"], ranks)
        if not wrong:
            break
        problems.append(f"{name}: {wrong}")
    if problems and ranks.rank == 0:
        tell(f"state: {'; '.join(problems)}; going on from {name} instead")
    if (version := state_document(place)["version"]) != STATE_VERSION:
        raise ValueError(
            f"state {place}: expected version {STATE_VERSION}, found {version}; start a new run in another folder"
        )
    return place


def _offers(folder: StateFolder, problems: list[str]) -> Iterator[dict[str, Any]]:
    """Yield the states to try, then an error; adds to `problems` what it sees itself. For rank 0."""
    try:
        folder.recover()
        names, fault = folder.candidates()
        if names and fault:
            problems.append(fault)
        for name in names:
            place = folder.path / name
            try:
                count = len(state_files(place))
                yield {"name": name, "digest": file_sha256(place / DIGESTS), "files": count}
            except FileNotFoundError:
                problems.append(f"{name}: {DIGESTS} {Fault.MISSING}")
            except (OSError, ValueError) as error:
                problems.append(f"{name}: {error}")
    except OSError as error:
        problems.append(str(error))
    if problems:
        yield {"error": f"no whole state in {folder.path}: {'; '.join(problems)}", "none": False}
    yield {"error": f"no state in {folder.path}", "none": True}


def _verify(place: Path, digest: str, count: int, ranks: Ranks) -> str:
    """Return what is wrong with a state of `count` files, whose list of them has this digest, or ""; collective."""
    faults = torch.zeros(count + 1, dtype=torch.int64)  # the last one: ranks that read another list
    listed = fault_of(place, DIGESTS, digest) is Fault.NONE
    files = sorted(state_files(place).items()) if listed else []
    faults[count] = not listed
    for index in range(ranks.rank, len(files), ranks.world.size):
        faults[index] = fault_of(place, *files[index])
    *found, unread = ranks.sum_all_(faults.to(ranks.device)).tolist()
    wrong = [f"{name} {Fault(fault)}" for (name, _), fault in zip(files, found, strict=False) if fault]
    if unread:
        wrong.append(f"{DIGESTS} is not the same on {unread} rank(s) as on rank 0")
    rest = f" and {len(wrong) - 3} more files" if len(wrong) > 3 else ""
    return ", ".join(wrong[:3]) + rest


def _share(value: Mapping[str, Any], ranks: Ranks) -> dict[str, Any]:
    """Return rank 0's value on every rank; collective."""
    text = json.dumps(value).encode() if ranks.rank == 0 else b""
    size = int(ranks.sum_all_(torch.tensor([len(text)], device=ranks.device)).item())
    letters = torch.tensor([*text] or [0] * size, dtype=torch.int32, device=ranks.device)
    shared: dict[str, Any] = json.loads(bytes(ranks.sum_all_(letters).tolist()))
    return shared
