"""The CUDA sources without a GPU: they compile, without spills, and on host fibers they give the reference's results.

The kernels run under the Python code that launches them on a GPU; only `nvrtc.load` is replaced, see host_fibers.h.
"""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from rung.kernels import Edges, VectorMessage, library, nvrtc
from rung.kernels.convolution import cuda as convolution
from rung.kernels.convolution import reference as convolution_reference
from rung.kernels.edge_basis import cuda as edge_basis
from rung.kernels.edge_basis import reference as edge_basis_reference
from rung.kernels.invariants import cuda as invariants
from rung.kernels.invariants import reference as invariants_reference
from rung.kernels.invariants.table import NUM_INVARIANTS
from rung.kernels.library import KERNELS, Unavailable

OPS = ("convolution", "edge_basis", "invariants")
ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
PRODUCTION = {  # the shapes of the largest model
    "convolution": {"REAL": "float", "C": 128, "R": 8, "L": 3, "VECTORS": 0, "WIDE": 4, "MIDDLE": 4, "NARROW": 2},
    "convolution with vectors": {
        "REAL": "float",
        **{"C": 128, "R": 8, "L": 3, "VECTORS": 1, "WIDE": 4, "MIDDLE": 2, "NARROW": 2},
    },
    "edge_basis": {"REAL": "float", "R": 8, "L": 3},
    "invariants": {"REAL": "float", "C": 128, "L": 3, "K": NUM_INVARIANTS[3]},
}
TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-13}  # of the norm
CUTOFF = 5.0
BARRIER = re.compile(r"__sync(?:threads|warp)\(\);")
KERNEL = re.compile(r"__global__\s+void\s+(?:__launch_bounds__\((?:[^()]|\([^()]*\))*\)\s*)?(\w+)\(")
Build = Callable[..., "FiberKernels"]
dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=["float32", "float64"])


# ---- compilers


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("case", PRODUCTION)
def test_nvcc_compiles_without_spills(case: str, arch: str, tmp_path: Path) -> None:
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc on the PATH")
    op = case.split()[0]
    defines = [f"-DRUNG_{name}={value}" for name, value in PRODUCTION[case].items()]
    command = ["nvcc", "-std=c++17", f"-arch={arch}", *defines, f"-I{KERNELS}", "-cubin", "-Xptxas", "-v"]
    command += [str(KERNELS / op / "cuda.cu"), "-o", str(tmp_path / "out.cubin")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "warning" not in result.stderr
    usage = re.findall(
        r"entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores", result.stderr, re.S
    )
    assert {name for name, *_ in usage} == set(KERNEL.findall((KERNELS / op / "cuda.cu").read_text()))
    assert [(name, stack, spills) for name, stack, spills in usage if (stack, spills) != ("0", "0")] == []


@pytest.mark.parametrize(
    "case,arch",
    [
        pytest.param(case, arch, marks=[] if (case, arch) == ("convolution", "sm_90") else pytest.mark.slow)
        for case in PRODUCTION
        for arch in ARCHITECTURES
    ],
)
def test_nvrtc_compiles(case: str, arch: str) -> None:
    nvrtc_or_skip()
    assert nvrtc.compile_op(case.split()[0], arch, PRODUCTION[case]).startswith(b"\x7fELF")


def nvrtc_or_skip() -> None:
    try:
        nvrtc._nvrtc()
    except Unavailable as error:
        pytest.skip(str(error))


def test_an_error_in_a_source_is_shown() -> None:
    nvrtc_or_skip()
    with pytest.raises(RuntimeError, match='(?s)edge_basis/cuda.cu does not compile for sm_90.*"wrong" is undefined'):
        nvrtc.compile_op("edge_basis", "sm_90", {**PRODUCTION["edge_basis"], "REAL": "wrong"})


def test_cubins_are_kept_and_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nvrtc_or_skip()
    monkeypatch.setenv("RUNG_CACHE", str(tmp_path))
    compiled = []
    monkeypatch.setattr(nvrtc, "compile_op", lambda *arguments: compiled.append(arguments) or b"code")
    for macros in ({"R": 8}, {"R": 8}, {"R": 5}):
        assert nvrtc._cached("edge_basis", "sm_90", macros) == b"code"
    assert compiled == [("edge_basis", "sm_90", {"R": 8}), ("edge_basis", "sm_90", {"R": 5})]
    assert len(list(tmp_path.glob("*.cubin"))) == 2


def test_missing_bindings_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings.nvrtc", None)
    nvrtc._nvrtc.cache_clear()
    with pytest.raises(Unavailable, match="cuda-bindings is missing.*install"):
        nvrtc._nvrtc()


def test_without_a_device_the_kernels_are_unavailable() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a device")
    for module in (convolution, edge_basis, invariants):
        with pytest.raises(Unavailable, match="no CUDA device"):
            module.prepare(torch.device("cuda"), 8, 3)


class Driver:
    """Stands for `cuda.bindings.driver`: notes launches, and refuses the kernel `wrong`."""

    def __init__(self) -> None:
        self.launches: list[Any] = []

    def __getattr__(self, name: str) -> Callable[..., tuple[int, ...]]:
        return lambda *arguments: (0, 1)

    def CUstream(self, handle: int) -> int:
        return handle

    def cuModuleGetFunction(self, module: int, name: bytes) -> tuple[int, bytes]:
        return 0, name

    def cuLaunchKernel(self, *arguments: Any) -> tuple[int]:
        self.launches.append(arguments[:9])
        return (1 if arguments[0] == b"wrong" else 0,)

    def cuGetErrorString(self, status: int) -> tuple[int, bytes]:
        return 0, b"invalid argument"


def test_launches_go_to_the_current_stream_and_errors_name_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver()
    monkeypatch.setattr(nvrtc, "_bindings", lambda name: driver)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=5))
    module = nvrtc._Module("invariants", torch.device("cuda", 0), b"code")
    module.launch("right", (0,), 128, torch.ones(3))
    assert driver.launches == []
    module.launch("right", (4, 2), 128, torch.ones(3))
    assert driver.launches == [(b"right", 4, 2, 1, 128, 1, 1, 0, 5)]
    shapes = r"7, float32 \[3\], \(None, int32 \[2\]\)"
    with pytest.raises(
        RuntimeError, match=f"invariants: wrong on cuda:0.* blocks of 32 .*{shapes}: .*invalid argument"
    ):
        module.launch("wrong", (4,), 32, 7, torch.ones(3), (None, torch.ones(2, dtype=torch.int32)))


