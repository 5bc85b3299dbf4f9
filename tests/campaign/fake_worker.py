"""A worker without PyTorch: answers at once with seeded numbers, or fails as it is told.

`python -I -S fake_worker.py FAULTS CODE`. CODE: what it says of the code that it runs, in JSON. FAULTS: a JSON list of
objects. `does` says what happens: die (SIGKILL), exit (status 0), hang, close, raw (writes `text`), error (`status`,
`reason`), answer (`fields` over the usual ones). It happens where every other key, but for `times` and `once`, equals
the request's argument of that name; `times`: only this many times in one process; `once`: a file that is made then, and
after that it never happens again.
"""

import hashlib
import json
import os
import random
import signal
import sys
import time

EFFECT = {"flash": 0.9, "tie": 1.0, "mlp": 0.97, "mask": 0.99, "norm": 0.8}
FINGERPRINT = {"weights": "seeded", "code": "this", "torch": "none", "device": "fake", "usable CPUs": "2"}
APART = ("run", "resume", "report")


class FakeWorker:
    """The answers of one process."""

    def __init__(self, code: dict[str, str]) -> None:
        self.code = code
        self.random = random.Random(0)
        self.workload = ""

    def probe(self, device):
        return {"device": "cpu" if device == "auto" else device}

    def open(self, config, **_):
        self.config = config
        return self.code

    def touch(self):
        return {}

    def identify(self):
        measured = json.dumps({k: v for k, v in self.config.items() if k not in APART}, sort_keys=True)
        digest = hashlib.sha256(measured.encode()).hexdigest()
        environment = {"device": "a fake device", "host": "here", "card": "GPU-1", "device_memory_bytes": 80 * 2**30}
        return {"environment": environment, "fingerprint": {"config": digest, **FINGERPRINT}}

    def load(self, cells):
        return {}

    def forward(self, prompt_tokens):
        return {"seconds": 1000.0 * prompt_tokens}

    def parameters(self, cell):
        count = 100 if "tie" in cell else 150
        names = ("num_parameters", "num_unique_parameters", "num_non_embedding_parameters")
        return {**dict.fromkeys(names, count), "parameter_bytes": 4 * count}

    def verify(self, cell):
        numbers = {"max_abs_error": 1e-6, "kl_mean": 0.0, "top1_agreement": 1.0}
        return {"equivalent": True, "reason": None, "checks": {}, **numbers}

    def gradients(self, cell, workload):
        return self.verify(cell)

    def memory(self, cell, workload, runtime):
        return {"peak_allocated_bytes": 1000, "peak_reserved_bytes": 2000, "cache_bytes": None}

    def evidence(self, cell, workload, runtime):
        what = {"attention_backend": "fake", "kernel_launches": 7, "kernels": {"mm": 7}, "notes": []}
        return {**what, "tied_storage": "tie" in cell, "graph_breaks": None, "recompiles": None}

    def eager(self, cell, workload):
        return {"eager_s": 0.02}

    def cost(self, cell, workload):
        return {"flops": 1000, "bytes": 1000}

    def ceilings(self):
        return {"copy_bytes_per_s": 1e9, "matmul_flops_per_s": 1e9, "dtype": "float32", "vendor": None}

    def enter(self, workload, runtime, cell):
        self.workload = workload
        return {}

    def prepare(self, cell, copy, launch=True):
        return {"compile_s": None}

    def visit(self, cell, copy, repeats=None, inner=None, untimed=None, takes=1):
        true_s = 0.01
        for name in cell.split("+"):
            true_s *= EFFECT.get(name, 1.0)
        samples = []
        for _ in range(repeats or 1):
            sample = {"latency_s": true_s * self.random.lognormvariate(0, 0.002), "waited_s": 0.0, "switches": 0}
            if self.workload == "generate":
                sample |= {"ttft_s": 0.004, "tpot_s": 0.001, "itl_s": [0.001, 0.001]}
            samples.append(sample)
        found = {"takes": 1, "repeats": repeats or 1, "inner": inner or 1, "untimed": None if untimed else untimed}
        return {"time": time.time(), "samples": samples, **found}


def strikes(fault, request):
    """Whether `fault` happens at this request."""
    where = {k: v for k, v in fault.items() if k not in ("does", "times", "once", "text", "status", "reason", "fields")}
    if any(request.get(key) != value for key, value in where.items()):
        return False
    if "once" in fault:
        if os.path.exists(fault["once"]):  # noqa: PTH110 (as few imports as can be)
            return False
        os.close(os.open(fault["once"], os.O_CREAT))
    if "times" in fault:
        fault["times"] -= 1
        return fault["times"] >= 0
    return True


def suffer(fault, usual):
    """The reply that a fault leaves, if it leaves any."""
    does = fault["does"]
    if does == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    elif does == "exit":
        os._exit(0)
    elif does == "hang":
        time.sleep(3600)
    elif does == "close":
        os.close(1)
        time.sleep(3600)
    elif does == "raw":
        os.write(1, fault["text"].encode("latin-1"))
    elif does == "error":
        return {"error": {"status": fault["status"], "reason": fault.get("reason", "as told")}}
    elif does == "answer":
        return {"ok": {**usual(), **fault["fields"]}}
    return None


def main():
    faults = json.loads(sys.argv[1])
    worker = FakeWorker(json.loads(sys.argv[2]))
    for line in sys.stdin.buffer:
        request = json.loads(line)
        arguments = {key: value for key, value in request.items() if key != "op"}

        def usual(request=request, arguments=arguments):
            return getattr(worker, request["op"])(**arguments)

        fault = next((each for each in faults if strikes(each, request)), None)
        reply = suffer(fault, usual) if fault else {"ok": usual()}
        if reply is not None:
            os.write(1, json.dumps(reply).encode() + b"\n")


if __name__ == "__main__":
    main()
