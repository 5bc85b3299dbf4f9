"""The process that runs models: it takes one request at a time on standard input and answers on standard output.

Started by a campaign, through boot.py. It knows cells and clocks, not designs or records.
"""

from __future__ import annotations

import ctypes
import gc
import os
import signal
import sys
import traceback
from collections.abc import Callable
from typing import Any, BinaryIO

import torch

from qwen3bench.config.choices import import_from, use_config_dir
from qwen3bench.config.settings import settings_from
from qwen3bench.config.sources import own_code
from qwen3bench.errors import UserError
from qwen3bench.record.environment import refuse_other_own_code, running_code
from qwen3bench.record.messages import (
    REFUSED,
    CollectEvidence,
    ComputeCost,
    CountParameters,
    DeviceFound,
    Done,
    Enter,
    Failure,
    Identify,
    Load,
    MeasureCeilings,
    MeasureMemory,
    Open,
    Prepare,
    Probe,
    Request,
    RunningCode,
    TimeEager,
    TimeForward,
    Touch,
    Verify,
    VerifyGradients,
    Visit,
    decode_request,
    encode_reply,
)
from qwen3bench.record.states import CellStatus
from qwen3bench.worker.device import device_here, emulates_bfloat16, is_out_of_memory
from qwen3bench.worker.error_text import both_ends, error_text
from qwen3bench.worker.identity import identify
from qwen3bench.worker.inspection import Inspection
from qwen3bench.worker.pauses import watch_pauses
from qwen3bench.worker.runtimes import InvalidCell
from qwen3bench.worker.session import Session
from qwen3bench.worker.timed_pass import TimedPass

_MAX_REASON = 500  # characters of an error's text: a page of it would not be read


class Worker:
    """What the requests do: `operations` has a function for each type of request, which returns the reply."""

    def __init__(self) -> None:
        self.session: Session
        self.inspection: Inspection
        self.timed_pass: TimedPass | None = None
        self.operations: dict[type[Request[Any]], Callable[[Any], object]] = {
            Probe: probe,
            Open: self.open,
            Touch: self.touch,
            Identify: lambda asked: identify(self.session.settings),
            Load: self.load,
            TimeForward: lambda asked: self.inspection.forward(asked.prompt_tokens),
            CountParameters: lambda asked: self.inspection.parameters(asked.cell),
            ComputeCost: lambda asked: self.inspection.cost(asked.cell, asked.workload),
            Verify: lambda asked: self.looking.verify(asked.cell),
            VerifyGradients: lambda asked: self.looking.gradients(asked.cell, asked.workload),
            MeasureMemory: lambda asked: self.looking.memory(asked.cell, asked.workload, asked.runtime),
            CollectEvidence: lambda asked: self.looking.evidence(asked.cell, asked.workload, asked.runtime),
            TimeEager: lambda asked: self.looking.eager(asked.cell, asked.workload),
            MeasureCeilings: lambda asked: self.looking.ceilings(),
            Enter: self.enter,
            Prepare: lambda asked: self.timing.prepare(asked),
            Visit: lambda asked: self.timing.visit(asked),
        }

    def answer(self, request: Request[Any]) -> object:
        """The reply to a request."""
        return self.operations[type(request)](request)

    @property
    def looking(self) -> Inspection:
        """Looks at single cells, with nothing that is ready to be timed in the way."""
        self.timed_pass = None
        return self.inspection

    @property
    def timing(self) -> TimedPass:
        """The timed pass that was entered."""
        assert self.timed_pass is not None
        return self.timed_pass

    def open(self, asked: Open) -> RunningCode:
        """Take the resolved settings; nothing is loaded yet."""
        self.timed_pass = None
        import_from(*asked.import_path)
        use_config_dir(asked.config_dir)
        settings = settings_from(asked.config)
        refuse_other_own_code(asked.own_code, own_code(settings.opts))
        self.session = Session(settings, getattr(self, "session", None))
        self.inspection = Inspection(self.session)
        return running_code()

    def touch(self, asked: Touch) -> Done:
        """Run a kernel, so that the device turns to this process."""
        if self.session.device.type == "cuda":
            torch.zeros(1, device=self.session.device).add_(1)
            self.session.synchronize()
        return Done()

    def load(self, asked: Load) -> Done:
        """Load the weights and build every cell: what cannot be built is refused before anything is measured."""
        for cell in asked.cells:
            self.inspection.load(cell)
        return Done()

    def enter(self, asked: Enter) -> Done:
        """Begin timing cells of one workload in one runtime."""
        self.looking.release()
        self.session.free()
        self.timed_pass = TimedPass(self.session, asked.workload, asked.runtime, asked.cell)
        return Done()


def probe(asked: Probe) -> DeviceFound:
    """The device that a name means here."""
    device = device_here(asked.device)
    return DeviceFound(device=device, emulates_bfloat16=emulates_bfloat16(device))


def failure(error: BaseException) -> Failure:
    """The reply for an exception: the cell's status, and the reason in one line."""
    line = both_ends(error_text(error), _MAX_REASON) or type(error).__name__
    if isinstance(error, UserError):
        return Failure(status=REFUSED, reason=str(error))
    if isinstance(error, InvalidCell):
        return Failure(status=CellStatus.INVALID, reason=line)
    if is_out_of_memory(error):
        known = torch.cuda.is_available() and torch.cuda.is_initialized()
        peak = torch.cuda.max_memory_allocated() if known else None
        return Failure(status=CellStatus.OOM, reason=line, peak_allocated_bytes=peak)
    return Failure(status=CellStatus.CRASHED, reason=f"{type(error).__name__}: {line}")


def serve(requests: BinaryIO, replies: BinaryIO, worker: Worker) -> None:
    """Answer requests until the other end closes."""
    for line in requests:
        request = decode_request(line)
        try:
            reply = encode_reply(worker.answer(request))
        except Exception as error:
            if not isinstance(error, (UserError, InvalidCell)):  # the reply has room for a part of it
                traceback.print_exception(error)
            reply = encode_reply(failure(error))
        replies.write(reply)
        replies.flush()


def main() -> None:
    """Serve on the process's own pipes; whatever libraries print goes to standard error."""
    if sys.platform == "linux":  # die with the supervisor, however it dies
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    # A machine that shuts down sends this to all; that is the end of the run, and no cell's failure.
    signal.signal(signal.SIGTERM, lambda *_: None)
    watch_pauses()
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    running_code()  # as it is now that it was imported
    gc.freeze()  # what imports made stays; collecting between cells need not look at it
    serve(sys.stdin.buffer, replies, Worker())
