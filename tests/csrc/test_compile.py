"""What nvcc makes of csrc/: no register spills, and the tensor-core instructions that each kernel is written for."""

import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from support.sass import instructions, overlap_faults

from slicegpt.bench.models.kernel_times import CODE
from slicegpt.bench.models.processors import processor_of

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted(path.stem for path in (ROOT / "csrc").glob("*.cu"))
ARCHITECTURES = ["75", "80", "90a"]

# The main loop's instructions: source -> architecture -> (kernel, pattern, whether it must occur).
INSTRUCTIONS = {
    "gram_fp64": {
        "75": [("gram_fp64_tiles", r"\bDFMA\b", True), ("gram_fp64_tiles", r"\bDMMA\b", False)],
        "80": [
            ("gram_fp64_tiles", r"\bDMMA\.884\b|\bDMMA\.8x8x4\b", True),
            ("gram_fp64_tiles", r"\bLDGSTS\b", True),
        ],
        "90a": [("gram_fp64_tiles", r"\bDMMA\.16x8x8\b", True), ("gram_fp64_tiles", r"\bLDGSTS\b", True)],
    },
    "gram_exact": {
        "75": [("residue_products", r"\bIMMA\.8816\.S8\.S8\b", True)],
        "80": [
            ("residue_products", r"\bIMMA\.16832\.S8\.S8\b", True),
            ("residue_products", r"\bLDGSTS\b", True),
        ],
        "90a": [
            ("residue_products", r"\bIMMA\.16832\.S8\.S8\b", True),
            ("residue_products", r"\bLDSM\b", True),
        ],
    },
    "residue_wgmma": {
        # Absent: the kernel's body is empty.
        **{arch: [("wgmma_tiles", r"\b(IGMMA|IMMA|STG|UBLKCP)\b", False)] for arch in ("75", "80")},
        "90a": [
            ("wgmma_tiles", r"\bIGMMA\.64x256x32\.S8\.S8\b", True),
            ("wgmma_tiles", r"\bUBLKCP\b", True),
            ("wgmma_tiles", r"\bUBLKCP\.S\.G\.MULTICAST\b", True),
            # One after each stage would stall the tensor cores; those of the cluster's barriers are on their own.
            ("wgmma_tiles", r"MEMBAR\.ALL\.GPU(?=(?s:.){0,400}SYNCS\.ARRIVE)", False),
            ("wgmma_tiles", r"\bIMMA\b", False),
        ],
    },
    "rotate_wgmma": {
        **{arch: [("rotate_tiles", r"\b(HGMMA|HMMA|STG|UTMALDG)\b", False)] for arch in ("75", "80")},
        "90a": [
            ("rotate_tiles", r"\bHGMMA\.64x256x16\.F32\.BF16\b", True),
            ("rotate_tiles", r"\bHGMMA\.64x256x16\.F32 ", True),
            ("rotate_tiles", r"\bUTMALDG\.2D \[", True),
            ("rotate_tiles", r"\bUTMALDG\.2D\.MULTICAST\b", True),
            ("rotate_tiles", r"\bSTG\.E\.128\b", True),
            ("rotate_tiles", r"MEMBAR\.ALL\.GPU(?=(?s:.){0,400}SYNCS\.ARRIVE)", False),
            ("rotate_tiles", r"\bHMMA\b", False),
        ],
    },
    "gram_fast": {
        "75": [("gram_fast_tiles", r"\bHMMA\.1688\.F32\b", True)],
        "80": [
            ("gram_fast_tiles", r"\bHMMA\.16816\.F32\b", True),
            ("gram_fast_tiles", r"HMMA\.16816\.F32\.BF16", True),
        ],
        "90a": [
            ("gram_fast_tiles", r"\bHMMA\.16816\.F32\b", True),
            ("gram_fast_tiles", r"LDSM\.16\.MT88\.4", True),
        ],
    },
    **{
        f"decode_{op}": {
            "75": [
                (f"{op}_decode", r"\bLDG\.E\.NA\.LTC128B\.128\.CONSTANT\b", True),
                (f"{op}_decode", r"\bHMMA\.1688\.F32\b", True),
            ],
            "80": [
                (f"{op}_decode", r"\bLDG\.E\.NA\.LTC128B\.128\.CONSTANT\b", True),
                (f"{op}_decode", r"\bHMMA\.16816\.F32\b", True),
                (f"{op}_decode", r"\bHMMA\.16816\.F32\.BF16\b", True),
            ],
            "90a": [
                (f"{op}_decode", r"\bLDG\.E\.NA\.LTC256B\.128\.CONSTANT\b", True),
                (f"{op}_decode", r"\bHMMA\.16816\.F32\.BF16\b", True),
                (
                    f"{op}_decode",
                    r"\bACQBULK\b",
                    True,
                ),  # waits for the kernel before it, prefetches ahead of that
                (f"{op}_decode", r"\bCCTL\.E\.PF2\b", True),
            ],
        }
        for op in ("norm_linear", "rotate_add")
    },
}