@pytest.mark.parametrize("capability,expected", [((9, 0), "sm_90"), ((12, 9), "compute_121"), ((3, 5), "3.5")])
def test_architecture(capability: tuple[int, int], expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bindings = SimpleNamespace(nvrtcGetSupportedArchs=lambda: (0, [80, 90, 121]), nvrtcVersion=lambda: (0, 13, 0))
    monkeypatch.setattr(nvrtc, "_nvrtc", lambda: bindings)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    if expected == "3.5":
        with pytest.raises(Unavailable, match="NVRTC 13.0 does not compile for compute capability 3.5"):
            nvrtc.architecture(torch.device("cuda"))
    else:
        assert nvrtc.architecture(torch.device("cuda")) == expected


# ---- fibers


class FiberKernels:
    """A compiled source's kernels, run on host fibers; warps in ascending or descending order."""

    def __init__(self, path: Path) -> None:
        self.library = ctypes.CDLL(str(path))

    def launch(self, name: str, grid: tuple[int, ...], block: int, *arguments: nvrtc.Argument) -> None:
        packed = nvrtc.values(arguments)
        pointers = (ctypes.c_void_p * len(packed))(*map(ctypes.addressof, packed))
        shape = (ctypes.c_uint * 3)(*(*grid, 1, 1)[:3])
        if self.library[f"fiber_{name}"](shape, ctypes.c_uint(block), pointers) != 0:
            raise RuntimeError(f"{name}: a barrier is not reached by all threads")


@pytest.fixture(scope="session")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """Return a compiler of CUDA source for the host; with the arguments of `nvrtc.load`, or of other source."""
    try:
        compiler = library.compiler()
    except Unavailable as error:
        pytest.skip(str(error))
    built: dict[Any, FiberKernels] = {}

    def build(op: str, device: torch.device, macros: Mapping[str, object], source: str = "") -> FiberKernels:
        key = (op, tuple(sorted(macros.items())), source)
        if key not in built:
            source = source or (KERNELS / op / "cuda.cu").read_text()
            folder = tmp_path_factory.mktemp("fibers")
            calls = "".join(f"FIBER_KERNEL({name})\n" for name in KERNEL.findall(source))
            (folder / "main.cpp").write_text(f'#include "host_fibers.h"\n{source}\n{calls}')
            defines = ["-DRUNG_HOST_FIBERS", *(f"-DRUNG_{name}={value}" for name, value in macros.items())]
            includes = [f"-I{path}" for path in (Path(__file__).parent, KERNELS / op, KERNELS)]
            command = [compiler, "-std=c++17", "-O1", "-fPIC", "-shared", *defines, *includes]
            command += [str(folder / "main.cpp"), "-o", str(folder / "lib.so")]
            result = subprocess.run(command, capture_output=True, text=True)
            assert result.returncode == 0, result.stderr
            built[key] = FiberKernels(folder / "lib.so")
        return built[key]

    return build


@pytest.fixture
def fibers(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run what is launched on a GPU on host fibers instead, on tensors in host memory."""
    monkeypatch.setattr(nvrtc, "load", build)


def error_of(found: Tensor | None, expected: Tensor | None) -> float:
    """Return the norm of the error over that of the expected result; zero where both are missing."""
    if found is None or expected is None:
        assert found is None and expected is None
        return 0.0
    assert found.shape == expected.shape
    difference = (found.double() - expected.detach()).norm().item()
    return difference / max(expected.norm().item(), 1e-300)


def assert_close(found: Sequence[Tensor | None], expected: Sequence[Tensor | None], dtype: torch.dtype) -> None:
    for k, pair in enumerate(zip(found, expected, strict=True)):
        assert error_of(*pair) <= TOLERANCE[dtype], f"result {k}"


def convolution_case(edges: Edges, R: int, l_max: int, C: int, with_vectors: bool) -> Any:
    """Return random inputs, cotangents, and A and its first and second derivatives by the reference."""
    N, E, degrees = len(edges.row_ptr) - 1, len(edges.senders), l_max + 1
    shapes: list[Any] = [(E, R), (E, degrees**2), (N, C), (R, degrees, C)]
    shapes += [(N, 3, C), (R, degrees, C), (R, C)] if with_vectors else [None] * 3
    inputs = [None if s is None else torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]
    gA = torch.randn(N, degrees**2, C, dtype=torch.float64, requires_grad=True)
    t = [None if inputs[k] is None else torch.randn_like(inputs[k]) for k in (0, 1, 2, 4)]
    message = VectorMessage(*inputs[4:]) if with_vectors else None
    A = convolution_reference.convolve(*inputs[:4], edges, message)
    first = gradients(A, inputs, gA)
    psi = sum((first[k] * tangent).sum() for k, tangent in zip((0, 1, 2, 4), t, strict=True) if tangent is not None)
    return inputs, gA, t, A, first, gradients(psi, [gA, *inputs])


def gradients(value: Tensor, inputs: Sequence[Tensor | None], cotangent: Tensor | None = None) -> list[Tensor | None]:
    present = [tensor for tensor in inputs if tensor is not None]
    results = iter(torch.autograd.grad(value, present, cotangent, create_graph=True))
    return [None if tensor is None else next(results) for tensor in inputs]


def as_dtype(tensors: Sequence[Tensor | None], dtype: torch.dtype) -> list[Tensor | None]:
    return [None if tensor is None else tensor.detach().to(dtype) for tensor in tensors]


CONVOLUTIONS = [  # R, l_max, C, with vectors; C = 144 takes two channel blocks of each width
    pytest.param(8, 3, 48, True, torch.float32),
    *[
        pytest.param(*shape, dtype, marks=pytest.mark.slow)
        for shape in [(8, 3, 16, False), (5, 2, 144, False), (11, 3, 64, True), (4, 1, 16, True), (16, 3, 80, True)]
        for dtype in TOLERANCE
    ],
]


@pytest.mark.usefixtures("fibers")
@pytest.mark.parametrize("R,l_max,C,with_vectors,dtype", CONVOLUTIONS)
@pytest.mark.parametrize("parts", [1, 3])
def test_convolution(
    R: int,
    l_max: int,
    C: int,
    with_vectors: bool,
    dtype: torch.dtype,
    parts: int,
    random_graph: Callable[..., Edges],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(convolution, "_MAX_PARTS", parts)
    edges = random_graph(num_atoms=8)
    *tensors, A, first, second = convolution_case(edges, R, l_max, C, with_vectors)
    inputs, (gA,), t = (as_dtype(group, dtype) for group in (tensors[0], [tensors[1]], tensors[2]))
    assert_close([convolution.forward(*inputs, edges)], [A], dtype)

    def keep(results: Sequence[Tensor | None], need: Sequence[bool]) -> list[Tensor | None]:
        return [result if wanted else None for result, wanted in zip(results, need, strict=True)]

    nodes = [False, False, True, True, True, True, True]
    for need in ([True] * 7, nodes):
        assert_close(convolution.backward(gA, *inputs, edges, need), keep(first, need), dtype)
    for need in ([True] * 8, [True, *nodes]):
        assert_close(convolution.backward2(gA, *inputs, *t, edges, need), keep(second, need), dtype)


@pytest.mark.usefixtures("fibers")
def test_convolution_takes_missing_cotangents_as_zero(random_graph: Callable[..., Edges]) -> None:
    edges = random_graph(num_atoms=7)
    inputs, gA, t, *_ = convolution_case(edges, 8, 3, 48, True)
    inputs, (gA,), t = (as_dtype(group, torch.float32) for group in (inputs, [gA], t))
    for missing in range(4):
        zero = [torch.zeros_like(tensor) if k == missing else tensor for k, tensor in enumerate(t)]
        none = [None if k == missing else tensor for k, tensor in enumerate(t)]
        expected, found = (convolution.backward2(gA, *inputs, *given, edges, [True] * 8) for given in (zero, none))
        for pair in zip(found, expected, strict=True):
            torch.testing.assert_close(*pair, rtol=0, atol=0)


@pytest.mark.usefixtures("fibers")
@pytest.mark.parametrize("num_atoms", [0, 3])
def test_convolution_without_edges(num_atoms: int) -> None:
    none = torch.zeros(0, dtype=torch.int32)
    edges = Edges(none, none, torch.zeros(num_atoms + 1, dtype=torch.int32), none)
    shapes = [(0, 8), (0, 16), (num_atoms, 48), (8, 4, 48), (num_atoms, 3, 48), (8, 4, 48), (8, 48)]
    inputs, gA = [torch.randn(shape) for shape in shapes], torch.randn(num_atoms, 16, 48)
    t = [torch.randn(shapes[k]) for k in (0, 1, 2, 4)]
    assert not convolution.forward(*inputs, edges).any()
    results = convolution.backward(gA, *inputs, edges, [True] * 7)
    results += convolution.backward2(gA, *inputs, *t, edges, [True] * 8)
    for result, shape in zip(results, [*shapes, gA.shape, *shapes], strict=True):
        assert result is not None and result.shape == torch.Size(shape) and not result.any()


@pytest.mark.usefixtures("fibers")
def test_tensors_may_begin_anywhere_in_memory(random_graph: Callable[..., Edges]) -> None:
    def shifted(tensors: Sequence[Tensor]) -> list[Tensor]:
        return [torch.cat([tensor.new_zeros(1), tensor.flatten()])[1:].reshape(tensor.shape) for tensor in tensors]

    edges = random_graph(num_atoms=7)
    inputs = [tensor.detach().float() for tensor in convolution_case(edges, 8, 3, 48, True)[0]]
    found, expected = (convolution.forward(*tensors, edges) for tensors in (shifted(inputs), inputs))
    assert torch.equal(found, expected)
    inputs = [torch.ones(5, 3), torch.randn(5, 8), torch.randn(5, 16)]
    found, expected = (edge_basis.backward(*tensors, CUTOFF, 8, 3) for tensors in (shifted(inputs), inputs))
    assert torch.equal(found, expected)


@pytest.mark.usefixtures("fibers")
@pytest.mark.parametrize(
    "l_max,C,dtype",
    [
        pytest.param(3, 16, torch.float32),
        *[pytest.param(l_max, 48, torch.float64, marks=pytest.mark.slow) for l_max in (1, 2, 3)],
    ],
)
@pytest.mark.parametrize("num_atoms", [0, 5])
def test_invariants(num_atoms: int, l_max: int, C: int, dtype: torch.dtype) -> None:
    A = torch.randn(num_atoms, (l_max + 1) ** 2, C, dtype=torch.float64, requires_grad=True)
    values = invariants_reference.invariants(A)
    g, u = torch.randn_like(values).requires_grad_(), torch.randn_like(A)
    (gA,) = gradients(values, [A], g)
    assert gA is not None
    d_A, dg = gradients(gA, [A, g], u)
    exact_A, exact_g, exact_u = (tensor.detach().to(dtype).contiguous() for tensor in (A, g, u))
    found = [invariants.forward(exact_A), invariants.backward(exact_A, exact_g)]
    found += invariants.backward2(exact_A, exact_g, exact_u)
    assert_close(found, [values, gA, dg, d_A], dtype)


def edge_basis_case(num_edges: int, R: int, l_max: int) -> Any:
    """Return vectors, some beyond the cut-off, cotangents, and the values and derivatives by the reference."""
    vectors = torch.randn(num_edges, 3, dtype=torch.float64)
    vectors *= torch.linspace(0.7, 1.2 * CUTOFF, num_edges)[:, None] / vectors.norm(dim=1, keepdim=True)
    vectors.requires_grad_()
    values = edge_basis_reference.edge_basis(vectors, cutoff=CUTOFF, num_radial=R, l_max=l_max)
    g = [torch.randn_like(value).requires_grad_() for value in values]
    t = torch.randn_like(vectors)
    (first,) = torch.autograd.grad(values, [vectors], g, create_graph=True)
    d_vectors, *d_g = torch.autograd.grad(first, [vectors, *g], t)
    return vectors, g, t, [*values, first, *d_g, d_vectors]


def run_edge_basis(vectors: Tensor, g: Sequence[Tensor], t: Tensor, dtype: torch.dtype) -> list[Tensor | None]:
    vectors, *g, t = (tensor.detach().to(dtype) for tensor in (vectors, *g, t))
    sizes = (CUTOFF, g[0].shape[1], round(g[1].shape[1] ** 0.5) - 1)
    values = edge_basis.forward(vectors, *sizes)
    first = edge_basis.backward(vectors, *g, *sizes)
    second = edge_basis.backward2(vectors, *g, t, *sizes, True)
    cheaper = edge_basis.backward2(vectors, *g, t, *sizes, False)
    assert cheaper[2] is None and all(torch.equal(a, b) for a, b in zip(cheaper[:2], second[:2], strict=True))
    return [*values, first, *second]


@pytest.mark.usefixtures("fibers")
@pytest.mark.parametrize(
    "R,l_max,dtype",
    [
        pytest.param(8, 3, torch.float32),
        *[pytest.param(*size, torch.float64, marks=pytest.mark.slow) for size in [(8, 3), (5, 1), (16, 2), (4, 3)]],
    ],
)
@pytest.mark.parametrize("num_edges", [0, 1, 130])  # 128 to a block
def test_edge_basis(num_edges: int, R: int, l_max: int, dtype: torch.dtype) -> None:
    vectors, g, t, expected = edge_basis_case(num_edges, R, l_max)
    assert_close(run_edge_basis(vectors, g, t, dtype), expected, dtype)


# ---- barriers


REVERSE = """
extern "C" __global__ void reverse(const float* in, float* out) {
  __shared__ float tile[64];
  tile[threadIdx.x] = in[threadIdx.x];
  BARRIER
  out[threadIdx.x] = tile[LAST - threadIdx.x];
}
"""


@pytest.mark.parametrize(
    "barrier,threads,right",
    [("__syncthreads();", 64, True), ("", 64, False), ("__syncwarp();", 32, True), ("", 32, False)],
)
@pytest.mark.parametrize("descending", [0, 1])
def test_fibers_show_a_missing_barrier(build: Build, barrier: str, threads: int, right: bool, descending: int) -> None:
    source = REVERSE.replace("BARRIER", barrier).replace("LAST", str(threads - 1))
    kernels = build("convolution", torch.device("cpu"), {}, source)
    kernels.library.fibers_descending(descending)
    values, out = torch.arange(64.0), torch.zeros(64)
    kernels.launch("reverse", (1,), threads, values, out)
    assert torch.equal(out[:threads], values[:threads].flip(0)) == right


def test_fibers_show_a_barrier_that_not_all_threads_reach(build: Build) -> None:
    source = REVERSE.replace("BARRIER", "if (threadIdx.x < 7) __syncthreads();").replace("LAST", "63")
    kernels = build("convolution", torch.device("cpu"), {}, source)
    with pytest.raises(RuntimeError, match="not reached by all"):
        kernels.launch("reverse", (1,), 64, torch.ones(64), torch.ones(64))


def barriers(op: str) -> list[int]:
    return list(range(len(BARRIER.findall((KERNELS / op / "cuda.cu").read_text()))))


def test_barriers_are_only_where_their_removal_is_tested() -> None:
    assert barriers("convolution") == barriers("invariants") == []
    for header in [*KERNELS.rglob("*.h"), *KERNELS.rglob("*.cuh")]:
        assert not BARRIER.search(header.read_text()), header


@pytest.mark.parametrize("number", barriers("edge_basis"))
def test_every_barrier_of_the_edge_basis_is_needed(number: int, build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    source = (KERNELS / "edge_basis" / "cuda.cu").read_text()
    start, end = list(BARRIER.finditer(source))[number].span()
    broken = source[:start] + source[end:]
    monkeypatch.setattr(nvrtc, "load", lambda op, device, macros: build(op, device, macros, broken))
    vectors, g, t, expected = edge_basis_case(130, 8, 3)
    found = run_edge_basis(vectors, g, t, torch.float32)
    errors = [error_of(*pair) for pair in zip(found, expected, strict=True)]
    assert not max(errors) <= TOLERANCE[torch.float32]
