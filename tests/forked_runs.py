# SPDX-License-Identifier: Apache-2.0
"""The command line in processes of its own that start at once, and get signals at chosen moments.

A server loads the libraries once and forks for every run: a fork takes milliseconds where a new
interpreter takes seconds. In the fork, what reads and writes is wrapped so that moments are
counted ("evaluation", "checkpoint", ...), and a signal is sent at the one asked for.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Ended:
    """How a run ended: its exit code (-9: killed), what it printed, the moments it came to."""

    code: int
    output: str
    moments: list[str] = field(default_factory=list)

    @property
    def lines(self):
        return [line for line in self.output.splitlines() if line.strip()]


class Forks:
    """The server; ``start`` a run, ``wait`` for its end."""

    def __init__(self, folder, model):
        self.folder, self.number = Path(folder), 0
        self.server = subprocess.Popen(
            [sys.executable, __file__, str(model)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            text=True,
        )  # fmt: skip

    def ask(self, **request):
        self.server.stdin.write(json.dumps(request) + "\n")
        self.server.stdin.flush()
        return json.loads(self.server.stdout.readline())

    def start(self, *arguments, at=None, signals=(), **options):
        """Start ``chunkgrpo ARGUMENTS``.

        Args:
            at: The moment at which signals are sent: the first of a name, or (name, which of them).
            signals: Sent one after the other.
            options: ``limit``, largest size of a file; ``before``, code to run first.
        """
        self.number += 1
        log = self.folder / f"{self.number}.log"
        pid = self.ask(
            arguments=list(map(str, arguments)), log=str(log), at=at,
            signals=[int(each) for each in signals], **options,
        )["pid"]  # fmt: skip
        return pid, log

    def wait(self, started):
        pid, log = started
        code = self.ask(wait=pid)["code"]
        moments = Path(f"{log}.moments")
        noted = moments.read_text().splitlines() if moments.exists() else []
        return Ended(code, log.read_text(), noted)

    def run(self, *arguments, **options):
        return self.wait(self.start(*arguments, **options))

    def close(self):
        self.server.stdin.close()
        self.server.wait()


# --- in the fork ----------------------------------------------------------------------------------


class Moments:
    """Counts moments, notes their names, and sends signals at one of them."""

    def __init__(self, log, at, signals):
        self.file = open(f"{log}.moments", "a")  # noqa: SIM115
        self.at = [at, 1] if isinstance(at, str) else at
        self.signals, self.numbers = signals, Counter()

    def __call__(self, name, half=None):
        self.numbers[name] += 1
        self.file.write(name + "\n")
        self.file.flush()
        if self.at == [name, self.numbers[name]]:
            self.at = None
            if half is not None and signal.SIGKILL in self.signals:
                half()
            for each in self.signals:
                os.kill(os.getpid(), each)


def place_of(path):
    """The moment that writing to a path is."""
    parts = Path(path).parts
    if "checkpoints" in parts:
        return "checkpoint"
    if any(part in ("model", ".model.partial", ".model.old") for part in parts):
        return "model"
    return "other file"


def wrap(moments):
    """Have everything that matters call ``moments``."""
    import shutil

    import safetensors.torch

    from chunkgrpo import evaluate
    from chunkgrpo.policies.pipeline import PipelinePolicy
    from chunkgrpo.report.metrics import MetricsWriter
    from chunkgrpo.runs import training
    from chunkgrpo.runtime import files
    from chunkgrpo.train import evaluating
    from chunkgrpo.train.loop import Trainer

    def before(owner, name, moment):
        inner = getattr(owner, name)

        def outer(*arguments, **options):
            moments(moment(*arguments) if callable(moment) else moment)
            return inner(*arguments, **options)

        setattr(owner, name, outer)

    before(training, "build_trainer", "loading")
    before(Trainer, "train_once", "training")
    before(Trainer, "update", "training")
    before(MetricsWriter, "write", "metrics")
    before(files, "_flush", place_of)
    before(files.os, "rename", lambda source, target: place_of(target))
    before(files.os, "replace", lambda source, target: place_of(target))
    before(shutil, "rmtree", lambda path, *rest, **more: place_of(path))

    save_file = safetensors.torch.save_file

    def saved(tensors, path, *rest, **more):
        moments(place_of(path), lambda: Path(path).write_bytes(b"half a file"))
        return save_file(tensors, path, *rest, **more)

    safetensors.torch.save_file = saved
    encode_new = PipelinePolicy.encode_new

    def encoded(self, prompts):
        for each in encode_new(self, prompts):
            moments("encoding")
            yield each

    PipelinePolicy.encode_new = encoded
    whole = evaluate.evaluate

    def evaluated(policy, prompts, sigmas, rewards, settings, progress=None):
        first = settings.label.startswith("000000") and settings.num_seeds > 1
        name = "base evaluation" if first else "final evaluation"
        name = name if settings.num_seeds > 1 else "evaluation"
        moments(name)

        def hook(done, total):
            moments(name)
            if progress is not None:
                progress(done, total)

        return whole(policy, prompts, sigmas, rewards, settings, hook)

    evaluating.evaluate = evaluated


def run_here(request):
    """Run the command line in this process, its output in a file; return its exit code."""
    out = os.open(request["log"], os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o644)
    os.dup2(out, 1)
    os.dup2(out, 2)
    sys.stdout = os.fdopen(1, "w", buffering=1)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    wrap(Moments(request["log"], request.get("at"), request.get("signals", ())))
    if request.get("limit"):
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (request["limit"], request["limit"]))
    if request.get("before"):
        exec(request["before"], {})
    from chunkgrpo.cli import main

    sys.argv = ["chunkgrpo", *request["arguments"]]
    try:
        main()
    except SystemExit as ending:
        return ending.code or 0
    return 0


def serve():
    import torch

    torch.set_num_threads(1)
    import diffusers
    import matplotlib.pyplot
    import peft
    import scipy.stats
    import transformers

    from chunkgrpo import cli, runs
    from chunkgrpo.policies.loading import load_policy
    from chunkgrpo.policies.pipeline import Adaptation
    from chunkgrpo.report.curves import save_curves

    used = (diffusers, matplotlib, peft, scipy, transformers, cli, runs)
    del used
    # What is loaded at first use is loaded here, once for all forks.
    with tempfile.TemporaryDirectory() as folder:
        load_policy(sys.argv[1], Adaptation(rank=4, alpha=4.0), "cpu").save(folder)
        save_curves(Path(folder, "curves.png"), [{"iteration": 1, "reward_mean": 0.0}])
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            _, status = os.waitpid(request["wait"], 0)
            answer = {"code": os.waitstatus_to_exitcode(status)}
        else:
            pid = os.fork()
            if pid == 0:
                code = 1
                try:
                    code = run_here(request)
                except BaseException:
                    import traceback

                    traceback.print_exc()
                finally:
                    sys.stdout.flush()
                    os._exit(code)
            answer = {"pid": pid}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    serve()