def disassembler() -> str | None:
    """cuobjdump of the toolkit, or the one that Triton carries."""
    found = shutil.which("cuobjdump")
    if found:
        return found
    try:
        import triton
    except ImportError:
        return None
    carried = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return str(carried) if carried.exists() else None


@pytest.fixture(scope="session")
def compile_one(tmp_path_factory):
    """A function from a source and an architecture to (cubin, what ptxas reported)."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("needs nvcc")
    folder = tmp_path_factory.mktemp("cubins")

    def compile_one(source, arch):
        cubin = folder / f"{source}_{arch}.cubin"
        command = [
            nvcc,
            "-std=c++17",
            "-O3",
            "--expt-relaxed-constexpr",
            "-Xptxas",
            "-v",
            "-Werror",
            "all-warnings",
        ]
        command += [
            f"-gencode=arch=compute_{arch},code=sm_{arch}",
            "-cubin",
            "-o",
            cubin,
            f"csrc/{source}.cu",
        ]
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        return cubin, run.stderr

    return compile_one


@pytest.fixture(scope="session")
def compiled(compile_one):
    """{(source, architecture): (cubin, what ptxas reported)}"""
    pairs = [(source, arch) for source in SOURCES for arch in ARCHITECTURES]
    with ThreadPoolExecutor(min(os.cpu_count() or 1, 4)) as pool:
        return dict(zip(pairs, pool.map(lambda pair: compile_one(*pair), pairs), strict=True))


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("source", SOURCES)
def test_no_spills(compiled, source, arch):
    """No kernel keeps anything in local memory: neither spilled registers nor arrays indexed at run time."""
    report = compiled[source, arch][1]
    found = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
    assert found, report
    assert all(numbers == ("0", "0", "0") for numbers in found), report


# Source -> its kernel.
WGMMA = {"residue_wgmma": "wgmma_tiles", "rotate_wgmma": "rotate_tiles"}


@pytest.mark.parametrize("source", WGMMA)
def test_wgmma_is_asynchronous(compiled, source):
    """ptxas serialises wgmma where it finds the accumulators used in between, and says so in a mere remark."""
    report = compiled[source, "90a"][1]
    assert WGMMA[source] in report
    assert not re.search(r"\bC75\d\d\b|serializ", report), report


@pytest.mark.parametrize("source", WGMMA)
def test_plain_90_has_no_wgmma(compile_one, source):
    """The PTX in a default build is compute_90's, where wgmma is no instruction: the kernel is empty there."""
    cubin, report = compile_one(source, "90")
    registers = [int(count) for count in re.findall(r"Used (\d+) registers", report)]
    assert max(registers) < 128, "has_residue_wgmma() or has_rotate_wgmma() would take it for the kernel"
    if disassembler() is not None:
        assert "GMMA" not in "".join(disassemble(cubin).values())


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_barriers_of_a_pair_are_fenced(tmp_path):
    """Between the last mbarrier.init and the first meeting of the cluster; ptxas makes no instruction of the fence."""
    target = tmp_path / "residue_wgmma.ptx"
    command = ["nvcc", "-std=c++17", "--expt-relaxed-constexpr", "-arch=sm_90a", "-ptx", "-o", target]
    subprocess.run([*command, "csrc/residue_wgmma.cu"], cwd=ROOT, check=True)
    bodies = target.read_text().split(".entry")[1:]
    steps = (
        "mbarrier.init",
        "fence.proxy.async",
        "fence.mbarrier_init.release.cluster",
        "barrier.cluster.arrive",
    )
    orders = [sorted((step for step in steps if step in body), key=body.index) for body in bodies]
    assert sorted(orders, key=len) == [list(steps[:2]), list(steps)]
    pair = max(bodies, key=lambda body: "barrier.cluster" in body)
    assert pair.rindex("mbarrier.init.shared") < pair.index("fence.mbarrier_init")


