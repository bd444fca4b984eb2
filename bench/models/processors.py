"""What a multiprocessor holds and does in a cycle, by compute capability.

CUDA C++ Programming Guide, "Technical Specifications per Compute Capability" and "Throughput of Native Arithmetic
Instructions"; tensor-core products from the architectures' white papers (`slicegpt.bench.models.devices`).
"""

from dataclasses import dataclass

from slicegpt.errors import SliceGPTError


@dataclass(frozen=True)
class Processor:
    """A multiprocessor.

    Attributes:
        registers, warps: that it holds.
        shared_bytes, block_shared_bytes: shared memory, and the most of it that a block can have.
        block_reserve: shared memory that the system takes of every block.
        schedulers: warps that issue an instruction in a cycle.
        half_products, double_products: multiply-adds in a cycle, half precision summed in float32, and float64; of
            tensor cores where there are such.
        double_conversions: to float64, in a cycle.
    """

    warps: int
    shared_bytes: int
    block_shared_bytes: int
    block_reserve: int
    half_products: int
    double_products: int
    double_conversions: int
    registers: int = 65536
    schedulers: int = 4


KIB = 1024
PROCESSORS = {
    (7, 5): Processor(32, 64 * KIB, 64 * KIB, 0, 512, 2, 2),
    (8, 0): Processor(64, 164 * KIB, 163 * KIB, KIB, 1024, 64, 16),
    (9, 0): Processor(64, 228 * KIB, 227 * KIB, KIB, 2048, 128, 16),
}


def processor_of(capability: tuple[int, int]) -> Processor:
    """Of a compute capability.

    Raises:
        SliceGPTError: it is not one that predictions are made for.
    """
    if capability not in PROCESSORS:
        known = ", ".join(f"{major}.{minor}" for major, minor in PROCESSORS)
        raise SliceGPTError(f"capability: predictions are made for {known}, got {capability}")
    return PROCESSORS[capability]
