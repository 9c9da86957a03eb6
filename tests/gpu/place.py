"""Where the checks run: on a GPU at full size, or the same bodies on a few numbers in Triton's interpreter."""

import json
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from bench.shapes import SMALL, Shape

KINDS = {"kernel": "kernels", "gpu_memcpy": "copies", "gpu_memset": "fills"}  # categories of a profiler's trace


class Place:
    """A GPU."""

    device = torch.device("cuda")
    backend = "triton"
    tensors = {"few": 3, "many": 300}
    sampled = 2048  # elements of a tensor, beside its ends
    raced = (1_500_000, 40_000, 4097, 4096, 1000, 7, 1, 333_333)  # elements: many blocks, one, and part of one
    repetitions = 1000  # of a reduction whose blocks race
    many = 8  # streams, each with an optimizer of its own
    lengths = tuple(2**k for k in range(6, 17))  # any block that a kernel may have
    beyond = 2**31 + 4097  # elements: the last of them need an offset of 64 bits
    slice = 2**27

    def describe(self) -> str:
        found = torch.cuda.get_device_properties(self.device)
        return f"{found.name}, {found.total_memory / 2**30:.0f} GiB, {torch.version.cuda or torch.version.hip}"

    def shapes(self, model: Shape) -> Sequence[tuple[int, ...]]:
        return model.tensors

    def tidy(self) -> None:
        torch.cuda.empty_cache()

    def settle(self) -> None:
        torch.cuda.synchronize(self.device)

    def streams(self, count: int) -> list[AbstractContextManager[Any]]:
        """To be entered again and again."""
        return [torch.cuda.stream(torch.cuda.Stream(self.device)) for _ in range(count)]

    def hold(self, streams: Sequence[AbstractContextManager[Any]]) -> None:
        """Keep the streams waiting for some 20 ms: what is queued on them meanwhile starts at once, and races."""
        one = torch.ones(8192, 8192, device=self.device)
        torch.mm(one, one)
        done = torch.cuda.current_stream(self.device).record_event()
        for stream in streams:
            with stream:
                torch.cuda.current_stream(self.device).wait_event(done)

    @contextmanager
    def unsynchronised(self) -> Iterator[None]:
        """What waits for the device in here raises."""
        self.settle()
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def queued(self, call: Callable[[], Any]) -> Counter[str]:
        """Kernels, copies and fills that a call queues, as torch's profiler saw them on the device."""
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        self.settle()
        with torch.profiler.profile(activities=activities) as profile:
            call()
            self.settle()
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "trace.json")
            profile.export_chrome_trace(str(file))
            return counted(file.read_text())


class Interpreter(Place):
    """The CPU: what the device's own clocks, streams and traces would say is stood in for."""

    device = torch.device("cpu")
    tensors = {"few": 3, "many": 20}
    sampled = 64
    raced = (9000, 4097, 4096, 7, 1)
    repetitions = 3
    many = 2
    lengths = (64, 2048)
    beyond = 2**17 + 4097
    slice = 2**16

    def describe(self) -> str:
        return "Triton's interpreter on the CPU: nothing here is a GPU's result"

    def shapes(self, model: Shape) -> Sequence[tuple[int, ...]]:
        return SMALL

    def tidy(self) -> None:
        pass

    def settle(self) -> None:
        pass

    def streams(self, count: int) -> list[AbstractContextManager[Any]]:
        return [nullcontext() for _ in range(count)]

    def hold(self, streams: Sequence[AbstractContextManager[Any]]) -> None:
        pass

    @contextmanager
    def unsynchronised(self) -> Iterator[None]:
        yield

    def queued(self, call: Callable[[], Any]) -> Counter[str]:
        from gradkit.triton_kernels import launch

        with (
            patch.object(launch, "launch", wraps=launch.launch) as launched,
            patch.object(launch, "send", wraps=launch.send) as sent,
        ):
            call()
        return Counter(kernels=launched.call_count, copies=sent.call_count)


def counted(trace: str) -> Counter[str]:
    """By kind; ranges that a program marks for itself are none of them."""
    events = json.loads(trace)["traceEvents"]
    return Counter(KINDS[event["cat"]] for event in events if event.get("cat") in KINDS)


def find(tiny: bool) -> Place:
    """The place; without a GPU this ends, in a sentence."""
    if tiny and os.environ.get("TRITON_INTERPRET") == "1":
        return Interpreter()
    if tiny:
        raise SystemExit("tests.gpu: --tiny runs in Triton's interpreter: set TRITON_INTERPRET=1")
    if not torch.cuda.is_available():
        raise SystemExit(f"tests.gpu: torch {torch.__version__} finds no GPU here, and these checks need one")
    return Place()


def parameters(place: Place, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """The same values at each call."""
    generator = torch.Generator(place.device).manual_seed(1)
    made = [torch.randn(s, generator=generator, device=place.device).to(dtype) for s in shapes]
    return [p.requires_grad_() for p in made]


def give(params: Sequence[Tensor], step: int, dtype: torch.dtype | None = None) -> None:
    """A step's gradients: new tensors, of the same values for the same shapes."""
    generator = torch.Generator(params[0].device).manual_seed(1000 + step)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator, device=p.device).to(dtype or p.dtype)