def disassemble(cubin) -> dict[str, str]:
    """SASS by the kernels' mangled names."""
    text = subprocess.check_output([disassembler(), "-sass", cubin], text=True)
    return dict(re.findall(r"Function : (\S+)\n(.*?)(?=Function :|\Z)", text, flags=re.DOTALL))


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("source", INSTRUCTIONS)
def test_instructions(compiled, source, arch):
    if disassembler() is None:
        pytest.skip("needs cuobjdump")
    functions = disassemble(compiled[source, arch][0])
    for kernel, pattern, wanted in INSTRUCTIONS[source][arch]:
        bodies = [body for name, body in functions.items() if kernel in name]
        assert bodies, f"no {kernel} among {list(functions)}"
        occurs = any(re.search(pattern, body) for body in bodies)
        assert occurs == wanted, f"{kernel} on sm_{arch}: {pattern} {'missing' if wanted else 'found'}"


@pytest.mark.parametrize("source", ["decode_norm_linear", "decode_rotate_add"])
def test_overlapping_kernels_wait_before_they_read(compiled, source):
    """On every path: nothing of the kernel ahead is touched before it has ended, and no thread ends before that."""
    if disassembler() is None:
        pytest.skip("needs cuobjdump")
    functions = disassemble(compiled[source, "90a"][0])
    assert functions
    for name, body in functions.items():
        assert overlap_faults(body) == [], name


# Kernel of slicegpt.bench.models.kernel_times -> source, and parts of its mangled name.
MODELLED = {
    "gram_fp64": ("gram_fp64", ("gram_fp64_tiles", "Bfloat16ELb0")),
    "gram_exact": ("gram_exact", ("residue_products",)),
    "gram_exact, wgmma": ("residue_wgmma", ("wgmma_tilesILi1",)),
    "norm_linear": ("decode_norm_linear", ("Bfloat16ELi8ELb1",)),
    "rotate_add": ("decode_rotate_add", ("Bfloat16ELi8ELb1",)),
}


def registers_of(report: str, parts: tuple[str, ...]) -> int:
    """Of the one kernel whose mangled name has these parts."""
    blocks = report.split("Compiling entry function")
    (mine,) = (block for block in blocks if all(part in block for part in parts))
    return int(re.search(r"Used (\d+) registers", mine)[1])


@pytest.mark.parametrize(("arch", "item"), [("75", "Float16"), ("80", "Bfloat16")])
@pytest.mark.parametrize("kernel", ["norm_linear", "rotate_add"])
def test_predictions_hold_as_many_blocks_elsewhere(compiled, kernel, arch, item):
    processor, facts = processor_of((int(arch[0]), int(arch[1]))), CODE[kernel]
    registers = registers_of(compiled[f"decode_{kernel}", arch][1], (f"{item}ELi8ELb1",))
    assert replace(facts, registers=registers).blocks_on(processor) == facts.blocks_on(processor)


@pytest.mark.parametrize("kernel", MODELLED)
def test_predictions_are_of_this_machine_code(compiled, kernel):
    """Another compiler may take a few registers more or less; the model's blocks a multiprocessor must be right."""
    source, parts = MODELLED[kernel]
    report, facts = compiled[source, "90a"][1], CODE[kernel]
    assert replace(facts, registers=registers_of(report, parts)).blocks == facts.blocks
    if disassembler() is None:
        pytest.skip("needs cuobjdump")
    functions = disassemble(compiled[source, "90a"][0])
    (body,) = (text for name, text in functions.items() if all(part in name for part in parts))
    places = [at for at, one in enumerate(instructions(body)) if re.match(r"[DI]G?MMA", one.name)]
    assert not facts.tensor or len(places) == facts.tensor
    if facts.longest_gap:
        gaps = sorted(after - before - 1 for before, after in pairwise(places))
        assert gaps[-2] <= facts.longest_gap, "a step's conversions do not run beside its products"
