"""Straight-line C++ from a tape: the choice of instructions, their order, and the text."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from rung.kernels.codegen.tape import Expression, Node, Tape


@dataclass(frozen=True)
class Instruction:
    """One machine operation: a sum, a product, or a product and a sum fused."""

    number: int  # of the tape's operation that it computes
    text: str
    reads: tuple[int, ...]  # the operands, but inputs and constants


class Program:
    """A function: arrays in, arrays out.

    The C++ function is a template on the type F of a value, the type T of a number, and the types of the arrays, which
    need only operator[]: pointers, or objects that read and write where they are indexed.
    """

    def __init__(self, name: str, outputs: dict[str, list[Expression]], comment: str) -> None:
        self.name = name
        self.comment = comment
        self.tape = next(iter(outputs.values()))[0].tape
        self.places: defaultdict[int, list[str]] = defaultdict(list)
        for array, values in outputs.items():
            for k, value in enumerate(values):
                self.places[value.number].append(f"{array}[{k}]")
        self.arrays_out = list(outputs)
        needed = _needed(self.tape, list(self.places))
        self.inputs = [number for number in needed if self.tape.nodes[number].op == "input"]
        self.instructions = _ordered(_select(self.tape, needed, set(self.places)))

    @property
    def num_operations(self) -> int:
        """The number of machine operations, a fused product and sum counted as one."""
        return len(self.instructions)

    def text(self) -> str:
        """Return the C++ function."""
        places = [self.tape.nodes[number].place for number in self.inputs]
        arrays_in = list(dict.fromkeys(place.split("[")[0] for place in places))
        types, arguments = ["class F", "class T"], []
        for k, array in enumerate(arrays_in + self.arrays_out):
            if array in places:  # a value, not an array
                arguments.append(f"F {array}")
            else:
                types.append(f"class Array{k}")
                arguments.append(f"Array{k} {array}")
        lines = [f"// {self.comment} {self.num_operations} operations."]
        lines += [f"template <{', '.join(types)}>"]
        lines += [f"RUNG_INLINE void {self.name}({', '.join(arguments)}) {{"]
        for number, targets in self.places.items():
            if self.tape.nodes[number].op in ("input", "constant"):
                lines += [f"  {target} = {_whole(self.tape.nodes[number])};" for target in targets]
        for instruction in self.instructions:
            lines.append(f"  const F t{instruction.number} = {instruction.text};")
            lines += [f"  {place} = t{instruction.number};" for place in self.places.get(instruction.number, [])]
        return "\n".join([*lines, "}"])


def _whole(node: Node) -> str:
    return node.place if node.op == "input" else f"F{{}} + T({node.value!r})"


def _needed(tape: Tape, outputs: Sequence[int]) -> list[int]:
    """Return the operations that the outputs depend on, operands first."""
    needed: set[int] = set()
    waiting = list(outputs)
    while waiting:
        number = waiting.pop()
        if number not in needed:
            needed.add(number)
            waiting += tape.nodes[number].operands
    return sorted(needed)


def _fused(tape: Tape, needed: Sequence[int], outputs: set[int], users: dict[int, list[int]]) -> dict[int, int]:
    """Return the product that each sum computes itself: one that occurs only in sums, each of which fuses it."""
    nodes = tape.nodes
    fused: dict[int, int] = {}
    for number in reversed(needed):
        readers = users[number]
        if nodes[number].op != "*" or number in outputs or len(set(readers)) < len(readers):
            continue
        if all(nodes[reader].op == "+" and reader not in fused for reader in readers):
            fused |= dict.fromkeys(readers, number)
    return fused


def _select(tape: Tape, needed: Sequence[int], outputs: set[int]) -> list[Instruction]:
    """Return the instructions: one for each operation but the products that are parts of others."""
    nodes = tape.nodes
    users: defaultdict[int, list[int]] = defaultdict(list)
    for number in needed:
        for operand in nodes[number].operands:
            users[operand].append(number)
    fused = _fused(tape, needed, outputs, users)
    absorbed = set(fused.values())

    def name(number: int) -> str:
        node = nodes[number]
        return {"constant": f"T({node.value!r})", "input": node.place}.get(node.op, f"t{number}")

    def product(number: int) -> tuple[str, tuple[int, ...]]:
        """Return the sign and the factors of a product; -1 (a b) becomes -(a b)."""
        a, b = nodes[number].operands
        if nodes[a].value != -1:
            return "", (a, b)
        if nodes[b].op == "*" and users[b] == [number] and b not in outputs:
            absorbed.add(b)
            return "-", nodes[b].operands
        return "-", (b,)

    instructions: list[Instruction] = []
    for number in reversed(needed):  # users first: they say what they absorb
        node = nodes[number]
        if number in absorbed or node.op in ("constant", "input"):
            continue
        if number in fused:
            (whole,) = (operand for operand in node.operands if operand != fused[number])
            sign, factors = product(fused[number])
            text = f"{name(whole)} {sign or '+'} {' * '.join(map(name, factors))}"
            reads = (whole, *factors)
        elif node.op == "*":
            sign, reads = product(number)
            text = sign + " * ".join(map(name, reads))
        else:
            reads = node.operands
            text = " + ".join(map(name, reads))
        values = tuple(k for k in dict.fromkeys(reads) if nodes[k].op not in ("constant", "input"))
        instructions.append(Instruction(number, text, values))
    return instructions[::-1]


def _ordered(instructions: Sequence[Instruction]) -> list[Instruction]:
    """Return the instructions in an order that keeps few values alive, so that few leave the registers.

    From the last to the first: of those whose users all have their places, take one that needs the fewest new values
    and, if it can, frees its own; of equals, the last.
    """
    by_number = {instruction.number: instruction for instruction in instructions}
    users_left = Counter(read for instruction in instructions for read in instruction.reads)
    ready = {instruction.number for instruction in instructions if not users_left[instruction.number]}
    alive: set[int] = set()
    order: list[Instruction] = []

    def cost(number: int) -> tuple[int, int]:
        return sum(read not in alive for read in by_number[number].reads) - (number in alive), -number

    while ready:
        number = min(ready, key=cost)
        ready.remove(number)
        alive.discard(number)
        order.append(by_number[number])
        alive.update(by_number[number].reads)
        for read in by_number[number].reads:
            users_left[read] -= 1
            if not users_left[read]:
                ready.add(read)
    return order[::-1]
