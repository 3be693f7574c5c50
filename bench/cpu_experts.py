"""What a CPU could take of the experts that a GPU lacks: GB/s of expert bytes that it multiplies.

    python -m bench.cpu_experts [--threads 1,16] [--out bench/results/cpu_experts.jsonl]

Expert bytes are those of MXFP4 (17 for 32 weights), one token. Ways: PyTorch's 4-bit kernel, which
takes affine codes of a layout of its own (not MXFP4: the most that a library could do); MXFP4 by
PyTorch's operations, decoded through a table and multiplied; kt-kernel's MXFP4 kernel, where that
package is installed (pip install --no-deps kt-kernel gguf), which has a copy of the experts in a
layout of its own; and a plain sum, which only reads. With a GPU each is measured again while the
link copies from host memory, with what the link then does.
"""

import argparse
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .machine import describe

D, F, GROUP = 4096, 2048, 32
BYTES = F * D * 17 // 32  # of one matrix
CODES = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
Work = Callable[[int], object]  # number of a matrix: multiply it


def ways() -> Iterator[tuple[str, Work, int, float]]:
    """Name, work, how many different matrices it has, and expert bytes of one."""
    x = torch.randn(1, D, dtype=torch.bfloat16)
    codes = torch.randint(0, 16, (F, D), dtype=torch.int32)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 2)
    each = [packed.clone() for _ in range(200)]
    scales = torch.rand(D // GROUP, F, 2, dtype=torch.bfloat16)
    yield (
        "PyTorch's 4-bit kernel (affine)",
        lambda i: torch.ops.aten._weight_int4pack_mm_for_cpu(x, each[i], GROUP, scales),
        len(each),
        BYTES,
    )
    yield "MXFP4 by PyTorch's operations", _decoded(x), 8, BYTES
    try:
        yield "kt-kernel, MXFP4", *_kt_kernel(x), 3.0 * BYTES
    except ImportError as error:
        print(f"kt-kernel: {error}")
    words = list(torch.ones(1 << 27, dtype=torch.int64).chunk(32))
    yield "sum", lambda i: words[i].sum(), len(words), words[0].nbytes


def _decoded(x: Tensor) -> Work:
    byte = torch.arange(256)
    pairs = torch.stack([CODES[byte & 15], CODES[byte >> 4]], -1).bfloat16().view(torch.int32)
    table = pairs.flatten()
    codes = [torch.randint(0, 256, (F, D // 2), dtype=torch.uint8) for _ in range(8)]
    scales = [torch.rand(F, D // GROUP, 1, dtype=torch.bfloat16) for _ in range(8)]

    def work(i: int) -> None:
        values = table[codes[i].int()].view(torch.bfloat16).view(F, -1, GROUP)
        _ = x @ values.mul_(scales[i]).view(F, D).T

    return work


def _kt_kernel(x: Tensor) -> tuple[Work, int]:
    """One expert a call: all three matrices."""
    import kt_kernel  # type: ignore[import-not-found]

    ext, experts = kt_kernel.kt_kernel_ext, 48
    threads = ext.WorkerPoolConfig()
    threads.subpool_count, threads.subpool_numa_map = 1, [0]
    threads.subpool_thread_count = [torch.get_num_threads()]
    pool = ext.CPUInfer(threads)
    mask = torch.zeros(experts, dtype=torch.bool)
    config = ext.moe.MOEConfig(experts, 1, D, F, mask.data_ptr())
    config.layer_idx, config.pool, config.max_len = 0, pool.backend_, 32
    config.quant_config.bits, config.quant_config.group_size = 4, GROUP
    config.quant_config.zero_point = False
    kept: list[Any] = [mask, pool]
    for name, rows, cols in (("gate", F, D), ("up", F, D), ("down", D, F)):
        codes = [torch.randint(0, 256, (rows, cols // 2), dtype=torch.uint8)] * experts
        scales = [torch.rand(rows, cols // GROUP, dtype=torch.bfloat16)] * experts
        setattr(config, f"{name}_projs", [[t.data_ptr() for t in codes]])
        setattr(config, f"{name}_scales", [[t.data_ptr() for t in scales]])
        kept += [codes, scales]
    moe = ext.moe.AMXFP4_KGroup_MOE(config)
    order = torch.arange(experts)
    pool.submit(moe.load_weights_task(order.data_ptr()))
    pool.sync()
    out, weight = torch.zeros(1, D, dtype=torch.bfloat16), torch.ones(1, 1)
    count, ids = torch.ones(1, dtype=torch.int32), [torch.tensor([[i]]) for i in range(experts)]

    def work(i: int) -> None:
        places = (t.data_ptr() for t in (ids[i], weight, x, out))
        pool.submit(moe.forward_task(count.data_ptr(), 1, *places, False))
        pool.sync()

    work.kept = kept  # type: ignore[attr-defined]  # the library has addresses only
    return work, experts


class Link:
    """Copies from pinned memory to the GPU until told to stop."""

    def __init__(self) -> None:
        self.host = torch.ones(1 << 31, dtype=torch.uint8).pin_memory()
        self.here = torch.empty(1 << 26, dtype=torch.uint8, device="cuda")

    def during(self, seconds: Callable[[], float]) -> tuple[float, float]:
        """What `seconds` returns, and the bytes a second that were copied meanwhile."""
        stop, done = threading.Event(), [0.0, 0.0]

        def copy() -> None:
            stream, since = torch.cuda.Stream(), time.perf_counter()
            with torch.cuda.stream(stream):
                while not stop.is_set():
                    for part in self.host.split(len(self.here)):
                        self.here.copy_(part, non_blocking=True)
                    stream.synchronize()
                    done[0] += len(self.host)
            done[1] = time.perf_counter() - since

        thread = threading.Thread(target=copy)
        thread.start()
        time.sleep(0.1)
        found = seconds()
        stop.set()
        thread.join()
        return found, done[0] / done[1]


def measure(work: Work, many: int) -> float:
    """Seconds of one, the mean over at least a second."""
    for i in range(min(4, many)):
        work(i)
    since, count = time.perf_counter(), 0
    while time.perf_counter() - since < 1:
        for i in range(many):
            work(i)
        count += many
    return (time.perf_counter() - since) / count


def main() -> None:
    parser = argparse.ArgumentParser(description="experts on a CPU")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    parser.add_argument("--threads", default=f"1,{cores}")
    parser.add_argument("--out")
    args = parser.parse_args()
    link = Link() if torch.cuda.is_available() else None
    about = describe("cuda:0" if link else "cpu")
    for threads in map(int, args.threads.split(",")):
        torch.set_num_threads(threads)
        for name, work, many, nbytes in ways():
            alone = measure(work, many)
            row: dict[str, Any] = {"bench": "cpu_experts", "way": name, "threads": threads}
            row |= {"gb_s": round(nbytes / alone / 1e9, 2), "us": round(alone * 1e6, 1)}
            if link:
                beside, copied = link.during(lambda w=work, n=many: measure(w, n))  # type: ignore
                row["gb_s_beside_link"] = round(nbytes / beside / 1e9, 2)
                row["link_gb_s"] = round(copied / 1e9, 2)
            print(row, flush=True)
            if args.out:
                Path(args.out).parent.mkdir(parents=True, exist_ok=True)
                with open(args.out, "a") as file:
                    file.write(json.dumps(row | about) + "\n")


if __name__ == "__main__":
    main()
